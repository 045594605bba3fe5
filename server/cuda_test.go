//go:build cuda && !cudaemu

package server_test

import (
	"os"
	"path/filepath"

	"trainerd/kernels"
	"trainerd/kernels/cuda"
	"trainerd/server/servertest"
)

// With this tag the servers of these tests have the first CUDA card, or the
// stand-in for one, and time their matrix products. All processes of a run share what
// was chosen, since their results are compared bit for bit.
func init() {
	choices := filepath.Join(os.TempDir(), "trainerd-server-test-choices.json")
	_ = os.Remove(choices)
	servertest.OpenDevice = func(int64) (kernels.Device, error) {
		d, err := cuda.Open(0, cuda.Options{Timed: true, Choices: choices})
		if err != nil {
			return nil, err
		}
		return d, nil
	}
}

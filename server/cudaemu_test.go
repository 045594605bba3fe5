//go:build cudaemu

package server_test

import (
	"os"

	"trainerd/kernels"
	"trainerd/kernels/cuda"
	"trainerd/server/servertest"
)

// With this tag the servers of these tests have the CUDA device on its emulator:
// bf16 models with their masters, evicted and restored, and a context that is lost in the driver.
func init() {
	servertest.OpenDevice = func(int64) (kernels.Device, error) {
		d, err := cuda.OpenEmulated(os.Getenv("TRAINERD_EMULATOR"), cuda.Options{})
		if err != nil {
			return nil, err
		}
		return d, nil
	}
}

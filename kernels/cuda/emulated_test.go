//go:build cudaemu

package cuda

import (
	"flag"
	"os"
	"testing"

	"trainerd/kernels/kerneltest"
)

// TestEmulated holds the whole device but for cuBLASLt and the driver to the
// float64 references: the kernels, their launches, schedules, scratch and transfers.
func TestEmulated(t *testing.T) {
	library := os.Getenv("TRAINERD_EMULATOR")
	if library == "" {
		t.Fatal("TRAINERD_EMULATOR names no library: run make cuda-emulated")
	}
	if f := flag.Lookup("kerneltest.budget"); f.Value.String() == f.DefValue {
		if err := f.Value.Set("9e5"); err != nil {
			t.Fatal(err)
		}
	}
	d, err := OpenEmulated(library)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}()
	kerneltest.Run(t, d)
}

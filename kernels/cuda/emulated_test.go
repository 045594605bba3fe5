//go:build cudaemu

package cuda

import (
	"flag"
	"os"
	"testing"

	"trainerd/kernels/kerneltest"
)

// emulator opens the device on the emulator.
func emulator(t *testing.T) *Device {
	t.Helper()
	library := os.Getenv("TRAINERD_EMULATOR")
	if library == "" {
		t.Fatal("TRAINERD_EMULATOR names no library: run make cuda-emulated")
	}
	d, err := OpenEmulated(library)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

// TestEmulated holds the whole device but for cuBLASLt and the driver to the
// float64 references: the kernels, their launches, schedules, scratch and transfers.
// The budget leaves out what takes minutes on an emulator.
func TestEmulated(t *testing.T) {
	if f := flag.Lookup("kerneltest.budget"); f.Value.String() == f.DefValue {
		if err := f.Value.Set("9e5"); err != nil {
			t.Fatal(err)
		}
	}
	kerneltest.Run(t, emulator(t))
}

func TestModels(t *testing.T) { testModels(t, emulator(t)) }

func TestMaster(t *testing.T) { testMaster(t, emulator(t)) }

func TestProfiledStep(t *testing.T) { testProfile(t, emulator(t)) }

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
	return emulatorWith(t, Options{})
}

func emulatorWith(t *testing.T, o Options) *Device {
	t.Helper()
	folder := os.Getenv("TRAINERD_EMULATOR")
	if folder == "" {
		t.Fatal("TRAINERD_EMULATOR names no folder: run make cuda-emulated")
	}
	d, err := OpenEmulated(folder, o)
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

// TestEmulated holds the whole device but for the driver to the float64 references:
// the kernels, their launches, schedules, scratch and transfers, and lt.c on a strict stand-in for cuBLASLt.
// The budget leaves out what takes minutes on an emulator.
func TestEmulated(t *testing.T) {
	if err := setBudget("9e5"); err != nil {
		t.Fatal(err)
	}
	kerneltest.Run(t, emulator(t))
}

// TestEmulatedWgmma: the same of attention by products of warpgroups.
func TestEmulatedWgmma(t *testing.T) {
	if err := setBudget("9e5"); err != nil {
		t.Fatal(err)
	}
	d := emulatorWith(t, Options{Attention: AttentionWgmma})
	kerneltest.Run(t, d, "attention", "decode")
	testModels(t, d)
}

func TestModels(t *testing.T) { testModels(t, emulator(t)) }

func TestMaster(t *testing.T) { testMaster(t, emulator(t)) }

func TestStaging(t *testing.T) { testStaging(t, emulator(t)) }

func TestMemory(t *testing.T) { testMemory(t, emulator(t)) }

func TestPins(t *testing.T) {
	testPins(t, emulator(t))
	testPinsEnd(t, emulator(t))
}

func TestProfiledStep(t *testing.T) { testProfile(t, emulator(t)) }

// setBudget bounds the cost of kerneltest's cases.
func setBudget(budget string) error { return flag.Lookup("kerneltest.budget").Value.Set(budget) }

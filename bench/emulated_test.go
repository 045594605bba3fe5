//go:build cudaemu

package bench

import (
	"context"
	"math"
	"os"
	"testing"
	"time"

	"trainerd/kernels"
	"trainerd/kernels/cuda"
)

func openEmulated(t *testing.T) *cuda.Device {
	t.Helper()
	folder := os.Getenv("TRAINERD_EMULATOR")
	if folder == "" {
		t.Fatal("TRAINERD_EMULATOR names no folder: run make cuda-emulated")
	}
	dev, err := cuda.OpenEmulated(folder, cuda.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = dev.Close() })
	return dev
}

// TestEmulatedKernels: the CUDA device takes every case, of a buffer type and an
// arena as the case has them. The times are the emulator's and say nothing.
func TestEmulatedKernels(t *testing.T) {
	dev := openEmulated(t)
	cfg, err := Shape("smoke")
	if err != nil {
		t.Fatal(err)
	}
	p, err := pack(Load{Prompt: 9, Groups: [][]int{{3, 1}, {5, 2}}}, 100)
	if err != nil {
		t.Fatal(err)
	}
	m := newMeter(dev, time.Microsecond)
	m.sets = 2
	if _, wrapped := m.dev.(*kernels.Timed); wrapped {
		t.Fatal("a CUDA device has a clock of its own")
	}
	for _, c := range kernelCases(dev.Info(), cfg, p, dev) {
		r, err := c.measure(context.Background(), m, Ceilings{CopyGBs: 1, MatmulTFLOPS: 1})
		if err != nil {
			t.Errorf("%s (%s): %v", c.op, c.sizes, err)
		} else if r.Seconds <= 0 {
			t.Errorf("%+v", r)
		}
	}
}

// TestEmulatedProfile: the phases of a step on the emulator, whose stream is the host, and its gaps are the step.
func TestEmulatedProfile(t *testing.T) {
	best := math.Inf(1)
	for range 3 {
		r, err := Step(context.Background(), openEmulated(t), StepOptions{Shape: "smoke", Load: "smoke", Repeats: 1, MaxTokens: 100, Profile: true})
		if err != nil {
			t.Fatal(err)
		}
		sum := r.Profile.Gaps
		for _, x := range r.Profile.Phases {
			if x.Calls == 0 {
				t.Errorf("phase %+v", x)
			}
			sum += x.Seconds
		}
		if math.Abs(sum-r.Profile.StepSeconds) > 1e-9*sum {
			t.Errorf("phases and gaps are %v s, the step %v s", sum, r.Profile.StepSeconds)
		}
		best = min(best, math.Abs(r.Profile.Residue))
	}
	if best > 0.05 {
		t.Errorf("residue %v of the step", best)
	}
}

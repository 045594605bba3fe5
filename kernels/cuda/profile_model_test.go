//go:build cuda || cudaemu

package cuda

import (
	"math"
	"math/rand/v2"
	"testing"
	"time"

	"trainerd/kernels"
	"trainerd/model"
)

// testProfile holds a whole step's profile to its span, which is measured on
// its own, and to the host's clock. A stretch is read to the resolution of an
// event, half a microsecond. The host waits for the profile's start and end:
// 5 % and 2 ms, in the best of five steps, since the machine may be busy.
func testProfile(t *testing.T, d *Device) {
	m := load(t, d, shapeOf("qwen2", 8))
	defer m.Close()
	rng := rand.New(rand.NewPCG(1, 2))
	b := groupBatch(rng, 50, 30, 12, 1, 20)
	best := math.Inf(1)
	for range 5 {
		began := time.Now()
		d.StartProfile(true)
		if _, err := m.ForwardBackward(b, lossOf(rng, len(b.Rows))); err != nil {
			t.Fatal(err)
		}
		if _, err := m.OptimStep(model.AdamW{LR: 1e-4, Beta1: 0.9, Beta2: 0.95, Eps: 1e-8, MaxGradNorm: 1}); err != nil {
			t.Fatal(err)
		}
		p, err := d.StopProfile()
		if err != nil {
			t.Fatal(err)
		}
		wall, calls := time.Since(began).Seconds(), 0
		for _, o := range p.Ops {
			calls += o.Calls
			if _, known := kernels.PhaseOf(o.Op); !known {
				t.Errorf("operation %q has no phase", o.Op)
			}
		}
		if off := math.Abs(p.Total() + p.Gaps - p.Span); off > 0.5e-6*float64(2*calls+2) {
			t.Errorf("phases %v s and gaps %v s are off the span of %v s by %v s", p.Total(), p.Gaps, p.Span, off)
		}
		for _, phase := range kernels.Phases() {
			if _, calls := p.Phase(phase); (calls == 0) != (phase == kernels.PhaseOther) {
				t.Errorf("%d operations of phase %v in a step", calls, phase)
			}
		}
		best = min(best, wall-p.Span-0.05*wall)
	}
	if best > 2e-3 {
		t.Errorf("the host waited %v s longer than 5 %% beyond the profile's span", best)
	}
}

package bench

import (
	"context"
	"slices"
	"time"

	"trainerd/kernels"
)

// meter times runs of operations by the device's own clock: between two CUDA
// events, or by the processor's.
type meter struct {
	dev    kernels.Device
	clock  kernels.Profiler
	budget time.Duration // of one measurement
	sets   int           // of buffers to rotate through, at most
}

// newMeter measures on dev, which is wrapped where it has no clock.
func newMeter(dev kernels.Device, budget time.Duration) *meter {
	if p, ok := dev.(kernels.Profiler); ok {
		return &meter{dev: dev, clock: p, budget: budget, sets: mostSets}
	}
	t := kernels.NewTimed(dev)
	return &meter{dev: t, clock: t, budget: budget, sets: mostSets}
}

// rounds are taken of each measurement; the median counts.
const rounds = 5

// mostCalls bounds the calls between two readings of the clock.
const mostCalls = 500

// seconds is the time of one call of run, of which as many as fit into the
// budget stand between two readings of the clock; run gets the number of the call.
func (m *meter) seconds(ctx context.Context, run func(i int)) (float64, error) {
	calls := 0
	span := func(n int) (float64, error) {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		m.clock.StartProfile(false)
		for range n {
			run(calls)
			calls++
		}
		p, err := m.clock.StopProfile()
		if err != nil {
			return 0, err
		}
		return p.Span / float64(n), m.dev.Sync()
	}
	if _, err := span(1); err != nil { // first use: kernels are loaded, algorithms chosen
		return 0, err
	}
	one, err := span(2)
	if err != nil {
		return 0, err
	}
	n := min(max(int(m.budget.Seconds()/rounds/max(one, 1e-9)), 1), mostCalls)
	var times []float64
	began := time.Now()
	for i := 0; i < rounds && (i < 3 || time.Since(began) < 2*m.budget); i++ {
		t, err := span(n)
		if err != nil {
			return 0, err
		}
		times = append(times, t)
	}
	slices.Sort(times)
	return times[len(times)/2], nil
}

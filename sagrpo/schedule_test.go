package sagrpo

import (
	"math"
	"testing"
)

func TestSchedules(t *testing.T) {
	for _, c := range []struct {
		name     string
		schedule Schedule
		maxSteps int64
		want     map[int64]float64 // share of lr by step
	}{
		{"constant", Schedule{Name: "constant"}, 0, map[int64]float64{0: 1, 1: 1, 1e6: 1}},
		{"constant, warm-up", Schedule{Name: "constant", WarmupSteps: 4}, 0, map[int64]float64{0: 0.25, 1: 0.5, 3: 1, 4: 1, 100: 1}},
		{"linear to max_steps", Schedule{Name: "linear"}, 10, map[int64]float64{0: 1, 5: 0.5, 9: 0.1, 10: 0, 11: 0}},
		{"linear, warm-up, floor", Schedule{Name: "linear", WarmupSteps: 2, DecaySteps: 12, MinRatio: 0.2}, 100,
			map[int64]float64{0: 0.5, 1: 1, 2: 1, 7: 0.6, 12: 0.2, 99: 0.2}},
		{"cosine", Schedule{Name: "cosine", DecaySteps: 8}, 0, map[int64]float64{0: 1, 2: (1 + math.Sqrt2/2) / 2, 4: 0.5, 8: 0, 20: 0}},
		{"cosine, warm-up, floor", Schedule{Name: "cosine", WarmupSteps: 5, MinRatio: 0.1}, 15, map[int64]float64{0: 0.2, 4: 1, 5: 1, 10: 0.55, 15: 0.1}},
	} {
		s := Settings{Optimizer: DefaultOptimizer(), MaxSteps: c.maxSteps}
		s.Optimizer.Schedule = c.schedule
		s.Optimizer.LR = 2e-5
		for step, want := range c.want {
			if got := s.LR(step); math.Abs(got-2e-5*want) > 1e-18 {
				t.Errorf("%s: step %d: lr %g, expected %g", c.name, step, got, 2e-5*want)
			}
		}
	}
}

// TestScheduleIsMonotone: up during the warm-up, then never up again, within [min, lr].
func TestScheduleIsMonotone(t *testing.T) {
	for _, name := range []string{"linear", "cosine"} {
		s := Settings{Optimizer: DefaultOptimizer(), MaxSteps: 200}
		s.Optimizer.Schedule = Schedule{Name: name, WarmupSteps: 20, MinRatio: 0.05}
		for step := int64(1); step < 300; step++ {
			before, now := s.LR(step-1), s.LR(step)
			if step < 20 && now <= before || step > 20 && now > before {
				t.Errorf("%s: lr goes from %g to %g at step %d", name, before, now, step)
			}
			if now > s.Optimizer.LR || now < 0.05*s.Optimizer.LR*(1-1e-12) {
				t.Errorf("%s: lr %g at step %d is out of range", name, now, step)
			}
		}
	}
}

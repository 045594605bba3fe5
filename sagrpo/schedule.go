package sagrpo

import "math"

// LR returns the learning rate of the optimizer step that follows step done
// ones (Done and the job's own), in closed form, so that a resumed job needs no
// scheduler state.
//
// During warm-up it is lr*(step+1)/warmup_steps: the first step already moves
// the weights and the last one has the whole rate. After it, a decaying schedule
// goes from lr to min_ratio*lr, which it reaches at decay_steps and keeps.
func (s Settings) LR(step int64) float64 {
	o := s.Optimizer
	warmup := int64(o.Schedule.WarmupSteps)
	if step < warmup {
		return o.LR * float64(step+1) / float64(warmup)
	}
	if o.Schedule.Name == "constant" {
		return o.LR
	}
	left := 0.0 // share of the decay that is still to come
	if end := s.decayEnd(); step < end {
		left = float64(end-step) / float64(end-warmup)
	}
	if o.Schedule.Name == "cosine" {
		left = (1 - math.Cos(math.Pi*left)) / 2
	}
	return o.LR * (o.Schedule.MinRatio + (1-o.Schedule.MinRatio)*left)
}

// decayEnd returns the step from which the rate is min_ratio*lr, 0 when nothing says.
func (s Settings) decayEnd() int64 {
	if s.Optimizer.Schedule.DecaySteps > 0 {
		return int64(s.Optimizer.Schedule.DecaySteps)
	}
	if s.MaxSteps == 0 {
		return 0
	}
	return s.Done + s.MaxSteps
}

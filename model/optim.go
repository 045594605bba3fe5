package model

import (
	"fmt"
	"math"

	"trainerd/internal/fault"
	"trainerd/kernels"
)

// AdamW are the optimizer's settings of one step.
type AdamW struct {
	LR, Beta1, Beta2, Eps float64
	WeightDecay           float64 // decoupled; not applied to norms and biases
	MaxGradNorm           float64 // 0: no clipping
}

// StepResult is what OptimStep measured.
type StepResult struct {
	GradNorm float64 // global norm before clipping
}

// OptimStep applies one AdamW step with the accumulated gradient and clears it.
// A gradient that is not finite changes nothing and is an Invalid fault that
// names the first tensor at fault; the gradient stays, ZeroGrad drops it.
func (m *Model) OptimStep(o AdamW) (StepResult, error) {
	if m.broken != nil {
		return StepResult{}, m.broken
	}
	if m.grad == nil {
		return StepResult{}, fault.New(fault.Invalid, "no_training", "the model was loaded without optimizer state")
	}
	if err := o.validate(); err != nil {
		return StepResult{}, err
	}
	if m.fresh {
		m.dev.Zero(m.grad.flat)
	}
	sumsq, err := m.sumSquares(m.grad.flat)
	if err != nil {
		return StepResult{}, err
	}
	norm := math.Sqrt(sumsq)
	if math.IsNaN(norm) || math.IsInf(norm, 0) {
		return StepResult{GradNorm: norm}, m.notFinite()
	}
	m.dev.ClipCoef(m.coef, m.sumsq, 1, float32(o.MaxGradNorm))
	for _, part := range []struct {
		from, to int
		decay    float64
	}{{0, m.lay.decayed, o.WeightDecay}, {m.lay.decayed, m.lay.size, 0}} {
		span := func(b kernels.Buffer) kernels.Buffer {
			if b == nil {
				return nil
			}
			return b.Slice(part.from, part.to)
		}
		step := kernels.AdamW{P: span(m.policy.flat), Rem: span(m.rem), G: span(m.grad.flat), M: span(m.m), V: span(m.v), Coef: m.coef,
			LR: o.LR, Beta1: o.Beta1, Beta2: o.Beta2, Eps: o.Eps, WeightDecay: part.decay, Step: m.steps + 1,
			Seed: m.opt.RoundingSeed, First: int64(part.from)}
		if m.scale != nil {
			step.Scale = m.scale.Slice(part.from/kernels.MomentBlock, part.to/kernels.MomentBlock)
		}
		m.dev.AdamW(step)
	}
	if err := m.dev.Sync(); err != nil {
		return StepResult{}, fmt.Errorf("optimizer step: %w", err)
	}
	m.steps++
	m.fresh = true
	return StepResult{GradNorm: norm}, nil
}

func (o AdamW) validate() error {
	for _, f := range []struct {
		name     string
		got      float64
		ok       bool
		expected string
	}{
		{"lr", o.LR, o.LR >= 0, "a number >= 0"},
		{"betas[0]", o.Beta1, o.Beta1 >= 0 && o.Beta1 < 1, "0 <= beta < 1"},
		{"betas[1]", o.Beta2, o.Beta2 >= 0 && o.Beta2 < 1, "0 <= beta < 1"},
		{"eps", o.Eps, o.Eps > 0, "a positive number"},
		{"weight_decay", o.WeightDecay, o.WeightDecay >= 0, "a number >= 0"},
		{"max_grad_norm", o.MaxGradNorm, o.MaxGradNorm >= 0, "a number >= 0"},
	} {
		if !f.ok || math.IsInf(f.got, 0) {
			return fault.BadField("optimizer."+f.name, f.got, f.expected)
		}
	}
	return nil
}

// sumSquares measures a gradient span; m.sumsq keeps the value on the device.
func (m *Model) sumSquares(g kernels.Buffer) (float64, error) {
	m.dev.Zero(m.sumsq)
	m.dev.SumSquares(m.sumsq, g)
	host := []float32{0}
	if err := m.dev.Download(denseF32(host), m.sumsq); err != nil {
		return 0, fmt.Errorf("measure gradient: %w", err)
	}
	return float64(host[0]), nil
}

// notFinite finds the first tensor whose gradient is not finite.
func (m *Model) notFinite() error {
	for _, t := range m.lay.tensors {
		sumsq, err := m.sumSquares(m.grad.flat.Slice(t.off, t.off+t.n))
		if err != nil {
			return err
		}
		if math.IsNaN(sumsq) || math.IsInf(sumsq, 0) {
			return &fault.Error{Kind: fault.Invalid, Code: "gradient_not_finite", Msg: "the step was not applied",
				Fields: []fault.Field{{Name: t.name, Row: -1, Got: "a gradient that is not finite", Expected: "finite gradients"}}}
		}
	}
	return fault.New(fault.Invalid, "gradient_not_finite", "the step was not applied: the global gradient norm overflows float32")
}

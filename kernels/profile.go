package kernels

import (
	"cmp"
	"maps"
	"slices"
)

// Phase files the operations of a step.
type Phase uint8

const (
	PhaseGemm        Phase = iota
	PhaseAttention         // scores and values, with the schedule's upload
	PhaseHead              // LM head with its products, loss, sampling
	PhaseElementwise       // norms, RoPE, SwiGLU, embedding, biases, copies
	PhaseOptimizer         // AdamW, norm and clipping of the gradient
	PhaseTransfer          // between host and device, indices and layouts among them
	PhaseOther
	phaseCount
)

// Phases lists all phases, in the order of a table.
func Phases() []Phase {
	out := make([]Phase, phaseCount)
	for i := range out {
		out[i] = Phase(i)
	}
	return out
}

// String names the phase as results do.
func (p Phase) String() string {
	return [...]string{"gemm", "attention", "head+loss", "norm/elementwise", "optimizer", "transfers", "other"}[p]
}

// phases files operations by the name that errors and profiles give them.
var phases = map[string]Phase{
	"gemm":      PhaseGemm,
	"attention": PhaseAttention, "attention backward": PhaseAttention,
	"log-prob": PhaseHead, "log-prob backward": PhaseHead, "sample": PhaseHead,
	"rmsnorm": PhaseElementwise, "rmsnorm backward": PhaseElementwise, "rope": PhaseElementwise, "rope backward": PhaseElementwise,
	"swiglu": PhaseElementwise, "swiglu backward": PhaseElementwise, "gather": PhaseElementwise, "scatter add": PhaseElementwise,
	"bias backward": PhaseElementwise, "zero": PhaseElementwise, "copy": PhaseElementwise, "lerp": PhaseElementwise,
	"adamw": PhaseOptimizer, "add gradient": PhaseOptimizer, "sum of squares": PhaseOptimizer, "clip coefficient": PhaseOptimizer,
	"upload": PhaseTransfer, "download": PhaseTransfer, "layout": PhaseTransfer, "scatter": PhaseTransfer,
	"advantages": PhaseOther,
}

// PhaseOf files an operation by its name; known is false, and the phase PhaseOther, for a name it has never heard.
func PhaseOf(operation string) (p Phase, known bool) {
	p, known = phases[operation]
	if !known {
		p = PhaseOther
	}
	return p, known
}

// Operations names all operations, in alphabetical order.
func Operations() []string { return slices.Sorted(maps.Keys(phases)) }

// Profiler is a device that times its operations by a clock of its own: CUDA
// events on the stream, or the processor's clock around each call (Timed).
type Profiler interface {
	// StartProfile begins a profile at this point of the order of operations. With
	// each, every operation is timed; without, only the span, which costs two
	// readings of the clock.
	StartProfile(each bool)
	// StopProfile waits for the operations before it and ends the profile.
	StopProfile() (Profile, error)
}

// Profile is what a device did between StartProfile and StopProfile, in
// seconds of its own clock. The operations and Gaps add up to Span but for the
// resolution of the clock, since each stretch is read on its own.
type Profile struct {
	Span float64
	Gaps float64 // between operations: nothing was queued, or the launch took longer than the work before it
	Ops  []OpTime
}

// OpTime is the time of all calls of one operation.
type OpTime struct {
	Op      string  `json:"op"`
	Phase   Phase   `json:"-"`
	Calls   int     `json:"calls"`
	Seconds float64 `json:"s"`
}

// Add counts one call of an operation.
func (p *Profile) Add(operation string, seconds float64) {
	i, found := slices.BinarySearchFunc(p.Ops, operation, func(o OpTime, name string) int { return cmp.Compare(o.Op, name) })
	if !found {
		phase, _ := PhaseOf(operation)
		p.Ops = slices.Insert(p.Ops, i, OpTime{Op: operation, Phase: phase})
	}
	p.Ops[i].Calls++
	p.Ops[i].Seconds += seconds
}

// Phase sums up a phase.
func (p Profile) Phase(of Phase) (seconds float64, calls int) {
	for _, o := range p.Ops {
		if o.Phase == of {
			seconds, calls = seconds+o.Seconds, calls+o.Calls
		}
	}
	return seconds, calls
}

// Total is the time of all operations.
func (p Profile) Total() float64 {
	s := 0.0
	for _, o := range p.Ops {
		s += o.Seconds
	}
	return s
}

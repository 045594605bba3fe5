package model

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strings"

	"gorgonia.org/tensor"

	"trainerd/internal/fault"
	"trainerd/kernels"
)

// Options say what a model will be used for; memory is planned from them.
type Options struct {
	Train          bool      // gradients and optimizer state
	Reference      bool      // a frozen copy of the weights for a KL term
	MaxTokens      int       // most tokens of a micro-batch
	MaxPredictions int       // predictions that go through the LM head at once; 0: MaxTokens
	SampleSlots    int       // most sequences decoded at once; 0: no sampling
	SampleTokens   int       // most cache rows of one sampling call: prompts plus slots*max new tokens
	Recompute      Recompute // what the backward pass computes again
	RecomputeMore  int       // layers, the first ones, for which that goes one mode further

	CompactMoments bool   // 8-bit first and bfloat16 second moments: 3.03 bytes a parameter instead of 8, see kernels.AdamW
	HostMoments    bool   // moments lie in page-locked host memory, and cross the bus once a step; the bits are the same
	BF16Gradients  bool   // gradients are kept in bfloat16 between micro-batches, and computed in float32
	RoundingSeed   uint64 // of the stochastic rounding that the two need
}

// Weights selects which weights a forward pass uses.
type Weights uint8

const (
	Policy Weights = iota
	Reference
)

// Model is a policy on a device. It is used by one goroutine at a time.
type Model struct {
	dev   kernels.Device
	cfg   Config
	opt   Options
	lay   *layout
	plan  kernels.Plan
	dtype string // stored type of the source

	policy, ref, grad *params        // ref and grad may be nil
	rem               kernels.Buffer // I16, low halves of the masters; nil when weights are F32
	m, v              kernels.Buffer // moments: F32, or I8 and BF16
	scale             kernels.Buffer // F32, of compact first moments; else nil
	cache             kernels.Buffer // [Layers, SampleTokens, 2*KV*hd]
	sumsq, coef       kernels.Buffer // F32[1]
	arena             kernels.Arena

	owned  []kernels.Buffer // what Close frees
	steps  int64
	fresh  bool  // the next ForwardBackward overwrites the gradients
	micro  int   // micro-batches in the gradients
	broken error // a half-loaded state, or no device memory: every later call returns it

	scratch int64    // capacity of the arena
	peak    int64    // of arenas before this one
	host    *evicted // the state while it is off the device
}

// Load puts a source's weights on the device. It plans first: a model that does
// not fit is a TooLarge fault that carries the plan and what would make it fit.
// Nothing is read from the source before that but its config and shapes.
func Load(ctx context.Context, dev kernels.Device, src Source, opt Options) (*Model, error) {
	cfg := src.Config()
	plan, arena, err := planned(dev, cfg, opt)
	if err != nil {
		return nil, err
	}
	if !plan.Fits() {
		return nil, tooLarge(dev, cfg, opt, plan)
	}
	m, err := allocate(dev, cfg, opt)
	if err != nil {
		return nil, err
	}
	m.plan, m.dtype = plan, src.DType()
	if err := m.fill(ctx, src, arena); err != nil {
		return nil, errors.Join(err, m.Close())
	}
	return m, nil
}

// allocate takes all of a model's memory but the arena. On an error nothing stays allocated.
func allocate(dev kernels.Device, cfg Config, opt Options) (_ *Model, err error) {
	info := dev.Info()
	m := &Model{dev: dev, cfg: cfg, opt: opt, fresh: true}
	m.lay = newLayout(cfg, opt.alignment(info))
	defer func() {
		if err != nil {
			m.free()
		}
	}()
	take := func(purpose string, t kernels.DType, n int) kernels.Buffer {
		if err != nil {
			return nil
		}
		var b kernels.Buffer
		if b, err = dev.Alloc(purpose, t, n); err != nil {
			err = fmt.Errorf("allocate %s: %w", purpose, err)
			return nil
		}
		m.owned = append(m.owned, b)
		return b
	}
	moments := func(t kernels.DType, n int) kernels.Buffer {
		host, ok := dev.(kernels.HostAllocator)
		if !opt.HostMoments || err != nil {
			return take("optimizer", t, n)
		}
		if !ok {
			err = fault.BadField("optimizer.moments_in", momentsIn(true), momentsIn(false)+" on "+info.Name+", which does not reach host memory beside its own")
			return nil
		}
		var b kernels.Buffer
		if b, err = host.AllocHost("optimizer", t, n); err != nil {
			err = fmt.Errorf("allocate optimizer: %w", err)
			return nil
		}
		m.owned = append(m.owned, b)
		return b
	}
	flat := func(purpose string, t kernels.DType) *params {
		if b := take(purpose, t, m.lay.size); b != nil {
			return m.lay.view(b)
		}
		return nil
	}
	m.policy = flat("weights", info.Compute)
	if opt.Train {
		if info.Compute != kernels.F32 {
			m.rem = take("weights", kernels.I16, m.lay.size)
		}
		kept := info.GradType
		if opt.BF16Gradients {
			kept = kernels.BF16
		}
		m.grad = flat("gradients", kept)
		if opt.CompactMoments {
			m.m = moments(kernels.I8, m.lay.size)
			m.scale = moments(kernels.F32, kernels.MomentBlocks(m.lay.size))
			m.v = moments(kernels.BF16, m.lay.size)
		} else {
			m.m = moments(kernels.F32, m.lay.size)
			m.v = moments(kernels.F32, m.lay.size)
		}
		m.sumsq = take("optimizer", kernels.F32, 1)
		m.coef = take("optimizer", kernels.F32, 1)
	}
	if opt.Reference {
		m.ref = flat("reference", info.Compute)
	}
	if opt.SampleSlots > 0 {
		m.cache = take("cache", info.Compute, cfg.Layers*opt.SampleTokens*2*cfg.KVHeads*cfg.HeadDim)
	}
	if err != nil {
		return nil, err
	}
	return m, nil
}

// fill reads the weights, clears the state and takes the arena.
func (m *Model) fill(ctx context.Context, src Source, arena int64) error {
	if err := CheckTensors(src); err != nil {
		return err
	}
	var err error
	m.scratch = arena
	if m.arena, err = m.dev.NewArena(arena); err != nil {
		return fmt.Errorf("allocate scratch: %w", err)
	}
	// Padding between blocks is zero for ever: it adds nothing to norms, and
	// AdamW leaves a zero weight with a zero gradient at zero.
	for _, b := range []*params{m.policy, m.grad} {
		if b != nil {
			m.dev.Zero(b.flat)
		}
	}
	for _, b := range []kernels.Buffer{m.rem, m.m, m.scale, m.v} {
		if b != nil {
			m.dev.Zero(b)
		}
	}
	for _, t := range m.lay.tensors {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("load weights: %w", err)
		}
		host := tensor.New(tensor.WithShape(t.shape...), tensor.WithBacking(make([]float32, t.n)))
		if err := src.Read(t.name, host); err != nil {
			return fmt.Errorf("load weights: %w", err)
		}
		values := host.Float32s()
		for i, x := range values {
			if math.IsNaN(float64(x)) || math.IsInf(float64(x), 0) {
				return fault.New(fault.Invalid, "invalid_tensor", "tensor %q: element %d is %v, expected finite weights", t.name, i, x)
			}
		}
		m.putMaster(t.off, values)
	}
	if m.ref != nil {
		m.dev.Copy(m.ref.flat, m.policy.flat)
	}
	if err := m.dev.Sync(); err != nil {
		return fmt.Errorf("load weights: %w", err)
	}
	return nil
}

// CheckTensors compares a source's tensors with what its config needs, by name
// and shape, before any of them is read. The config must be valid.
func CheckTensors(src Source) error {
	cfg := src.Config()
	lay := newLayout(cfg, 1)
	var bad []fault.Field
	add := func(name string, got any, expected string) {
		bad = append(bad, fault.Field{Name: name, Row: -1, Got: fmt.Sprint(got), Expected: expected})
	}
	for _, t := range lay.tensors {
		shape, ok := src.Shape(t.name)
		switch {
		case !ok:
			add(t.name, "no such tensor", fmt.Sprintf("shape %v", t.shape))
		case fmt.Sprint(shape) != fmt.Sprint(t.shape):
			add(t.name, fmt.Sprintf("shape %v", shape), fmt.Sprintf("%v", t.shape))
		}
	}
	for _, name := range src.Names() {
		if _, ok := lay.index[name]; ok || ignorable(name) {
			continue
		}
		add(name, "a tensor", fmt.Sprintf("none of this name in a %s of %d layers", cfg.Type, cfg.Layers))
	}
	if len(bad) == 0 {
		return nil
	}
	if more := len(bad) - 8; more > 0 {
		bad = append(bad[:8], fault.Field{Name: fmt.Sprintf("%d more tensors", more), Row: -1})
	}
	return &fault.Error{Kind: fault.Invalid, Code: "invalid_tensor", Msg: "weights do not match the config", Fields: bad}
}

// ignorable are tensors that some files carry and that follow from the config:
// RoPE's frequencies, and the head of a tied model (one that is untied needs it,
// and has it in its layout).
func ignorable(name string) bool {
	return name == "lm_head.weight" || strings.HasSuffix(name, "rotary_emb.inv_freq")
}

// Config returns the model's architecture.
func (m *Model) Config() Config { return m.cfg }

// Options returns what the model was loaded for.
func (m *Model) Options() Options { return m.opt }

// Device returns the device that the model lives on.
func (m *Model) Device() kernels.Device { return m.dev }

// Plan returns the memory that the model takes.
func (m *Model) Plan() kernels.Plan { return m.plan }

// ScratchPeak returns the greatest use of scratch memory so far, in bytes.
func (m *Model) ScratchPeak() int64 {
	if m.arena == nil {
		return m.peak
	}
	return max(m.peak, m.arena.Peak())
}

// Steps returns how many optimizer steps the moments have seen.
func (m *Model) Steps() int64 { return m.steps }

// Close frees the model's device memory. Closing twice is harmless.
func (m *Model) Close() error {
	if m.host != nil {
		m.host, m.broken = nil, fault.New(fault.Unavailable, "model_closed", "the model is closed")
	}
	if m.owned == nil {
		return nil
	}
	err := m.dev.Sync()
	m.free()
	m.broken = fault.New(fault.Unavailable, "model_closed", "the model is closed")
	return err
}

func (m *Model) free() {
	for _, b := range m.owned {
		m.dev.Free(b)
	}
	m.owned = nil
	if m.arena != nil {
		m.dev.FreeArena(m.arena)
		m.arena = nil
	}
}

// weights returns the parameters that a forward pass uses.
func (m *Model) weights(w Weights) (*params, error) {
	if m.broken != nil {
		return nil, m.broken
	}
	if w == Policy {
		return m.policy, nil
	}
	if m.ref == nil {
		return nil, fault.New(fault.Invalid, "no_reference", "the model was loaded without reference weights")
	}
	return m.ref, nil
}

// SyncReference sets reference = (1-alpha)*reference + alpha*policy.
func (m *Model) SyncReference(alpha float32) error {
	ref, err := m.weights(Reference)
	if err != nil {
		return err
	}
	if !(alpha >= 0 && alpha <= 1) {
		return fault.BadField("sync_alpha", alpha, "0 to 1")
	}
	if alpha == 1 {
		m.dev.Copy(ref.flat, m.policy.flat)
	} else {
		m.dev.Lerp(ref.flat, m.policy.flat, alpha)
	}
	return m.dev.Sync()
}

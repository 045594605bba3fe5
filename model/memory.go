package model

import (
	"fmt"

	"trainerd/internal/fault"
	"trainerd/kernels"
)

// Plan returns the exact memory that Load with the same arguments will take,
// without allocating any of it.
func Plan(dev kernels.Device, cfg Config, opt Options) (kernels.Plan, error) {
	p, _, err := planned(dev, cfg, opt)
	return p, err
}

// planned runs the real code on a device that only counts, with the largest
// shapes the options allow. It returns the plan and the arena's capacity.
func planned(dev kernels.Device, cfg Config, opt Options) (kernels.Plan, int64, error) {
	if err := cfg.Validate(); err != nil {
		return kernels.Plan{}, 0, err
	}
	if err := opt.validate(); err != nil {
		return kernels.Plan{}, 0, err
	}
	pd := kernels.NewPlanner(dev)
	m, err := allocate(pd, cfg, opt)
	if err != nil {
		return kernels.Plan{}, 0, err
	}
	if m.arena, err = pd.NewArena(0); err != nil {
		return kernels.Plan{}, 0, err
	}
	if err := m.rehearse(); err != nil {
		return kernels.Plan{}, 0, fmt.Errorf("plan memory: %w", err)
	}
	peak := m.arena.Peak()
	if _, err := pd.NewArena(peak); err != nil {
		return kernels.Plan{}, 0, err
	}
	return pd.Plan(), peak, nil
}

func (o Options) validate() error {
	switch {
	case o.MaxTokens < 1 || o.MaxTokens > maxTokens:
		return fault.BadField("max_tokens_per_micro_batch", o.MaxTokens, fmt.Sprintf("1 to %d", maxTokens))
	case o.MaxPredictions < 0 || o.MaxPredictions > maxTokens:
		return fault.BadField("max_predictions", o.MaxPredictions, fmt.Sprintf("0 to %d", maxTokens))
	case o.SampleSlots < 0 || o.SampleSlots > maxTokens:
		return fault.BadField("sample_slots", o.SampleSlots, fmt.Sprintf("0 to %d", maxTokens))
	case o.SampleSlots > 0 && (o.SampleTokens < 1 || o.SampleTokens > maxTokens):
		return fault.BadField("sample_tokens", o.SampleTokens, fmt.Sprintf("1 to %d when there are sample slots", maxTokens))
	case o.Recompute > RecomputeLayers:
		return fault.BadField("recompute", int(o.Recompute), "a known mode")
	case o.RecomputeMore < 0 || o.RecomputeMore > 0 && o.Recompute == RecomputeLayers:
		return fault.BadField("recompute_more", o.RecomputeMore, "0 or more, and 0 with layers")
	}
	return nil
}

// headRows is how many predictions go through the head at once.
func (o Options) headRows() int {
	if o.MaxPredictions > 0 {
		return o.MaxPredictions
	}
	return o.MaxTokens
}

// rehearse calls everything that takes scratch memory, with the shapes that
// take the most: every token another segment, all tokens distinct (as far as
// the vocabulary goes), all rows predicted.
func (m *Model) rehearse() error {
	t, n := m.opt.MaxTokens, m.opt.headRows()
	b := &Batch{Tokens: make([]int32, t), Positions: make([]int32, t), Rows: make([]int32, n), Targets: make([]int32, n)}
	for i := range t {
		b.Tokens[i] = int32(i % m.cfg.Vocab)
		b.Segments = append(b.Segments, Segment{Start: i, Len: 1, Prefix: -1})
	}
	for i := range n {
		b.Rows[i] = int32(i % t)
	}
	if _, err := m.Score(b, Policy, 1); err != nil {
		return err
	}
	if m.opt.Train {
		zeros := make([]float32, n)
		surrogate := Loss{Temperature: 1, Old: zeros, Ref: zeros, Adv: zeros, Weight: zeros, TIS: zeros}
		given := Loss{Temperature: 1, Coefficients: func(Scores) ([]float32, []float32) { return zeros, zeros }}
		for _, l := range []Loss{surrogate, given} {
			if _, err := m.ForwardBackward(b, l); err != nil {
				return err
			}
		}
	}
	if m.opt.SampleSlots > 0 {
		return m.rehearseSampling()
	}
	return nil
}

// tooLarge says why a plan does not fit and which settings would.
func tooLarge(dev kernels.Device, cfg Config, opt Options, plan kernels.Plan) error {
	e := &fault.Error{Kind: fault.TooLarge, Code: "model_too_large",
		Msg: fmt.Sprintf("the model does not fit on %s: %s", dev.Info().Name, plan)}
	suggest := func(name string, got any, expected string) {
		e.Fields = append(e.Fields, fault.Field{Name: name, Row: -1, Got: fmt.Sprint(got), Expected: expected})
	}
	fits := func(change func(*Options)) bool {
		o := opt
		change(&o)
		p, _, err := planned(dev, cfg, o)
		return err == nil && p.Total <= plan.Free
	}
	// The predictions that share the head at once shrink with the tokens.
	setTokens := func(n int) func(*Options) {
		return func(o *Options) {
			o.MaxTokens = n
			if o.MaxPredictions > n {
				o.MaxPredictions = n
			}
		}
	}
	if fits(setTokens(1)) {
		lo, hi := 1, opt.MaxTokens // lo fits, hi does not
		for hi-lo > max(1, lo/64) {
			mid := lo + (hi-lo)/2
			if fits(setTokens(mid)) {
				lo = mid
			} else {
				hi = mid
			}
		}
		suggest("max_tokens_per_micro_batch", opt.MaxTokens, fmt.Sprintf("at most %d, everything else unchanged", lo))
	}
	if opt.Train && opt.Recompute < RecomputeLayers && fits(func(o *Options) { o.Recompute, o.RecomputeMore = RecomputeLayers, 0 }) {
		suggest("recompute", opt.Recompute, "layers")
	}
	if opt.Train && !opt.CompactMoments && fits(func(o *Options) { o.CompactMoments = true }) {
		suggest("optimizer.moments", momentsName(false), momentsName(true))
	}
	if opt.Train && !opt.BF16Gradients && fits(func(o *Options) { o.BF16Gradients = true }) {
		suggest("optimizer.gradients", "float32", "bfloat16")
	}
	if opt.Reference && fits(func(o *Options) { o.Reference = false }) {
		suggest("beta", "> 0 (a reference model is kept)", "0")
	}
	if opt.SampleSlots > 0 && fits(func(o *Options) { o.SampleSlots, o.SampleTokens = 0, 0 }) {
		suggest("sample_tokens", opt.SampleTokens, "fewer, or no sampling on this device")
	}
	leanest := func(o *Options) {
		o.Recompute, o.RecomputeMore, o.CompactMoments, o.BF16Gradients = RecomputeLayers, 0, true, true
	}
	onHost := func(o *Options) { leanest(o); o.HostMoments = true }
	_, reaches := dev.(kernels.HostAllocator)
	further := len(e.Fields) == 0 && opt.Train && reaches && !opt.HostMoments && !fits(leanest) && fits(onHost)
	if len(e.Fields) == 0 && opt.Train && (further || fits(leanest)) { // no one of them is enough
		if opt.Recompute < RecomputeLayers {
			suggest("recompute", opt.Recompute, "layers")
		}
		if !opt.CompactMoments {
			suggest("optimizer.moments", momentsName(false), momentsName(true))
		}
		if !opt.BF16Gradients {
			suggest("optimizer.gradients", "float32", "bfloat16")
		}
	}
	if further {
		suggest("optimizer.moments_in", momentsIn(false), momentsIn(true))
	}
	if len(e.Fields) == 0 {
		state := plan.Total - plan.Bytes["scratch"]
		suggest("model", fmt.Sprintf("%d parameters, %d bytes without activations", cfg.Parameters(), state),
			fmt.Sprintf("a smaller model: %d bytes are free", plan.Free))
	}
	return e
}

package bench

import (
	"context"
	"fmt"
	"math/rand/v2"
	"time"

	"trainerd/kernels"
	"trainerd/model"
	"trainerd/rollout"
	"trainerd/sagrpo"
)

// StepResult is one line of output of Step.
type StepResult struct {
	Name        string       `json:"name"`
	Impl        string       `json:"impl"`
	Device      string       `json:"device"`
	Workers     int          `json:"workers"`
	Shape       string       `json:"shape"`
	Load        string       `json:"load"`
	Attention   string       `json:"attention,omitempty"` // wgmma; absent: the card's mma, or the CPU's
	Rollouts    int          `json:"rollouts"`
	StepSeconds float64      `json:"step_s"` // median
	RolloutsS   float64      `json:"rollouts_s"`
	UsefulGFLOP float64      `json:"useful_gflop_s"`
	Plan        kernels.Plan `json:"memory_plan"`
	PeakBytes   int64        `json:"peak_bytes"` // on the device: the plan with the scratch memory that was used
	Formats

	*Floor
	Profile *StepProfile `json:"profile,omitempty"`
}

// Floor is the load's useful arithmetic at the rate of a large product on the same device, measured before the step.
type Floor struct {
	MatmulTFLOPS float64 `json:"matmul_tflop_s"`
	Seconds      float64 `json:"floor_s"`
	RolloutsS    float64 `json:"floor_rollouts_s"`
	MFU          float64 `json:"mfu"` // floor / step: useful FLOP/s as a share of that rate
}

// StepOptions say what Step measures.
type StepOptions struct {
	Shape, Load string
	Repeats     int
	MaxTokens   int
	Floor       bool // measure the rate of a large product before the step
	Profile     bool // add steps in which every operation is timed
	Formats
}

// Formats are what a job says about the memory of its model. RecomputeMore is what "auto" chose.
type Formats struct {
	Moments       string `json:"moments"`        // float32 or compact
	MomentsIn     string `json:"moments_in"`     // device or host
	Gradients     string `json:"gradients"`      // float32 or bfloat16
	Recompute     string `json:"recompute"`      // auto, cheap, mlp or layers
	RecomputeMore int    `json:"recompute_more"` // layers for which that goes one mode further
}

// options resolves the formats for a device.
func (f *Formats) options(dev kernels.Device, cfg model.Config, maxTokens int) (model.Options, sagrpo.Optimizer, error) {
	set := sagrpo.DefaultOptimizer()
	o := model.Options{Train: true, MaxTokens: maxTokens}
	if f.Moments != "" {
		set.Moments = f.Moments
	}
	if f.MomentsIn != "" {
		set.MomentsIn = f.MomentsIn
	}
	if f.Gradients != "" {
		set.Gradients = f.Gradients
	}
	f.Moments, f.MomentsIn, f.Gradients = set.Moments, set.MomentsIn, set.Gradients
	o.HostMoments = f.MomentsIn == sagrpo.MomentsHost
	o.CompactMoments, o.BF16Gradients = f.Moments == sagrpo.MomentsCompact, f.Gradients == sagrpo.GradientsBFloat
	switch f.Recompute {
	case "", "auto":
		var err error
		if o, _, _, err = model.Fit(dev, cfg, o, dev.Info().MemFree); err != nil { // where nothing fits, Load refuses with the plan
			return o, set, err
		}
	case "cheap":
	case "mlp":
		o.Recompute = model.RecomputeMLP
	case "layers":
		o.Recompute = model.RecomputeLayers
	default:
		return o, set, fmt.Errorf("recompute is %q, expected auto, cheap, mlp or layers", f.Recompute)
	}
	f.Recompute, f.RecomputeMore = o.Recompute.String(), o.RecomputeMore
	return o, set, nil
}

// check returns the model and the load that a benchmark of steps names.
func (o StepOptions) check() (model.Config, Load, error) {
	cfg, err := Shape(o.Shape)
	if err != nil {
		return cfg, Load{}, err
	}
	l, err := LoadByName(o.Load)
	if err != nil {
		return cfg, l, err
	}
	if o.Repeats < 1 {
		return cfg, l, fmt.Errorf("repeats is %d, expected 1 or more", o.Repeats)
	}
	return cfg, l, nil
}

// attention is what a result says of the device's attention kernels.
func attention(dev kernels.Device) string { return kernels.FingerprintOf(dev).Attention }

// Step times whole SA-GRPO steps (forward, loss, backward, clip, AdamW) of a
// randomly initialised model and returns the median after one warm-up. Rewards
// and tokens are seeded; the sampler's log-probs are -12 as in torch_baseline.py.
func Step(ctx context.Context, dev kernels.Device, o StepOptions) (StepResult, error) {
	cfg, l, err := o.check()
	if err != nil {
		return StepResult{}, err
	}
	info, flops := dev.Info(), UsefulFLOPs(cfg, l)
	r := StepResult{Name: "step", Impl: "trainerd", Device: info.Name, Workers: info.Workers, Shape: o.Shape, Load: o.Load, Attention: attention(dev), Rollouts: l.Rollouts()}
	if o.Floor {
		if r.Floor, err = newFloor(ctx, dev, flops, l.Rollouts()); err != nil {
			return r, err
		}
	}
	clock, ok := dev.(kernels.Profiler)
	if o.Profile && !ok {
		t := kernels.NewTimed(dev)
		dev, clock = t, t
	}
	opt, set, err := o.options(dev, cfg, o.MaxTokens)
	if err != nil {
		return r, err
	}
	r.Formats = o.Formats
	t, err := newTrainee(ctx, dev, cfg, l, opt, set)
	if err != nil {
		return r, err
	}
	defer t.m.Close()
	if r.StepSeconds, err = medianSeconds(o.Repeats, func() error { return t.step(ctx) }); err != nil {
		return r, err
	}
	r.RolloutsS, r.UsefulGFLOP = float64(r.Rollouts)/r.StepSeconds, flops/r.StepSeconds/1e9
	r.Plan, r.PeakBytes = t.m.Plan(), t.peak()
	if r.Floor != nil {
		r.MFU = r.Floor.Seconds / r.StepSeconds
	}
	if o.Profile {
		r.Profile, err = profileSteps(ctx, clock, min(o.Repeats, 3), r.StepSeconds, t.step)
	}
	return r, err
}

func newFloor(ctx context.Context, dev kernels.Device, flops float64, rollouts int) (*Floor, error) {
	c, err := MeasureCeilings(ctx, dev)
	if err != nil {
		return nil, fmt.Errorf("measure ceilings: %w", err)
	}
	s := flops / (c.MatmulTFLOPS * 1e12)
	return &Floor{MatmulTFLOPS: c.MatmulTFLOPS, Seconds: s, RolloutsS: float64(rollouts) / s}, nil
}

// medianSeconds times a run repeatedly, after one that does not count.
func medianSeconds(repeats int, run func() error) (float64, error) {
	var times []float64
	for i := range repeats + 1 {
		start := time.Now()
		if err := run(); err != nil {
			return 0, err
		}
		if i > 0 {
			times = append(times, time.Since(start).Seconds())
		}
	}
	return median(times), nil
}

// groups makes the load's rollouts from a fixed seed; no group has zero variance.
func (l Load) groups(vocab int) []rollout.Group {
	r := rand.New(rand.NewPCG(7, 7))
	ids := func(n int) []int32 {
		out := make([]int32, n)
		for i := range out {
			out[i] = int32(r.IntN(vocab))
		}
		return out
	}
	var out []rollout.Group
	for g, lens := range l.Groups {
		group := rollout.Group{ID: fmt.Sprintf("g%d", g), Prompt: ids(l.Prompt)}
		for _, n := range lens {
			old := make([]float32, n)
			for i := range old {
				old[i] = -12
			}
			group.Rollouts = append(group.Rollouts, rollout.Rollout{GroupID: group.ID, Prompt: group.Prompt, Completion: ids(n),
				Reward: r.NormFloat64(), SamplerLogProbs: old, PolicyStep: rollout.NoPolicyStep})
		}
		out = append(out, group)
	}
	return out
}

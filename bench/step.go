package bench

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sort"
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
	Rollouts    int          `json:"rollouts"`
	StepSeconds float64      `json:"step_s"` // median
	RolloutsS   float64      `json:"rollouts_s"`
	UsefulGFLOP float64      `json:"useful_gflop_s"`
	Plan        kernels.Plan `json:"memory_plan"`
}

// Step times whole SA-GRPO steps (forward, loss, backward, clip, AdamW) of a
// randomly initialised model and returns the median after one warm-up. Rewards
// and tokens are seeded; the sampler's log-probs are -12 as in torch_baseline.py.
func Step(ctx context.Context, dev kernels.Device, shape, load string, repeats, maxTokens int) (StepResult, error) {
	cfg, err := Shape(shape)
	if err != nil {
		return StepResult{}, err
	}
	l, err := LoadByName(load)
	if err != nil {
		return StepResult{}, err
	}
	if repeats < 1 {
		return StepResult{}, fmt.Errorf("repeats is %d, expected 1 or more", repeats)
	}
	src, err := model.NewRandom(cfg, 1)
	if err != nil {
		return StepResult{}, err
	}
	m, err := model.Load(ctx, dev, src, model.Options{Train: true, MaxTokens: maxTokens})
	if err != nil {
		return StepResult{}, err
	}
	defer m.Close()
	obj, opt := sagrpo.DefaultObjective("sa_grpo"), sagrpo.DefaultOptimizer()
	obj.GroupSize = len(l.Groups[0])
	e, err := sagrpo.NewEngine(m, sagrpo.Settings{Objective: obj, Optimizer: opt, MaxTokens: maxTokens})
	if err != nil {
		return StepResult{}, err
	}
	groups := l.groups(cfg.Vocab)
	var times []float64
	for i := range repeats + 1 {
		start := time.Now()
		c, err := e.Consume(ctx, groups, int64(i))
		if err != nil {
			return StepResult{}, err
		}
		for done := false; !done; {
			if _, done, err = c.Next(ctx); err != nil {
				return StepResult{}, err
			}
		}
		if i > 0 {
			times = append(times, time.Since(start).Seconds())
		}
	}
	sort.Float64s(times)
	t := times[len(times)/2]
	info := dev.Info()
	return StepResult{Name: "step", Impl: "trainerd", Device: info.Name, Workers: info.Workers, Shape: shape, Load: load, Rollouts: l.Rollouts(),
		StepSeconds: t, RolloutsS: float64(l.Rollouts()) / t, UsefulGFLOP: UsefulFLOPs(cfg, l) / t / 1e9, Plan: m.Plan()}, nil
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

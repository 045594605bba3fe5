package sagrpo

import (
	"context"
	"fmt"
	"math/rand/v2"
	"testing"

	"trainerd/model"
	"trainerd/rollout"
)

// learn trains a policy on its own samples for the token that its prompt's first
// asks for, over a few micro-batches a step, and returns the mean reward of the
// first and of the last ten steps.
func learn(t *testing.T, moments, gradients string, seed uint64) (first, last float64) {
	t.Helper()
	const steps, prompts, size, tokens = 40, 4, 7, 6
	o := DefaultObjective("")
	o.GroupSize = size
	s := testSettings(o)
	s.Optimizer.LR, s.Optimizer.Moments, s.Optimizer.Gradients = 1e-2, moments, gradients
	m := tinyModel(t, model.Options{Train: true, MaxTokens: s.MaxTokens, SampleSlots: prompts * size, SampleTokens: 512,
		CompactMoments: moments == MomentsCompact, BF16Gradients: gradients == GradientsBFloat, RoundingSeed: seed})
	e, err := NewEngine(m, s)
	if err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(seed, 1))
	for step := range steps {
		var groups []rollout.Group
		req := model.GenerateRequest{N: size, MaxTokens: tokens, Temperature: 1, Seed: seed<<20 + uint64(step), Stop: []int32{}}
		for g := range prompts {
			prompt := []int32{int32(rng.IntN(2)), 5}
			req.Prompts = append(req.Prompts, prompt)
			groups = append(groups, rollout.Group{ID: fmt.Sprint(g), Prompt: prompt})
		}
		out, err := m.Generate(context.Background(), req)
		if err != nil {
			t.Fatal(err)
		}
		mean := 0.0
		for _, c := range out {
			g := &groups[c.Prompt]
			reward := 0.0
			for _, id := range c.Tokens {
				if id%4 == g.Prompt[0] {
					reward += 1.0 / tokens
				}
			}
			mean += reward / float64(len(out))
			g.Rollouts = append(g.Rollouts, rollout.Rollout{GroupID: g.ID, Prompt: g.Prompt, Completion: c.Tokens, Reward: reward, PolicyStep: rollout.NoPolicyStep})
		}
		switch {
		case step < 10:
			first += mean / 10
		case step >= steps-10:
			last += mean / 10
		}
		consume(t, e, groups, int64(step))
	}
	return first, last
}

// TestFormatsLearnAlike: over three seeds every format of moments and gradients
// ends where float32 does. What seeds alone make of float32 is the measure: three
// draws' spread, of which three are allowed below the lowest.
func TestFormatsLearnAlike(t *testing.T) {
	type ends struct{ mean, low, high float64 }
	run := func(moments, gradients string) (e ends) {
		e.low = 1
		for seed := range uint64(3) {
			first, last := learn(t, moments, gradients, seed+1)
			t.Logf("moments %-8s gradients %-8s seed %d: reward %.3f over the first ten steps, %.3f over the last", moments, gradients, seed+1, first, last)
			if last < first+0.2 {
				t.Errorf("moments %s, gradients %s, seed %d: learned nothing", moments, gradients, seed+1)
			}
			e.mean += last / 3
			e.low, e.high = min(e.low, last), max(e.high, last)
		}
		return e
	}
	want := run(Float32, Float32)
	for _, f := range [][2]string{{MomentsCompact, Float32}, {Float32, GradientsBFloat}, {MomentsCompact, GradientsBFloat}} {
		if got := run(f[0], f[1]); got.mean < want.low-3*(want.high-want.low) {
			t.Errorf("moments %s, gradients %s: reward %.3f, float32 has %.3f to %.3f", f[0], f[1], got.mean, want.low, want.high)
		}
	}
}

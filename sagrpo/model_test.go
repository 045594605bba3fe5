package sagrpo

import (
	"context"
	"math"
	"math/rand/v2"
	"testing"
	"time"

	"gorgonia.org/tensor"

	"trainerd/internal/fault"
	"trainerd/kernels/cpu"
	"trainerd/model"
	"trainerd/rollout"
)

// tinyModel is a random decoder on the CPU device, small enough to run hundreds of times.
func tinyModel(t *testing.T, opt model.Options) *model.Model {
	t.Helper()
	cfg := model.Config{Type: "qwen2", Vocab: 31, Hidden: 16, FFN: 24, Layers: 2, Heads: 4, KVHeads: 2, HeadDim: 4,
		MaxPositions: 128, RopeTheta: 1e4, NormEps: 1e-6, Tied: true, QKVBias: true, InitStd: 0.3, BOS: -1}
	src, err := model.NewRandom(cfg, 7)
	if err != nil {
		t.Fatal(err)
	}
	dev, err := cpu.New(2)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dev.Close() })
	m, err := model.Load(context.Background(), dev, src, opt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

// probe is a policy that keeps the gradient of a step and does not take it.
type probe struct {
	*model.Model
	repeat   bool // give every completion its own prompt
	gradient map[string][]float32
	batches  int
}

func (p *probe) Score(b *model.Batch, w model.Weights, temperature float32) (model.Scores, error) {
	return p.Model.Score(p.lay(b), w, temperature)
}

func (p *probe) Accumulate(b *model.Batch, l model.Loss) (model.Scores, error) {
	p.batches++
	return p.Model.Accumulate(p.lay(b), l)
}

func (p *probe) OptimStep(model.AdamW) (model.StepResult, error) {
	src := p.Model.Gradient()
	defer src.Close()
	p.gradient = map[string][]float32{}
	for _, name := range src.Names() {
		shape, _ := src.Shape(name)
		x := tensor.New(tensor.WithShape(shape...), tensor.Of(tensor.Float32))
		if err := src.Read(name, x); err != nil {
			return model.StepResult{}, err
		}
		p.gradient[name] = x.Data().([]float32)
	}
	p.Model.ZeroGrad()
	return model.StepResult{}, nil
}

// lay writes a batch the way other trainers do, with repeat: every completion
// behind its own copy of the prompt, one causal run of tokens each.
func (p *probe) lay(b *model.Batch) *model.Batch {
	if !p.repeat {
		return b
	}
	out := &model.Batch{Targets: b.Targets, Rows: make([]int32, len(b.Rows))}
	moved := make([]int32, len(b.Tokens))
	for _, s := range b.Segments {
		start := len(out.Tokens)
		if s.Prefix >= 0 {
			prompt := b.Segments[s.Prefix]
			out.Tokens = append(out.Tokens, b.Tokens[prompt.Start:prompt.Start+prompt.Len]...)
		}
		for i := range s.Len {
			moved[s.Start+i] = int32(len(out.Tokens))
			out.Tokens = append(out.Tokens, b.Tokens[s.Start+i])
		}
		out.Segments = append(out.Segments, model.Segment{Start: start, Len: len(out.Tokens) - start, Prefix: -1})
		for i := range len(out.Tokens) - start {
			out.Positions = append(out.Positions, int32(i))
		}
	}
	for i, r := range b.Rows {
		out.Rows[i] = moved[r]
	}
	return out
}

// tokenGroups makes groups of real token ids, with sampler's log-probs off the
// model's by steps that keep every ratio, and every mean of up to 8 log-ratios,
// 1e-3 away from the clip bounds in use: rounding must not decide a clip.
func tokenGroups(t *testing.T, rng *rand.Rand, e *Engine, vocab int) []rollout.Group {
	t.Helper()
	var groups []rollout.Group
	draw := func(n int) []int32 {
		x := make([]int32, n)
		for i := range x {
			x[i] = int32(rng.IntN(vocab))
		}
		return x
	}
	for q := range 3 {
		g := rollout.Group{ID: string(rune('a' + q)), Prompt: draw(4 + rng.IntN(8))}
		for range 4 {
			r := rollout.Rollout{Prompt: g.Prompt, Completion: draw(3 + rng.IntN(6)), Reward: rng.Float64() * 2, PolicyStep: 0}
			for range r.Completion {
				r.LossMask = append(r.LossMask, rng.IntN(5) > 0)
			}
			g.Rollouts = append(g.Rollouts, r)
		}
		scores, err := e.Score(context.Background(), g.Rollouts)
		if err != nil {
			t.Fatal(err)
		}
		for i, s := range scores {
			for _, lp := range s.LogProb {
				off := []float32{-0.4, -0.1, 0.1, 0.4}[rng.IntN(4)]
				g.Rollouts[i].SamplerLogProbs = append(g.Rollouts[i].SamplerLogProbs, lp+off)
			}
		}
		groups = append(groups, g)
	}
	return groups
}

// TestGradientInvariance: on a real model the gradient is the same, to 1e-5 of
// each tensor's norm, with the prompt shared or repeated, for any micro-batch
// size and any order of rows.
func TestGradientInvariance(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	m := tinyModel(t, model.Options{Train: true, Reference: true, MaxTokens: 2000})
	for _, name := range []string{"sa_grpo", "grpo", "gspo", "cispo"} {
		o := DefaultObjective(name)
		o.GroupSize, o.Temperature = 4, 0.9
		if name == "gspo" {
			o.EpsilonLow, o.EpsilonHigh = 0.05, 0.05
		}
		if name == "grpo" {
			o.Beta, o.EntropyCoef = 0.05, 0.01
		}
		run := func(groups []rollout.Group, maxTokens int, repeat bool) (map[string][]float32, int) {
			p := &probe{Model: m, repeat: repeat}
			s := testSettings(o)
			s.MaxTokens = maxTokens
			consume(t, newEngine(p, m.Device().Advantages, s), groups, 0)
			return p.gradient, p.batches
		}
		s := testSettings(o)
		s.MaxTokens = 1000
		groups := tokenGroups(t, rng, newEngine(m, m.Device().Advantages, s), m.Config().Vocab)
		want, n := run(groups, 1000, false)
		if n != 1 {
			t.Fatalf("%d micro-batches, expected 1", n)
		}
		for _, c := range []struct {
			title     string
			maxTokens int
			repeat    bool
			shuffle   bool
		}{
			{"prompt repeated", 1000, true, false},
			{"one completion a micro-batch", 18, false, false},
			{"some micro-batches", 30, false, false},
			{"another order", 1000, false, true},
			{"all of it", 30, true, true},
		} {
			gs := append([]rollout.Group(nil), groups...)
			if c.shuffle {
				rng.Shuffle(len(gs), func(i, j int) { gs[i], gs[j] = gs[j], gs[i] })
				for g := range gs {
					rs := append([]rollout.Rollout(nil), gs[g].Rollouts...)
					rng.Shuffle(len(rs), func(i, j int) { rs[i], rs[j] = rs[j], rs[i] })
					gs[g].Rollouts = rs
				}
			}
			got, n := run(gs, c.maxTokens, c.repeat)
			if (n == 1) != (c.maxTokens == 1000) {
				t.Fatalf("%s: %d micro-batches of %d tokens", c.title, n, c.maxTokens)
			}
			worst, where := gap(want, got)
			t.Logf("%s, %s: %.2g", name, c.title, worst)
			if !(worst <= 1e-5) {
				t.Errorf("%s, %s: gradient of %s off by %.2g", name, c.title, where, worst)
			}
		}
	}
}

// gap returns the greatest distance of two gradients over their tensors, relative
// to the tensor's norm or a thousandth of the whole gradient's, whichever is more.
func gap(want, got map[string][]float32) (worst float64, where string) {
	norm := func(x []float32) (s float64) {
		for _, v := range x {
			s += float64(v) * float64(v)
		}
		return math.Sqrt(s)
	}
	all := 0.0
	for _, x := range want {
		all += norm(x) * norm(x)
	}
	all = math.Sqrt(all)
	if all == 0 {
		return math.Inf(1), "everything: it is 0"
	}
	for name, x := range want {
		diff := make([]float32, len(x))
		for i := range x {
			diff[i] = x[i] - got[name][i]
		}
		if r := norm(diff) / math.Max(norm(x), 1e-3*all); !(r <= worst) {
			worst, where = r, name
		}
	}
	return worst, where
}

// TestLearns: a few steps of the real path raise the probability of the rewarded
// completion, for every objective.
func TestLearns(t *testing.T) {
	for _, obj := range objectives {
		o := DefaultObjective(obj.name)
		o.Iterations = 3
		if obj.rule.rewards {
			o.GroupSize, o.Beta, o.Reference = 2, 1e-3, Reference{SyncEverySteps: 4, SyncAlpha: 0.6}
		}
		if obj.rule.sequence {
			o.EpsilonLow, o.EpsilonHigh = 0.2, 0.28
		}
		if obj.name == "dr_grpo" {
			o.MaxCompletionTokens = 4
		}
		s := testSettings(o)
		s.Optimizer.LR = 1e-2
		m := tinyModel(t, model.Options{Train: true, Reference: o.NeedsReference(), MaxTokens: s.MaxTokens})
		e, err := NewEngine(m, s)
		if err != nil {
			t.Fatal(err)
		}
		prompt := []int32{1, 2, 3}
		rows := []rollout.Rollout{
			{Prompt: prompt, Completion: []int32{4, 5, 6}, Reward: 1, PolicyStep: rollout.NoPolicyStep},
			{Prompt: prompt, Completion: []int32{7, 8}, Reward: 0, PolicyStep: rollout.NoPolicyStep},
		}
		if !obj.rule.rewards {
			rows = rows[:1]
		}
		logp := func() (sum float64) {
			scores, err := e.Score(context.Background(), rows[:1])
			if err != nil {
				t.Fatal(err)
			}
			for _, x := range scores[0].LogProb {
				sum += float64(x)
			}
			return sum
		}
		before := logp()
		step := int64(0)
		for range 2 {
			for k, metrics := range consume(t, e, []rollout.Group{{ID: "g", Prompt: prompt, Rollouts: rows}}, step) {
				step++
				if obj.rule.rewards && k == 0 && metrics["ratio/max"] != 1 {
					t.Errorf("%s: ratio/max %v in a first pass, expected exactly 1", obj.name, metrics["ratio/max"])
				}
				if metrics["grad_norm"] <= 0 || metrics["memory_peak_bytes"] <= 0 {
					t.Errorf("%s: metrics %v", obj.name, metrics)
				}
			}
		}
		if m.Steps() != step || step != 6 {
			t.Errorf("%s: %d optimizer steps, %d counted, expected 6", obj.name, m.Steps(), step)
		}
		if after := logp(); !(after > before+0.05) {
			t.Errorf("%s: log-prob of the rewarded completion went from %.3f to %.3f", obj.name, before, after)
		}
	}
}

// TestNewEngineRefuses: settings that are bad, or ask for what the model was not loaded with.
func TestNewEngineRefuses(t *testing.T) {
	m := tinyModel(t, model.Options{MaxTokens: 24})
	trained := tinyModel(t, model.Options{Train: true, MaxTokens: 24})
	good := testSettings(DefaultObjective(""))
	bad, beta := good, good
	bad.Objective.GroupSize = 0
	beta.Objective.Beta = 0.1
	compact, half := good, good
	compact.Optimizer.Moments, half.Optimizer.Gradients = MomentsCompact, GradientsBFloat
	for _, c := range []struct {
		m    *model.Model
		s    Settings
		code string
	}{
		{trained, bad, "invalid_field"}, {m, good, "no_training"}, {trained, beta, "no_reference"},
		{trained, compact, "invalid_field"}, {trained, half, "invalid_field"},
	} {
		_, err := NewEngine(c.m, c.s)
		if f, ok := fault.As(err); !ok || f.Code != c.code {
			t.Errorf("error %v, expected code %s", err, c.code)
		}
	}
	if _, err := NewEngine(trained, good); err != nil {
		t.Error(err)
	}
}

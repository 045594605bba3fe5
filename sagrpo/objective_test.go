package sagrpo

import (
	"context"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"trainerd/internal/fault"
	"trainerd/kernels"
	"trainerd/rollout"
)

// tolerance is relative to the magnitudes that a float32 value was added up
// from. Weight, advantage and factor are rounded once each (2^-24 each), the
// ratio twice, and at most six products and sums follow: under 12 * 2^-24 = 7e-7.
const tolerance = 1e-6

// cancelled is what an advantage of 0 may come to by the rounding of its group's
// mean: rewards are at most 3, so a few times 2^-53, times ratios of at most 10.
const cancelled = 1e-14

func testSettings(o Objective) Settings {
	return Settings{Objective: o, Optimizer: DefaultOptimizer(), MaxTokens: 24}
}

// TestObjectivesAgainstReference holds the loss and every coefficient that the
// engine gives to the model, in every iteration, to the float64 reference given
// identical log-probs; and the reference's formulas to its finite differences.
func TestObjectivesAgainstReference(t *testing.T) {
	plain := shape{sampler: 1}
	cases := []struct {
		name  string
		shape shape
		set   func(*Objective)
		ce    bool // applies to cross_entropy
		cispo bool // applies to cispo
	}{
		{"plain", plain, func(o *Objective) {}, true, true},
		{"no sampler", shape{}, func(o *Objective) {}, true, true},
		{"masks", shape{sampler: 1, masks: true}, func(o *Objective) {}, true, true},
		{"mask truncated", shape{sampler: 1, truncated: true}, func(o *Objective) { o.MaskTruncated = true }, true, true},
		{"truncated kept", shape{sampler: 1, truncated: true}, func(o *Objective) {}, true, true},
		{"delta", plain, func(o *Objective) { o.Delta = 1.5 }, false, false},
		{"no clip range", plain, func(o *Objective) { o.EpsilonLow, o.EpsilonHigh = 0, 0 }, false, false},
		{"wide clip range", plain, func(o *Objective) { o.EpsilonLow, o.EpsilonHigh = 0.1, 0.3 }, false, false},
		{"tight cap", plain, func(o *Objective) {
			if o.RatioCap > 0 {
				o.RatioCap = 1.1
			}
		}, false, true},
		{"beta", plain, func(o *Objective) { o.Beta = 0.04 }, false, true},
		{"entropy", plain, func(o *Objective) { o.EntropyCoef = 0.01 }, true, true},
		{"mixed columns", shape{sampler: 0.5}, func(o *Objective) {}, false, true},
		{"trainer", plain, func(o *Objective) { o.OldLogProbs = OldTrainer }, false, true},
		{"tis", plain, func(o *Objective) { o.OldLogProbs, o.TISCap = OldTrainer, 1.2 }, false, true},
		{"incomplete group", shape{sampler: 1, incomplete: true}, func(o *Objective) {}, false, true},
		{"iterations sampler", shape{sampler: 1, steps: 3}, func(o *Objective) { o.Iterations = 3 }, true, true},
		{"iterations trainer", shape{steps: 3}, func(o *Objective) { o.Iterations = 3 }, true, true},
		{"iterations tis", shape{sampler: 1, steps: 3}, func(o *Objective) {
			o.Iterations, o.OldLogProbs, o.TISCap = 3, OldTrainer, 2
		}, false, true},
		{"weights", shape{weights: true}, func(o *Objective) {}, true, false},
		{"everything", shape{sampler: 0.5, masks: true, truncated: true, incomplete: true, steps: 2}, func(o *Objective) {
			o.Iterations, o.MaskTruncated, o.Beta, o.EntropyCoef = 2, true, 0.1, 0.02
			if o.RatioCap == 0 {
				o.Delta = 1.4
			}
		}, false, true},
	}
	seed := uint64(20251209)
	t.Logf("seed %d", seed)
	dev := device(t)
	for _, obj := range objectives {
		for _, c := range cases {
			ce, cispo := obj.name == "cross_entropy", obj.name == "cispo"
			if ce && !c.ce || cispo && !c.cispo || !ce && c.shape.weights {
				continue
			}
			t.Run(obj.name+"/"+c.name, func(t *testing.T) {
				rng := rand.New(rand.NewPCG(seed, uint64(len(obj.name)*100+len(c.name))))
				o := DefaultObjective(obj.name)
				if !ce {
					o.GroupSize = 5
				}
				if obj.name == "dr_grpo" {
					o.MaxCompletionTokens = 11
				}
				c.set(&o)
				for i := range 4 {
					compare(t, o, newProblem(rng, o, c.shape), dev, i == 0)
				}
			})
		}
	}
}

// compare runs one consumption and checks each of its steps; byDifferences also
// checks the reference itself, which costs a loss per token.
func compare(t *testing.T, o Objective, p *problem, dev func(kernels.Advantages), byDifferences bool) {
	t.Helper()
	if err := testSettings(o).Validate(); err != nil {
		t.Fatal(err)
	}
	fake := p.fake()
	e := newEngine(fake, dev, testSettings(o))
	c, err := e.Consume(context.Background(), p.groups, 10)
	if err != nil {
		t.Fatal(err)
	}
	ref := refOf(o, p.groups)
	ref.trainer, ref.ref, ref.entropy = float64s(p.logp[0]), float64s(p.ref), float64s(p.ent)
	for k := range o.Iterations {
		m, done, err := c.Next(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		if done != (k == o.Iterations-1) {
			t.Fatalf("step %d of %d: done = %v", k+1, o.Iterations, done)
		}
		theta := float64s(p.logp[min(k, len(p.logp)-1)])
		want := ref.loss(theta, ref.entropy, theta)
		if diff := math.Abs(m["loss"] - want.value); !(diff <= tolerance*want.scale+cancelled) {
			t.Errorf("iteration %d: loss %.10g, expected %.10g (off %.2g of %.3g)", k, m["loss"], want.value, diff, want.scale)
		}
		dLogp, dEntropy := ref.gradient(theta)
		for id := range theta {
			if diff := math.Abs(fake.grads[k][id] - dLogp[id].value); !(diff <= tolerance*dLogp[id].scale+cancelled) {
				t.Errorf("iteration %d token %d: dL/dlogp %.10g, expected %.10g", k, id, fake.grads[k][id], dLogp[id].value)
			}
			if diff := math.Abs(fake.entGrads[k][id] - dEntropy[id].value); !(diff <= tolerance*dEntropy[id].scale) {
				t.Errorf("iteration %d token %d: dL/dentropy %.10g, expected %.10g", k, id, fake.entGrads[k][id], dEntropy[id].value)
			}
		}
		if byDifferences {
			differences(t, ref, theta, dLogp, dEntropy)
		}
	}
	if fake.maxTokens > e.set.MaxTokens {
		t.Errorf("a micro-batch has %d tokens, expected at most %d", fake.maxTokens, e.set.MaxTokens)
	}
}

// differences checks the reference's formulas by central differences of its
// loss. With step h the error is of the order h² of the third derivative plus
// 2^-53/h of the loss; h = 1e-5 leaves 1e-9 of the loss's scale. Where a kink of
// min or clip lies within h, the two sides disagree and there is no derivative.
func differences(t *testing.T, s *refStep, theta []float64, dLogp, dEntropy map[int]terms) {
	t.Helper()
	const h = 1e-5
	at := func(x []float64, id int, d float64) []float64 {
		y := slices.Clone(x)
		y[id] += d
		return y
	}
	base := s.loss(theta, s.entropy, theta)
	tol := 1e-8 * (base.scale + 1)
	for id := range theta {
		up := s.loss(at(theta, id, h), s.entropy, theta).value
		down := s.loss(at(theta, id, -h), s.entropy, theta).value
		right, left := (up-base.value)/h, (base.value-down)/h
		if math.Abs(right-left) > 100*h*(base.scale+1) {
			// A kink: the formula must be one of the two sides.
			if math.Min(math.Abs(right-dLogp[id].value), math.Abs(left-dLogp[id].value)) > 100*h*(base.scale+1) {
				t.Errorf("reference token %d: derivative %g at a kink of %g and %g", id, dLogp[id].value, left, right)
			}
		} else if fd := (up - down) / (2 * h); math.Abs(fd-dLogp[id].value) > tol && !kink(s, theta, id, h) {
			t.Errorf("reference token %d: derivative %g, by differences %g", id, dLogp[id].value, fd)
		}
		up = s.loss(theta, at(s.entropy, id, h), theta).value
		down = s.loss(theta, at(s.entropy, id, -h), theta).value
		if fd := (up - down) / (2 * h); math.Abs(fd-dEntropy[id].value) > tol {
			t.Errorf("reference token %d: entropy derivative %g, by differences %g", id, dEntropy[id].value, fd)
		}
	}
}

// kink reports whether the derivative's formula changes within h of theta[id].
func kink(s *refStep, theta []float64, id int, h float64) bool {
	d := func(x float64) float64 {
		moved := slices.Clone(theta)
		moved[id] += x
		g, _ := s.gradient(moved)
		return g[id].value
	}
	return math.Abs(d(h)-d(-h)) > 1e-3*math.Abs(d(0))
}

// TestTieIsUnclipped: with an empty clip range and equal policies both branches
// are equal, and the gradient flows.
func TestTieIsUnclipped(t *testing.T) {
	for _, name := range []string{"sa_grpo", "grpo", "dapo", "gspo"} {
		o := DefaultObjective(name)
		o.GroupSize, o.EpsilonLow, o.EpsilonHigh = 2, 0, 0
		p := &problem{logp: [][]float32{{0, -1, -2}}, ref: make([]float32, 3), ent: make([]float32, 3)}
		p.groups = []rollout.Group{{ID: "g", Prompt: []int32{promptToken}, Rollouts: []rollout.Rollout{
			{Completion: []int32{1}, Reward: 1, SamplerLogProbs: []float32{-1}},
			{Completion: []int32{2}, Reward: 0, SamplerLogProbs: []float32{-2}},
		}}}
		fake := p.fake()
		c, err := newEngine(fake, device(t), testSettings(o)).Consume(context.Background(), p.groups, 0)
		if err != nil {
			t.Fatal(err)
		}
		m, _, err := c.Next(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		if g := fake.grads[0]; !(g[1] < 0 && g[2] > 0) {
			t.Errorf("%s: coefficients %v, expected the first negative and the second positive", name, g[1:])
		}
		if m["clip_ratio/region_mean"] != 0 {
			t.Errorf("%s: clip_ratio/region_mean %v, expected 0", name, m["clip_ratio/region_mean"])
		}
	}
}

// TestOneToken is SA-GRPO by hand: Q = 1, G = 2, rewards 1 and 0, so A = ±1/2.
func TestOneToken(t *testing.T) {
	ln := func(x float64) float32 { return float32(math.Log(x)) }
	for _, c := range []struct {
		name         string
		ratio0       float64 // of the rollout with A = 1/2
		ratio1       float64 // of the one with A = -1/2
		delta        float64
		grad0, grad1 float64
		loss         float64
	}{
		{"on policy", 1, 1, 0, -0.25, 0.25, 0},
		{"inside", 1.2, 0.9, 0, -0.25 * 1.2, 0.25 * 0.9, -0.25*1.2 + 0.25*0.9},
		{"high clip", 1.5, 1, 0, 0, 0.25, -0.25*1.28 + 0.25},
		{"low clip", 1, 0.5, 0, -0.25, 0, -0.25 + 0.25*0.8},
		{"wrong sides are not clipped", 0.5, 1.5, 0, -0.125, 0.375, -0.125 + 0.375},
		{"delta", 0.5, 3, 2, -0.125, 0, -0.125 + 0.5},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := DefaultObjective("")
			o.Delta = c.delta
			p := &problem{logp: [][]float32{{0, -1, -1}}, ref: make([]float32, 3), ent: make([]float32, 3)}
			p.groups = []rollout.Group{{ID: "g", Prompt: []int32{promptToken}, Rollouts: []rollout.Rollout{
				{Completion: []int32{1}, Reward: 1, SamplerLogProbs: []float32{-1 - ln(c.ratio0)}},
				{Completion: []int32{2}, Reward: 0, SamplerLogProbs: []float32{-1 - ln(c.ratio1)}},
			}}}
			fake := p.fake()
			run, err := newEngine(fake, device(t), testSettings(o)).Consume(context.Background(), p.groups, 0)
			if err != nil {
				t.Fatal(err)
			}
			m, _, err := run.Next(context.Background())
			if err != nil {
				t.Fatal(err)
			}
			for i, pair := range [][2]float64{{fake.grads[0][1], c.grad0}, {fake.grads[0][2], c.grad1}, {m["loss"], c.loss}} {
				if math.Abs(pair[0]-pair[1]) > 1e-6 {
					t.Errorf("value %d: %g, expected %g", i, pair[0], pair[1])
				}
			}
		})
	}
}

// TestClipCounts: which ratios count as clipped, and where.
func TestClipCounts(t *testing.T) {
	for _, c := range []struct {
		objective         string
		delta             float64
		g, adv            float64
		low, high, region float64
	}{
		{"sa_grpo", 0, 1.2801, 1, 0, 1, 1},
		{"sa_grpo", 0, 1.28, 1, 0, 0, 0},
		{"sa_grpo", 0, 1.2801, -1, 0, 0, 0},
		{"sa_grpo", 0, 1.2801, 0, 0, 0, 0},
		{"sa_grpo", 0, 0.7999, -1, 1, 0, 1},
		{"sa_grpo", 0, 0.8, -1, 0, 0, 0},
		{"sa_grpo", 0, 0.7999, 1, 0, 0, 0},
		{"sa_grpo", 2, 2.01, -1, 0, 0, 1},
		{"sa_grpo", 2, 2, -1, 0, 0, 0},
		{"sa_grpo", 2, 2.01, 1, 0, 1, 1},
		{"gspo", 0, 1.0005, 1, 0, 1, 1},
		{"gspo", 0, 0.9996, -1, 1, 0, 1},
		{"cispo", 0, 5.01, 1, 0, 1, 1},
		{"cispo", 0, 5.01, -1, 0, 1, 1},
		{"cispo", 0, 5, 1, 0, 0, 0},
	} {
		o := DefaultObjective(c.objective)
		o.Delta = c.delta
		l := newLoss(o)
		var got tally
		got.ratio(c.g, c.adv, &l)
		if want := (tally{n: 1, sum: c.g, max: c.g, low: c.low, high: c.high, region: c.region}); got != want {
			t.Errorf("%s, ratio %v, advantage %v: %+v, expected %+v", c.objective, c.g, c.adv, got, want)
		}
	}
}

// TestNotFinite: a log-prob or ratio that is no number stops the step, names the
// group, and leaves the weights alone.
func TestNotFinite(t *testing.T) {
	nan := float32(math.NaN())
	for _, c := range []struct {
		name, objective, code string
		spoil                 func(*problem)
	}{
		{"log-prob", "sa_grpo", "logprob_not_finite", func(p *problem) { p.logp[0][1] = nan }},
		{"log-prob of a sequence", "gspo", "logprob_not_finite", func(p *problem) { p.logp[0][1] = nan }},
		{"minus infinity", "cross_entropy", "logprob_not_finite", func(p *problem) { p.logp[0][1] = float32(math.Inf(-1)) }},
		{"entropy", "sa_grpo", "entropy_not_finite", func(p *problem) { p.ent[1] = nan }},
		{"ratio", "sa_grpo", "ratio_not_finite", func(p *problem) { p.groups[0].Rollouts[0].SamplerLogProbs[0] = -200 }},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := DefaultObjective(c.objective)
			p := newProblem(rand.New(rand.NewPCG(1, 2)), o, shape{sampler: 1})
			c.spoil(p)
			fake := p.fake()
			run, err := newEngine(fake, device(t), testSettings(o)).Consume(context.Background(), p.groups, 0)
			if err != nil {
				t.Fatal(err)
			}
			_, _, err = run.Next(context.Background())
			f, ok := fault.As(err)
			if !ok || f.Kind != fault.Invalid || f.Code != c.code {
				t.Fatalf("error %v, expected code %s", err, c.code)
			}
			if want := `group "g0", rollout 0, completion token 0`; len(f.Fields) != 1 || f.Fields[0].Name != want {
				t.Errorf("fields %v, expected %s", f.Fields, want)
			}
			if fake.step != 0 || !fake.fresh {
				t.Errorf("%d optimizer steps and gradient kept: %v; expected none of both", fake.step, !fake.fresh)
			}
		})
	}
}

package sagrpo

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"trainerd/internal/fault"
	"trainerd/model"
	"trainerd/rollout"
)

// consume runs a whole consumption and returns the metrics of its steps.
func consume(t *testing.T, e *Engine, groups []rollout.Group, step int64) []Metrics {
	t.Helper()
	c, err := e.Consume(context.Background(), groups, step)
	if err != nil {
		t.Fatal(err)
	}
	var all []Metrics
	for {
		m, done, err := c.Next(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, m)
		if done {
			if m, done, err := c.Next(context.Background()); m != nil || !done || err != nil {
				t.Fatalf("after the last step: %v, %v, %v", m, done, err)
			}
			return all
		}
	}
}

// flatten gives every rollout of some groups the same reward.
func flatten(groups []rollout.Group, which ...int) {
	for _, g := range which {
		for i := range groups[g].Rollouts {
			groups[g].Rollouts[i].Reward = 1.0 / 3
		}
	}
}

// TestNoSignalCostsNothing: groups without variance are not computed unless KL or
// entropy want them, count in the denominators all the same, and a step of such
// groups still runs the optimizer.
func TestNoSignalCostsNothing(t *testing.T) {
	dev := device(t)
	run := func(o Objective, flat ...int) (*fakePolicy, Metrics) {
		p := newProblem(rand.New(rand.NewPCG(3, 4)), o, shape{sampler: 1})
		flatten(p.groups, flat...)
		fake := p.fake()
		s := testSettings(o)
		s.MaxTokens = 1000
		ms := consume(t, newEngine(fake, dev, s), p.groups, 0)
		return fake, ms[0]
	}
	for _, name := range []string{"sa_grpo", "grpo", "gspo", "cispo", "dapo"} {
		o := DefaultObjective(name)
		fake, m := run(o, 0, 1, 2, 3)
		if fake.forward != 0 || fake.scored != 0 {
			t.Errorf("%s: %d passes over groups without signal", name, fake.forward)
		}
		if fake.step != 1 || m["frac_reward_zero_std"] != 1 || m["loss"] != 0 || m["tokens"] != 0 {
			t.Errorf("%s: %d optimizer steps, metrics %v", name, fake.step, m)
		}
		for id, g := range fake.grads[0] {
			if g != 0 {
				t.Fatalf("%s: gradient %g at token %d", name, g, id)
			}
		}
		// Which groups have signal must not change the shares of the others.
		all, _ := run(o)
		some, m := run(o, 0)
		if m["frac_reward_zero_std"] != 0.5 { // problems have one such group anyway
			t.Errorf("%s: frac_reward_zero_std %v, expected 0.5", name, m["frac_reward_zero_std"])
		}
		n := 0
		for id := range all.grads[0] {
			if some.grads[0][id] != 0 && all.grads[0][id] != some.grads[0][id] {
				t.Errorf("%s: token %d: %g, and %g beside a group without signal", name, id, all.grads[0][id], some.grads[0][id])
			}
			if some.grads[0][id] != all.grads[0][id] {
				n++
			}
		}
		if n == 0 {
			t.Errorf("%s: taking a group's signal changed nothing", name)
		}

		o.EntropyCoef = 0.01
		if fake, _ := run(o, 0, 1, 2, 3); fake.forward == 0 {
			t.Errorf("%s: entropy of groups without signal was not computed", name)
		}
		o.EntropyCoef, o.Beta = 0, 0.01
		if fake, _ := run(o, 0, 1, 2, 3); fake.forward == 0 || fake.scored == 0 {
			t.Errorf("%s: KL of groups without signal was not computed", name)
		}
	}
	o := DefaultObjective("cross_entropy")
	if fake, m := run(o, 0, 1, 2, 3); fake.forward == 0 || m["loss"] <= 0 {
		t.Errorf("cross_entropy looks at rewards: %d passes, loss %v", fake.forward, m["loss"])
	}
}

// TestMaskedCostsNothing: a completion without active tokens is not computed.
func TestMaskedCostsNothing(t *testing.T) {
	o := DefaultObjective("")
	o.MaskTruncated = true
	p := newProblem(rand.New(rand.NewPCG(5, 6)), o, shape{})
	tokens := 0
	for g := range p.groups {
		for i := range p.groups[g].Rollouts {
			p.groups[g].Rollouts[i].Truncated = true
		}
	}
	kept := &p.groups[1].Rollouts[2]
	kept.Truncated = false
	tokens = len(p.groups[1].Prompt) + len(kept.Completion) - 1
	m := consume(t, newEngine(p.fake(), device(t), testSettings(o)), p.groups, 0)[0]
	if m["tokens"] != float64(tokens) {
		t.Errorf("%v tokens computed, expected %d", m["tokens"], tokens)
	}
	total := 0
	for _, g := range p.groups {
		total += len(g.Rollouts)
	}
	if got, want := m["completions/clipped_ratio"], float64(total-1)/float64(total); got != want {
		t.Errorf("completions/clipped_ratio %v, expected %v", got, want)
	}
}

// TestFused: objectives of single tokens leave their coefficients to the device
// wherever they can, so that the head runs once.
func TestFused(t *testing.T) {
	dev := device(t)
	for _, c := range []struct {
		objective string
		shape     shape
		set       func(*Objective)
		fused     [2]bool // of the first iteration and of the second
	}{
		{"sa_grpo", shape{sampler: 1}, func(o *Objective) {}, [2]bool{true, true}},
		{"sa_grpo", shape{}, func(o *Objective) {}, [2]bool{true, true}},
		{"cross_entropy", shape{}, func(o *Objective) {}, [2]bool{true, true}},
		{"sa_grpo", shape{sampler: 1}, func(o *Objective) { o.OldLogProbs, o.TISCap = OldTrainer, 2 }, [2]bool{false, true}},
		{"gspo", shape{sampler: 1}, func(o *Objective) {}, [2]bool{false, false}},
	} {
		o := DefaultObjective(c.objective)
		o.Iterations = 2
		c.set(&o)
		p := newProblem(rand.New(rand.NewPCG(7, 8)), o, c.shape)
		fake := p.fake()
		run, err := newEngine(fake, dev, testSettings(o)).Consume(context.Background(), p.groups, 0)
		if err != nil {
			t.Fatal(err)
		}
		for k := range 2 {
			fake.forward, fake.fused = 0, 0
			if _, _, err := run.Next(context.Background()); err != nil {
				t.Fatal(err)
			}
			if got := fake.fused == fake.forward; got != c.fused[k] || fake.forward == 0 {
				t.Errorf("%s %+v, iteration %d: %d of %d passes fused", c.objective, c.shape, k, fake.fused, fake.forward)
			}
		}
		if fake.scored != 0 {
			t.Errorf("%s: %d extra forward passes", c.objective, fake.scored)
		}
	}
}

// TestInvariance: rows in any order and micro-batches of any size give the same
// coefficient to every token, to the float64 addition of one number to 0.
func TestInvariance(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	dev := device(t)
	for _, obj := range objectives {
		o := DefaultObjective(obj.name)
		o.EntropyCoef, o.Iterations = 0.01, 2
		if obj.name == "dr_grpo" {
			o.MaxCompletionTokens = 9
		}
		p := newProblem(rng, o, shape{sampler: 0.5, masks: true, truncated: true, steps: 2, weights: !obj.rule.rewards})
		for g := range p.groups {
			for i := range p.groups[g].Rollouts {
				// None is the mean of others: the sign of a rounding error depends on the order.
				p.groups[g].Rollouts[i].Reward = rng.Float64()
			}
		}
		flatten(p.groups, 2)
		s := testSettings(o)
		base := p.fake()
		s.MaxTokens = 10000
		ms := consume(t, newEngine(base, dev, s), p.groups, 0)
		if base.forward != 2 {
			t.Fatalf("%s: %d micro-batches, expected one a step", obj.name, base.forward)
		}
		for trial := range 6 {
			groups := append([]rollout.Group(nil), p.groups...)
			rng.Shuffle(len(groups), func(i, j int) { groups[i], groups[j] = groups[j], groups[i] })
			for g := range groups {
				rs := append([]rollout.Rollout(nil), groups[g].Rollouts...)
				rng.Shuffle(len(rs), func(i, j int) { rs[i], rs[j] = rs[j], rs[i] })
				groups[g].Rollouts = rs
			}
			s.MaxTokens = 13 + rng.IntN(60)
			fake := p.fake()
			again := consume(t, newEngine(fake, dev, s), groups, 0)
			for k := range base.grads {
				for id := range base.grads[k] {
					a, b := base.grads[k][id], fake.grads[k][id]
					// Another order of summing rewards moves an advantage in its last bits,
					// which may round the other way to float32.
					if math.Abs(a-b) > 2e-7*math.Abs(a)+cancelled {
						t.Fatalf("%s, trial %d, step %d, token %d: %g became %g with %d tokens a micro-batch", obj.name, trial, k, id, a, b, s.MaxTokens)
					}
				}
				for name, v := range ms[k] {
					if w, ok := again[k][name]; !IsTiming(name) && name != "tokens" && (!ok || math.Abs(v-w) > 1e-6*(1+math.Abs(v))) {
						t.Errorf("%s: metric %s went from %v to %v", obj.name, name, v, w)
					}
				}
			}
		}
	}
}

// TestMetricNames: every name that people know is there after a step, and
// nothing that is not documented.
func TestMetricNames(t *testing.T) {
	known := strings.Fields(`loss reward/mean reward/std reward/format/mean reward/penalty/mean frac_reward_zero_std
		advantage/mean advantage/min advantage/max ratio/mean ratio/max
		clip_ratio/low_mean clip_ratio/high_mean clip_ratio/region_mean kl kl/reference entropy grad_norm lr
		completions/mean_length completions/min_length completions/max_length completions/clipped_ratio
		sampling/logp_difference_mean sampling/logp_difference_max sampling/ess policy_lag/mean policy_lag/max tokens
		tokens_per_second mfu step_time memory_peak_bytes`)
	absent := map[string][]string{
		"cross_entropy": strings.Fields(`reward/mean reward/std reward/format/mean reward/penalty/mean frac_reward_zero_std
			advantage/mean advantage/min advantage/max ratio/mean ratio/max
			clip_ratio/low_mean clip_ratio/high_mean clip_ratio/region_mean kl kl/reference`),
	}
	dev := device(t)
	for _, obj := range objectives {
		o := DefaultObjective(obj.name)
		if obj.rule.rewards {
			o.Beta = 0.01
		}
		if obj.name == "dr_grpo" {
			o.MaxCompletionTokens = 9
		}
		o.Iterations = 2
		p := newProblem(rand.New(rand.NewPCG(9, 10)), o, shape{sampler: 1, steps: 2})
		s := testSettings(o)
		s.PeakFLOPS = 1e12
		e := newEngine(p.fake(), dev, s)
		e.cost = cost{token: 100, prediction: 10, pair: 1}
		e.memory = func() int64 { return 12345 }
		for k, m := range consume(t, e, p.groups, 7) {
			want := map[string]bool{}
			for _, name := range known {
				want[name] = true
			}
			for _, name := range absent[obj.name] {
				delete(want, name)
			}
			got := map[string]bool{}
			for name, v := range m {
				got[name] = true
				if !finite(v) {
					t.Errorf("%s: %s is %v", obj.name, name, v)
				}
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("%s, step %d: names (-want +got):\n%s", obj.name, k, diff)
			}
			if m["memory_peak_bytes"] != 12345 || m["mfu"] <= 0 {
				t.Errorf("%s: memory_peak_bytes %v, mfu %v", obj.name, m["memory_peak_bytes"], m["mfu"])
			}
		}
	}
	for _, name := range known {
		if want := slices.Contains([]string{"tokens_per_second", "mfu", "step_time", "memory_peak_bytes"}, name); IsTiming(name) != want {
			t.Errorf("IsTiming(%q) = %v", name, !want)
		}
	}
}

// TestMetricValues is one step by hand.
func TestMetricValues(t *testing.T) {
	ln := func(x float64) float32 { return float32(math.Log(x)) }
	o := DefaultObjective("")
	o.GroupSize = 2
	p := &problem{logp: [][]float32{{0, -1, -1, -2, -1}}, ref: make([]float32, 5), ent: []float32{0, 1, 2, 3, 4}}
	p.groups = []rollout.Group{
		{ID: "a", Prompt: []int32{0, 0, 0}, Components: []string{"format", "style"}, Rollouts: []rollout.Rollout{
			{Completion: []int32{1}, Reward: 3, Components: []float64{1, 0.5}, SamplerLogProbs: []float32{-1 - ln(2)}, PolicyStep: 4},
			{Completion: []int32{2, 3}, Reward: 1, Components: []float64{0, 1}, SamplerLogProbs: []float32{-1 - ln(0.5), -2}, PolicyStep: rollout.NoPolicyStep, Truncated: true},
		}},
		{ID: "b", Prompt: []int32{0}, Rollouts: []rollout.Rollout{
			{Completion: []int32{4}, Reward: 0, PolicyStep: 1}, {Completion: []int32{4}, Reward: 0, PolicyStep: 5},
		}},
	}
	s := testSettings(o)
	s.Optimizer.Schedule = Schedule{Name: "linear", DecaySteps: 12}
	fake := p.fake()
	e := newEngine(fake, device(t), s)
	clock := time.Unix(0, 0)
	e.now = func() time.Time { clock = clock.Add(time.Second); return clock }
	m := consume(t, e, p.groups, 6)[0]
	third := 1.0 / 3
	half := math.Log(2) // k3 at ratio 2: 1/2 + ln 2 - 1; at ratio 1/2: 2 - ln 2 - 1
	want := Metrics{
		// Group a: A = 1 and -1; G = Q = 2. Token 1 is clipped high, token 2 low.
		"loss":        -(1.28 - 0.8 - 1) / 4,
		"reward/mean": 1, "reward/std": math.Sqrt2 / 2, "reward/format/mean": 0.5, "reward/style/mean": 0.75,
		"frac_reward_zero_std": 0.5, "advantage/mean": 0, "advantage/min": -1, "advantage/max": 1,
		"ratio/mean": 3.5 / 3, "ratio/max": 2,
		"clip_ratio/low_mean": third, "clip_ratio/high_mean": third, "clip_ratio/region_mean": 2 * third,
		"kl": (0.5 + half - 1 + 2 - half - 1) / 3, "entropy": 2, "grad_norm": 1, "lr": 1.5e-6,
		"completions/mean_length": 1.25, "completions/min_length": 1, "completions/max_length": 2, "completions/clipped_ratio": 0.25,
		"sampling/logp_difference_mean": 2 * half / 3, "sampling/logp_difference_max": half, "sampling/ess": 3.5 * 3.5 / 5.25 / 3,
		"policy_lag/mean": 8.0 / 3, "policy_lag/max": 5, "tokens": 4,
		"step_time": 2, "tokens_per_second": 2, "memory_peak_bytes": 0, // two readings a second apart in Consume, two in Next
	}
	if len(m) != len(want) {
		t.Errorf("%d metrics, expected %d: %v", len(m), len(want), m)
	}
	for name, w := range want {
		if v, ok := m[name]; !ok || math.Abs(v-w) > 1e-6 {
			t.Errorf("%s = %v, expected %v", name, v, w)
		}
	}
	if diff := cmp.Diff(model.AdamW{LR: 1.5e-6, Beta1: 0.9, Beta2: 0.95, Eps: 1e-8, MaxGradNorm: 1}, fake.optim[0]); diff != "" {
		t.Errorf("optimizer (-want +got):\n%s", diff)
	}
}

// TestReferenceSync: after every n-th step of the job, and then the reference's
// log-probs are computed anew; otherwise once for all iterations.
func TestReferenceSync(t *testing.T) {
	o := DefaultObjective("")
	o.Beta, o.Iterations, o.Reference = 0.1, 4, Reference{SyncEverySteps: 3, SyncAlpha: 0.25}
	p := newProblem(rand.New(rand.NewPCG(11, 12)), o, shape{})
	s := testSettings(o)
	s.MaxTokens = 10000
	fake := p.fake()
	consume(t, newEngine(fake, device(t), s), p.groups, 1) // steps 2, 3 (sync), 4, 5
	if diff := cmp.Diff(map[int]float32{2: 0.25}, fake.synced); diff != "" {
		t.Errorf("syncs (-want +got):\n%s", diff)
	}
	if fake.scored != 2 {
		t.Errorf("the reference was scored %d times, expected 2", fake.scored)
	}
}

// TestTemperature: the same in every pass.
func TestTemperature(t *testing.T) {
	o := DefaultObjective("gspo")
	o.Beta, o.Temperature = 0.1, 0.7
	p := newProblem(rand.New(rand.NewPCG(13, 14)), o, shape{})
	fake := p.fake()
	e := newEngine(fake, device(t), testSettings(o))
	consume(t, e, p.groups, 0)
	if _, err := e.Score(context.Background(), []rollout.Rollout{{Prompt: []int32{0}, Completion: []int32{1}}}); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(map[float32]bool{0.7: true}, fake.temps); diff != "" {
		t.Errorf("temperatures (-want +got):\n%s", diff)
	}
}

// TestRetry: a step that was cancelled or refused leaves nothing behind, and
// going on gives what an undisturbed run gives.
func TestRetry(t *testing.T) {
	o := DefaultObjective("")
	o.Iterations = 2
	p := newProblem(rand.New(rand.NewPCG(15, 16)), o, shape{steps: 2})
	dev := device(t)
	calm := p.fake()
	want := consume(t, newEngine(calm, dev, testSettings(o)), p.groups, 0)

	fake := p.fake()
	run, err := newEngine(fake, dev, testSettings(o)).Consume(context.Background(), p.groups, 0)
	if err != nil {
		t.Fatal(err)
	}
	for k := range 2 {
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		if _, _, err := run.Next(ctx); !errors.Is(err, context.Canceled) {
			t.Fatalf("cancelled step: error %v", err)
		}
		fake.optimErr = fault.New(fault.Invalid, "gradient_not_finite", "tensor w")
		if _, _, err := run.Next(context.Background()); !errors.Is(err, fake.optimErr) || fault.KindOf(err) != fault.Invalid {
			t.Fatalf("refused step: error %v", err)
		}
		fake.optimErr = nil
		m, _, err := run.Next(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		if m["loss"] != want[k]["loss"] {
			t.Errorf("step %d: loss %v after a retry, expected %v", k, m["loss"], want[k]["loss"])
		}
		if diff := cmp.Diff(calm.grads[k], fake.grads[k]); diff != "" {
			t.Errorf("step %d: gradient after a retry (-want +got):\n%s", k, diff)
		}
	}
}

// TestConsumeRefuses: what intake should have refused, named.
func TestConsumeRefuses(t *testing.T) {
	nan := float32(math.NaN())
	for _, c := range []struct {
		field string
		set   func(*Objective, *rollout.Rollout)
	}{
		{"reward", func(o *Objective, r *rollout.Rollout) { r.Reward = math.NaN() }},
		{"completion_tokens", func(o *Objective, r *rollout.Rollout) { r.Completion = nil }},
		{"loss_mask", func(o *Objective, r *rollout.Rollout) { r.LossMask = []bool{true} }},
		{"sampler_logprobs", func(o *Objective, r *rollout.Rollout) { r.SamplerLogProbs = []float32{-1} }},
		{"sampler_logprobs[1]", func(o *Objective, r *rollout.Rollout) { r.SamplerLogProbs = []float32{-1, nan} }},
		{"sampler_logprobs", func(o *Objective, r *rollout.Rollout) { o.OldLogProbs = OldSampler }},
		{"sampler_logprobs", func(o *Objective, r *rollout.Rollout) { o.OldLogProbs, o.TISCap = OldTrainer, 2 }},
		{"loss_weights", func(o *Objective, r *rollout.Rollout) { r.LossWeights = []float32{1, 1} }},
		{"loss_weights", func(o *Objective, r *rollout.Rollout) {
			*o = DefaultObjective("cross_entropy")
			r.LossWeights = []float32{1}
		}},
		{"loss_weights[0]", func(o *Objective, r *rollout.Rollout) {
			*o = DefaultObjective("cross_entropy")
			r.LossWeights = []float32{-1, 1}
		}},
	} {
		o := DefaultObjective("")
		r := rollout.Rollout{Completion: []int32{1, 2}, Reward: 1}
		c.set(&o, &r)
		p := &problem{logp: [][]float32{{0, -1, -1}}, ref: make([]float32, 3), ent: make([]float32, 3)}
		groups := []rollout.Group{{ID: "g7", Prompt: []int32{0}, Rollouts: []rollout.Rollout{r}}}
		_, err := newEngine(p.fake(), device(t), testSettings(o)).Consume(context.Background(), groups, 0)
		f, ok := fault.As(err)
		if !ok || f.Kind != fault.Invalid || len(f.Fields) != 1 || f.Fields[0].Name != c.field || !strings.Contains(f.Error(), `"g7"`) {
			t.Errorf("%s: error %v", c.field, err)
		}
	}
	e := newEngine(&fakePolicy{}, device(t), testSettings(DefaultObjective("")))
	for name, groups := range map[string][]rollout.Group{"none": nil, "empty": {{ID: "g"}}} {
		if _, err := e.Consume(context.Background(), groups, 0); fault.KindOf(err) != fault.Invalid {
			t.Errorf("%s: error %v, expected an invalid fault", name, err)
		}
	}
}

// TestMaskedSamplerValuesAreIgnored: NaN where the loss is masked does no harm.
func TestMaskedSamplerValuesAreIgnored(t *testing.T) {
	o := DefaultObjective("")
	p := newProblem(rand.New(rand.NewPCG(17, 18)), o, shape{sampler: 1, masks: true})
	seen := false
	for _, g := range p.groups {
		for _, r := range g.Rollouts {
			for t := range r.SamplerLogProbs {
				seen = seen || r.SamplerLogProbs[t] != r.SamplerLogProbs[t]
			}
		}
	}
	if !seen {
		t.Fatal("the problem has no NaN")
	}
	fake := p.fake()
	consume(t, newEngine(fake, device(t), testSettings(o)), p.groups, 0)
	for id, g := range fake.grads[0] {
		if !finite(g) {
			t.Errorf("token %d: gradient %v", id, g)
		}
	}
}

func TestScore(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	p := &problem{logp: [][]float32{{0, 0, 0}}, ref: make([]float32, 3), ent: make([]float32, 3)}
	var rows []rollout.Rollout
	var want []model.Scores
	for range 40 {
		r := rollout.Rollout{Prompt: [][]int32{{1}, {1, 2}, {2, 1, 1}, {0}}[rng.IntN(4)], LossMask: []bool{false}}
		var s model.Scores
		for range 1 + rng.IntN(6) {
			r.Completion = append(r.Completion, int32(len(p.ent)))
			p.logp[0] = append(p.logp[0], -rng.Float32())
			p.ent = append(p.ent, rng.Float32())
			s.LogProb = append(s.LogProb, p.logp[0][len(p.ent)-1])
			s.Entropy = append(s.Entropy, p.ent[len(p.ent)-1])
		}
		rows, want = append(rows, r), append(want, s)
	}
	for _, maxTokens := range []int{8, 20, 1000} {
		s := testSettings(DefaultObjective(""))
		s.MaxTokens = maxTokens
		fake := p.fake()
		got, err := newEngine(fake, device(t), s).Score(context.Background(), rows)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%d tokens a micro-batch (-want +got):\n%s", maxTokens, diff)
		}
		if maxTokens == 1000 && fake.scored != 1 {
			t.Errorf("%d micro-batches, expected 1", fake.scored)
		}
	}
	e := newEngine(p.fake(), device(t), testSettings(DefaultObjective("")))
	for field, bad := range map[string]rollout.Rollout{
		"prompt_tokens":     {Completion: []int32{1}},
		"completion_tokens": {Prompt: []int32{1}},
	} {
		_, err := e.Score(context.Background(), append(rows[:3:3], bad))
		if f, ok := fault.As(err); !ok || len(f.Fields) != 1 || f.Fields[0].Name != field || f.Fields[0].Row != 3 {
			t.Errorf("%s: error %v, expected row 3 named", field, err)
		}
	}
	if _, err := e.Score(context.Background(), []rollout.Rollout{{Prompt: make([]int32, 20), Completion: make([]int32, 6)}}); fault.KindOf(err) != fault.Invalid {
		t.Errorf("row over the limit: error %v", err)
	}
	if got, err := e.Score(context.Background(), nil); err != nil || len(got) != 0 {
		t.Errorf("no rows: %v, %v", got, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := e.Score(ctx, rows); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: error %v", err)
	}
}

// TestCost counts the arithmetic of a tiny decoder by hand.
func TestCost(t *testing.T) {
	c := costOf(model.Config{Vocab: 10, Hidden: 4, FFN: 6, Layers: 2, Heads: 2, KVHeads: 1, HeadDim: 3})
	// A layer's weights: q 4*6, k and v 4*3 each, o 6*4, gate, up and down 4*6 each.
	if want := (cost{token: 2 * 2 * (24 + 12 + 12 + 24 + 72), prediction: 2 * 4 * 10, pair: 2 * 4 * 6}); c != want {
		t.Errorf("cost %+v, expected %+v", c, want)
	}
	b := model.Batch{Tokens: make([]int32, 6), Rows: make([]int32, 4), Segments: []model.Segment{{Start: 0, Len: 3, Prefix: -1}, {Start: 3, Len: 2, Prefix: 0}, {Start: 5, Len: 1, Prefix: 0}}}
	pairs := float64(6 + 2*3 + 3 + 3 + 1)
	if got, want := c.forward(&b), 6*c.token+4*c.prediction+pairs*c.pair; got != want {
		t.Errorf("forward pass of %v operations, expected %v", got, want)
	}
}

func ExampleDefaultObjective() {
	o := DefaultObjective("bnpo")
	fmt.Println(o.Name, o.GroupSize, o.EpsilonLow, o.EpsilonHigh)
	// Output: dapo 7 0.2 0.28
}

func TestAllFinite(t *testing.T) {
	inf := float32(math.Inf(1))
	for _, x := range [][]float32{nil, {0}, {-1, math.MaxFloat32, -math.MaxFloat32, math.SmallestNonzeroFloat32}} {
		if !allFinite(x) {
			t.Errorf("%v: refused", x)
		}
	}
	for _, bad := range []float32{inf, -inf, float32(math.NaN()), math.Float32frombits(0xFF800001)} {
		for at := range 9 { // they are looked at by four
			x := []float32{-1, -2, -3, -4, -5, -6, -7, -8, -9}
			x[at] = bad
			if allFinite(x) {
				t.Errorf("%v passed", x)
			}
		}
	}
}

// TestReleasedMemory consumes other groups in the memory of consumptions that were
// released, and one in between that was not: gradients and metrics are those of
// fresh engines, and what is still held does not change.
func TestReleasedMemory(t *testing.T) {
	rng := rand.New(rand.NewPCG(23, 29))
	dev := device(t)
	o := DefaultObjective("sa_grpo")
	s := testSettings(o)
	var kept *Consumption
	var before [][]int32
	var engine *Engine
	for round := range 12 {
		p := newProblem(rng, o, shape{sampler: 1, masks: round%3 == 0})
		fresh := p.fake()
		want := consume(t, newEngine(fresh, dev, s), p.groups, 0)

		fake := p.fake()
		if engine == nil {
			engine = newEngine(fake, dev, s)
		}
		engine.policy = fake
		c, err := engine.Consume(t.Context(), p.groups, 0)
		if err != nil {
			t.Fatal(err)
		}
		m, done, err := c.Next(t.Context())
		if err != nil || !done {
			t.Fatal(done, err)
		}
		for name, v := range want[0] {
			if !IsTiming(name) && m[name] != v {
				t.Errorf("round %d: metric %s is %v, in fresh memory %v", round, name, m[name], v)
			}
		}
		for id, v := range fresh.grads[0] {
			if fake.grads[0][id] != v {
				t.Errorf("round %d: gradient of token %d is %v, in fresh memory %v", round, id, fake.grads[0][id], v)
			}
		}
		if round == 5 { // somebody still looks at this one
			kept = c
			for i := range c.micros {
				before = append(before, slices.Clone(c.micros[i].batch.Tokens))
			}
			continue
		}
		c.Release()
		c.Release()
		if _, done, err := c.Next(t.Context()); !done || err != nil {
			t.Errorf("a released consumption: %v, %v", done, err)
		}
	}
	for i := range before {
		if !slices.Equal(before[i], kept.micros[i].batch.Tokens) {
			t.Errorf("micro-batch %d of a consumption that was not released has changed", i)
		}
	}
	if len(before) == 0 || cap(engine.spare.tokens) == 0 {
		t.Error("nothing was kept, or nothing given back")
	}
}

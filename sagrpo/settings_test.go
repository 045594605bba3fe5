package sagrpo

import (
	"encoding/json"
	"math"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"trainerd/internal/fault"
)

// names returns the fields of an Invalid fault, nil of no error.
func names(t *testing.T, err error) []string {
	t.Helper()
	if err == nil {
		return nil
	}
	f, ok := fault.As(err)
	if !ok || f.Kind != fault.Invalid {
		t.Fatalf("error %v, expected an invalid fault", err)
	}
	var out []string
	for _, field := range f.Fields {
		if field.Got == "" || field.Expected == "" {
			t.Errorf("field %+v says not what it got or what was expected", field)
		}
		if !slices.Contains(out, field.Name) {
			out = append(out, field.Name)
		}
	}
	return out
}

func TestDefaults(t *testing.T) {
	base := Objective{Name: "sa_grpo", GroupSize: 7, EpsilonLow: 0.2, EpsilonHigh: 0.28, Iterations: 1, Temperature: 1,
		RewardWeights: map[string]float64{"format": 1, "execution": 1, "evaluation": 1, "penalty": -1}}
	want := map[string]Objective{}
	for name, change := range map[string]func(*Objective){
		"": func(o *Objective) {}, "sa_grpo": func(o *Objective) {},
		"grpo": func(o *Objective) { o.Name = "grpo" }, "dr_grpo": func(o *Objective) { o.Name = "dr_grpo" },
		"dapo": func(o *Objective) { o.Name = "dapo" }, "bnpo": func(o *Objective) { o.Name = "dapo" },
		"gspo":          func(o *Objective) { o.Name, o.EpsilonLow, o.EpsilonHigh = "gspo", 3e-4, 4e-4 },
		"cispo":         func(o *Objective) { o.Name, o.EpsilonLow, o.EpsilonHigh, o.RatioCap = "cispo", 0, 0, 5 },
		"cross_entropy": func(o *Objective) { *o = Objective{Name: "cross_entropy", GroupSize: 1, Iterations: 1, Temperature: 1} },
	} {
		o := base
		change(&o)
		want[name] = o
	}
	for name, o := range want {
		if diff := cmp.Diff(o, DefaultObjective(name)); diff != "" {
			t.Errorf("defaults of %q (-want +got):\n%s", name, diff)
		}
		raw, _ := json.Marshal(map[string]string{"name": name})
		if name == "" {
			raw = nil
		}
		got, err := ParseObjective(raw)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(o, got); diff != "" {
			t.Errorf("parsed %s (-want +got):\n%s", raw, diff)
		}
		if name == "dr_grpo" {
			got.MaxCompletionTokens = 64
		}
		if err := got.Validate(); err != nil {
			t.Errorf("defaults of %q: %v", name, err)
		}
		again, err := json.Marshal(got)
		if err != nil {
			t.Fatal(err)
		}
		back, err := ParseObjective(again)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(got, back); diff != "" {
			t.Errorf("written and read back, %q (-want +got):\n%s", name, diff)
		}
		if err := back.Validate(); err != nil {
			t.Errorf("written and read back, %q: %v", name, err)
		}
	}
	wantOpt := Optimizer{Name: "adamw", LR: 3e-6, Betas: [2]float64{0.9, 0.95}, Eps: 1e-8, MaxGradNorm: 1, Moments: "float32", MomentsIn: "device", Gradients: "float32", Schedule: Schedule{Name: "constant"}}
	got, err := ParseOptimizer(json.RawMessage(`null`))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(wantOpt, got); diff != "" {
		t.Errorf("optimizer (-want +got):\n%s", diff)
	}
}

// TestGivenIsNotAbsent: a 0 that is given is kept, an absent or null field has its default.
func TestGivenIsNotAbsent(t *testing.T) {
	o, err := ParseObjective(json.RawMessage(`{"epsilon_high": 0, "group_size": null, "reward_weights": {"style": 2}, "beta": 0.1}`))
	if err != nil {
		t.Fatal(err)
	}
	want := DefaultObjective("sa_grpo")
	want.EpsilonHigh, want.RewardWeights, want.Beta = 0, map[string]float64{"style": 2}, 0.1
	want.Reference = Reference{SyncEverySteps: 512, SyncAlpha: 0.6}
	if diff := cmp.Diff(want, o); diff != "" {
		t.Errorf("objective (-want +got):\n%s", diff)
	}
	for raw, ref := range map[string]Reference{
		`{"beta": 0.1, "reference": {"sync_every_steps": 0}}`:                    {},
		`{"beta": 0.1, "reference": {"sync_every_steps": 9}}`:                    {SyncEverySteps: 9, SyncAlpha: 0.6},
		`{"beta": 0.1, "reference": {"sync_alpha": 0.5}}`:                        {SyncEverySteps: 512, SyncAlpha: 0.5},
		`{"beta": 0.1, "reference": {"sync_alpha": 1, "sync_every_steps": 2}}`:   {SyncEverySteps: 2, SyncAlpha: 1},
		`{"beta": 0, "reference": {"sync_alpha": 0, "sync_every_steps": 0}}`:     {},
		`{"beta": 0.1, "reference": {"sync_alpha": null}, "reward_weights": {}}`: {SyncEverySteps: 512, SyncAlpha: 0.6},
	} {
		o, err := ParseObjective(json.RawMessage(raw))
		if err != nil {
			t.Fatal(err)
		}
		if o.Reference != ref {
			t.Errorf("%s: reference %+v, expected %+v", raw, o.Reference, ref)
		}
		if err := o.Validate(); err != nil {
			t.Errorf("%s: %v", raw, err)
		}
	}
	opt, err := ParseOptimizer(json.RawMessage(`{"max_grad_norm": 0, "betas": [0, 0.5], "schedule": {"name": "cosine", "decay_steps": 10}}`))
	if err != nil {
		t.Fatal(err)
	}
	wantOpt := DefaultOptimizer()
	wantOpt.MaxGradNorm, wantOpt.Betas, wantOpt.Schedule = 0, [2]float64{0, 0.5}, Schedule{Name: "cosine", DecaySteps: 10}
	if diff := cmp.Diff(wantOpt, opt); diff != "" {
		t.Errorf("optimizer (-want +got):\n%s", diff)
	}
}

// TestOptimizerOfOldRecords: a record from before moments and gradients had a format has float32 ones.
func TestOptimizerOfOldRecords(t *testing.T) {
	for raw, want := range map[string][2]string{
		`{"name": "adamw"}`:                       {"float32", "float32"},
		`{"name": "adamw", "moments": "compact"}`: {"compact", "float32"},
		`{"gradients": "bfloat16"}`:               {"float32", "bfloat16"},
	} {
		var o Optimizer
		if err := json.Unmarshal([]byte(raw), &o); err != nil || [2]string{o.Moments, o.Gradients} != want {
			t.Errorf("%s: moments %q, gradients %q, %v", raw, o.Moments, o.Gradients, err)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	objective := func(raw string) error { _, err := ParseObjective(json.RawMessage(raw)); return err }
	optimizer := func(raw string) error { _, err := ParseOptimizer(json.RawMessage(raw)); return err }
	for _, c := range []struct {
		parse func(string) error
		raw   string
		want  []string
	}{
		{objective, `{"groupsize": 7}`, []string{"objective.groupsize"}},
		{objective, `{"Group_Size": 7}`, []string{"objective.Group_Size"}}, // names are exact
		{objective, `{"group_size": "7", "epsilon_lo": 1, "beta": []}`, []string{"objective.beta", "objective.epsilon_lo", "objective.group_size"}},
		{objective, `{"group_size": 7.5}`, []string{"objective.group_size"}},
		{objective, `{"group_size": 1e99}`, []string{"objective.group_size"}},
		{objective, `{"epsilon_low": 1e999}`, []string{"objective.epsilon_low"}},
		{objective, `{"name": 3}`, []string{"objective.name"}},
		{objective, `{"mask_truncated": 1}`, []string{"objective.mask_truncated"}},
		{objective, `{"reward_weights": {"format": "much"}}`, []string{"objective.reward_weights"}},
		{objective, `{"reference": {"sync": 3, "sync_alpha": true}}`, []string{"objective.reference.sync", "objective.reference.sync_alpha"}},
		{objective, `{"reference": 7}`, []string{"objective.reference"}},
		{objective, `[1]`, []string{"objective"}},
		{objective, `"sa_grpo"`, []string{"objective"}},
		{optimizer, `{"lr": "small", "momentum": 0.9}`, []string{"optimizer.lr", "optimizer.momentum"}},
		{optimizer, `{"betas": [0.9]}`, []string{"optimizer.betas"}},
		{optimizer, `{"betas": [0.9, 0.95, 0.99]}`, []string{"optimizer.betas"}},
		{optimizer, `{"betas": [0.9, null]}`, []string{"optimizer.betas"}},
		{optimizer, `{"schedule": {"kind": "cosine", "warmup_steps": 1.5}}`, []string{"optimizer.schedule.kind", "optimizer.schedule.warmup_steps"}},
	} {
		if diff := cmp.Diff(c.want, names(t, c.parse(c.raw))); diff != "" {
			t.Errorf("%s: bad fields (-want +got):\n%s", c.raw, diff)
		}
	}
	for _, raw := range []string{`{"name": `, `{]`} {
		if err := objective(raw); fault.KindOf(err) != fault.Malformed {
			t.Errorf("%s: error %v, expected a malformed fault", raw, err)
		}
		if err := optimizer(raw); fault.KindOf(err) != fault.Malformed {
			t.Errorf("%s: error %v, expected a malformed fault", raw, err)
		}
	}
}

// TestValidateRefuses lists every combination that makes no sense, with all the
// fields that the fault must name and no others.
func TestValidateRefuses(t *testing.T) {
	nan, inf := math.NaN(), math.Inf(1)
	type change = func(*Settings)
	for _, c := range []struct {
		title     string
		objective string
		set       change
		want      []string
	}{
		{"unknown name", "sa_grpo", func(s *Settings) { s.Objective.Name = "ppo" }, []string{"objective.name"}},
		{"empty name", "sa_grpo", func(s *Settings) { s.Objective.Name = "" }, []string{"objective.name"}},
		{"no group", "sa_grpo", func(s *Settings) { s.Objective.GroupSize = 0 }, []string{"objective.group_size"}},
		{"grpo of one", "grpo", func(s *Settings) { s.Objective.GroupSize = 1 }, []string{"objective.group_size"}},
		{"dapo of one", "dapo", func(s *Settings) { s.Objective.GroupSize = 1 }, []string{"objective.group_size"}},
		{"gspo of one", "gspo", func(s *Settings) { s.Objective.GroupSize = 1 }, []string{"objective.group_size"}},
		{"cispo of one", "cispo", func(s *Settings) { s.Objective.GroupSize = 1 }, []string{"objective.group_size"}},
		{"cross_entropy of many", "cross_entropy", func(s *Settings) { s.Objective.GroupSize = 7 }, []string{"objective.group_size"}},
		{"negative epsilons", "sa_grpo", func(s *Settings) { s.Objective.EpsilonLow, s.Objective.EpsilonHigh = -0.1, -0.1 }, []string{"objective.epsilon_low", "objective.epsilon_high"}},
		{"epsilon_low of one", "sa_grpo", func(s *Settings) { s.Objective.EpsilonLow = 1 }, []string{"objective.epsilon_low"}},
		{"epsilons no number", "gspo", func(s *Settings) { s.Objective.EpsilonLow, s.Objective.EpsilonHigh = nan, inf }, []string{"objective.epsilon_low", "objective.epsilon_high"}},
		{"epsilons with cispo", "cispo", func(s *Settings) { s.Objective.EpsilonLow, s.Objective.EpsilonHigh = 0.2, 0.28 }, []string{"objective.epsilon_low", "objective.epsilon_high"}},
		{"epsilons with cross_entropy", "cross_entropy", func(s *Settings) { s.Objective.EpsilonLow, s.Objective.EpsilonHigh = 0.2, 0.28 }, []string{"objective.epsilon_low", "objective.epsilon_high"}},
		{"delta in the clip range", "sa_grpo", func(s *Settings) { s.Objective.Delta = 1.28 }, []string{"objective.delta"}},
		{"delta negative", "sa_grpo", func(s *Settings) { s.Objective.Delta = -2 }, []string{"objective.delta"}},
		{"delta no number", "grpo", func(s *Settings) { s.Objective.Delta = nan }, []string{"objective.delta"}},
		{"delta with cispo", "cispo", func(s *Settings) { s.Objective.Delta = 2 }, []string{"objective.delta"}},
		{"delta with cross_entropy", "cross_entropy", func(s *Settings) { s.Objective.Delta = 2 }, []string{"objective.delta"}},
		{"ratio_cap with sa_grpo", "sa_grpo", func(s *Settings) { s.Objective.RatioCap = 5 }, []string{"objective.ratio_cap"}},
		{"ratio_cap with gspo", "gspo", func(s *Settings) { s.Objective.RatioCap = 5 }, []string{"objective.ratio_cap"}},
		{"ratio_cap with cross_entropy", "cross_entropy", func(s *Settings) { s.Objective.RatioCap = 5 }, []string{"objective.ratio_cap"}},
		{"cispo without cap", "cispo", func(s *Settings) { s.Objective.RatioCap = 0 }, []string{"objective.ratio_cap"}},
		{"beta with cross_entropy", "cross_entropy", func(s *Settings) { s.Objective.Beta = 0.1 }, []string{"objective.beta"}},
		{"beta negative", "sa_grpo", func(s *Settings) { s.Objective.Beta = -0.1 }, []string{"objective.beta"}},
		{"beta under float32", "sa_grpo", func(s *Settings) { s.Objective.Beta = 1e-60 }, []string{"objective.beta"}},
		{"entropy negative", "sa_grpo", func(s *Settings) { s.Objective.EntropyCoef = -1 }, []string{"objective.entropy_coef"}},
		{"no iterations", "sa_grpo", func(s *Settings) { s.Objective.Iterations = 0 }, []string{"objective.iterations"}},
		{"temperature 0", "sa_grpo", func(s *Settings) { s.Objective.Temperature = 0 }, []string{"objective.temperature"}},
		{"temperature infinite", "sa_grpo", func(s *Settings) { s.Objective.Temperature = inf }, []string{"objective.temperature"}},
		{"old_logprobs unknown", "sa_grpo", func(s *Settings) { s.Objective.OldLogProbs = "both" }, []string{"objective.old_logprobs"}},
		{"old_logprobs with cross_entropy", "cross_entropy", func(s *Settings) { s.Objective.OldLogProbs = OldTrainer }, []string{"objective.old_logprobs"}},
		{"tis_cap alone", "sa_grpo", func(s *Settings) { s.Objective.TISCap = 2 }, []string{"objective.tis_cap"}},
		{"tis_cap with sampler", "sa_grpo", func(s *Settings) { s.Objective.TISCap, s.Objective.OldLogProbs = 2, OldSampler }, []string{"objective.tis_cap"}},
		{"tis_cap negative", "sa_grpo", func(s *Settings) { s.Objective.TISCap, s.Objective.OldLogProbs = -2, OldTrainer }, []string{"objective.tis_cap"}},
		{"tis_cap with cross_entropy", "cross_entropy", func(s *Settings) { s.Objective.TISCap = 2 }, []string{"objective.tis_cap"}},
		{"dr_grpo without its denominator", "dr_grpo", func(s *Settings) { s.Objective.MaxCompletionTokens = 0 }, []string{"objective.max_completion_tokens"}},
		{"denominator elsewhere", "grpo", func(s *Settings) { s.Objective.MaxCompletionTokens = 64 }, []string{"objective.max_completion_tokens"}},
		{"reward_weights with cross_entropy", "cross_entropy", func(s *Settings) { s.Objective.RewardWeights = DefaultRewardWeights() }, []string{"objective.reward_weights"}},
		{"reward_weights no number", "sa_grpo", func(s *Settings) { s.Objective.RewardWeights = map[string]float64{"a": nan, "b": 1} }, []string{"objective.reward_weights.a"}},
		{"reward_weights without a name", "sa_grpo", func(s *Settings) { s.Objective.RewardWeights = map[string]float64{"": 1} }, []string{"objective.reward_weights"}},
		{"reward_weights all 0", "sa_grpo", func(s *Settings) { s.Objective.RewardWeights = map[string]float64{"a": 0} }, []string{"objective.reward_weights"}},
		{"sync without beta", "sa_grpo", func(s *Settings) { s.Objective.Reference = Reference{SyncEverySteps: 5, SyncAlpha: 0.6} }, []string{"objective.reference.sync_every_steps"}},
		{"sync_alpha without sync", "sa_grpo", func(s *Settings) { s.Objective.Beta, s.Objective.Reference.SyncAlpha = 0.1, 0.6 }, []string{"objective.reference.sync_alpha"}},
		{"sync without alpha", "sa_grpo", func(s *Settings) { s.Objective.Beta, s.Objective.Reference.SyncEverySteps = 0.1, 5 }, []string{"objective.reference.sync_alpha"}},
		{"sync_alpha over 1", "sa_grpo", func(s *Settings) {
			s.Objective.Beta, s.Objective.Reference = 0.1, Reference{SyncEverySteps: 5, SyncAlpha: 1.5}
		}, []string{"objective.reference.sync_alpha"}},
		{"sync negative", "sa_grpo", func(s *Settings) {
			s.Objective.Beta, s.Objective.Reference = 0.1, Reference{SyncEverySteps: -5, SyncAlpha: 0.5}
		}, []string{"objective.reference.sync_every_steps"}},

		{"other optimizer", "sa_grpo", func(s *Settings) { s.Optimizer.Name = "sgd" }, []string{"optimizer.name"}},
		{"lr negative", "sa_grpo", func(s *Settings) { s.Optimizer.LR = -1 }, []string{"optimizer.lr"}},
		{"lr no number", "sa_grpo", func(s *Settings) { s.Optimizer.LR = nan }, []string{"optimizer.lr"}},
		{"beta of one", "sa_grpo", func(s *Settings) { s.Optimizer.Betas = [2]float64{0.9, 1} }, []string{"optimizer.betas"}},
		{"eps 0", "sa_grpo", func(s *Settings) { s.Optimizer.Eps = 0 }, []string{"optimizer.eps"}},
		{"decay negative", "sa_grpo", func(s *Settings) { s.Optimizer.WeightDecay = -0.1 }, []string{"optimizer.weight_decay"}},
		{"norm negative", "sa_grpo", func(s *Settings) { s.Optimizer.MaxGradNorm = -1 }, []string{"optimizer.max_grad_norm"}},
		{"moments unknown", "sa_grpo", func(s *Settings) { s.Optimizer.Moments = "int8" }, []string{"optimizer.moments"}},
		{"moments elsewhere", "sa_grpo", func(s *Settings) { s.Optimizer.MomentsIn = "disk" }, []string{"optimizer.moments_in"}},
		{"no moments", "sa_grpo", func(s *Settings) { s.Optimizer.Moments = "" }, []string{"optimizer.moments"}},
		{"gradients unknown", "sa_grpo", func(s *Settings) { s.Optimizer.Gradients = "compact" }, []string{"optimizer.gradients"}},
		{"schedule unknown", "sa_grpo", func(s *Settings) { s.Optimizer.Schedule.Name = "step" }, []string{"optimizer.schedule.name"}},
		{"warm-up negative", "sa_grpo", func(s *Settings) { s.Optimizer.Schedule.WarmupSteps = -1 }, []string{"optimizer.schedule.warmup_steps"}},
		{"warm-up past the job", "sa_grpo", func(s *Settings) { s.MaxSteps, s.Optimizer.Schedule.WarmupSteps = 5, 6 }, []string{"optimizer.schedule.warmup_steps"}},
		{"constant that decays", "sa_grpo", func(s *Settings) {
			s.Optimizer.Schedule = Schedule{Name: "constant", DecaySteps: 10, MinRatio: 0.1}
		}, []string{"optimizer.schedule.decay_steps", "optimizer.schedule.min_ratio"}},
		{"decay without an end", "sa_grpo", func(s *Settings) { s.Optimizer.Schedule.Name = "cosine" }, []string{"optimizer.schedule.decay_steps"}},
		{"decay inside the warm-up", "sa_grpo", func(s *Settings) {
			s.Optimizer.Schedule = Schedule{Name: "linear", WarmupSteps: 10, DecaySteps: 10}
		}, []string{"optimizer.schedule.warmup_steps"}},
		{"min_ratio over 1", "sa_grpo", func(s *Settings) { s.Optimizer.Schedule = Schedule{Name: "linear", DecaySteps: 10, MinRatio: 2} }, []string{"optimizer.schedule.min_ratio"}},
		{"decay_steps negative", "sa_grpo", func(s *Settings) {
			s.MaxSteps, s.Optimizer.Schedule = 9, Schedule{Name: "linear", DecaySteps: -1}
		}, []string{"optimizer.schedule.decay_steps"}},
		{"max_steps negative", "sa_grpo", func(s *Settings) { s.MaxSteps = -1 }, []string{"max_steps"}},
		{"no micro-batch", "sa_grpo", func(s *Settings) { s.MaxTokens = 0 }, []string{"batch.max_tokens_per_micro_batch"}},
		{"peak negative", "sa_grpo", func(s *Settings) { s.PeakFLOPS = -1 }, []string{"peak_flops"}},
		{"all at once", "dapo", func(s *Settings) {
			s.Objective.GroupSize, s.Objective.RatioCap, s.Objective.TISCap = 1, 3, 2
			s.Optimizer.Eps, s.MaxTokens = 0, 0
		}, []string{"objective.group_size", "objective.ratio_cap", "objective.tis_cap", "optimizer.eps", "batch.max_tokens_per_micro_batch"}},

		{"sa_grpo of one is legal", "sa_grpo", func(s *Settings) { s.Objective.GroupSize = 1 }, nil},
		{"alias", "bnpo", func(s *Settings) { s.Objective.Name = "bnpo" }, nil},
		{"no clip range is legal", "sa_grpo", func(s *Settings) { s.Objective.EpsilonLow, s.Objective.EpsilonHigh = 0, 0 }, nil},
		{"tis_cap", "gspo", func(s *Settings) { s.Objective.TISCap, s.Objective.OldLogProbs = 2, OldTrainer }, nil},
		{"delta", "sa_grpo", func(s *Settings) { s.Objective.Delta = 1.29 }, nil},
		{"decay to the job's end", "sa_grpo", func(s *Settings) { s.MaxSteps, s.Optimizer.Schedule.Name = 9, "cosine" }, nil},
		{"entropy of cross_entropy", "cross_entropy", func(s *Settings) { s.Objective.EntropyCoef = 0.1 }, nil},
	} {
		t.Run(c.title, func(t *testing.T) {
			s := testSettings(DefaultObjective(c.objective))
			if c.objective == "dr_grpo" {
				s.Objective.MaxCompletionTokens = 64
			}
			if err := s.Validate(); err != nil {
				t.Fatalf("before the change: %v", err)
			}
			c.set(&s)
			if diff := cmp.Diff(c.want, names(t, s.Validate())); diff != "" {
				t.Errorf("bad fields (-want +got):\n%s", diff)
			}
		})
	}
}

func TestNeeds(t *testing.T) {
	o := DefaultObjective("")
	if o.NeedsSamplerLogProbs() || o.NeedsReference() {
		t.Error("the defaults need the sampler's log-probs or a reference")
	}
	o.OldLogProbs = OldSampler
	if !o.NeedsSamplerLogProbs() {
		t.Error("old_logprobs sampler does not need them")
	}
	o.OldLogProbs, o.TISCap, o.Beta = OldTrainer, 2, 0.1
	if !o.NeedsSamplerLogProbs() || !o.NeedsReference() {
		t.Error("tis_cap and beta need nothing")
	}
}

func FuzzParseObjective(f *testing.F) {
	f.Add([]byte(`{"name": "gspo", "group_size": 7, "reference": {"sync_alpha": 0.6}}`))
	f.Add([]byte(`{"reward_weights": {"format": 1}, "betas": null}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		o, err := ParseObjective(raw)
		if err != nil {
			if k := fault.KindOf(err); k != fault.Invalid && k != fault.Malformed {
				t.Fatalf("%q: kind %v: %v", raw, k, err)
			}
			return
		}
		if o.Validate() != nil {
			return
		}
		again, err := json.Marshal(o)
		if err != nil {
			t.Fatalf("%q: %v", raw, err)
		}
		back, err := ParseObjective(again)
		if err != nil {
			t.Fatalf("%q, written as %s: %v", raw, again, err)
		}
		if diff := cmp.Diff(o, back); diff != "" {
			t.Fatalf("%q, written as %s (-want +got):\n%s", raw, again, diff)
		}
	})
}

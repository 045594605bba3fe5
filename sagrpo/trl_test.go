package sagrpo

import (
	"context"
	"encoding/json"
	"math"
	"os"
	"testing"

	"trainerd/rollout"
)

// trlGoldens is testdata/trl.json, made by testdata/trl_goldens.py. The outer
// slices are over completions, group after group.
type trlGoldens struct {
	TRL                 string      `json:"trl"`
	GroupSize           int         `json:"group_size"`
	MaxCompletionTokens int         `json:"max_completion_tokens"`
	Rewards             []float64   `json:"rewards"`
	LogP                [][]float32 `json:"logp"`
	Old                 [][]float32 `json:"old"`
	Ref                 [][]float32 `json:"ref"`
	Sampler             [][]float32 `json:"sampler"`
	Mask                [][]bool    `json:"mask"`
	Cases               []struct {
		Objective   string             `json:"objective"`
		EpsilonLow  float64            `json:"epsilon_low"`
		EpsilonHigh float64            `json:"epsilon_high"` // cispo: the cap
		Delta       float64            `json:"delta"`
		Beta        float64            `json:"beta"`
		TISCap      float64            `json:"tis_cap"`
		Loss        float64            `json:"loss"`
		Grad        [][]float64        `json:"grad"`
		Clip        map[string]float64 `json:"clip"`
	} `json:"cases"`
}

// TestAgainstTRL holds loss, gradient and clip ratios to what TRL's trainer
// computes in float64 from the same log-probs. The reductions agree without a
// constant factor. (TRL has no objective with sa_grpo's reduction.)
func TestAgainstTRL(t *testing.T) {
	raw, err := os.ReadFile("testdata/trl.json")
	if err != nil {
		t.Fatal(err)
	}
	var golden trlGoldens
	if err := json.Unmarshal(raw, &golden); err != nil {
		t.Fatal(err)
	}
	dev := device(t)
	clipped := map[string]float64{}
	for i, c := range golden.Cases {
		o := DefaultObjective(c.Objective)
		o.GroupSize, o.Beta, o.TISCap = golden.GroupSize, c.Beta, c.TISCap
		if o.Name == "cispo" {
			o.RatioCap = c.EpsilonHigh
		} else {
			o.EpsilonLow, o.EpsilonHigh, o.Delta = c.EpsilonLow, c.EpsilonHigh, c.Delta
		}
		if o.Name == "dr_grpo" {
			o.MaxCompletionTokens = golden.MaxCompletionTokens
		}
		// TRL's case of old, sampler's and new log-probs that all differ is our
		// second iteration: the first one's log-probs are the old ones.
		tables := 1
		if c.TISCap > 0 {
			o.OldLogProbs, o.Iterations, tables = OldTrainer, 2, 2
		}
		if err := testSettings(o).Validate(); err != nil {
			t.Fatal(err)
		}

		p := &problem{logp: make([][]float32, tables), ref: []float32{0}, ent: []float32{0}}
		for k := range p.logp {
			p.logp[k] = []float32{0}
		}
		for b, reward := range golden.Rewards {
			if b%golden.GroupSize == 0 {
				p.groups = append(p.groups, rollout.Group{ID: "g", Prompt: []int32{promptToken}})
			}
			r := rollout.Rollout{Reward: reward, LossMask: golden.Mask[b], SamplerLogProbs: golden.Old[b]}
			if c.TISCap > 0 {
				r.SamplerLogProbs = golden.Sampler[b]
			}
			for s := range golden.LogP[b] {
				r.Completion = append(r.Completion, int32(len(p.ref)))
				p.logp[0] = append(p.logp[0], golden.Old[b][s])
				p.logp[tables-1] = append(p.logp[tables-1][:len(p.ref)], golden.LogP[b][s])
				p.ref, p.ent = append(p.ref, golden.Ref[b][s]), append(p.ent, 0)
			}
			last := &p.groups[len(p.groups)-1]
			last.Rollouts = append(last.Rollouts, r)
		}

		fake := p.fake()
		run, err := newEngine(fake, dev, testSettings(o)).Consume(context.Background(), p.groups, 0)
		if err != nil {
			t.Fatal(err)
		}
		var m Metrics
		for range o.Iterations {
			if m, _, err = run.Next(context.Background()); err != nil {
				t.Fatal(err)
			}
		}
		scale := 0.0 // of the loss: the magnitudes it was added up from are at least the gradient's
		got := fake.grads[o.Iterations-1]
		id := 0
		var norm, diff float64
		for b := range c.Grad {
			for _, want := range c.Grad[b] {
				id++
				scale += math.Abs(want)
				norm += want * want
				diff += (got[id] - want) * (got[id] - want)
			}
		}
		if !(math.Sqrt(diff) <= tolerance*math.Sqrt(norm)) {
			t.Errorf("case %d (%s): gradient off by %.2g of its norm", i, c.Objective, math.Sqrt(diff/norm))
		}
		if !(math.Abs(m["loss"]-c.Loss) <= tolerance*(scale+math.Abs(c.Loss))) {
			t.Errorf("case %d (%s): loss %.10g, expected %.10g", i, c.Objective, m["loss"], c.Loss)
		}
		for name, want := range c.Clip {
			clipped[name] += want
			if c.Delta == 0 && math.Abs(m[name]-want) > 1e-6 { // TRL sums counts in float32
				t.Errorf("case %d (%s): %s %v, expected %v", i, c.Objective, name, m[name], want)
			}
		}
	}
	if clipped["clip_ratio/low_mean"] == 0 || clipped["clip_ratio/high_mean"] == 0 || len(golden.Cases) < 10 {
		t.Errorf("the goldens clip too little to tell: %v over %d cases", clipped, len(golden.Cases))
	}
}

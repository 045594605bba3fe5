package loop

import (
	"maps"
	"slices"

	"trainerd/internal/fault"
	"trainerd/secloop"
)

// Settings are everything that a run's numbers depend on, besides the field.
type Settings struct {
	Seed uint64 `json:"seed"`

	Objective   string             `json:"objective"`
	Weights     map[string]float64 `json:"weights"` // of the reward modules; 0 switches one off
	Shuffle     bool               `json:"shuffle"` // the control: rewards permuted within each group
	LR          float64            `json:"lr"`
	Temperature float64            `json:"temperature"`
	Steps       int                `json:"steps"`
	Groups      int                `json:"groups"`     // incidents per step
	Size        int                `json:"size"`       // strategies per incident (G)
	Most        int                `json:"most"`       // summaries in a prompt
	MaxPrompt   int                `json:"max_prompt"` // tokens that a prompt is planned with
	MaxTokens   int                `json:"max_tokens"` // of a strategy
	MicroBatch  int                `json:"micro_batch"`

	Warm Warm `json:"warm"`

	EvalIncidents int `json:"eval_incidents"` // held-out incidents of training scenarios
	EvalScenarios int `json:"eval_scenarios"` // incidents of held-out scenarios
	EvalEvery     int `json:"eval_every"`     // steps between measurements
}

// Warm says how a model is taught form and tools before it is rewarded.
type Warm struct {
	Steps int     `json:"steps"` // 0: no warm start
	Rows  int     `json:"rows"`  // demonstrations per step
	Ahead int     `json:"ahead"` // steps' worth of rows in one batch
	Pool  int     `json:"pool"`  // different incidents that are demonstrated on
	LR    float64 `json:"lr"`
	Skill float64 `json:"skill"` // how often the operator picks a tool that helps
	EOS   int32   `json:"eos"`   // ends a strategy
}

// DefaultWeights are the paper's.
func DefaultWeights() map[string]float64 {
	return map[string]float64{"format": 1, "execution": 1, "evaluation": 1, "penalty": -1}
}

// Validate refuses settings that a run could not use.
func (s Settings) Validate() error {
	for _, f := range []struct {
		name string
		v    int
		min  int
	}{
		{"steps", s.Steps, 0}, {"groups", s.Groups, 1}, {"group-size", s.Size, 1}, {"summaries", s.Most, 1}, {"max-prompt", s.MaxPrompt, 1},
		{"max-tokens", s.MaxTokens, 1}, {"micro-batch", s.MicroBatch, 2}, {"warm-steps", s.Warm.Steps, 0}, {"eval-incidents", s.EvalIncidents, 1},
		{"eval-scenarios", s.EvalScenarios, 0}, {"eval-every", s.EvalEvery, 1},
	} {
		if f.v < f.min {
			return fault.BadField(f.name, f.v, "a larger number")
		}
	}
	if s.Warm.Steps > 0 && (s.Warm.Rows < 1 || s.Warm.Ahead < 1 || s.Warm.Pool < 1 || !(s.Warm.LR > 0) || !(s.Warm.Skill >= 0 && s.Warm.Skill <= 1)) {
		return fault.BadField("warm start", s.Warm, "rows, ahead, pool 1 or more, lr above 0, skill from 0 to 1")
	}
	if s.Steps > 0 && !(s.LR > 0) {
		return fault.BadField("lr", s.LR, "a number above 0")
	}
	for _, name := range slices.Sorted(maps.Keys(s.Weights)) {
		if !slices.Contains(secloop.Components, name) {
			return fault.BadField("weights", name, "format, execution, evaluation or penalty")
		}
	}
	return nil
}

// warmJob is the document of the warm start's job.
func (s Settings) warmJob(source string) map[string]any {
	w := s.Warm
	return map[string]any{
		"version": 1, "name": "secloop-warm-start", "model": map[string]any{"source": source},
		"objective":  map[string]any{"name": "cross_entropy", "group_size": 1},
		"optimizer":  map[string]any{"lr": w.LR, "betas": []float64{0.9, 0.98}, "schedule": map[string]any{"name": "cosine", "warmup_steps": w.Steps / 20, "min_ratio": 0.1}},
		"batch":      map[string]any{"groups_per_step": w.Rows, "max_tokens_per_micro_batch": s.MicroBatch, "max_policy_lag": w.Steps},
		"checkpoint": map[string]any{"publish_every_steps": w.Steps},
		"sampling":   map[string]any{"max_sequences": 0},
		"max_steps":  w.Steps, "seed": s.Seed,
	}
}

// loopJob is the document of the job that learns from rewards.
func (s Settings) loopJob(source string) map[string]any {
	objective := map[string]any{"name": s.Objective, "group_size": s.Size, "temperature": s.Temperature, "reward_weights": s.Weights}
	if s.Objective == "dr_grpo" {
		objective["max_completion_tokens"] = s.MaxTokens
	}
	return map[string]any{
		"version": 1, "name": "secloop", "model": map[string]any{"source": source},
		"objective":  objective,
		"optimizer":  map[string]any{"lr": s.LR, "betas": []float64{0.9, 0.95}, "max_grad_norm": 1.0},
		"batch":      map[string]any{"groups_per_step": s.Groups, "max_tokens_per_micro_batch": s.MicroBatch, "max_policy_lag": 1},
		"checkpoint": map[string]any{"publish_every_steps": 1, "keep_last": 2, "keep_every": 0},
		"sampling":   map[string]any{"max_sequences": s.sequences(), "max_tokens": s.cacheTokens(s.sequences())},
		"max_steps":  s.Steps, "seed": s.Seed,
	}
}

// sequences is how many strategies are decoded at once.
func (s Settings) sequences() int { return min(max(s.Groups*s.Size, 32), 512) }

// cacheTokens is the room that decoding them takes: a group shares its prompt,
// but what is measured is one strategy of each prompt.
func (s Settings) cacheTokens(sequences int) int {
	return min(sequences*(s.MaxPrompt+s.MaxTokens), 1<<20)
}

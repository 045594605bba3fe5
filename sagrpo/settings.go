package sagrpo

import "encoding/json"

// Objective is the "objective" member of a job. Start from DefaultObjective or
// ParseObjective; a field that its objective does not use is 0 and must stay 0.
type Objective struct {
	Name                string             `json:"name"` // sa_grpo, grpo, dr_grpo, dapo (alias bnpo), gspo, cispo, cross_entropy
	GroupSize           int                `json:"group_size"`
	EpsilonLow          float64            `json:"epsilon_low"`
	EpsilonHigh         float64            `json:"epsilon_high"`
	Delta               float64            `json:"delta"`                 // 0: none; else > 1+epsilon_high
	RatioCap            float64            `json:"ratio_cap"`             // cispo only, absolute
	Beta                float64            `json:"beta"`                  // k3 KL to the reference; 0: no reference
	EntropyCoef         float64            `json:"entropy_coef"`          // the entropy's share is subtracted from the loss
	Iterations          int                `json:"iterations"`            // mu, optimizer steps on the same groups
	Temperature         float64            `json:"temperature"`           // divides the logits, everywhere
	OldLogProbs         string             `json:"old_logprobs"`          // "", sampler, trainer; "": sampler where the column exists
	TISCap              float64            `json:"tis_cap"`               // 0: off; needs old_logprobs trainer
	MaskTruncated       bool               `json:"mask_truncated"`        // a truncated completion gives no gradient
	MaxCompletionTokens int                `json:"max_completion_tokens"` // dr_grpo's denominator; 0: unset
	RewardWeights       map[string]float64 `json:"reward_weights"`        // by component; empty: only plain rewards
	Reference           Reference          `json:"reference"`
}

// Reference says where the KL reference comes from (the initial policy) and how it follows the policy.
type Reference struct {
	SyncEverySteps int     `json:"sync_every_steps"` // 0: never
	SyncAlpha      float64 `json:"sync_alpha"`       // share of the policy in the new reference
}

// Optimizer is the "optimizer" member of a job.
type Optimizer struct {
	Name        string     `json:"name"` // adamw
	LR          float64    `json:"lr"`   // peak, after warm-up
	Betas       [2]float64 `json:"betas"`
	Eps         float64    `json:"eps"`
	WeightDecay float64    `json:"weight_decay"`
	MaxGradNorm float64    `json:"max_grad_norm"` // 0: no clipping
	Moments     string     `json:"moments"`       // float32, or compact: 3 bytes a parameter instead of 8, see kernels.AdamW
	MomentsIn   string     `json:"moments_in"`    // device, or host: page-locked host memory that a card reads and writes over the bus
	Gradients   string     `json:"gradients"`     // float32, or bfloat16: 2 bytes a parameter instead of 4, see kernels.AddGrad
	Schedule    Schedule   `json:"schedule"`
}

// Values of Optimizer.Moments and Optimizer.Gradients.
const (
	Float32         = "float32"  // of both
	MomentsCompact  = "compact"  // int8 first moments with a scale for every 128, bfloat16 second moments
	MomentsDevice   = "device"   // Optimizer.MomentsIn
	MomentsHost     = "host"     // the same
	GradientsBFloat = "bfloat16" // computed in float32, kept in bfloat16
)

// UnmarshalJSON implements json.Unmarshaler: records from before moments and
// gradients had a format have float32 ones, and the moments on the device.
func (o *Optimizer) UnmarshalJSON(raw []byte) error {
	type plain Optimizer
	p := plain{Moments: Float32, MomentsIn: MomentsDevice, Gradients: Float32}
	if err := json.Unmarshal(raw, &p); err != nil {
		return err
	}
	*o = Optimizer(p)
	return nil
}

// Schedule is the learning rate over steps; see Settings.LR.
type Schedule struct {
	Name        string  `json:"name"` // constant, linear, cosine
	WarmupSteps int     `json:"warmup_steps"`
	DecaySteps  int     `json:"decay_steps"` // step at which the decay ends, warm-up included; 0: the job's max_steps
	MinRatio    float64 `json:"min_ratio"`   // final lr / lr
}

// Settings are everything a step depends on besides weights, batches and step number.
type Settings struct {
	Objective Objective
	Optimizer Optimizer
	MaxSteps  int64   // for schedules that decay; 0: endless
	Done      int64   // steps that the optimizer had behind it at the job's first; schedules count them too
	MaxTokens int     // token budget of a micro-batch
	PeakFLOPS float64 // of the device, for the metric "mfu"; 0: not reported
}

// Values of Objective.OldLogProbs.
const (
	OldSampler = "sampler" // the column sampler_logprobs
	OldTrainer = "trainer" // the policy at the groups' first consumption
)

// Reference sync of the paper's Table IV, in force where beta is not 0.
const (
	defaultSyncEverySteps = 512
	defaultSyncAlpha      = 0.6
)

// DefaultRewardWeights returns SecLoop's weights, freshly made: R = format +
// execution + evaluation - penalty.
func DefaultRewardWeights() map[string]float64 {
	return map[string]float64{"format": 1, "execution": 1, "evaluation": 1, "penalty": -1}
}

// DefaultObjective returns the settings of an objective when nothing but its name
// is given; "" means sa_grpo and bnpo becomes dapo. An unknown name gets
// sa_grpo's settings, and Validate refuses it.
func DefaultObjective(name string) Objective {
	if name == "" {
		name = "sa_grpo"
	}
	name = canonical(name)
	o := Objective{Name: name, GroupSize: 7, Iterations: 1, Temperature: 1}
	r, known := ruleOf(name)
	if !known {
		r, _ = ruleOf("sa_grpo")
	}
	switch {
	case r.sequence:
		o.EpsilonLow, o.EpsilonHigh = 3e-4, 4e-4
	case r.clips():
		o.EpsilonLow, o.EpsilonHigh = 0.2, 0.28
	case r.caps():
		o.RatioCap = 5
	}
	if r.rewards {
		o.RewardWeights = DefaultRewardWeights()
	} else {
		o.GroupSize = 1
	}
	return o
}

// DefaultOptimizer returns AdamW with the paper's learning rate, at a constant schedule.
func DefaultOptimizer() Optimizer {
	return Optimizer{
		Name: "adamw", LR: 3e-6, Betas: [2]float64{0.9, 0.95}, Eps: 1e-8, MaxGradNorm: 1, Moments: Float32, MomentsIn: MomentsDevice, Gradients: Float32,
		Schedule: Schedule{Name: "constant"},
	}
}

// NeedsSamplerLogProbs reports whether every rollout must come with the
// sampler's log-probs, so that intake can refuse a batch without them.
func (o Objective) NeedsSamplerLogProbs() bool {
	return o.OldLogProbs == OldSampler || o.TISCap > 0
}

// NeedsReference reports whether the model must be loaded with a reference.
func (o Objective) NeedsReference() bool { return o.Beta != 0 }

package sagrpo

// Objective is the "objective" member of a job. See Defaults and Validate.
type Objective struct {
	Name                string             `json:"name"` // sa_grpo, grpo, dr_grpo, dapo (alias bnpo), gspo, cispo, cross_entropy
	GroupSize           int                `json:"group_size"`
	EpsilonLow          float64            `json:"epsilon_low"`
	EpsilonHigh         float64            `json:"epsilon_high"`
	Delta               float64            `json:"delta"`                 // 0: none; else > 1+epsilon_high
	RatioCap            float64            `json:"ratio_cap"`             // cispo only
	Beta                float64            `json:"beta"`                  // k3 KL to the reference
	EntropyCoef         float64            `json:"entropy_coef"`          //
	Iterations          int                `json:"iterations"`            // mu
	Temperature         float64            `json:"temperature"`           //
	OldLogProbs         string             `json:"old_logprobs"`          // "", sampler, trainer; "": sampler where the column exists
	TISCap              float64            `json:"tis_cap"`               // 0: off; needs old_logprobs trainer
	MaskTruncated       bool               `json:"mask_truncated"`        //
	MaxCompletionTokens int                `json:"max_completion_tokens"` // dr_grpo's denominator; 0: unset
	RewardWeights       map[string]float64 `json:"reward_weights"`
	Reference           Reference          `json:"reference"`
}

// Reference says where the KL reference comes from (the initial policy) and how it follows the policy.
type Reference struct {
	SyncEverySteps int     `json:"sync_every_steps"` // 0: never
	SyncAlpha      float64 `json:"sync_alpha"`
}

// Optimizer is the "optimizer" member of a job.
type Optimizer struct {
	Name        string     `json:"name"` // adamw
	LR          float64    `json:"lr"`
	Betas       [2]float64 `json:"betas"`
	Eps         float64    `json:"eps"`
	WeightDecay float64    `json:"weight_decay"`
	MaxGradNorm float64    `json:"max_grad_norm"`
	Schedule    Schedule   `json:"schedule"`
}

// Schedule is the learning rate over steps.
type Schedule struct {
	Name        string  `json:"name"` // constant, linear, cosine
	WarmupSteps int     `json:"warmup_steps"`
	DecaySteps  int     `json:"decay_steps"` // 0: the job's max_steps
	MinRatio    float64 `json:"min_ratio"`   // final lr / lr
}

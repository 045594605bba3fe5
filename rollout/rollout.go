package rollout

// NoPolicyStep marks a rollout whose sampler did not say which step it used.
const NoPolicyStep int64 = -1

// Rollout is one completion of a prompt with its reward.
type Rollout struct {
	GroupID         string
	ID              string // rollout_id, "" when the column is absent
	Prompt          []int32
	Completion      []int32   // not empty
	Reward          float64   // composed when the batch has components
	Components      []float64 // by Batch.Components; nil when the batch has a plain reward
	SamplerLogProbs []float32 // nil or len(Completion); values at masked positions are undefined
	LossMask        []bool    // nil (all true) or len(Completion)
	LossWeights     []float32 // nil (all 1) or len(Completion); cross_entropy only
	PolicyStep      int64     // NoPolicyStep when unknown
	Truncated       bool
}

// Batch is one accepted Arrow body, decoded.
type Batch struct {
	Rollouts   []Rollout
	Components []string // names of reward_<name> columns without the prefix, sorted
	HasReward  bool     // the column "reward" is present
}

// Limits bound a batch before anything is allocated for it.
type Limits struct {
	MaxBytes            int64 // of the body, and of its decompressed buffers
	MaxRows             int
	MaxTokens           int64 // of the whole batch, prompts counted per row
	MaxPromptTokens     int
	MaxCompletionTokens int
	MaxSequence         int // prompt + completion of a row; 0: no limit
	Vocab               int // ids are in [0, Vocab)
}

// Schema says which columns a job needs and understands.
type Schema struct {
	Objective     string             // a group is one row and reward is not required with "cross_entropy"
	RewardWeights map[string]float64 // by component; a component column without a weight is refused
}

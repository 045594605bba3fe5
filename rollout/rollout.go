package rollout

import (
	"fmt"
	"math"
	"time"

	"trainerd/internal/fault"
)

// NoPolicyStep marks a rollout whose sampler did not say which step it used.
const NoPolicyStep int64 = -1

// CrossEntropy is the objective under which a group is one row and no reward is required.
const CrossEntropy = "cross_entropy"

// Rollout is one completion of a prompt with its reward.
type Rollout struct {
	GroupID         string
	ID              string // rollout_id, "" when the column is absent
	Prompt          []int32
	Completion      []int32   // not empty
	Reward          float64   // composed when the batch has components
	Components      []float64 // by Batch.Components (in a Group: by Group.Components); nil when the batch has a plain reward
	SamplerLogProbs []float32 // nil or len(Completion); values at masked positions are undefined
	LossMask        []bool    // nil (all true) or len(Completion)
	LossWeights     []float32 // nil (all 1) or len(Completion); cross_entropy only
	PolicyStep      int64     // NoPolicyStep when unknown
	Truncated       bool
}

// Batch is one accepted Arrow body, decoded. Rows of one group share one prompt slice.
type Batch struct {
	Rollouts   []Rollout
	Components []string // names of reward_<name> columns without the prefix, sorted
	HasReward  bool     // the column "reward" is present

	// Received starts the group timeout of the groups that the batch opens. The
	// zero time means unknown: their clock starts at the next Assembler.Expire.
	Received time.Time

	// Shared says that the rows lie in the memory of the body that they came in,
	// all of which one row keeps.
	Shared bool

	// Free, when it is not nil, is for a batch whose rows are Shared: an assembler
	// calls it at most once, when it, its snapshots and the groups that it handed
	// out have no use for the body any more. Where it cannot tell, it does not.
	Free func()

	prints []fingerprint // see Fingerprint
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
	Objective       string             // reward is not required with "cross_entropy"; "" fits any (inspection)
	RewardWeights   map[string]float64 // by component; a component column without a weight is refused
	AnyComponent    bool               // but with this it is read and weighs 0 (inspection)
	SamplerLogProbs bool               // the column sampler_logprobs is required
}

// ComposeReward is the sum of weight * value over components, in the order of
// names, so that the same batch gives the same bits everywhere.
func ComposeReward(weights map[string]float64, names []string, values []float64) float64 {
	var r float64
	for i, name := range names {
		r += weights[name] * values[i]
	}
	return r
}

// Tokens counts prompt and completion tokens, prompts per row.
func (b *Batch) Tokens() int64 {
	var n int64
	for i := range b.Rollouts {
		n += int64(len(b.Rollouts[i].Prompt) + len(b.Rollouts[i].Completion))
	}
	return n
}

// Bytes is at most what the batch adds to Depth.Bytes: prompts count per row.
func (b *Batch) Bytes() int64 {
	var n int64
	for i := range b.Rollouts {
		n += 4*int64(len(b.Rollouts[i].Prompt)) + b.Rollouts[i].payload()
	}
	return n
}

// CheckPolicySteps refuses rows that claim a policy newer than newest.
func (b *Batch) CheckPolicySteps(newest int64) error {
	for i := range b.Rollouts {
		if s := b.Rollouts[i].PolicyStep; s > newest {
			return fault.BadRow("policy_step", i, s, fmt.Sprintf("at most %d, the newest step of the policy", newest))
		}
	}
	return nil
}

// MaxReward is the greatest magnitude of a reward that is let in. Gradients grow with
// the advantage and their float32 sum of squares ends at 3e38, that is, at a norm of
// 1.8e19: this leaves the policy's own gradient seven orders of magnitude.
const MaxReward = 1e12

// CheckRewards refuses rows whose reward, composed or plain, is past MaxReward: a step
// would find its gradient infinite, and the job would fail for one row.
func (b *Batch) CheckRewards() error {
	for i := range b.Rollouts {
		if r := b.Rollouts[i].Reward; math.Abs(r) > MaxReward || math.IsNaN(r) { // NaN: components whose overflows cancel
			if len(b.Components) > 0 {
				return fault.BadRow("reward_"+b.Components[0], i, r, fmt.Sprintf("components whose weighted sum is at most %g in magnitude", MaxReward))
			}
			return fault.BadRow("reward", i, r, fmt.Sprintf("at most %g in magnitude", MaxReward))
		}
	}
	return nil
}

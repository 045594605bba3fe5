package model

import "trainerd/kernels"

// Segment is a run of consecutive tokens of a micro-batch: a prompt (Prefix -1)
// or a completion, which sees the whole segment Prefix and then causally itself.
type Segment struct {
	Start, Len int // tokens
	Prefix     int // index of the prompt's segment in Batch.Segments, or -1
}

// Batch is one packed micro-batch: T tokens in one row, no padding, and the N
// predictions wanted from it. Predictions that share a hidden state (the first
// tokens of a group's completions all follow the last prompt token) repeat its row.
type Batch struct {
	Tokens    []int32 // [T]
	Positions []int32 // [T] RoPE positions; a completion continues its prompt's
	Segments  []Segment
	Rows      []int32 // [N] token index whose hidden state predicts
	Targets   []int32 // [N] the token that is predicted
}

// Loss is the loss of a micro-batch: per-row inputs of a surrogate, each [N].
// Denominators are in Weight, so micro-batches add up to the step's gradient.
type Loss struct {
	Surrogate   kernels.Surrogate
	Temperature float32
	Old         []float32 // nil: the fresh log-probs (ratio exactly 1)
	Ref         []float32 // nil unless Surrogate.Beta != 0
	Adv         []float32 // nil for SurrogateNLL
	Weight      []float32 // 0 masks a row
	TIS         []float32 // nil: 1

	// Coefficients, when not nil, replaces the surrogate: it is called once
	// with the fresh log-probs and entropies and returns dLoss/dlogp and
	// dLoss/dentropy (nil for none), each [N]. Sequence-level objectives use it.
	Coefficients func(s Scores) (dLogProb, dEntropy []float32)
}

// Scores are the log-prob of each target and the entropy of its distribution, in nats, each [N].
type Scores struct {
	LogProb []float32
	Entropy []float32
}

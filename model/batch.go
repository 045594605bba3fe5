package model

import (
	"fmt"
	"math"

	"trainerd/internal/fault"
	"trainerd/kernels"
)

// Segment is a run of consecutive tokens of a micro-batch: a prompt (Prefix -1)
// or a completion, which sees the whole segment Prefix and then causally itself.
type Segment struct {
	Start, Len int // tokens
	Prefix     int // index of the prompt's segment in Batch.Segments, or -1
}

// Batch is one packed micro-batch: T tokens in one row, no padding, and the N
// predictions wanted from it. Predictions that share a hidden state (the first
// tokens of a group's completions all follow the last prompt token) repeat its row.
//
// Segments cover the tokens in order without gaps; empty ones are allowed (a
// completion of one token has nothing to run). A prefix is a segment without a
// prefix of its own, anywhere in the list.
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
	Temperature float32   // > 0
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

func badBatch(name string, row int, got any, expected string) error {
	return &fault.Error{Kind: fault.Invalid, Code: "invalid_batch", Msg: "micro-batch is not usable",
		Fields: []fault.Field{{Name: name, Row: row, Got: fmt.Sprint(got), Expected: expected}}}
}

// Validate checks a batch against an architecture: lengths, ranges and the
// segments' cover. The fault names the first offending field and element.
func (b *Batch) Validate(c Config) error {
	t := len(b.Tokens)
	switch {
	case t == 0:
		return badBatch("tokens", -1, "0 tokens", "at least one")
	case len(b.Positions) != t:
		return badBatch("positions", -1, fmt.Sprintf("%d elements", len(b.Positions)), fmt.Sprintf("%d, one per token", t))
	case len(b.Rows) == 0:
		return badBatch("rows", -1, "0 predictions", "at least one")
	case len(b.Targets) != len(b.Rows):
		return badBatch("targets", -1, fmt.Sprintf("%d elements", len(b.Targets)), fmt.Sprintf("%d, one per prediction", len(b.Rows)))
	}
	for _, f := range []struct {
		name   string
		values []int32
		limit  int
		what   string
	}{
		{"tokens", b.Tokens, c.Vocab, "the vocabulary"},
		{"positions", b.Positions, c.MaxPositions, "max_position_embeddings"},
		{"rows", b.Rows, t, "the tokens"},
		{"targets", b.Targets, c.Vocab, "the vocabulary"},
	} {
		for i, v := range f.values {
			if v < 0 || int(v) >= f.limit {
				return badBatch(f.name, i, v, fmt.Sprintf("0 to %d (%s)", f.limit-1, f.what))
			}
		}
	}
	next := 0
	for i, s := range b.Segments {
		if s.Start != next || s.Len < 0 || s.Len > t-next {
			return badBatch("segments", i, fmt.Sprintf("start %d, length %d", s.Start, s.Len),
				fmt.Sprintf("start %d and a length of 0 to %d", next, t-next))
		}
		next += s.Len
		if s.Prefix == -1 {
			continue
		}
		if s.Prefix < -1 || s.Prefix >= len(b.Segments) || b.Segments[s.Prefix].Prefix != -1 {
			return badBatch("segments", i, fmt.Sprintf("prefix %d", s.Prefix), "-1 or the index of a segment without a prefix")
		}
	}
	if next != t {
		return badBatch("segments", -1, fmt.Sprintf("%d tokens covered", next), fmt.Sprintf("%d", t))
	}
	return nil
}

// validate checks a loss for n predictions.
func (l *Loss) validate(n int) error {
	if err := checkTemperature(l.Temperature); err != nil {
		return err
	}
	if l.Coefficients != nil {
		return nil
	}
	needAdv := l.Surrogate.Kind != kernels.SurrogateNLL
	needRef := l.Surrogate.Beta != 0
	for _, f := range []struct {
		name     string
		values   []float32
		required bool
	}{
		{"old", l.Old, false}, {"ref", l.Ref, needRef}, {"adv", l.Adv, needAdv},
		{"weight", l.Weight, true}, {"tis", l.TIS, false},
	} {
		if len(f.values) != n && (f.required || f.values != nil) {
			return badBatch("loss."+f.name, -1, fmt.Sprintf("%d elements", len(f.values)), fmt.Sprintf("%d, one per prediction", n))
		}
	}
	return nil
}

func checkTemperature(t float32) error {
	if !(t > 0) || math.IsInf(float64(t), 0) {
		return fault.BadField("temperature", t, "a positive number")
	}
	return nil
}

// deviceSegments turns the batch's segments into attention segments over its own rows.
func (b *Batch) deviceSegments() []kernels.Segment {
	out := make([]kernels.Segment, 0, len(b.Segments))
	for _, s := range b.Segments {
		if s.Len == 0 {
			continue
		}
		k := kernels.Segment{Q: int32(s.Start), QLen: int32(s.Len), K: int32(s.Start), KLen: int32(s.Len)}
		if s.Prefix >= 0 && b.Segments[s.Prefix].Len > 0 {
			p := b.Segments[s.Prefix]
			k.Prefix, k.PrefixLen = int32(p.Start), int32(p.Len)
		}
		out = append(out, k)
	}
	return out
}

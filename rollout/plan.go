package rollout

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash"
	"math"
	"slices"

	"trainerd/internal/fault"
)

// plan is what adding a batch would do, found without doing it.
type plan struct {
	batch     *Batch
	version   uint64
	duplicate []bool           // by row
	seen      []record[digest] // rollout ids that the batch adds, with their content
}

// plan checks a batch against the state and against itself. Check followed by
// Add of the same batch in the same state plans once.
func (a *Assembler) plan(b *Batch) (*plan, error) {
	if p := a.planned; p != nil && p.batch == b && p.version == a.version {
		return p, nil
	}
	if len(b.Rollouts) == 0 {
		return nil, &fault.Error{Kind: fault.Invalid, Code: "empty_batch", Msg: "a batch without rows"}
	}
	type claim struct {
		prompt []int32
		rows   int
		row    int // of this batch that brought the prompt, -1: an earlier batch
	}
	p := &plan{batch: b, version: a.version, duplicate: make([]bool, len(b.Rollouts))}
	own := map[digest]digest{}
	claims := map[string]*claim{}
	prints := b.fingerprints()
	var last *claim // of group lastID, in which the next row mostly is
	lastID := ""
	for i := range b.Rollouts {
		r := &b.Rollouts[i]
		if a.opts.RequirePolicyStep && r.PolicyStep == NoPolicyStep {
			return nil, fault.BadRow("policy_step", i, "none", "the published step that sampled the row (this job requires it)")
		}
		if r.ID != "" {
			id, sum := prints[i].id, prints[i].content
			before, known := own[id]
			if !known {
				before, known = a.seen.get(id)
			}
			if known && before != sum {
				return nil, &fault.Error{Kind: fault.Conflict, Code: "rollout_id_reused", Fields: []fault.Field{{
					Name: "rollout_id", Row: i, Got: fmt.Sprintf("%q, which was used for another content", r.ID), Expected: "a new id"}}}
			}
			if known {
				p.duplicate[i] = true
				continue
			}
			own[id] = sum
			p.seen = append(p.seen, record[digest]{id, sum})
		}
		c := last
		if c == nil || r.GroupID != lastID {
			c = claims[r.GroupID]
		}
		if c == nil {
			c = &claim{prompt: r.Prompt, row: i}
			if e := a.live[r.GroupID]; e != nil {
				if e.state.Status != Open {
					return nil, closedRow(i, r.GroupID, "complete")
				}
				c.prompt, c.rows, c.row = e.group.Prompt, len(e.group.Rollouts), -1
			} else if z, ok := a.closed.get(name(r.GroupID)); ok {
				return nil, closedRow(i, r.GroupID, z.status.String())
			}
			claims[r.GroupID] = c
		}
		last, lastID = c, r.GroupID
		if !samePrompt(c.prompt, r.Prompt) {
			expected := fmt.Sprintf("the prompt of group %q as in row %d", r.GroupID, c.row)
			if c.row < 0 {
				expected = fmt.Sprintf("the prompt of group %q as in an earlier batch", r.GroupID)
			}
			return nil, &fault.Error{Kind: fault.Invalid, Code: "unequal_prompts", Fields: []fault.Field{{
				Name: "prompt_tokens", Row: i, Got: DescribePrompt(r.Prompt, c.prompt), Expected: expected}}}
		}
		if c.rows == a.opts.GroupSize {
			return nil, closedRow(i, r.GroupID, fmt.Sprintf("complete with %d rows", c.rows))
		}
		c.rows++
	}
	a.planned = p
	return p, nil
}

// samePrompt compares prompts, which rows of a batch share.
func samePrompt(x, y []int32) bool {
	if len(x) == len(y) && len(x) > 0 && &x[0] == &y[0] {
		return true
	}
	return slices.Equal(x, y)
}

// fingerprint names a row and what is in it.
type fingerprint struct{ id, content digest }

// Fingerprint reads all rows that have an id and remembers their fingerprints, so
// that Check and Add, whose callers hold a lock, need not. Afterwards the rows
// must not change.
func (b *Batch) Fingerprint() { b.prints = b.fingerprints() }

// fingerprints are by row, nil when no row has an id.
func (b *Batch) fingerprints() []fingerprint {
	if b.prints != nil {
		return b.prints
	}
	var prints []fingerprint
	var content contentHash
	for i := range b.Rollouts {
		r := &b.Rollouts[i]
		if r.ID == "" {
			continue
		}
		if prints == nil {
			prints = make([]fingerprint, len(b.Rollouts))
		}
		prints[i] = fingerprint{name(r.ID), content.of(b, r)}
	}
	return prints
}

// DescribePrompt says how a prompt differs from what was expected.
func DescribePrompt(got, want []int32) string {
	for i := range min(len(got), len(want)) {
		if got[i] != want[i] {
			return fmt.Sprintf("%d tokens that differ at %d (%d, not %d)", len(got), i, got[i], want[i])
		}
	}
	return fmt.Sprintf("%d tokens, not %d", len(got), len(want))
}

// contentHash fingerprints rows. Values at masked positions are undefined and left out.
type contentHash struct {
	h   hash.Hash
	buf []byte
}

func (c *contentHash) of(b *Batch, r *Rollout) digest {
	if c.h == nil {
		c.h = sha256.New()
	}
	c.h.Reset()
	out := c.buf[:0]
	text := func(s string) {
		out = binary.LittleEndian.AppendUint32(out, uint32(len(s)))
		out = append(out, s...)
	}
	tokens := func(v []int32) {
		out = binary.LittleEndian.AppendUint32(out, uint32(len(v)))
		at := len(out)
		out = slices.Grow(out, 4*len(v))[:at+4*len(v)]
		for i, t := range v {
			binary.LittleEndian.PutUint32(out[at+4*i:], uint32(t))
		}
	}
	text(r.GroupID)
	tokens(r.Prompt)
	tokens(r.Completion)
	out = binary.LittleEndian.AppendUint64(out, math.Float64bits(r.Reward))
	for i, v := range r.Components {
		text(b.Components[i])
		out = binary.LittleEndian.AppendUint64(out, math.Float64bits(v))
	}
	out = binary.LittleEndian.AppendUint64(out, uint64(r.PolicyStep))
	out = append(out, flag(r.Truncated), flag(r.Components != nil), flag(r.SamplerLogProbs != nil), flag(r.LossMask != nil), flag(r.LossWeights != nil))
	for i, v := range r.SamplerLogProbs {
		if r.LossMask == nil || r.LossMask[i] {
			out = binary.LittleEndian.AppendUint32(out, math.Float32bits(v))
		}
	}
	for _, m := range r.LossMask {
		out = append(out, flag(m))
	}
	for _, v := range r.LossWeights {
		out = binary.LittleEndian.AppendUint32(out, math.Float32bits(v))
	}
	c.buf = out
	c.h.Write(out)
	var sum [sha256.Size]byte
	c.h.Sum(sum[:0])
	return digest(sum[:16])
}

func flag(b bool) byte {
	if b {
		return 1
	}
	return 0
}

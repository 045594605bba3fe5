package sagrpo

import (
	"trainerd/model"
	"trainerd/rollout"
)

// micro is a micro-batch: what the model runs, and whose predictions it holds.
type micro struct {
	batch model.Batch
	spans []span
	flops float64 // useful arithmetic of one forward pass
}

// span is the predictions [start, start+len(row.active)) of a batch.
type span struct {
	row   *row
	start int
}

// of returns a row's part of a batch-long slice, nil of nil.
func (s span) of(x []float32) []float32 {
	if x == nil {
		return nil
	}
	return x[s.start : s.start+len(s.row.active)]
}

// cut packs rows, which stand together by group, into micro-batches. Only their
// active tokens are predicted; a row without any is left out, and a group of
// such rows costs nothing. The micro-batches lie in mem as far as that goes, and
// in what cut returns.
func cut(rows []*row, maxTokens int, cost cost, mem []int32) ([]micro, []int32, error) {
	var groups []rollout.Group
	var members [][]*row
	var last *rollout.Group
	for _, r := range rows {
		if len(r.active) == 0 {
			continue
		}
		if r.group != last {
			last = r.group
			groups = append(groups, rollout.Group{ID: last.ID, Prompt: last.Prompt, Position: last.Position})
			members = append(members, nil)
		}
		g := len(groups) - 1
		groups[g].Rollouts = append(groups[g].Rollouts, r.group.Rollouts[r.index])
		members[g] = append(members[g], r)
	}
	if len(groups) == 0 {
		return nil, mem, nil
	}
	packed, mem, err := rollout.PackIn(mem, groups, maxTokens)
	if err != nil {
		return nil, nil, err
	}
	micros := make([]micro, 0, len(packed))
	for i := range packed {
		p := &packed[i]
		m := micro{batch: model.Batch{Tokens: p.Tokens, Positions: p.Positions, Segments: make([]model.Segment, len(p.Segments))}}
		for k, s := range p.Segments {
			m.batch.Segments[k] = model.Segment(s)
		}
		whole := true // every token of every completion is predicted
		for _, s := range p.Spans {
			whole = whole && len(members[s.Group][s.Rollout].active) == s.Len
		}
		m.spans = make([]span, 0, len(p.Spans))
		if whole {
			m.batch.Rows, m.batch.Targets = p.Rows, p.Targets
			for _, s := range p.Spans {
				m.spans = append(m.spans, span{row: members[s.Group][s.Rollout], start: s.Start})
			}
		} else {
			m.predict(p, members)
		}
		m.flops = cost.forward(&m.batch)
		micros = append(micros, m)
	}
	return micros, mem, nil
}

// predict takes the predictions of active tokens.
func (m *micro) predict(p *rollout.Packed, members [][]*row) {
	n := 0
	for _, s := range p.Spans {
		n += len(members[s.Group][s.Rollout].active)
	}
	m.batch.Rows, m.batch.Targets = make([]int32, 0, n), make([]int32, 0, n)
	for _, s := range p.Spans {
		r := members[s.Group][s.Rollout]
		m.spans = append(m.spans, span{row: r, start: len(m.batch.Rows)})
		for _, t := range r.active {
			m.batch.Rows = append(m.batch.Rows, p.Rows[s.Start+int(t)])
			m.batch.Targets = append(m.batch.Targets, p.Targets[s.Start+int(t)])
		}
	}
}

// cost counts the useful arithmetic of a model: matrix products of every token,
// the LM head at predictions, attention over visible pairs. One multiply-add is
// two operations; norms, activations and anything computed twice count nothing.
type cost struct{ token, prediction, pair float64 }

func costOf(c model.Config) cost {
	d, hd := float64(c.Hidden), float64(c.HeadDim)
	q, kv := float64(c.Heads)*hd, float64(c.KVHeads)*hd
	layers := float64(c.Layers)
	return cost{
		token:      2 * layers * (d*(q+2*kv) + q*d + 3*d*float64(c.FFN)),
		prediction: 2 * d * float64(c.Vocab),
		pair:       4 * layers * q,
	}
}

func (c cost) forward(b *model.Batch) float64 {
	pairs := 0.0
	for _, s := range b.Segments {
		n := float64(s.Len)
		pairs += n * (n + 1) / 2
		if s.Prefix >= 0 {
			pairs += n * float64(b.Segments[s.Prefix].Len)
		}
	}
	return c.token*float64(len(b.Tokens)) + c.prediction*float64(len(b.Rows)) + c.pair*pairs
}

// A backward pass is two products for each of the forward pass's.
const trainingPasses = 3

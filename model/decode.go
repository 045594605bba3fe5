package model

import (
	"context"
	"fmt"

	"trainerd/kernels"
)

// The cache holds, per layer, SampleTokens rows of k|v after RoPE: the prompts
// of a round first, then a run of rows for each slot.

// cacheRow is the width of a cache row.
func (m *Model) cacheRow() int { return 2 * m.cfg.KVHeads * m.cfg.HeadDim }

// cached makes a pass write its k|v to the given cache rows (one per row of the
// pass) and attend to the cache, as the segments say.
//
// The k|v part of a q|k|v row is not contiguous with the next row's, so rows are
// taken as runs of u elements, the largest that divides both parts.
func (p *pass) cached(rows []int32, segments []kernels.Segment) {
	m, c := p.m, p.m.cfg
	layout := m.dev.Layout(m.arena, segments)
	q, kv, width, row := c.Heads*c.HeadDim, c.KVHeads*c.HeadDim, c.qkvWidth(), m.cacheRow()
	u := c.HeadDim * gcd(c.Heads, 2*c.KVHeads)
	s := kernels.ScatterIndex{Start: []int32{0}}
	for i, r := range rows {
		for j := range row / u {
			s.Dst = append(s.Dst, int32(int(r)*(row/u)+j))
			s.Src = append(s.Src, int32((i*width+q)/u+j))
			s.Start = append(s.Start, int32(len(s.Src)))
		}
	}
	index := m.dev.Scatter(m.arena, s)
	size := m.opt.SampleTokens * row
	p.attend = func(l int, s *saved) {
		cache := m.cache.Slice(l*size, (l+1)*size)
		m.dev.ScatterAdd(cache, s.qkv, index, u, false)
		k := kernels.Strided{Buf: cache, Stride: row}
		v := kernels.Strided{Buf: cache, Off: kv, Stride: row}
		m.dev.Attention(kernels.Attention{Out: s.attn, Q: kernels.Strided{Buf: s.qkv, Stride: width}, K: k, V: v, PK: k, PV: v,
			Layout: layout, T: p.t, H: c.Heads, KV: c.KVHeads, HD: c.HeadDim, Scratch: m.arena})
	}
}

func gcd(a, b int) int {
	for b != 0 {
		a, b = b, a%b
	}
	return a
}

// chunk is a run of prompt tokens that is prefilled in one pass.
type chunk struct {
	tokens, positions, rows []int32
	segments                []kernels.Segment
	ended                   []*prompt // prompts whose last token is in it
}

// chunks cuts the prompts into passes of at most limit tokens. Only a prompt
// longer than that is cut itself, always at multiples of limit, so that where
// it is cut does not depend on its neighbours.
func chunks(prompts []*prompt, limit int) []*chunk {
	var out []*chunk
	for _, p := range prompts {
		for from := 0; from < len(p.tokens); from += limit {
			to := min(from+limit, len(p.tokens))
			if len(out) == 0 || len(out[len(out)-1].tokens)+to-from > limit {
				out = append(out, &chunk{})
			}
			c := out[len(out)-1]
			c.segments = append(c.segments, kernels.Segment{Q: int32(len(c.tokens)), QLen: int32(to - from), K: int32(p.row), KLen: int32(to)})
			for i := from; i < to; i++ {
				c.tokens = append(c.tokens, p.tokens[i])
				c.positions = append(c.positions, int32(i))
				c.rows = append(c.rows, int32(p.row+i))
			}
			if to == len(p.tokens) {
				p.lastRow = int32(len(c.tokens) - 1)
				c.ended = append(c.ended, p)
			}
		}
	}
	return out
}

// prefill fills the cache with the round's prompts and samples the first token
// of every completion; those that go on wait for a slot.
func (w *round) prefill(ctx context.Context, out []Completion) error {
	for _, c := range chunks(w.prompts, w.m.opt.MaxTokens) {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("generate: %w", err)
		}
		if err := w.m.prefill(w, c, out); err != nil {
			return err
		}
	}
	return nil
}

func (m *Model) prefill(w *round, c *chunk, out []Completion) error {
	mark := m.arena.Mark()
	defer m.arena.Release(mark)
	p := m.newPass(m.policy, c.positions, false)
	p.cached(c.rows, c.segments)
	p.forward(c.tokens)

	var rows []int32
	var first []*sequence
	for _, q := range c.ended {
		for _, i := range q.wanted {
			rows = append(rows, q.lastRow)
			first = append(first, &sequence{out: i, prompt: q})
		}
	}
	for from := 0; from < len(rows); from += m.opt.SampleSlots {
		to := min(from+m.opt.SampleSlots, len(rows))
		u := make([]float32, to-from)
		for i := range u {
			u[i] = w.uniform(first[from+i].out, 0)
		}
		tokens, logProbs, err := m.draw(p, rows[from:to], u, w.r)
		if err != nil {
			return err
		}
		for i, s := range first[from:to] {
			if w.accept(out, s.out, tokens[i], logProbs[i]) {
				s.last = tokens[i]
				w.waiting = append(w.waiting, s)
			}
		}
	}
	return nil
}

// decode feeds every active sequence its last token and samples the next.
func (m *Model) decode(w *round, active []*sequence, out []Completion) ([]int32, []float32, error) {
	mark := m.arena.Mark()
	defer m.arena.Release(mark)
	n := len(active)
	tokens, positions, rows, all := make([]int32, n), make([]int32, n), make([]int32, n), make([]int32, n)
	u, segments := make([]float32, n), make([]kernels.Segment, n)
	for i, s := range active {
		start, length := w.base+s.slot*w.tail, len(s.prompt.tokens)
		tokens[i], positions[i], rows[i], all[i] = s.last, int32(length+s.fed), int32(start+s.fed), int32(i)
		segments[i] = kernels.Segment{Q: int32(i), QLen: 1, K: int32(start), KLen: int32(s.fed + 1),
			Prefix: int32(s.prompt.row), PrefixLen: int32(length)}
		u[i] = w.uniform(s.out, s.fed+1)
	}
	p := m.newPass(m.policy, positions, false)
	p.cached(rows, segments)
	p.forward(tokens)
	return m.draw(p, all, u, w.r)
}

// draw samples one token after each of the given rows of a pass.
func (m *Model) draw(p *pass, rows []int32, u []float32, r *GenerateRequest) ([]int32, []float32, error) {
	mark := m.arena.Mark()
	defer m.arena.Release(mark)
	n, d := len(rows), m.cfg.Hidden
	hidden, sum := m.act(n*d), m.act(n*d)
	p.finalNorm(hidden, sum, nil, rows)
	ids, lp := m.arena.Alloc(kernels.I32, n), m.arena.Alloc(kernels.F32, n)
	m.dev.Sample(kernels.Draw{Hidden: hidden, W: p.w.head, U: m.putF32(u), Tokens: ids, LogProb: lp, N: n, D: d, V: m.cfg.Vocab,
		Temperature: r.Temperature, TopP: r.TopP, Scratch: m.arena})
	tokens, logProbs := make([]int32, n), make([]float32, n)
	if err := m.dev.Download(denseI32(tokens), ids); err != nil {
		return nil, nil, fmt.Errorf("generate: %w", err)
	}
	if err := m.dev.Download(denseF32(logProbs), lp); err != nil {
		return nil, nil, fmt.Errorf("generate: %w", err)
	}
	return tokens, logProbs, nil
}

// rehearseSampling takes the most scratch memory that Generate can: a chunk of
// one-token prompts, and a decoding step of all slots.
func (m *Model) rehearseSampling() error {
	r := &GenerateRequest{N: 1, MaxTokens: 2, Temperature: 1, TopP: 1}
	w := &round{m: m, r: r, slots: m.opt.SampleSlots, tail: 1}
	slots := m.opt.SampleSlots
	p := &prompt{tokens: []int32{0}, wanted: make([]int, slots)}
	c := &chunk{tokens: make([]int32, m.opt.MaxTokens), positions: make([]int32, m.opt.MaxTokens), rows: make([]int32, m.opt.MaxTokens), ended: []*prompt{p}}
	for i := range m.opt.MaxTokens {
		c.segments = append(c.segments, kernels.Segment{Q: int32(i), QLen: 1, K: 0, KLen: 1})
	}
	out := make([]Completion, 1)
	if err := m.prefill(w, c, out); err != nil {
		return err
	}
	active := make([]*sequence, slots)
	for i := range active {
		active[i] = &sequence{prompt: p, slot: i}
	}
	_, _, err := m.decode(w, active, out)
	return err
}

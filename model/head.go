package model

import (
	"fmt"

	"trainerd/kernels"
)

// headPass is the final norm and LM head over some predictions of a pass. The
// norm runs on gathered rows only: in a micro-batch few tokens predict.
type headPass struct {
	n                 int
	sum, hidden, rstd kernels.Buffer // [n,d] residual stream, [n,d] normed, F32[n]
	rows              []int32
	head              kernels.Head
}

// newHead gathers the rows and norms them; the pass's forward must have run.
func (p *pass) newHead(rows, targets []int32, temperature float32) *headPass {
	m, d, n := p.m, p.m.cfg.Hidden, len(rows)
	h := &headPass{n: n, rows: rows, sum: m.act(n * d), hidden: m.act(n * d), rstd: m.arena.Alloc(kernels.F32, n)}
	p.finalNorm(h.hidden, h.sum, h.rstd, rows)
	h.head = kernels.Head{Hidden: h.hidden, W: p.w.head, N: n, D: d, V: m.cfg.Vocab, Temperature: temperature, Scratch: m.arena}
	if targets != nil {
		h.head.Targets = m.putI32(targets)
		h.head.LogProb = m.arena.Alloc(kernels.F32, n)
		h.head.Entropy = m.arena.Alloc(kernels.F32, n)
	}
	return h
}

// finalNorm writes the residual stream of the given rows and its norm; rstd may be nil.
func (p *pass) finalNorm(hidden, sum, rstd kernels.Buffer, rows []int32) {
	m, d, n := p.m, p.m.cfg.Hidden, len(rows)
	mark := m.arena.Mark()
	index := m.putI32(rows)
	m.dev.Gather(sum, p.last().x2, index, d)
	m.dev.Gather(hidden, p.out, index, d)
	m.arena.Release(mark)
	m.dev.RMSNorm(kernels.Norm{Out: hidden, Rstd: rstd, X: sum, Add: hidden, Sum: sum, W: p.w.norm, T: n, D: d, Eps: float32(m.cfg.NormEps)})
}

// fetch asks for the head's outputs, which out holds once the device was waited
// for; devices that need not be are waited for here.
func (h *headPass) fetch(m *Model, out Scores) error {
	late, ok := m.dev.(kernels.Fetcher)
	if !ok {
		return h.scores(m, out)
	}
	if err := late.Fetch(denseF32(out.LogProb), h.head.LogProb); err != nil {
		return fmt.Errorf("score: %w", err)
	}
	if err := late.Fetch(denseF32(out.Entropy), h.head.Entropy); err != nil {
		return fmt.Errorf("score: %w", err)
	}
	return nil
}

// scores waits for the head and copies its outputs to out.
func (h *headPass) scores(m *Model, out Scores) error {
	if err := m.dev.Download(denseF32(out.LogProb), h.head.LogProb); err != nil {
		return fmt.Errorf("score: %w", err)
	}
	if err := m.dev.Download(denseF32(out.Entropy), h.head.Entropy); err != nil {
		return fmt.Errorf("score: %w", err)
	}
	return nil
}

// eachChunk calls fn for runs of predictions small enough for the head, with
// the scratch memory that fn took given back.
func (m *Model) eachChunk(n int, fn func(from, to int) error) error {
	step := m.opt.headRows()
	for from := 0; from < n; from += step {
		mark := m.arena.Mark()
		err := fn(from, min(n, from+step))
		m.arena.Release(mark)
		if err != nil {
			return err
		}
	}
	return nil
}

// part returns a run of per-prediction values; nil stays nil.
func part(x []float32, from, to int) []float32 {
	if x == nil {
		return nil
	}
	return x[from:to]
}

func (s Scores) part(from, to int) Scores { return Scores{s.LogProb[from:to], s.Entropy[from:to]} }

func newScores(n int) Scores { return Scores{make([]float32, n), make([]float32, n)} }

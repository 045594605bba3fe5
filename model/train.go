package model

import (
	"fmt"

	"trainerd/internal/fault"
	"trainerd/kernels"
)

// check validates a batch for this model.
func (m *Model) check(b *Batch) error {
	if err := b.Validate(m.cfg); err != nil {
		return err
	}
	if len(b.Tokens) > m.opt.MaxTokens {
		return fault.New(fault.TooLarge, "batch_too_large", "micro-batch of %d tokens, expected at most %d (max_tokens_per_micro_batch)", len(b.Tokens), m.opt.MaxTokens)
	}
	return nil
}

// Score computes log-probs and entropies of a batch's predictions; no gradients.
func (m *Model) Score(b *Batch, w Weights, temperature float32) (Scores, error) {
	weights, err := m.weights(w)
	if err != nil {
		return Scores{}, err
	}
	if err := m.check(b); err != nil {
		return Scores{}, err
	}
	if err := checkTemperature(temperature); err != nil {
		return Scores{}, err
	}
	mark := m.arena.Mark()
	defer m.arena.Release(mark)
	p := m.newPass(weights, b.Positions, false)
	p.packed(b.deviceSegments())
	p.forward(b.Tokens)
	return m.scoreRows(p, b, temperature)
}

// scoreRows runs the head forward over all of a batch's predictions.
func (m *Model) scoreRows(p *pass, b *Batch, temperature float32) (Scores, error) {
	out := newScores(len(b.Rows))
	err := m.eachChunk(len(b.Rows), func(from, to int) error {
		h := p.newHead(b.Rows[from:to], b.Targets[from:to], temperature)
		m.dev.LogProb(h.head)
		return h.scores(m, out.part(from, to))
	})
	return out, err
}

// ForwardBackward adds the gradient of the loss over one micro-batch. The first
// call after OptimStep or ZeroGrad overwrites, later ones accumulate.
//
// With Loss.Coefficients the head runs twice (all log-probs before any
// gradient); otherwise once.
func (m *Model) ForwardBackward(b *Batch, l Loss) (Scores, error) {
	fresh, micro := m.fresh, m.micro
	s, err := m.Accumulate(b, l)
	if err == nil {
		err = m.Settle()
	}
	if err != nil {
		m.fresh, m.micro = fresh, micro
		return Scores{}, err
	}
	return s, nil
}

// Settle waits for what Accumulate began, fills in its scores, and returns what
// failed; the gradient is then to be dropped by ZeroGrad.
func (m *Model) Settle() error {
	if err := m.dev.Sync(); err != nil {
		return fmt.Errorf("forward and backward pass: %w", err)
	}
	return nil
}

// Accumulate is ForwardBackward that does not wait for the device, so that
// micro-batches follow each other there without a gap: the scores hold nothing
// before Settle has returned nil. With Loss.Coefficients it waits for the log-probs.
func (m *Model) Accumulate(b *Batch, l Loss) (Scores, error) {
	weights, err := m.weights(Policy)
	if err != nil {
		return Scores{}, err
	}
	if m.grad == nil {
		return Scores{}, fault.New(fault.Invalid, "no_training", "the model was loaded without gradients")
	}
	if err := m.check(b); err != nil {
		return Scores{}, err
	}
	n := len(b.Rows)
	if err := l.validate(n); err != nil {
		return Scores{}, err
	}
	mark := m.arena.Mark()
	defer m.arena.Release(mark)
	p := m.newPass(weights, b.Positions, true)
	layout := p.packed(b.deviceSegments())
	p.forward(b.Tokens)

	var dLogProb, dEntropy []float32
	if l.Coefficients != nil {
		s, err := m.scoreRows(p, b, l.Temperature)
		if err != nil {
			return Scores{}, err
		}
		dLogProb, dEntropy = l.Coefficients(s)
		if len(dLogProb) != n || (dEntropy != nil && len(dEntropy) != n) {
			return Scores{}, badBatch("loss.coefficients", -1, fmt.Sprintf("%d and %d elements", len(dLogProb), len(dEntropy)), fmt.Sprintf("%d, one per prediction", n))
		}
	}
	if m.fresh {
		m.micro = 0
	}
	grads := m.newSink()
	dx := m.act(p.t * m.cfg.Hidden)
	m.dev.Zero(dx)
	out := newScores(n)
	headMark := m.arena.Mark()
	dHead, dNorm := grads.headGrad()
	err = m.eachChunk(n, func(from, to int) error {
		h := p.newHead(b.Rows[from:to], b.Targets[from:to], l.Temperature)
		g := kernels.HeadGrad{DW: dHead, Accumulate: grads.accumulates() || from > 0}
		if l.Coefficients != nil {
			g.DLogProb, g.DEntropy = m.putF32(part(dLogProb, from, to)), m.putF32(part(dEntropy, from, to))
		} else {
			g.Surrogate = &l.Surrogate
			g.Tokens = kernels.SurrogateTokens{
				Old: m.putF32(part(l.Old, from, to)), Adv: m.putF32(part(l.Adv, from, to)),
				Ref:    m.putF32(part(l.Ref, from, to)),
				Weight: m.putF32(part(l.Weight, from, to)), TIS: m.putF32(part(l.TIS, from, to)),
			}
		}
		m.headBackward(h, g, dNorm, dx)
		return h.fetch(m, out.part(from, to))
	})
	if err != nil {
		return Scores{}, err
	}

	grads.putHead()
	m.arena.Release(headMark)

	layersMark := m.arena.Mark()
	p.backward(dx, layout, grads)
	m.arena.Release(layersMark)
	grads.addEmbedding(dx, b.Tokens)
	m.fresh = false
	m.micro++
	return out, nil
}

// headBackward runs the head forward and backward and adds the gradient of its
// rows' hidden states to dx [T,d], and that of the final norm to dNorm as g says.
func (m *Model) headBackward(h *headPass, g kernels.HeadGrad, dNorm, dx kernels.Buffer) {
	d := m.cfg.Hidden
	g.DHidden = m.act(h.n * d)
	m.dev.LogProbBackward(h.head, g)
	// The normed rows are not needed any more: their buffer takes the gradient.
	drows := h.hidden
	m.dev.RMSNormBackward(kernels.NormBackward{DX: drows, DW: dNorm, DY: g.DHidden, X: h.sum, W: m.policy.norm, Rstd: h.rstd,
		T: h.n, D: d, Accumulate: g.Accumulate})
	m.dev.ScatterAdd(dx, drows, m.dev.Scatter(m.arena, kernels.ScatterTo(h.rows)), d, true)
}

// ZeroGrad makes the next ForwardBackward overwrite; an OptimStep straight after it sees a zero gradient.
func (m *Model) ZeroGrad() { m.fresh = true }

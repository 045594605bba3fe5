package cpu

import (
	"math"

	"trainerd/kernels"
	"trainerd/kernels/cpu/internal/simd"
)

// headRows is the most rows of logits that are held at once, within 128 MiB: each
// chunk packs all of W again, twice with gradients.
func headRows(v int) int { return min(512, max(16, (128<<20)/(4*v))) }

// headChunk returns how many rows of logits are held at once: n cut evenly. It
// depends on the shape alone, and may be greater for fewer rows.
func headChunk(n, v int) int {
	most := headRows(v)
	chunks := max(1, (n+most-1)/most)
	return (n + chunks - 1) / chunks
}

// logitBytes is what n rows or fewer need: a plan is made for the most rows, and fewer of them may make larger chunks.
func logitBytes(n, v int) int64 {
	return kernels.Round(int64(min(n, headRows(v)))*int64(v)*4, alignment)
}

func (d *device) HeadScratch(n, dim, v int, backward bool) int64 { return logitBytes(n, v) }

func (d *device) LogProb(h kernels.Head) { d.head("log-prob", h, nil) }

func (d *device) LogProbBackward(h kernels.Head, g kernels.HeadGrad) {
	d.head("log-prob backward", h, &g)
}

// head runs chunks of rows through logits -> statistics -> logit gradients, in
// place -> gradients of Hidden and W. Forward only (g nil) and forward with
// backward share the code, so their log-probs agree bit for bit.
func (d *device) head(op string, h kernels.Head, g *kernels.HeadGrad) {
	n, dim, v := h.N, h.D, h.V
	must(n >= 0 && dim > 0 && v > 0 && h.Temperature > 0, op, "N %d d %d V %d temperature %v", n, dim, v, h.Temperature)
	hidden, w := floats(op, "Hidden", h.Hidden, n*dim), floats(op, "W", h.W, v*dim)
	targets := ints(op, "Targets", h.Targets, n)
	inside(op, "Targets", targets, v)
	logProb, entropy := floats(op, "LogProb", h.LogProb, n), optional(op, "Entropy", h.Entropy, n)
	var grad rowGradient
	var dHidden, dW []float32
	if g != nil {
		grad = newRowGradient(op, g, n)
		dHidden, dW = floats(op, "DHidden", g.DHidden, n*dim), floats(op, "DW", g.DW, v*dim)
		if n == 0 && !g.Accumulate {
			d.Zero(g.DW)
		}
	}
	if n == 0 {
		return
	}
	must(h.Scratch != nil, op, "Scratch is nil")
	mark := h.Scratch.Mark()
	defer h.Scratch.Release(mark)
	chunk := headChunk(n, v)
	logits := scratch(op, h.Scratch, chunk*v)
	scale := 1 / h.Temperature
	for from := 0; from < n; from += chunk {
		m := min(chunk, n-from)
		d.gemm(false, true, m, v, dim, hidden[from*dim:][:m*dim], w, logits[:m*v], false)
		d.each(m, func(_, i int) {
			z, row := logits[i*v:][:v], from+i
			s := stats(z, targets[row], scale)
			logProb[row] = s.logProb
			if h.Entropy != nil {
				entropy[row] = s.entropy
			}
			if g != nil {
				dLogProb, dEntropy := grad.row(row, s.logProb, s.entropy)
				s.gradient(z, dLogProb, dEntropy)
			}
		})
		if g != nil {
			d.gemm(false, false, m, dim, v, logits[:m*v], w, dHidden[from*dim:][:m*dim], false)
			d.gemm(true, false, v, dim, m, logits[:m*v], hidden[from*dim:][:m*dim], dW, g.Accumulate || from > 0)
		}
	}
}

// rowStats is what one row of logits z says about its target, with y = z*scale.
type rowStats struct {
	target           int32
	scale, lse       float32 // lse: logsumexp(y)
	logProb, entropy float32
}

func stats(z []float32, target int32, scale float32) rowStats {
	top := simd.Max(z) * scale
	s, sy := simd.LogitStats(z, scale, top)
	log := math.Log(s)
	return rowStats{
		target: target, scale: scale, lse: float32(float64(top) + log),
		logProb: float32(float64(scale)*float64(z[target]) - float64(top) - log),
		entropy: float32(log - sy/s),
	}
}

// gradient overwrites z with the gradient of dLogProb*logp + dEntropy*H:
//
//	dz_j = scale * (dLogProb*([j=target] - p_j) - dEntropy*p_j*(log p_j + H))
//
// It is exactly 0 when both are 0, even where the logits are not finite.
func (s rowStats) gradient(z []float32, dLogProb, dEntropy float32) {
	if dLogProb == 0 && dEntropy == 0 {
		clear(z)
		return
	}
	simd.DLogits(z, z, s.scale, s.lse, -s.scale*(dLogProb+dEntropy*s.entropy), -s.scale*dEntropy)
	z[s.target] += s.scale * dLogProb
}

// rowGradient gives the derivatives of the loss with respect to one row's
// log-prob and entropy.
type rowGradient struct {
	surrogate                  *kernels.Surrogate
	old, ref, adv, weight, tis []float32
	dLogProb, dEntropy         []float32
}

func newRowGradient(op string, g *kernels.HeadGrad, n int) rowGradient {
	if g.Surrogate == nil {
		return rowGradient{dLogProb: floats(op, "DLogProb", g.DLogProb, n), dEntropy: optional(op, "DEntropy", g.DEntropy, n)}
	}
	t := g.Tokens
	r := rowGradient{
		surrogate: g.Surrogate,
		old:       optional(op, "Old", t.Old, n), ref: optional(op, "Ref", t.Ref, n),
		adv: optional(op, "Adv", t.Adv, n), weight: floats(op, "Weight", t.Weight, n), tis: optional(op, "TIS", t.TIS, n),
	}
	must(r.adv != nil || g.Surrogate.Kind == kernels.SurrogateNLL, op, "Adv is nil")
	must(r.ref != nil || g.Surrogate.Beta == 0, op, "Ref is nil and Beta %v", g.Surrogate.Beta)
	return r
}

func (r rowGradient) row(i int, logp, entropy float32) (dLogProb, dEntropy float32) {
	if r.surrogate == nil {
		return r.dLogProb[i], at(r.dEntropy, i, 0)
	}
	_, dLogProb, dEntropy = r.surrogate.Token(logp, at(r.old, i, logp), at(r.ref, i, 0), at(r.adv, i, 0), r.weight[i], at(r.tis, i, 1), entropy)
	return dLogProb, dEntropy
}

// at returns x[i], or the default of an input that was not given.
func at(x []float32, i int, otherwise float32) float32 {
	if x == nil {
		return otherwise
	}
	return x[i]
}

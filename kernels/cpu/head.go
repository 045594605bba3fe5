package cpu

import (
	"math"

	"trainerd/kernels"
)

// headChunk returns how many rows of logits are held at once.
func headChunk(n, v int) int {
	most := min(512, max(16, (64<<20)/(4*v)))
	chunks := max(1, (n+most-1)/most)
	return (n + chunks - 1) / chunks
}

func (d *device) HeadScratch(n, dim, v int, backward bool) int64 {
	bytes := kernels.Round(int64(headChunk(n, v))*int64(v)*4, alignment)
	if backward {
		bytes += kernels.Round(int64(min(d.workers, headChunk(n, v)))*int64(v)*4, alignment)
	}
	return bytes
}

func (d *device) LogProb(h kernels.Head) { d.head("log-prob", h, nil) }

func (d *device) LogProbBackward(h kernels.Head, g kernels.HeadGrad) {
	d.head("log-prob backward", h, &g)
}

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
	mark := h.Scratch.Mark()
	defer h.Scratch.Release(mark)
	chunk := headChunk(n, v)
	logits := scratch(op, h.Scratch, chunk*v)
	var rows []float32
	if g != nil {
		rows = scratch(op, h.Scratch, min(d.workers, chunk)*v)
	}
	inv := 1 / h.Temperature
	for from := 0; from < n; from += chunk {
		m := min(chunk, n-from)
		d.gemm(false, true, m, v, dim, hidden[from*dim:][:m*dim], w, logits[:m*v], false)
		d.each(m, func(worker, i int) {
			z, t := logits[i*v:][:v], int(targets[from+i])
			if inv != 1 {
				for j := range z {
					z[j] *= inv
				}
			}
			top := math.Inf(-1)
			for _, a := range z {
				top = max(top, float64(a))
			}
			var e []float32
			if g != nil {
				e = rows[worker*v:][:v]
			}
			var s, sz float64
			for j, a := range z {
				x := math.Exp(float64(a) - top)
				s += x
				if x > 0 {
					sz += x * (float64(a) - top)
				}
				if g != nil {
					e[j] = float32(x)
				}
			}
			logS := math.Log(s)
			lp, ent := float32(float64(z[t])-top-logS), float32(logS-sz/s)
			logProb[from+i] = lp
			if entropy != nil {
				entropy[from+i] = ent
			}
			if g == nil {
				return
			}
			dlogp, dent := grad.row(from+i, lp, ent)
			if dlogp == 0 && dent == 0 {
				clear(z)
				return
			}
			c := float32(1 / s)
			for j, a := range z {
				p := e[j] * c
				y := -dlogp * p
				if dent != 0 && p > 0 {
					y -= dent * p * (float32(float64(a)-top-logS) + ent)
				}
				z[j] = y * inv
			}
			z[t] += dlogp * inv
		})
		if g != nil {
			d.gemm(false, false, m, dim, v, logits[:m*v], w, dHidden[from*dim:][:m*dim], false)
			d.gemm(true, false, v, dim, m, logits[:m*v], hidden[from*dim:][:m*dim], dW, g.Accumulate || from > 0)
		}
	}
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

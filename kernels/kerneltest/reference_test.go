package kerneltest

import (
	"math"
	"math/rand/v2"
	"testing"
	"time"

	"trainerd/kernels"
)

// gradientOf holds an analytic gradient to central differences of f, the
// float64 loss, at some elements of x. With h = 1e-5 the truncation is about
// 1e-10 of the third derivative and the rounding 1e-11 of f, which are both far
// below 1e-6 of the scale that the test allows.
func gradientOf(t *testing.T, rng *rand.Rand, name string, x, grad []float64, f func() float64) {
	t.Helper()
	if len(x) != len(grad) {
		t.Fatalf("%s: %d elements, gradient of %d", name, len(x), len(grad))
	}
	const h = 1e-5
	scale := 1 + maxAbs(grad)
	for n := range min(60, len(x)) {
		i := n
		if len(x) > 60 {
			i = rng.IntN(len(x))
		}
		kept := x[i]
		x[i] = kept + h
		up := f()
		x[i] = kept - h
		down := f()
		x[i] = kept
		if d := (up - down) / (2 * h); math.Abs(d-grad[i]) > 1e-6*scale {
			t.Errorf("%s[%d]: gradient %v, finite difference %v", name, i, grad[i], d)
			return
		}
	}
}

func fresh(t *testing.T) (*rand.Rand, func(n int) []float64) {
	seed := *seedFlag
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	t.Logf("-kerneltest.seed=%d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	return rng, func(n int) []float64 {
		x := make([]float64, n)
		for i := range x {
			x[i] = rng.NormFloat64()
		}
		return x
	}
}

// weighted is sum c_i*x_i: a loss whose gradient with respect to x is c.
func weighted(c, x []float64) float64 {
	v, _ := dot64(c, x)
	return v
}

func plain(x []value) []float64 {
	out := make([]float64, len(x))
	for i, v := range x {
		out[i] = v.v
	}
	return out
}

func TestSwiGLUReference(t *testing.T) {
	rng, normal := fresh(t)
	const rows, f = 5, 7
	gu, dout := normal(rows*2*f), normal(rows*f)
	gradientOf(t, rng, "gu", gu, plain(refSwiGLUBackward(dout, gu, rows, f)), func() float64 {
		return weighted(dout, plain(refSwiGLU(gu, rows, f)))
	})
}

func TestGemmReference(t *testing.T) {
	rng, normal := fresh(t)
	const m, n, k = 4, 5, 6
	// dA = dC·op(B)ᵀ and dB = op(A)ᵀ·dC, in all four storage orders
	for mode := range 4 {
		ta, tb := mode&1 != 0, mode&2 != 0
		a, b, c := normal(m*k), normal(k*n), normal(m*n)
		loss := func() float64 { return weighted(c, plain(refGemm(a, b, m, n, k, ta, tb))) }
		var da, db []value
		if ta {
			da = refGemm(b, c, k, m, n, tb, true)
		} else {
			da = refGemm(c, b, m, k, n, false, !tb)
		}
		if tb {
			db = refGemm(c, a, n, k, m, true, ta)
		} else {
			db = refGemm(a, c, k, n, m, !ta, false)
		}
		gradientOf(t, rng, "a", a, plain(da), loss)
		gradientOf(t, rng, "b", b, plain(db), loss)
	}
}

func TestRMSNormReference(t *testing.T) {
	rng, normal := fresh(t)
	const d, eps = 9, 1e-3
	x, w, dy := normal(6*d), normal(d), normal(6*d)
	loss := func() float64 {
		out, _ := refRMSNorm(x, w, d, eps)
		return weighted(dy, out)
	}
	_, rstd := refRMSNorm(x, w, d, eps)
	dx, dw := refRMSNormBackward(dy, x, w, rstd, d)
	gradientOf(t, rng, "x", x, plain(dx), loss)
	gradientOf(t, rng, "w", w, plain(dw), loss)
}

func TestRopeReference(t *testing.T) {
	rng, normal := fresh(t)
	s := ropeShape{t: 4, h: 3, kv: 1, hd: 6, theta: 1e4, eps: 1e-3, pos: []int32{0, 1, 7, 30000}}
	for _, norm := range []bool{false, true} {
		if norm {
			s.qw, s.kw = normal(s.hd), normal(s.hd)
		}
		in, d := normal(s.t*s.width()), normal(s.t*s.width())
		loss := func() float64 {
			out, _ := refRope(in, s)
			return weighted(d, out)
		}
		dx, dw := refRopeBackward(d, in, s)
		gradientOf(t, rng, "in", in, plain(dx), loss)
		if norm {
			gradientOf(t, rng, "qw", s.qw, plain(dw)[:s.hd], loss)
			gradientOf(t, rng, "kw", s.kw, plain(dw)[s.hd:], loss)
		}
	}
}

func TestAttentionReference(t *testing.T) {
	rng, normal := fresh(t)
	for _, s := range []attentionShape{
		{2, 1, 4, [][]int{{3, 2, 4}, {2}}, 1},
		{3, 3, 6, [][]int{{1, 1}, {4, 3}}, 1},
	} {
		segments, n := s.segments()
		w := (s.h + 2*s.kv) * s.hd
		qkv, dout := normal(n*w), normal(n*s.h*s.hd)
		g := attentionGrad{attention: packed(qkv, segments, s.h, s.kv, s.hd), dout: dout}
		forward := func() (out, lse []float64) {
			out, lse = make([]float64, n*s.h*s.hd), make([]float64, n*s.h)
			for _, seg := range segments {
				for i := range int(seg.QLen) {
					for head := range s.h {
						r := g.row(seg, i, head)
						at := (int(seg.Q)+i)*s.h + head
						copy(out[at*s.hd:], plain(r.out))
						lse[at] = r.lse
					}
				}
			}
			return out, lse
		}
		g.out, g.lse = forward()
		grad := make([]float64, n*w)
		for _, seg := range segments {
			for i := range int(seg.QLen) {
				for head := range s.h {
					copy(grad[(int(seg.Q)+i)*w+head*s.hd:], plain(g.dq(seg, i, head)))
				}
			}
		}
		for row := range n {
			for head := range s.kv {
				dk, dv := g.dkv(int32(row), head)
				copy(grad[row*w+(s.h+head)*s.hd:], plain(dk))
				copy(grad[row*w+(s.h+s.kv+head)*s.hd:], plain(dv))
			}
		}
		gradientOf(t, rng, "qkv", qkv, grad, func() float64 {
			out, _ := forward()
			return weighted(dout, out)
		})
	}
}

func TestHeadReference(t *testing.T) {
	rng, normal := fresh(t)
	const d, v = 5, 11
	hidden, w := normal(d), normal(v*d)
	for _, temperature := range []float64{1, 0.6} {
		const dlp, dent = -1.3, 0.7
		loss := func() float64 {
			r := refHeadRow(hidden, w, v, 3, temperature)
			return dlp*r.logProb + dent*r.entropy
		}
		dz := plain(refHeadRow(hidden, w, v, 3, temperature).dlogits(dlp, dent))
		gradientOf(t, rng, "hidden", hidden, plain(refGemm(dz, w, 1, d, v, false, false)), loss)
		gradientOf(t, rng, "w", w, plain(refGemm(dz, hidden, v, d, 1, true, false)), loss)
	}
}

// TestTokenReference holds the derivatives of every surrogate to differences of
// its loss, and kernels.Surrogate.Token (float32) to the float64 reference.
func TestTokenReference(t *testing.T) {
	rng, _ := fresh(t)
	for _, s := range []kernels.Surrogate{
		{Kind: kernels.SurrogateNLL, EntropyCoef: 0.1},
		{EpsLow: 0.2, EpsHigh: 0.28},
		{EpsLow: 0.2, EpsHigh: 0.28, Delta: 1.7, Beta: 0.3, EntropyCoef: 0.1},
		{Kind: kernels.SurrogateCISPO, RatioCap: 1.5, Beta: 0.3},
	} {
		for range 300 {
			x := tokenInputs{logp: -rng.Float64() * 5, adv: rng.NormFloat64(), weight: rng.Float64(), tis: 2 * rng.Float64(), entropy: rng.Float64()}
			x.old, x.ref = x.logp+rng.NormFloat64()*0.4, x.logp+rng.NormFloat64()*0.4
			g, edge := math.Exp(x.logp-x.old), false
			for _, bound := range []float64{0.8, 1.28, 1.7, 1.5} {
				edge = edge || math.Abs(g-bound) < 1e-3 // no derivative there, and float32 may fall on the other side
			}
			if edge {
				continue
			}
			at := []float64{x.logp, x.entropy}
			_, dlp, dent, mag, _ := refToken(s, x, x.logp)
			gradientOf(t, rng, "logp, entropy", at, []float64{dlp, dent}, func() float64 {
				y := x
				y.logp, y.entropy = at[0], at[1]
				loss, _, _, _, _ := refToken(s, y, x.logp)
				return loss
			})
			f := func(v float64) float32 { return float32(v) }
			_, gotLP, gotEnt := s.Token(f(x.logp), f(x.old), f(x.ref), f(x.adv), f(x.weight), f(x.tis), f(x.entropy))
			// float32 inputs of up to 7 in an exponent, and a dozen roundings
			if tol := 64 * u32 * mag; math.Abs(float64(gotLP)-dlp) > tol || math.Abs(float64(gotEnt)-dent) > 8*u32*math.Abs(dent) {
				t.Fatalf("%+v %+v: Token gives %v, %v, expected %v ± %v, %v", s, x, gotLP, gotEnt, dlp, tol, dent)
			}
		}
	}
}

package kerneltest

import (
	"math"

	"trainerd/kernels"
)

// normCases: the mean of squares is off by D+2 roundings relatively (all terms
// are positive), its root by half; the backward pass adds a dot product of D terms.
func normCases(e *env) {
	for _, c := range []struct{ t, d int }{{1, 1}, {1, 33}, {3, 7}, {17, 64}, {70, 576}, {953, 40}, {200, 896}, {16384, 3584}} {
		for variant := range 4 {
			residual, more := variant&1 != 0, variant&2 != 0
			e.sub(float64(c.t*c.d)*perElement, label("%dx%d/residual=%v,accumulate=%v", c.t, c.d, residual, more), func(e *env) {
				const eps = float32(1e-5)
				x, w := e.normal(e.act, c.t*c.d, 2), e.normal(e.act, c.d, 1)
				n := kernels.Norm{Out: e.poisoned(e.act, c.t*c.d), Rstd: e.poisoned(kernels.F32, c.t), X: e.load(e.act, x), W: e.load(e.act, w), T: c.t, D: c.d, Eps: eps}
				slack := make([]float64, len(x)) // error of x itself
				if residual {
					add := e.normal(e.act, c.t*c.d, 2)
					n.Add, n.Sum = e.load(e.act, add), e.poisoned(e.act, c.t*c.d)
					if more {
						n.Sum = n.X
					}
					sum, tol := make([]float64, len(x)), make([]float64, len(x))
					for i := range x {
						sum[i] = x[i] + add[i]
						tol[i] = (u32 + e.u) * math.Abs(sum[i])
						slack[i] = tol[i]
					}
					e.dev.RMSNorm(n)
					got := e.read(n.Sum)
					e.compare("sum", got, sum, tol)
					x = got // the rest is judged on what the device stored
				} else {
					e.dev.RMSNorm(n)
				}
				want, rstd := refRMSNorm(x, w, c.d, float64(eps))
				rel := float64(c.d/2+4) * u32
				// A device may use the sum before it is rounded to be stored.
				rowSlack := e.u * 2
				if !residual {
					rowSlack = 0
				}
				tol := make([]float64, len(want))
				for i, v := range want {
					tol[i] = (rel+e.u+rowSlack+3*u32)*math.Abs(v) + slack[i]*rstd[i/c.d]*math.Abs(w[i%c.d])
				}
				e.compare("out", e.read(n.Out), want, tol)
				rtol := make([]float64, c.t)
				for i, v := range rstd {
					rtol[i] = (rel + rowSlack) * v
				}
				e.compare("rstd", e.read(n.Rstd), rstd, rtol)

				dy, before, dwBefore := e.normal(e.act, len(x), 1), e.normal(e.act, len(x), 1), e.normal(e.grad, c.d, 1)
				for i, v := range rstd {
					rstd[i] = round(kernels.F32, v)
				}
				b := kernels.NormBackward{
					DX: e.poisoned(e.act, len(x)), DW: e.poisoned(e.grad, c.d), DY: e.load(e.act, dy), X: e.load(e.act, x), W: n.W,
					Rstd: e.load(kernels.F32, rstd), T: c.t, D: c.d, AddTo: residual, Accumulate: more,
				}
				dx, dw := refRMSNormBackward(dy, x, w, rstd, c.d)
				if residual {
					e.store(b.DX, before)
					for i := range dx {
						dx[i] = value{dx[i].v + before[i], dx[i].mag + math.Abs(before[i])}
					}
				}
				if more {
					e.store(b.DW, dwBefore)
					for i := range dw {
						dw[i] = value{dw[i].v + dwBefore[i], dw[i].mag + math.Abs(dwBefore[i])}
					}
				}
				e.dev.RMSNormBackward(b)
				want, tol = values(dx, float64(c.d+10)*u32, e.u)
				e.compare("dx", e.read(b.DX), want, tol)
				want, tol = values(dw, float64(c.t+6)*u32, e.uGrad)
				e.compare("dw", e.read(b.DW), want, tol)
			})
		}
	}
	e.sub(1, "nan and zero", func(e *env) {
		x := []float64{1, math.NaN(), 0, 0}
		out := e.poisoned(e.act, 4)
		e.dev.RMSNorm(kernels.Norm{Out: out, X: e.load(e.act, x), W: e.load(e.act, []float64{1, 2}), T: 2, D: 2, Eps: 1e-6})
		got := e.read(out)
		e.nan("out", got[:2])
		e.same("a row of zeros", got[2:], []float64{0, 0})
	})
}

// ropeCases: cosine and sine are rounded once, the rotation adds three
// roundings; QK-norm adds those of normCases.
func ropeCases(e *env) {
	for _, c := range []ropeShape{
		{t: 1, h: 1, kv: 1, hd: 2, theta: 1e4}, {t: 5, h: 3, kv: 1, hd: 6, theta: 1e4}, {t: 67, h: 9, kv: 3, hd: 64, theta: 1e5},
		{t: 33, h: 4, kv: 2, hd: 128, theta: 1e6}, {t: 20, h: 2, kv: 2, hd: 80, theta: 1e4}, {t: 16384, h: 14, kv: 2, hd: 64, theta: 1e6},
	} {
		for _, norm := range []bool{false, true} {
			e.sub(float64(c.t*c.width())*perElement, label("%dx%d.%d.%d/norm=%v", c.t, c.h, c.kv, c.hd, norm), func(e *env) {
				s := c
				s.eps = float64(float32(1e-6))
				for i := range s.t {
					s.pos = append(s.pos, int32(i))
				}
				s.pos[s.t-1] = 32767 // and out of order
				in, d := e.normal(e.act, s.t*s.width(), 1), e.normal(e.act, s.t*s.width(), 1)
				if norm {
					s.qw, s.kw = e.normal(e.act, s.hd, 1), e.normal(e.act, s.hd, 1)
				}
				x := kernels.Rope{Out: e.poisoned(e.act, len(in)), In: e.load(e.act, in), Pos: e.ints(s.pos), T: s.t, H: s.h, KV: s.kv, HD: s.hd, Theta: s.theta, Eps: float32(s.eps)}
				b := kernels.RopeBackward{D: e.load(e.act, d), In: x.In, Pos: x.Pos, T: s.t, H: s.h, KV: s.kv, HD: s.hd, Theta: s.theta}
				want, rstd := refRope(in, s)
				factor := 6.0
				if norm {
					x.QW, x.KW, x.Rstd = e.load(e.act, s.qw), e.load(e.act, s.kw), e.poisoned(kernels.F32, len(rstd))
					b.QW, b.KW, b.Rstd = x.QW, x.KW, x.Rstd
					b.DQW, b.DKW = e.poisoned(e.grad, s.hd), e.poisoned(e.grad, s.hd)
					factor += float64(s.hd/2 + 6)
				}
				e.dev.Rope(x)
				// A rotated element mixes both of its pair: errors scale with the pair's length.
				tol := make([]float64, len(want))
				for i, v := range want {
					half, at := s.hd/2, i/s.hd*s.hd
					tol[i] = factor*u32*math.Hypot(want[at+i%half], want[at+half+i%half])*1.5 + e.u*math.Abs(v)
					if i%s.width() >= (s.h+s.kv)*s.hd {
						tol[i] = 0 // v is copied
					}
				}
				e.compare("out", e.read(x.Out), want, tol)
				if norm {
					rtol := make([]float64, len(rstd))
					for i, v := range rstd {
						rtol[i] = float64(s.hd/2+4) * u32 * v
					}
					e.compare("rstd", e.read(x.Rstd), rstd, rtol)
				} else {
					inPlace := x
					inPlace.In = e.load(e.act, in)
					inPlace.Out = inPlace.In
					e.dev.Rope(inPlace)
					e.compare("out over in", e.read(inPlace.Out), want, tol)
				}

				dx, dw := refRopeBackward(d, in, s)
				e.dev.RopeBackward(b)
				want, tol = values(dx, float64(3*s.hd+32)*u32, e.u)
				e.compare("dx", e.read(b.D), want, tol)
				if !norm {
					return
				}
				for range 2 { // overwrite, then accumulate
					want, tol = values(dw, float64(s.t*(s.h+s.kv)+s.hd+16)*u32, e.uGrad)
					e.compare("dqw", e.read(b.DQW), want[:s.hd], tol[:s.hd])
					e.compare("dkw", e.read(b.DKW), want[s.hd:], tol[s.hd:])
					if b.Accumulate {
						return
					}
					b.Accumulate = true
					e.store(b.D, d)
					e.dev.RopeBackward(b)
					for i, v := range dw {
						dw[i] = value{2 * v.v, 2 * v.mag}
					}
				}
			})
		}
	}
}

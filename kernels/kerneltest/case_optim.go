package kerneltest

import (
	"math"

	"trainerd/kernels"
)

// advantageCases: float64 on the host. A mean of n rewards is off by n+1
// roundings of float64; dividing by a deviation carries that over it.
func advantageCases(e *env) {
	const u64 = 1.0 / (1 << 53)
	for _, sizes := range [][]int{{}, {1}, {7}, {0, 3, 0}, {7, 7, 7, 7}, {2, 100, 1, 33}} {
		for _, scale := range []kernels.AdvantageScale{kernels.ScaleNone, kernels.ScaleStd} {
			e.sub(1, label("%v/%d", sizes, scale), func(e *env) {
				start, r := []int32{0}, []float64{}
				for _, n := range sizes {
					n := max(n, 0)
					if scale == kernels.ScaleStd && n == 1 {
						n = 2
					}
					for range n {
						r = append(r, e.rng.NormFloat64()+3)
					}
					start = append(start, int32(len(r)))
				}
				out := repeat(math.NaN(), len(r))
				e.dev.Advantages(kernels.Advantages{Out: out, R: r, Start: start, Scale: scale})
				want, tol := refAdvantages(r, start, scale), make([]float64, len(r))
				for i := range tol {
					tol[i] = 8 * float64(len(r)+4) * u64 * maxAbs(r)
					if scale == kernels.ScaleStd {
						tol[i] *= (1 + math.Abs(want[i])) * 1e4 // over a deviation of at least 1e-4
					}
				}
				e.compare("advantages", out, want, tol)
			})
		}
	}
	e.sub(1, "equal rewards", func(e *env) {
		r := repeat(e.rng.NormFloat64()*1e6, 7)
		for _, scale := range []kernels.AdvantageScale{kernels.ScaleNone, kernels.ScaleStd} {
			out := repeat(math.NaN(), 7)
			e.dev.Advantages(kernels.Advantages{Out: out, R: r, Start: []int32{0, 7}, Scale: scale})
			e.same("advantages", out, make([]float64, 7))
		}
	})
	e.sub(1, "single", func(e *env) {
		out := []float64{math.NaN()}
		e.dev.Advantages(kernels.Advantages{Out: out, R: []float64{3}, Start: []int32{0, 1}, Scale: kernels.ScaleNone})
		e.same("advantage of a group of one", out, []float64{0})
	})
}

func optimizerCases(e *env) {
	for _, n := range []int{0, 1, 17, 1000, 70001, 1 << 26} {
		e.sub(float64(n)*perElement, label("sum of squares/%d", n), func(e *env) {
			x := e.normal(e.grad, n, 3)
			out := e.load(kernels.F32, []float64{2.5})
			e.dev.SumSquares(out, e.load(e.grad, x))
			want := 2.5
			for _, v := range x {
				want += v * v
			}
			// accumulated in float64 or compensated: a few roundings of float32 in all
			e.compare("sum", e.read(out), []float64{want}, []float64{8 * u32 * want})
		})
	}
	for _, c := range []struct{ sumsq, scale, maxNorm, want float64 }{
		{4, 1, 0, 1}, {4, 0.5, 0, 0.5}, {4, 1, 10, 1}, {4, 1, 1, 1 / (2 + 1e-6)}, {16, 0.5, 1, 0.5 * (1 / (2 + 1e-6))}, {0, 1, 1, 1}, {0, 2, 0, 2},
		{math.NaN(), 1, 1, math.NaN()}, {math.Inf(1), 1, 1, math.NaN()}, {math.Inf(1), 1, 0, math.NaN()}, {1, math.NaN(), 1, math.NaN()},
	} {
		e.sub(1, label("clip/%v,%v,%v", c.sumsq, c.scale, c.maxNorm), func(e *env) {
			coef := e.poisoned(kernels.F32, 1)
			if !math.IsNaN(c.want) {
				e.store(coef, []float64{-1})
			} else {
				e.store(coef, []float64{7})
			}
			e.dev.ClipCoef(coef, e.load(kernels.F32, []float64{c.sumsq}), float32(c.scale), float32(c.maxNorm))
			e.compare("coefficient", e.read(coef), []float64{c.want}, []float64{8 * u32 * math.Abs(c.want)})
		})
	}
	for _, n := range []int{1, 19, 1000, 70001, 1 << 22} {
		for _, step := range []int64{1, 2, 1000} {
			e.sub(float64(n)*perElement, label("adamw/%d/step %d", n, step), func(e *env) { e.adamW(n, step) })
		}
	}
}

// adamW runs one step of a float32 weight; with a BF16 compute type the weight
// and its remainder start as exact float32 masters.
func (e *env) adamW(n int, step int64) {
	p, g := e.normal(kernels.F32, n, 1), e.normal(e.grad, n, 0.1)
	m, v := e.normal(kernels.F32, n, 0.1), e.normal(kernels.F32, n, 0.01)
	for i := range v {
		v[i] *= v[i]
		v[i] = round(kernels.F32, v[i])
		if i%11 == 0 {
			g[i], m[i], v[i] = 0, 0, 0
		}
	}
	x := kernels.AdamW{LR: 1e-2, Beta1: 0.9, Beta2: 0.95, Eps: 1e-8, WeightDecay: 0.1, Step: step}
	for _, coef := range []float64{0.25, math.NaN(), math.Inf(1)} {
		x.P, x.G = e.load(e.act, p), e.load(e.grad, g)
		if e.act == kernels.BF16 {
			x.Rem = e.alloc(kernels.I16, n)
			e.storeMaster(x.P, x.Rem, p)
		}
		x.M, x.V, x.Coef = e.load(kernels.F32, m), e.load(kernels.F32, v), e.load(kernels.F32, []float64{coef})
		e.dev.AdamW(x)
		gotP, gotM, gotV := e.readMaster(x.P, x.Rem), e.read(x.M), e.read(x.V)
		if coef != 0.25 {
			e.same("weights under a coefficient that is not finite", gotP, p)
			e.same("first moments", gotM, m)
			e.same("second moments", gotV, v)
			continue
		}
		wantP, wantM, wantV := make([]float64, n), make([]float64, n), make([]float64, n)
		tolP, tolM, tolV := make([]float64, n), make([]float64, n), make([]float64, n)
		for i := range p {
			wantP[i], wantM[i], wantV[i] = refAdamW(p[i], g[i], m[i], v[i], x, coef)
			mMag := x.Beta1*math.Abs(m[i]) + (1-x.Beta1)*math.Abs(g[i]*coef)
			tolM[i] = 6 * u32 * mMag
			tolV[i] = 8 * u32 * wantV[i]
			// the update: its moment's error, plus a dozen roundings of its own
			root := math.Sqrt(wantV[i]/(1-math.Pow(x.Beta2, float64(step)))) + x.Eps
			update := x.LR * mMag / (1 - math.Pow(x.Beta1, float64(step))) / root
			tolP[i] = 4*u32*math.Abs(p[i]) + 24*u32*update
		}
		e.compare("weights", gotP, wantP, tolP)
		e.compare("first moments", gotM, wantM, tolM)
		e.compare("second moments", gotV, wantV, tolV)
	}
}

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
		for _, grad := range []kernels.DType{kernels.F32, kernels.BF16} {
			e.sub(float64(n)*perElement, label("sum of squares/%d/%v", n, grad), func(e *env) {
				x := e.normal(grad, n, 3)
				out := e.load(kernels.F32, []float64{2.5})
				e.dev.SumSquares(out, e.load(grad, x))
				want := 2.5
				for _, v := range x {
					want += v * v
				}
				// accumulated in float64 or compensated: a few roundings of float32 in all
				e.compare("sum", e.read(out), []float64{want}, []float64{8 * u32 * want})
			})
		}
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
	adamWCases(e)
}

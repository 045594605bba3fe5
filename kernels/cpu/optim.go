package cpu

import (
	"math"

	"trainerd/kernels"
	"trainerd/kernels/cpu/internal/simd"
)

func (d *device) SumSquares(out, x kernels.Buffer) {
	const op = "sum of squares"
	o, v := floats(op, "out", out, 1), anyFloats(op, "x", x)
	sums := make([]float64, (len(v)+grain-1)/grain)
	d.blocks(len(v), grain, func(from, to int) {
		sums[from/grain] = simd.SumSquares(v[from:to])
	})
	total := float64(o[0])
	for _, s := range sums {
		total += s
	}
	o[0] = float32(total)
}

func (d *device) ClipCoef(coef, sumsq kernels.Buffer, scale, maxNorm float32) {
	const op = "clip coefficient"
	c, s := floats(op, "coef", coef, 1), floats(op, "sumsq", sumsq, 1)
	norm := float64(scale) * math.Sqrt(float64(s[0]))
	v := float64(scale)
	if maxNorm > 0 {
		v *= min(1, float64(maxNorm)/(norm+1e-6))
	}
	if !finite(norm) || !finite(float64(scale)) {
		v = math.NaN()
	}
	c[0] = float32(v)
}

func (d *device) AdamW(x kernels.AdamW) {
	const op = "adamw"
	p := anyFloats(op, "P", x.P)
	n := len(p)
	must(x.Rem == nil, op, "Rem is given, but P is f32")
	must(x.Step >= 1, op, "Step %d, expected 1 or more", x.Step)
	g, m, v := floats(op, "G", x.G, n), floats(op, "M", x.M, n), floats(op, "V", x.V, n)
	coef := floats(op, "Coef", x.Coef, 1)[0]
	if !finite(float64(coef)) {
		return
	}
	c := simd.NewAdamWCoef(x.LR, x.Beta1, x.Beta2, x.Eps, x.WeightDecay, x.Step, coef)
	d.blocks(n, grain, func(from, to int) { simd.AdamW(p[from:to], g[from:to], m[from:to], v[from:to], &c) })
}

func (d *device) Advantages(a kernels.Advantages) {
	const op = "advantages"
	must(len(a.Out) == len(a.R), op, "Out has %d rows, R %d", len(a.Out), len(a.R))
	for g := 0; g+1 < len(a.Start); g++ {
		from, to := a.Start[g], a.Start[g+1]
		must(from >= 0 && from <= to && int(to) <= len(a.R), op, "group %d is [%d,%d) of %d rows", g, from, to, len(a.R))
		groupAdvantages(a.Out[from:to], a.R[from:to], a.Scale)
	}
}

// groupAdvantages centres one group and divides by its scale. The mean is
// taken twice, the second time over the centred values, so that equal rewards
// give exactly 0 and a large common offset costs no digits.
func groupAdvantages(out, r []float64, scale kernels.AdvantageScale) {
	if len(r) == 0 {
		return
	}
	n := float64(len(r))
	var mean, rest, square float64
	for _, v := range r {
		mean += v / n
	}
	for _, v := range r {
		rest += v - mean
	}
	rest /= n
	for i, v := range r {
		out[i] = v - mean - rest
		square += out[i] * out[i]
	}
	if scale != kernels.ScaleStd {
		return
	}
	std := math.Sqrt(square / max(n-1, 1))
	for i := range out {
		out[i] /= std + 1e-4
	}
}

package cpu

import (
	"math"

	"trainerd/kernels"
)

func (d *device) SumSquares(out, x kernels.Buffer) {
	const op = "sum of squares"
	o, v := floats(op, "out", out, 1), anyFloats(op, "x", x)
	sums := make([]float64, (len(v)+grain-1)/grain)
	d.blocks(len(v), grain, func(from, to int) {
		var s float64
		for _, a := range v[from:to] {
			s += float64(a) * float64(a)
		}
		sums[from/grain] = s
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

// adamScalars are the constants of one AdamW step.
type adamScalars struct {
	coef, decay, b1, b2, step, root, eps float32
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
	correct1, correct2 := 1-math.Pow(x.Beta1, float64(x.Step)), 1-math.Pow(x.Beta2, float64(x.Step))
	s := adamScalars{
		coef: coef, decay: float32(1 - x.LR*x.WeightDecay), b1: float32(x.Beta1), b2: float32(x.Beta2),
		step: float32(x.LR / correct1), root: float32(1 / math.Sqrt(correct2)), eps: float32(x.Eps),
	}
	d.blocks(n, grain, func(from, to int) { s.apply(p[from:to], g[from:to], m[from:to], v[from:to], x.Beta1, x.Beta2) })
}

func (s adamScalars) apply(p, g, m, v []float32, beta1, beta2 float64) {
	c1, c2 := float32(1-beta1), float32(1-beta2)
	for i := range p {
		gi := g[i] * s.coef
		m[i] = s.b1*m[i] + c1*gi
		v[i] = s.b2*v[i] + c2*gi*gi
		p[i] = s.decay*p[i] - s.step*m[i]/(float32(math.Sqrt(float64(v[i])))*s.root+s.eps)
	}
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

package cpu

import (
	"math"

	"trainerd/kernels"
	"trainerd/kernels/cpu/internal/simd"
)

func (d *device) SumSquares(out, x kernels.Buffer) {
	const op = "sum of squares"
	o, v := floats(op, "out", out, 1), gradient(op, "x", x, -1)
	n := v.Len()
	sums := make([]float64, (n+grain-1)/grain)
	d.workerBlocks(n, grain, func(w *worker, from, to int) {
		sums[from/grain] = simd.SumSquares(v.widened(w, from, to))
	})
	total := float64(o[0])
	for _, s := range sums {
		total += s
	}
	o[0] = float32(total)
}

// gradient returns a buffer of F32 or BF16 that holds n elements, any number if n is negative.
func gradient(op, name string, b kernels.Buffer, n int) *buffer {
	c := own(op, name, b)
	must(c.t == kernels.F32 || c.t == kernels.BF16, op, "%s is %v, expected f32 or bf16", name, c.t)
	must(n < 0 || c.Len() == n, op, "%s holds %d elements, expected %d", name, c.Len(), n)
	return c
}

// widened returns elements of a gradient as float32, in the worker's memory unless they are already.
func (b *buffer) widened(w *worker, from, to int) []float32 {
	if b.t == kernels.F32 {
		return b.f[from:to]
	}
	x := w.floats(to - from)
	simd.BF16ToF32(x, b.u[from:to])
	return x
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
	g := gradient(op, "G", x.G, n)
	coef := floats(op, "Coef", x.Coef, 1)[0]
	compact := x.Scale != nil
	var m, v []float32
	var codes []int8
	var scale []float32
	var half []uint16
	if compact {
		codes, half = codesOf(op, "M", x.M, n), halves(op, "V", x.V, n)
		scale = floats(op, "Scale", x.Scale, kernels.MomentBlocks(n))
	} else {
		m, v = floats(op, "M", x.M, n), floats(op, "V", x.V, n)
	}
	if !finite(float64(coef)) {
		return
	}
	c := simd.NewAdamWCoef(x.LR, x.Beta1, x.Beta2, x.Eps, x.WeightDecay, x.Step, coef)
	key := kernels.RoundingKey(x.Seed, uint64(x.Step))
	d.workerBlocks(n, grain, func(w *worker, from, to int) {
		g := g.widened(w, from, to)
		if compact {
			simd.AdamWCompact(p[from:to], g, codes[from:to], scale[from/kernels.MomentBlock:kernels.MomentBlocks(to)], half[from:to], &c, key, x.First+int64(from))
			return
		}
		simd.AdamW(p[from:to], g, m[from:to], v[from:to], &c)
	})
}

func (d *device) AddGrad(x kernels.AddGrad) {
	const op = "add gradient"
	src := anyFloats(op, "Src", x.Src)
	dst := halves(op, "Dst", x.Dst, len(src))
	d.blocks(len(src), grain, func(from, to int) {
		if x.Fresh {
			simd.F32ToBF16(dst[from:to], src[from:to])
			return
		}
		simd.AddGrad(dst[from:to], src[from:to], x.Key, x.First+int64(from))
	})
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

package simd

import (
	"fmt"
	"math"
	"math/rand/v2"
	"testing"

	"trainerd/kernels"
)

// lengths crosses every tail of 8, 16, 32 and 64 lanes, and sumBlock.
func lengths() []int {
	var all []int
	for n := range 70 {
		all = append(all, n)
	}
	return append(all, 127, 128, 129, 500, sumBlock-1, sumBlock+17)
}

// guarded is a slice at an odd offset between elements that must survive.
type guarded struct {
	whole, x []float32
}

const guard = 12345

func newGuarded(n, offset int) guarded {
	w := make([]float32, n+offset+17)
	for i := range w {
		w[i] = guard
	}
	return guarded{w, w[offset : offset+n : offset+n]}
}

func (g guarded) check(t *testing.T, what string) {
	t.Helper()
	off := cap(g.whole) - cap(g.whole[len(g.whole)-17:]) - len(g.x)
	for i, v := range g.whole {
		if (i < off || i >= off+len(g.x)) && v != guard {
			t.Fatalf("%s: wrote outside the slice of %d, at %d", what, len(g.x), i-off)
		}
	}
}

func normals(r *rand.Rand, n int) []float32 {
	x := make([]float32, n+3)
	for i := range x {
		x[i] = float32(r.NormFloat64())
	}
	return x[3:]
}

// TestElementwise compares every elementwise primitive with float64. tol is in
// units of roundoff of the sum of the terms' magnitudes, which want returns.
func TestElementwise(t *testing.T) {
	const a = float32(0.37)
	cases := []struct {
		name string
		tol  float64
		run  func(dst, x, y []float32) // dst holds old values
		want func(d, x, y float64) (value, magnitude float64)
	}{
		{"axpy", 2, func(d, x, y []float32) { Axpy(a, x, d) }, func(d, x, y float64) (float64, float64) {
			return d + float64(a)*x, math.Abs(d) + math.Abs(float64(a)*x)
		}},
		{"scale", 1, func(d, x, y []float32) { Scale(d, x, a) }, func(d, x, y float64) (float64, float64) { return one(float64(a) * x) }},
		{"add", 1, func(d, x, y []float32) { Add(d, x, y) }, func(d, x, y float64) (float64, float64) { return one(x + y) }},
		{"mul", 1, func(d, x, y []float32) { Mul(d, x, y) }, func(d, x, y float64) (float64, float64) { return one(x * y) }},
		{"muladd", 2, func(d, x, y []float32) { MulAdd(d, x, y) }, func(d, x, y float64) (float64, float64) {
			return d + x*y, math.Abs(d) + math.Abs(x*y)
		}},
		{"scalemul", 2.1, func(d, x, y []float32) { ScaleMul(d, x, y, a) }, func(d, x, y float64) (float64, float64) { return one(float64(a) * x * y) }},
		{"lerp", 4, func(d, x, y []float32) { Lerp(d, x, a) }, func(d, x, y float64) (float64, float64) {
			b := 1 - float64(a)
			return b*d + float64(a)*x, math.Abs(b*d) + math.Abs(float64(a)*x)
		}},
	}
	eachLevel(t, func(t *testing.T) {
		r := newRand(t)
		for _, c := range cases {
			for _, n := range lengths() {
				dst, x, y := newGuarded(n, 1+n%5), normals(r, n), normals(r, n)
				old := normals(r, n)
				copy(dst.x, old)
				c.run(dst.x, x, y)
				dst.check(t, c.name)
				for i, got := range dst.x {
					want, mag := c.want(float64(old[i]), float64(x[i]), float64(y[i]))
					if d := math.Abs(float64(got) - want); !(d <= c.tol*unit*mag) {
						t.Fatalf("%s of %d: element %d is %g, want %g", c.name, n, i, got, want)
					}
				}
			}
		}
	})
}

func one(v float64) (float64, float64) { return v, math.Abs(v) }

func TestInPlace(t *testing.T) {
	eachLevel(t, func(t *testing.T) {
		x, y := []float32{1, 2, 3, 4, 5, 6, 7, 8, 9}, []float32{9, 8, 7, 6, 5, 4, 3, 2, 1}
		Add(x, x, y)
		Mul(y, y, y)
		for i := range x {
			if w := float32(9 - i); x[i] != 10 || y[i] != w*w {
				t.Fatalf("element %d: %g %g", i, x[i], y[i])
			}
		}
	})
}

func TestReductions(t *testing.T) {
	eachLevel(t, func(t *testing.T) {
		r := newRand(t)
		for _, n := range lengths() {
			x, y := normals(r, n), normals(r, n)
			var dot, dotAbs, sum, sumAbs, sq float64
			top := math.Inf(-1)
			for i := range x {
				p := float64(x[i]) * float64(y[i])
				dot, dotAbs = dot+p, dotAbs+math.Abs(p)
				sum, sumAbs = sum+float64(x[i]), sumAbs+math.Abs(float64(x[i]))
				sq += float64(x[i]) * float64(x[i])
				top = max(top, float64(x[i]))
			}
			if got := float64(Dot(x, y)); !(math.Abs(got-dot) <= 1.01*float64(n)*unit*dotAbs) {
				t.Fatalf("dot of %d: %g, want %g", n, got, dot)
			}
			// Both sums are of float64, in different order: n roundings of 2^-53 each.
			if got := Sum(x); !(math.Abs(got-sum) <= 2*float64(n)*0x1p-53*sumAbs) {
				t.Fatalf("sum of %d: %g, want %g", n, got, sum)
			}
			if got := SumSquares(x); !(math.Abs(got-sq) <= 2*float64(n)*0x1p-53*sq) {
				t.Fatalf("sum of squares of %d: %g, want %g", n, got, sq)
			}
			if got := float64(Max(x)); got != top {
				t.Fatalf("max of %d: %g, want %g", n, got, top)
			}
			if n > 0 {
				// Negative values only: the lanes past the end must not count as 0.
				for i := range x {
					x[i] = -1 - float32(i)
				}
				at := r.IntN(n)
				x[at] = -0.5
				if got := Max(x); got != -0.5 {
					t.Fatalf("max of %d negatives: %g, want -0.5", n, got)
				}
				x[at] = poison
				if got := Max(x); got == got {
					t.Fatalf("max of %d with NaN at %d: %g", n, at, got)
				}
			}
		}
	})
}

func TestRope(t *testing.T) {
	eachLevel(t, func(t *testing.T) {
		r := newRand(t)
		for _, h := range []int{0, 1, 3, 8, 16, 20, 32, 33, 64} {
			x, cos, sin := normals(r, 2*h), make([]float32, h), make([]float32, h)
			for i := range h {
				s, c := math.Sincos(r.Float64() * 7)
				cos[i], sin[i] = float32(c), float32(s)
			}
			out := newGuarded(2*h, 3)
			Rope(out.x, x, cos, sin)
			out.check(t, "rope")
			for i := range h {
				a, b, c, s := float64(x[i]), float64(x[i+h]), float64(cos[i]), float64(sin[i])
				mag := 2 * unit * (math.Abs(a) + math.Abs(b))
				if !(math.Abs(float64(out.x[i])-(a*c-b*s)) <= mag) || !(math.Abs(float64(out.x[i+h])-(b*c+a*s)) <= mag) {
					t.Fatalf("pair %d of %d: %g, %g", i, h, out.x[i], out.x[i+h])
				}
			}
			// Back again, in place: cos²+sin² is 1 within 4 roundings of the table.
			RopeInverse(out.x, out.x, cos, sin)
			for i, v := range out.x {
				j := (i + h) % max(1, 2*h)
				if !(math.Abs(float64(v-x[i])) <= 8*unit*(math.Abs(float64(x[i]))+math.Abs(float64(x[j])))) {
					t.Fatalf("inverse: element %d of %d is %g, want %g", i, 2*h, v, x[i])
				}
			}
		}
	})
}

func TestAdamW(t *testing.T) {
	eachLevel(t, func(t *testing.T) {
		r := newRand(t)
		const lr, b1, b2, eps, wd = 1e-3, 0.9, 0.999, 1e-8, 0.1
		for _, n := range []int{1, 7, 8, 15, 16, 33, 300} {
			p, g, m, v := newGuarded(n, 1), normals(r, n), newGuarded(n, 2), newGuarded(n, 3)
			copy(p.x, normals(r, n))
			for i := range n {
				m.x[i], v.x[i] = 0.1*float32(r.NormFloat64()), 0.01*r.Float32()
			}
			p0, m0, v0 := clone(p.x), clone(m.x), clone(v.x)
			c := NewAdamWCoef(lr, b1, b2, eps, wd, 3, 0.5)
			AdamW(p.x, g, m.x, v.x, &c)
			for _, s := range []guarded{p, m, v} {
				s.check(t, "adamw")
			}
			for i := range n {
				gi := 0.5 * float64(g[i])
				mi := b1*float64(m0[i]) + (1-b1)*gi
				vi := b2*float64(v0[i]) + (1-b2)*gi*gi
				step := lr / (1 - math.Pow(b1, 3)) * mi / (math.Sqrt(vi)/math.Sqrt(1-math.Pow(b2, 3)) + eps)
				pi := float64(p0[i])*(1-lr*wd) - step
				// Coefficients, products and sums are rounded: at most 4 roundings of
				// each term of m and v, and 8 more of the step.
				mm := math.Abs(b1*float64(m0[i])) + math.Abs((1-b1)*gi)
				stepMag := math.Abs(step) + lr/(1-math.Pow(b1, 3))*mm/(math.Sqrt(vi)/math.Sqrt(1-math.Pow(b2, 3)))
				switch {
				case !(math.Abs(float64(m.x[i])-mi) <= 4*unit*mm):
					t.Fatalf("m[%d] of %d is %g, want %g", i, n, m.x[i], mi)
				case !(math.Abs(float64(v.x[i])-vi) <= 4*unit*vi):
					t.Fatalf("v[%d] of %d is %g, want %g", i, n, v.x[i], vi)
				case !(math.Abs(float64(p.x[i])-pi) <= 3*unit*math.Abs(pi)+12*unit*stepMag):
					t.Fatalf("p[%d] of %d is %g, want %g", i, n, p.x[i], pi)
				}
			}
		}
	})
}

func clone(x []float32) []float32 { return append([]float32(nil), x...) }

// TestStackSlices: arguments of vector primitives do not escape, so small buffers may live on the stack.
func TestStackSlices(t *testing.T) {
	if n := testing.AllocsPerRun(10, func() {
		var x, y [64]float32
		ExpShift(y[:], x[:], Max(x[:]))
		Axpy(Dot(x[:], y[:]), x[:], y[:])
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkVector(b *testing.B) {
	r := rand.New(rand.NewPCG(1, 1))
	const n = 4096
	x, y, z := normals(r, n), normals(r, n), normals(r, n)
	u, v := make([]float32, n), make([]float32, n)
	h, codes, scale := make([]uint16, n), make([]int8, n), make([]float32, kernels.MomentBlocks(n))
	key := kernels.RoundingKey(1)
	coef := NewAdamWCoef(1e-3, 0.9, 0.999, 1e-8, 0.1, 3, 1)
	for _, c := range []struct {
		name string
		run  func()
	}{
		{"Dot", func() { Dot(x, y) }},
		{"Axpy", func() { Axpy(1e-9, x, u) }},
		{"Add", func() { Add(u, x, y) }},
		{"SumSquares", func() { SumSquares(x) }},
		{"Max", func() { Max(x) }},
		{"ExpShift", func() { ExpShift(u, x, 1) }},
		{"LogitStats", func() { LogitStats(x, 1, 1) }},
		{"DLogits", func() { DLogits(u, x, 1, 3, 0.1, 0.2) }},
		{"SiLUMul", func() { SiLUMul(u, x, y) }},
		{"SiLUMulBackward", func() { SiLUMulBackward(u, v, x, y, z) }},
		{"AdamW", func() { AdamW(u, z, v, v, &coef) }},
		{"AdamWCompact", func() { AdamWCompact(u, z, codes, scale, h, &coef, key, 0) }},
		{"AddGrad", func() { AddGrad(h, z, key, 0) }},
		{"F32ToBF16", func() { F32ToBF16(h, x) }},
		{"F16ToF32", func() { F16ToF32(u, h) }},
	} {
		for _, l := range Levels() {
			b.Run(fmt.Sprint(c.name, "/", l), func(b *testing.B) {
				defer Use(Use(l))
				for range b.N {
					c.run()
				}
				b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/n, "ns/element")
			})
		}
	}
}

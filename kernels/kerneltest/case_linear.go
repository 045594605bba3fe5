package kerneltest

import (
	"math"
	"slices"

	"gorgonia.org/tensor"

	"trainerd/kernels"
)

// transferCases: what is uploaded comes back, rounded to the buffer's type; slices alias.
func transferCases(e *env) {
	for _, n := range []int{1, 2, 17, 64, 1000, 70001} {
		e.sub(1, label("float/%d", n), func(e *env) {
			x := make([]float64, n)
			for i := range x {
				x[i] = float64(float32(e.rng.NormFloat64() * math.Pow(10, float64(e.rng.IntN(60)-30))))
			}
			x[0] = math.Inf(-1)
			for _, t := range []kernels.DType{kernels.F32, kernels.BF16} {
				want := make([]float64, n)
				for i, v := range x {
					want[i] = round(t, v)
				}
				b := e.load(t, x)
				e.same("round trip", e.read(b), want)
				from, to := n/3, n-n/4
				e.same("slice", e.read(b.Slice(from, to)), want[from:to])
				c := e.poisoned(kernels.BF16, n)
				e.dev.Copy(c, b)
				for i := range want {
					want[i] = round(kernels.BF16, want[i])
				}
				e.same("copy", e.read(c), want)
				back := e.poisoned(kernels.F32, n)
				e.dev.Copy(back, c)
				e.same("copy back", e.read(back), want)
				e.dev.Zero(c.Slice(from, to))
				clear(want[from:to])
				e.same("zero of a slice", e.read(c), want)
			}
		})
		e.sub(1, label("int/%d", n), func(e *env) {
			x := make([]int32, n)
			for i := range x {
				x[i] = int32(e.rng.Uint32())
			}
			b := e.ints(x)
			got := e.readInts(b)
			for i := range x {
				if got[i] != x[i] {
					e.Fatalf("[%d] is %d, expected %d", i, got[i], x[i])
				}
			}
		})
		e.sub(1, label("int8/%d", n), func(e *env) {
			x := make([]int8, n)
			for i := range x {
				x[i] = int8(e.rng.Uint32())
			}
			b, c := e.loadCodes(x), e.loadCodes(make([]int8, n))
			e.dev.Copy(c, b)
			e.same("copy", floatsOf(e.readCodes(c)), floatsOf(x))
			from, to := n/3, n-n/4
			e.dev.Zero(b.Slice(from, to))
			clear(x[from:to])
			e.same("zero of a slice", floatsOf(e.readCodes(b)), floatsOf(x))
		})
		e.sub(1, label("bits of bf16/%d", n), func(e *env) { // every kind of NaN too
			x, got := make([]int16, n), make([]int16, n)
			for i := range x {
				x[i] = int16(e.rng.Uint32())
			}
			x[0] = 0x7f81 // a signalling NaN
			b := e.alloc(kernels.BF16, n)
			e.dev.Upload(b, tensor.New(tensor.WithShape(n), tensor.WithBacking(append([]int16(nil), x...))))
			if err := e.dev.Download(tensor.New(tensor.WithShape(n), tensor.WithBacking(got)), b); err != nil {
				e.Fatal(err)
			}
			if !slices.Equal(got, x) {
				e.Error("the bits that came back are others")
			}
		})
		e.sub(1, label("lerp/%d", n), func(e *env) {
			x, y := e.normal(e.act, n, 1), e.normal(e.act, n, 3)
			for _, alpha := range []float32{0, 0.6, 1} {
				a, b := e.load(e.act, x), e.load(e.act, y)
				e.dev.Lerp(a, b, alpha)
				want, tol := make([]float64, n), make([]float64, n)
				for i := range x {
					p, q := (1-float64(alpha))*x[i], float64(alpha)*y[i]
					// three roundings in float32 (1-alpha is exact to one), one to store
					want[i], tol[i] = p+q, 4*u32*(math.Abs(p)+math.Abs(q))+e.u*math.Abs(p+q)
				}
				e.compare("lerp", e.read(a), want, tol)
			}
		})
	}
	e.sub(1, "matrix", func(e *env) {
		b := e.poisoned(kernels.F32, 6)
		e.dev.Upload(b, tensor.New(tensor.WithShape(2, 3), tensor.WithBacking([]float32{1, 2, 3, 4, 5, 6})))
		e.same("matrix", e.read(b), []float64{1, 2, 3, 4, 5, 6})
	})
}

// rowCases: Gather copies, ScatterAdd sums buckets in order.
func rowCases(e *env) {
	for _, c := range []struct{ vocab, n, d int }{{1, 1, 1}, {5, 3, 7}, {40, 100, 64}, {100, 953, 33}, {151936, 4096, 896}} {
		e.sub(float64((c.vocab+c.n)*c.d)*perElement, label("%dx%d/%d", c.vocab, c.d, c.n), func(e *env) {
			table := e.normal(e.act, c.vocab*c.d, 1)
			rows := make([]int32, c.n)
			for i := range rows {
				rows[i] = int32(e.rng.IntN(c.vocab))
			}
			out := e.poisoned(e.act, c.n*c.d)
			e.dev.Gather(out, e.load(e.act, table), e.ints(rows), c.d)
			want := make([]float64, c.n*c.d)
			for i, r := range rows {
				copy(want[i*c.d:], table[int(r)*c.d:][:c.d])
			}
			e.same("gather", e.read(out), want)

			index, buckets := scatterOf(rows)
			src := e.normal(e.act, c.n*c.d, 1)
			before := e.normal(e.grad, c.vocab*c.d, 1)
			for _, accumulate := range []bool{false, true} {
				dst := e.load(e.grad, before)
				b := e.load(e.act, src)
				e.run(func(dev kernels.Device, a kernels.Arena) {
					dev.ScatterAdd(dst, b, dev.Scatter(a, index), c.d, accumulate)
				})
				want, tol := append([]float64(nil), before...), make([]float64, len(before))
				for u, r := range index.Dst {
					for j := range c.d {
						s := value{}
						if accumulate {
							s = value{before[int(r)*c.d+j], math.Abs(before[int(r)*c.d+j])}
						}
						for _, i := range buckets[u] {
							s.v += src[int(i)*c.d+j]
							s.mag += math.Abs(src[int(i)*c.d+j])
						}
						want[int(r)*c.d+j] = s.v
						tol[int(r)*c.d+j] = float64(len(buckets[u])+1)*u32*s.mag + e.uGrad*math.Abs(s.v)
					}
				}
				e.compare(label("scatter add, accumulate %v", accumulate), e.read(dst), want, tol)
			}
		})
	}
	e.sub(1, "nothing", func(e *env) {
		dst, src := e.load(e.grad, []float64{1, 2}), e.load(e.act, []float64{5, 6})
		e.run(func(dev kernels.Device, a kernels.Arena) {
			dev.ScatterAdd(dst, src, dev.Scatter(a, kernels.ScatterIndex{Start: []int32{0}}), 2, false)
		})
		e.same("scatter of no rows", e.read(dst), []float64{1, 2})
		e.run(func(dev kernels.Device, a kernels.Arena) {
			s := dev.Scatter(a, kernels.ScatterIndex{Dst: []int32{0}, Start: []int32{0, 0}})
			dev.ScatterAdd(dst, src, s, 2, false)
		})
		e.same("an empty bucket overwrites with 0", e.read(dst), []float64{0, 0})
	})
}

// scatterOf is the index that sums rows with the same id, in order of first appearance.
func scatterOf(rows []int32) (s kernels.ScatterIndex, buckets [][]int32) {
	at := map[int32]int{}
	for i, r := range rows {
		u, ok := at[r]
		if !ok {
			u = len(buckets)
			at[r] = u
			buckets, s.Dst = append(buckets, nil), append(s.Dst, r)
		}
		buckets[u] = append(buckets[u], int32(i))
	}
	s.Start = []int32{0}
	for _, b := range buckets {
		s.Src = append(s.Src, b...)
		s.Start = append(s.Start, int32(len(s.Src)))
	}
	return s, buckets
}

// gemmCases: a product of K terms is off by (K+2) roundings of float32 and the one that stores it.
func gemmCases(e *env) {
	for _, c := range []struct{ m, n, k int }{
		{1, 1, 1}, {1, 7, 3}, {3, 1, 5}, {2, 3, 0}, {5, 4, 1}, {17, 19, 23}, {64, 64, 64}, {33, 100, 65}, {1, 576, 192},
		{7, 960, 576}, {100, 130, 257}, {953, 64, 48}, {1024, 576, 1536}, {4096, 4864, 896},
	} {
		for mode := range 4 {
			ta, tb := mode&1 != 0, mode&2 != 0
			e.sub(float64(c.m*c.n*c.k)*2, label("%dx%dx%d/transA=%v,transB=%v", c.m, c.n, c.k, ta, tb), func(e *env) {
				a, b := e.normal(e.act, c.m*c.k, 1), e.normal(e.act, c.k*c.n, 1)
				bias, before := e.normal(e.act, c.n, 1), e.normal(e.act, c.m*c.n, 2)
				for variant := range 4 {
					accumulate, biased := variant&1 != 0, variant&2 != 0
					g := kernels.Gemm{A: e.load(e.act, a), B: e.load(e.act, b), M: c.m, N: c.n, K: c.k, TransA: ta, TransB: tb, Accumulate: accumulate}
					g.C = e.poisoned(e.act, c.m*c.n)
					if accumulate {
						e.store(g.C, before)
					}
					if biased {
						g.Bias = e.load(e.act, bias)
					}
					e.dev.Gemm(g)
					got := e.read(g.C)
					// Of a large product a sample is checked.
					picks := e.picks(c.m*c.n, 3e7/max(1, c.k)/16)
					gp, want, tol := make([]float64, len(picks)), make([]float64, len(picks)), make([]float64, len(picks))
					for x, at := range picks {
						r := refGemmAt(a, b, c.m, c.n, c.k, ta, tb, at/c.n, at%c.n)
						if accumulate {
							r = value{r.v + before[at], r.mag + math.Abs(before[at])}
						}
						if biased {
							r = value{r.v + bias[at%c.n], r.mag + math.Abs(bias[at%c.n])}
						}
						gp[x], want[x], tol[x] = got[at], r.v, float64(c.k+4)*u32*r.mag+e.u*math.Abs(r.v)
					}
					e.compare(label("accumulate %v, bias %v", accumulate, biased), gp, want, tol)
				}
			})
		}
	}
	e.sub(1, "into gradients", func(e *env) {
		const m, n, k = 24, 20, 70
		a, b, before := e.normal(e.act, m*k, 1), e.normal(e.act, k*n, 1), e.normal(e.grad, m*n, 1)
		c := e.load(e.grad, before)
		e.dev.Gemm(kernels.Gemm{A: e.load(e.act, a), B: e.load(e.act, b), C: c, M: m, N: n, K: k, TransA: true, Accumulate: true})
		r := refGemm(a, b, m, n, k, true, false)
		for i := range r {
			r[i] = value{r[i].v + before[i], r[i].mag + math.Abs(before[i])}
		}
		want, tol := values(r, (k+3)*u32, e.uGrad)
		e.compare("c", e.read(c), want, tol)
	})
	e.sub(1, "nan", func(e *env) {
		a, b := e.normal(e.act, 3*5, 1), e.normal(e.act, 5*4, 1)
		a[7] = math.NaN()
		c := e.poisoned(e.act, 12)
		e.dev.Gemm(kernels.Gemm{A: e.load(e.act, a), B: e.load(e.act, b), C: c, M: 3, N: 4, K: 5})
		got := e.read(c)
		e.nan("the row of the NaN", got[4:8])
		for _, v := range append(got[:4:4], got[8:]...) {
			if math.IsNaN(v) {
				e.Errorf("NaN outside its row: %v", got)
			}
		}
	})
	for _, c := range []struct{ m, n int }{{0, 3}, {1, 1}, {3, 5}, {129, 33}, {953, 960}, {32768, 1152}} {
		e.sub(float64(c.m*c.n)*perElement, label("bias backward/%dx%d", c.m, c.n), func(e *env) {
			dy, before := e.normal(e.act, c.m*c.n, 1), e.normal(e.grad, c.n, 1)
			r := refColumnSums(dy, c.m, c.n)
			for _, accumulate := range []bool{false, true} {
				db := e.poisoned(e.grad, c.n)
				if accumulate {
					e.store(db, before)
					for i := range r {
						r[i] = value{r[i].v + before[i], r[i].mag + math.Abs(before[i])}
					}
				}
				e.dev.BiasBackward(db, e.load(e.act, dy), c.m, c.n, accumulate)
				want, tol := values(r, float64(c.m+2)*u32, e.uGrad)
				e.compare(label("accumulate %v", accumulate), e.read(db), want, tol)
			}
		})
	}
}

// picks returns all of [0,n), or about most of them at random.
func (e *env) picks(n, most int) []int {
	if n <= most {
		all := make([]int, n)
		for i := range all {
			all[i] = i
		}
		return all
	}
	some := make([]int, most)
	for i := range some {
		some[i] = e.rng.IntN(n)
	}
	return append(some, 0, n-1)
}

// swigluCases: sigmoid is good to a few roundings; its product with the gate
// and up adds three more. Where 1+g(1-s) cancels, the magnitude says so.
func swigluCases(e *env) {
	const roundings = 16
	for _, c := range []struct{ t, f int }{{1, 1}, {1, 17}, {3, 5}, {7, 64}, {65, 130}, {953, 96}, {16384, 4864}} {
		e.sub(float64(c.t*c.f)*perElement, label("%dx%d", c.t, c.f), func(e *env) {
			gu, dout := e.normal(e.act, c.t*2*c.f, 3), e.normal(e.act, c.t*c.f, 1)
			gu[0] = round(e.act, -80+160*float64(e.rng.IntN(2)))
			out, b := e.poisoned(e.act, c.t*c.f), e.load(e.act, gu)
			e.dev.SwiGLU(out, b, c.t, c.f)
			want, tol := values(refSwiGLU(gu, c.t, c.f), roundings*u32, e.u)
			e.compare("out", e.read(out), want, tol)
			want, tol = values(refSwiGLUBackward(dout, gu, c.t, c.f), roundings*u32, e.u)
			d := e.poisoned(e.act, c.t*2*c.f)
			e.dev.SwiGLUBackward(d, e.load(e.act, dout), b, c.t, c.f)
			e.compare("dgu", e.read(d), want, tol)
			e.dev.SwiGLUBackward(b, e.load(e.act, dout), b, c.t, c.f)
			e.compare("dgu over gu", e.read(b), want, tol)
		})
	}
	e.sub(1, "nan", func(e *env) {
		out := e.load(e.act, []float64{1, 1})
		e.dev.SwiGLU(out, e.load(e.act, []float64{math.NaN(), 2, 3, math.NaN()}), 1, 2)
		e.nan("out", e.read(out))
	})
}

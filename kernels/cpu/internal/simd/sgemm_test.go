package simd

import (
	"fmt"
	"math"
	"math/rand/v2"
	"testing"
	"time"
)

// unit is the unit roundoff of float32.
const unit = 0x1p-24

var poison = float32(math.NaN())

// eachLevel runs f under every level of this processor.
func eachLevel(t *testing.T, f func(t *testing.T)) {
	for _, l := range Levels() {
		t.Run(l.String(), func(t *testing.T) {
			defer Use(Use(l))
			f(t)
		})
	}
}

func newRand(t testing.TB) *rand.Rand {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 1))
}

// matrix returns a [rows,cols] matrix with stride ld, poisoned between the rows.
// The slice ends with the last row's last element, so that reading past it fails
// the bounds that the packing relies on.
func matrix(r *rand.Rand, rows, cols, ld int) []float32 {
	x := make([]float32, (rows-1)*ld+cols)
	for i := range x {
		x[i] = poison
		if i%ld < cols {
			x[i] = float32(r.NormFloat64())
		}
	}
	return x
}

type gemmCase struct {
	m, n, k        int
	transA, transB bool
	accumulate     bool
	pad            int // added to every stride
}

func (g gemmCase) String() string {
	return fmt.Sprintf("%dx%dx%d/%t/%t/acc=%t/pad=%d", g.m, g.n, g.k, g.transA, g.transB, g.accumulate, g.pad)
}

// problem is a case with data and its float64 result and bound.
type problem struct {
	gemmCase
	a, b, c       []float32
	lda, ldb, ldc int
	want, bound   []float64 // [m,n]
}

// A sum of k products in any order, fused or not, is within k*u*Σ|a||b| of the
// exact one to first order (Higham, Accuracy and Stability, 3.1), joining C in
// blocks included; one more rounding comes with accumulation, and 1 % covers the
// higher orders for k*u < 0.01.
func newProblem(r *rand.Rand, g gemmCase) *problem {
	p := &problem{gemmCase: g}
	ar, ac, br, bc := g.m, g.k, g.k, g.n
	if g.transA {
		ar, ac = ac, ar
	}
	if g.transB {
		br, bc = bc, br
	}
	p.lda, p.ldb, p.ldc = ac+g.pad, bc+g.pad, g.n+g.pad
	p.a, p.b, p.c = matrix(r, ar, ac, p.lda), matrix(r, br, bc, p.ldb), matrix(r, g.m, g.n, p.ldc)
	p.want, p.bound = make([]float64, g.m*g.n), make([]float64, g.m*g.n)
	a := dense(p.a, p.lda, g.m, g.k, g.transA)
	b := dense(p.b, p.ldb, g.n, g.k, !g.transB)
	for i := range g.m {
		for j := range g.n {
			var sum, abs float64
			if g.accumulate {
				sum = float64(p.c[i*p.ldc+j])
				abs = math.Abs(sum)
			}
			y := b[j*g.k:][:g.k]
			for q, x := range a[i*g.k:][:g.k] {
				v := x * y[q]
				sum += v
				abs += math.Abs(v)
			}
			p.want[i*g.n+j] = sum
			p.bound[i*g.n+j] = 1.01 * float64(g.k+1) * unit * abs
		}
	}
	if !g.accumulate {
		for i := range p.c {
			p.c[i] = poison
		}
	}
	return p
}

// dense returns x, stored [rows,cols] or transposed, as [rows,cols] without gaps.
func dense(x []float32, ld, rows, cols int, transposed bool) []float64 {
	out := make([]float64, rows*cols)
	for i := range rows {
		for j := range cols {
			at := i*ld + j
			if transposed {
				at = j*ld + i
			}
			out[i*cols+j] = float64(x[at])
		}
	}
	return out
}

// check compares c with the reference, and the gaps between rows with poison.
func (p *problem) check(t *testing.T, c []float32) {
	t.Helper()
	for i, v := range c {
		row, col := i/p.ldc, i%p.ldc
		if col >= p.n {
			if v == v {
				t.Fatalf("%v: wrote %g beside row %d at column %d", p.gemmCase, v, row, col)
			}
			continue
		}
		at := row*p.n + col
		if d := math.Abs(float64(v) - p.want[at]); !(d <= p.bound[at]) {
			t.Fatalf("%v: c[%d,%d] = %g, want %g within %g", p.gemmCase, row, col, v, p.want[at], p.bound[at])
		}
	}
}

func (p *problem) run(par Parallel) []float32 {
	c := append([]float32(nil), p.c...)
	Sgemm(p.transA, p.transB, p.m, p.n, p.k, p.a, p.lda, p.b, p.ldb, c, p.ldc, p.accumulate, par)
	return c
}

// forms calls f for all transpositions and accumulation.
func forms(f func(transA, transB, accumulate bool)) {
	for i := range 8 {
		f(i&1 != 0, i&2 != 0, i&4 != 0)
	}
}

func TestSgemmSizes(t *testing.T) {
	sizes := [][3]int{
		{1, 1, 1}, {1, 64, 5}, {2, 3, 4}, {4, 4, 4}, {5, 9, 7}, {6, 16, 8}, {7, 17, 9}, {13, 31, 15}, {14, 32, 16},
		{15, 33, 17}, {16, 65, 100}, {17, 70, 385}, {29, 47, 64}, {64, 64, 64}, {64, 40, 64}, {70, 100, 400}, {8, 130, 770},
		{130, 257, 70}, {1, 1, 1000}, {257, 1, 300}, {3, 700, 90},
	}
	eachLevel(t, func(t *testing.T) {
		r := newRand(t)
		for _, s := range sizes {
			forms(func(transA, transB, accumulate bool) {
				for _, pad := range []int{0, 5} {
					p := newProblem(r, gemmCase{s[0], s[1], s[2], transA, transB, accumulate, pad})
					p.check(t, p.run(nil))
				}
			})
		}
	})
}

// TestSgemmRandomSizes draws sizes so that every remainder by the tile meets
// every other in time.
func TestSgemmRandomSizes(t *testing.T) {
	eachLevel(t, func(t *testing.T) {
		r := newRand(t)
		for range 60 {
			g := gemmCase{1 + r.IntN(60), 1 + r.IntN(90), 1 + r.IntN(60), r.IntN(2) == 0, r.IntN(2) == 0, r.IntN(2) == 0, r.IntN(3)}
			if r.IntN(8) == 0 {
				g.k *= 17
			}
			p := newProblem(r, g)
			p.check(t, p.run(nil))
			p.forceEveryPath(t)
		}
	})
}

// forceEveryPath computes the product by each algorithm that can, whatever the
// size: all must agree bit by bit.
func (p *problem) forceEveryPath(t *testing.T) {
	t.Helper()
	ref := p.run(nil)
	if active == Portable {
		return
	}
	op := func(c []float32) operands {
		return operands{p.transA, p.transB, p.m, p.n, p.k, p.a, p.lda, p.b, p.ldb, c, p.ldc, p.accumulate}
	}
	var s Scratch
	c := append([]float32(nil), p.c...)
	s.blocked.run(op(c), nil)
	wantSameBits(t, p.String()+" blocked", c, ref)
	c = append([]float32(nil), p.c...)
	s.direct.run(op(c))
	wantSameBits(t, p.String()+" direct", c, ref)
	if p.transB && !p.transA && p.m <= geometries[active].nr {
		c = append([]float32(nil), p.c...)
		s.narrow.run(op(c), nil)
		wantSameBits(t, p.String()+" narrow", c, ref)
	}
}

func wantSameBits(t *testing.T, what string, got, want []float32) {
	t.Helper()
	for i := range want {
		if math.Float32bits(got[i]) != math.Float32bits(want[i]) && (got[i] == got[i] || want[i] == want[i]) {
			t.Fatalf("%s: element %d is %g (%#x), want the bits of %g (%#x)", what, i, got[i], math.Float32bits(got[i]), want[i], math.Float32bits(want[i]))
		}
	}
}

// TestSgemmBlocks crosses the limits of the outer blocks, on one side at a time
// to stay quick.
func TestSgemmBlocks(t *testing.T) {
	eachLevel(t, func(t *testing.T) {
		r := newRand(t)
		for _, s := range [][3]int{{blockRows + 17, 20, 24}, {20, blockCols + 33, 24}, {21, 22, 2*blockSteps + 77}, {blockRows + 1, 5, blockSteps + 1}} {
			p := newProblem(r, gemmCase{s[0], s[1], s[2], r.IntN(2) == 0, r.IntN(2) == 0, true, 3})
			p.check(t, p.run(nil))
			c := append([]float32(nil), p.c...)
			var b blocked
			b.run(operands{p.transA, p.transB, p.m, p.n, p.k, p.a, p.lda, p.b, p.ldb, c, p.ldc, true}, nil)
			p.check(t, c)
		}
	})
}

func TestSgemmSameBitsForAnyWorkers(t *testing.T) {
	eachLevel(t, func(t *testing.T) {
		r := newRand(t)
		for _, g := range []gemmCase{
			{150, 330, 400, false, true, false, 0}, {150, 330, 400, true, false, true, 7}, {260, 90, 800, false, false, true, 1}, {7, 900, 500, false, true, true, 0},
		} {
			p := newProblem(r, g)
			ref := p.run(nil)
			p.check(t, ref)
			for _, workers := range []int{1, 2, 3, 7} {
				pool := NewPool(workers)
				wantSameBits(t, fmt.Sprint(g, " workers ", workers), p.run(pool), ref)
				pool.Close()
			}
			c := append([]float32(nil), p.c...)
			SgemmSerial(p.transA, p.transB, p.m, p.n, p.k, p.a, p.lda, p.b, p.ldb, c, p.ldc, p.accumulate, new(Scratch))
			wantSameBits(t, fmt.Sprint(g, " serial"), c, ref)
		}
	})
}

// TestSgemmRowAlone holds the promise that a row's result does not depend on
// which rows it is computed with.
func TestSgemmRowAlone(t *testing.T) {
	eachLevel(t, func(t *testing.T) {
		r := newRand(t)
		p := newProblem(r, gemmCase{m: 120, n: 600, k: 500, transB: true})
		whole := p.run(nil)
		for _, rows := range [][2]int{{0, 1}, {5, 12}, {100, 120}, {3, 60}} {
			m := rows[1] - rows[0]
			c := make([]float32, m*p.n)
			Sgemm(false, true, m, p.n, p.k, p.a[rows[0]*p.lda:], p.lda, p.b, p.ldb, c, p.n, false, nil)
			wantSameBits(t, fmt.Sprint("rows ", rows), c, whole[rows[0]*p.n:rows[1]*p.n])
		}
	})
}

// TestSgemmLevelsAgree: both assembly levels sum in the same order with fused
// multiply-adds, so they give the same bits.
func TestSgemmLevelsAgree(t *testing.T) {
	if best < AVX512 {
		t.Logf("this processor has %v only: nothing to compare", best)
		return
	}
	r := newRand(t)
	for _, g := range []gemmCase{{70, 130, 900, false, true, false, 3}, {65, 64, 64, true, false, true, 0}, {5, 90, 400, false, true, true, 2}} {
		p := newProblem(r, g)
		defer Use(Use(AVX2))
		ref := p.run(nil)
		Use(AVX512)
		wantSameBits(t, g.String(), p.run(nil), ref)
	}
}

func TestSgemmNaNAndInfReachC(t *testing.T) {
	eachLevel(t, func(t *testing.T) {
		// A zero in A does not hide an infinity or NaN in B.
		a, b, c := make([]float32, 20*30), make([]float32, 30*40), make([]float32, 20*40)
		b[7*40+11] = float32(math.Inf(1))
		b[9*40+39] = poison
		Sgemm(false, false, 20, 40, 30, a, 30, b, 40, c, 40, false, nil)
		for i, v := range c {
			if j := i % 40; (v != v) != (j == 11 || j == 39) {
				t.Fatalf("c[%d,%d] = %g", i/40, j, v)
			}
		}
	})
}

func TestSgemmEmpty(t *testing.T) {
	c := []float32{1, 2, 3, 4}
	Sgemm(false, false, 2, 2, 0, nil, 0, nil, 2, c, 2, true, nil)
	wantSameBits(t, "k=0, accumulate", c, []float32{1, 2, 3, 4})
	Sgemm(false, false, 2, 1, 0, nil, 0, nil, 1, c, 2, false, nil)
	wantSameBits(t, "k=0", c, []float32{0, 2, 0, 4})
	Sgemm(false, false, 0, 2, 3, nil, 3, make([]float32, 6), 2, nil, 2, false, nil)
}

func TestSgemmRefuses(t *testing.T) {
	f := func(n int) []float32 { return make([]float32, n) }
	for name, call := range map[string]func(){
		"short a":   func() { Sgemm(false, false, 3, 3, 3, f(8), 3, f(9), 3, f(9), 3, false, nil) },
		"short b":   func() { Sgemm(false, true, 3, 3, 3, f(9), 3, f(9), 4, f(9), 3, false, nil) },
		"short c":   func() { Sgemm(false, false, 3, 3, 3, f(9), 3, f(9), 3, f(8), 3, false, nil) },
		"thin rows": func() { Sgemm(true, false, 4, 3, 3, f(99), 3, f(9), 3, f(99), 3, false, nil) },
		"negative":  func() { Sgemm(false, false, -1, 3, 3, f(9), 3, f(9), 3, f(9), 3, false, nil) },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s: no panic", name)
				}
			}()
			call()
		}()
	}
}

func TestSgemmMakesNoGarbage(t *testing.T) {
	pool := NewPool(2)
	defer pool.Close()
	a, b, c := make([]float32, 200*200), make([]float32, 200*200), make([]float32, 200*200)
	var s Scratch
	for name, call := range map[string]func(){
		"blocked": func() { Sgemm(false, true, 200, 200, 200, a, 200, b, 200, c, 200, false, pool) },
		"narrow":  func() { Sgemm(false, true, 4, 200, 200, a, 200, b, 200, c, 200, false, pool) },
		"direct":  func() { SgemmSerial(false, true, 64, 64, 64, a, 200, b, 200, c, 200, true, &s) },
	} {
		if n := testing.AllocsPerRun(20, call); n >= 1 {
			t.Errorf("%s: %v allocations per call", name, n)
		}
	}
}

package kerneltest

import (
	"math"

	"gorgonia.org/tensor"

	"trainerd/kernels"
)

// nearest16 is the bfloat16 nearest to x, ties to even, found by trying the two around it.
func nearest16(x float32) uint16 {
	bits := math.Float32bits(x)
	if x != x {
		return uint16(bits>>16) | 0x40
	}
	below := uint16(bits >> 16) // towards zero
	value := func(h uint16) float64 {
		if h&0x7fff == 0x7f80 && !math.IsInf(float64(x), 0) { // as if the exponent went on
			return math.Copysign(math.Ldexp(1, 128), float64(x))
		}
		return float64(math.Float32frombits(uint32(h) << 16))
	}
	if value(below) == float64(x) {
		return below
	}
	above := below + 1
	down, up := math.Abs(float64(x)-value(below)), math.Abs(value(above)-float64(x))
	if down < up || down == up && below&1 == 0 {
		return below
	}
	return above
}

// roundCases: a device that makes the weights of a checkpoint on their way to the
// host rounds the masters, and says when one is not finite, or gives them exactly.
func roundCases(e *env) {
	r, ok := e.dev.(kernels.Rounder)
	if !ok {
		return
	}
	for _, n := range []int{1, 63, 1000, 70001, 2<<20 + 3} { // the last in several pieces
		for _, large := range []bool{false, true} {
			e.sub(float64(n)/64, label("n=%d/large=%v", n, large), func(e *env) {
				x := make([]float32, n)
				for i := range x {
					x[i] = math.Float32frombits(e.rng.Uint32()&^0x40000000 | uint32(e.rng.IntN(2))<<16) // below 2 in magnitude, the last bit of the upper half at random
					if e.rng.IntN(4) == 0 {
						x[i] = math.Float32frombits(math.Float32bits(x[i])&0xffff0000 | 0x8000) // a tie
					}
				}
				for i, v := range []float32{math.Float32frombits(0x7f7f7fff), -math.SmallestNonzeroFloat32, 0} {
					if i+1 < n {
						x[i+1] = v
					}
				}
				if large { // infinity or NaN once it is rounded, at any place
					x[e.rng.IntN(n)] = math.Float32frombits([]uint32{0x7f7f8000, 0xff7fffff, 0x7f800000, 0xff800000, 0x7fc00000, 0xffffffff, 0x7f810000}[e.rng.IntN(7)])
				}
				host := func(v any) *tensor.Dense { return tensor.New(tensor.WithShape(n), tensor.WithBacking(v)) }
				check := func(p, rem kernels.Buffer, from, to int) {
					e.Helper()
					got := make([]uint16, to-from+1)
					got[to-from] = 0x1234
					if rem != nil {
						rem = rem.Slice(from, to)
					}
					finite, err := r.DownloadRounded(got[:to-from], p.Slice(from, to), rem)
					if err != nil {
						e.Fatalf("download: %v", err)
					}
					infinite := false
					for i, v := range x[from:to] {
						want := nearest16(v)
						infinite = infinite || want&0x7f80 == 0x7f80
						if nan := func(h uint16) bool { return h&0x7fff > 0x7f80 }; got[i] != want && !(nan(got[i]) && nan(want)) {
							e.Fatalf("[%d] of %x is %#x, expected %#x", from+i, math.Float32bits(v), got[i], want)
						}
					}
					if finite == infinite {
						e.Fatalf("finite is %v although it is %v that a value is not", finite, infinite)
					}
					exact := make([]float32, to-from+1)
					exact[to-from] = 0.25
					if err := r.DownloadMasters(exact[:to-from], p.Slice(from, to), rem); err != nil {
						e.Fatalf("download: %v", err)
					}
					for i, v := range x[from:to] {
						if math.Float32bits(exact[i]) != math.Float32bits(v) && !(v != v && exact[i] != exact[i]) {
							e.Fatalf("[%d] is %x, expected %x", from+i, math.Float32bits(exact[i]), math.Float32bits(v))
						}
					}
					if got[to-from] != 0x1234 || exact[to-from] != 0.25 {
						e.Fatalf("wrote past the end")
					}
				}
				spans := [][2]int{{0, n}, {n / 3, n - n/4}, {0, 0}}
				p := e.poisoned(kernels.F32, n)
				e.dev.Upload(p, host(x))
				for _, s := range spans {
					check(p, nil, s[0], s[1])
				}
				if e.dev.Info().Compute != kernels.BF16 {
					return
				}
				high, low := make([]float32, n), make([]int16, n)
				for i, v := range x {
					bits := math.Float32bits(v)
					upper := (bits + 0x8000) >> 16
					high[i], low[i] = math.Float32frombits(upper<<16), int16(bits-upper<<16)
				}
				h, rem := e.poisoned(kernels.BF16, n), e.alloc(kernels.I16, n)
				e.dev.Upload(h, host(high))
				e.dev.Upload(rem, host(low))
				for _, s := range spans {
					check(h, rem, s[0], s[1])
				}
			})
		}
	}
}

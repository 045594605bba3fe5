package simd

import (
	"math"
	"testing"
)

// TestHalfFormatsAll converts every 16-bit pattern up and back: up is exact, so
// the way back must give the pattern, but for NaN, which is made quiet.
func TestHalfFormatsAll(t *testing.T) {
	all := make([]uint16, 1<<16)
	for i := range all {
		all[i] = uint16(i)
	}
	eachLevel(t, func(t *testing.T) {
		x, back := make([]float32, len(all)), make([]uint16, len(all))
		BF16ToF32(x, all)
		F32ToBF16(back, x)
		for i, h := range all {
			want := math.Float32frombits(uint32(h) << 16)
			switch {
			case want != want:
				if x[i] == x[i] || back[i] != h|0x40 {
					t.Fatalf("bf16 NaN %#x became %g and %#x", h, x[i], back[i])
				}
			case x[i] != want || back[i] != h:
				t.Fatalf("bf16 %#x became %g and %#x", h, x[i], back[i])
			}
		}
		F16ToF32(x, all)
		F32ToF16(back, x)
		for i, h := range all {
			exp, frac := int(h>>10&31), float64(h&0x3ff)
			want := math.Ldexp(1024+frac, exp-25)
			if exp == 0 {
				want = math.Ldexp(frac, -24)
			}
			if exp == 31 {
				want = math.Inf(1)
			}
			if h>>15 == 1 {
				want = -want
			}
			switch {
			case exp == 31 && frac != 0:
				if x[i] == x[i] || back[i] != h|0x200 {
					t.Fatalf("f16 NaN %#x became %g and %#x", h, x[i], back[i])
				}
			case float64(x[i]) != want || math.Signbit(float64(x[i])) != (h>>15 == 1) || back[i] != h:
				t.Fatalf("f16 %#x became %g and %#x, want %g", h, x[i], back[i], want)
			}
		}
	})
}

// nearest is the pattern whose value is closest to x, the even one on a tie, by
// search among the neighbours of a truncation: slow and obvious.
func nearest(x float32, up func(uint16) float64, infinity uint16) uint16 {
	sign := uint16(math.Float32bits(x) >> 16 & 0x8000)
	v := math.Abs(float64(x))
	lo, hi := uint16(0), infinity
	for hi-lo > 1 {
		if mid := (lo + hi) / 2; up(mid) <= v {
			lo = mid
		} else {
			hi = mid
		}
	}
	// The step above the greatest finite value is where infinity counts as lying.
	top := up(hi)
	if hi == infinity {
		top = 2*up(infinity-1) - up(infinity-2)
	}
	dl, dh := v-up(lo), top-v
	if dh < dl || dh == dl && lo&1 == 1 {
		return sign | hi
	}
	return sign | lo
}

func TestHalfRounding(t *testing.T) {
	r := newRand(t)
	x := make([]float32, 20011)
	for i := range x {
		x[i] = math.Float32frombits(r.Uint32())
		switch i % 4 {
		case 1: // the range of binary16
			x[i] = float32(math.Ldexp(r.NormFloat64(), r.IntN(44)-27))
		case 2: // ties and their neighbours, for both formats
			bits := uint32(r.IntN(1<<16))<<16 | 0x8000
			x[i] = math.Float32frombits(bits + uint32(r.IntN(3)) - 1)
		case 3:
			bits := uint32(0x38000000) + uint32(r.IntN(1<<14))<<13 | 0x1000
			x[i] = math.Float32frombits(bits + uint32(r.IntN(3)) - 1)
		}
		if x[i] != x[i] {
			x[i] = 65520 // the tie between the greatest binary16 and infinity
		}
	}
	bf := func(h uint16) float64 { return float64(math.Float32frombits(uint32(h) << 16)) }
	f16 := func(h uint16) float64 {
		if h < 0x400 {
			return math.Ldexp(float64(h), -24)
		}
		return math.Ldexp(float64(0x400|h&0x3ff), int(h>>10)-25)
	}
	eachLevel(t, func(t *testing.T) {
		for _, n := range []int{0, 1, 7, 8, 9, 15, 16, 17, 31, 33, len(x)} {
			b, h := make([]uint16, n+1), make([]uint16, n+1)
			b[n], h[n] = 77, 77
			F32ToBF16(b[:n], x)
			F32ToF16(h[:n], x)
			if b[n] != 77 || h[n] != 77 {
				t.Fatalf("wrote past %d elements", n)
			}
			for i := range n {
				if want := nearest(x[i], bf, 0x7f80); b[i] != want {
					t.Fatalf("bf16(%g = %#x) = %#x, want %#x", x[i], math.Float32bits(x[i]), b[i], want)
				}
				if want := nearest(x[i], f16, 0x7c00); h[i] != want {
					t.Fatalf("f16(%g = %#x) = %#x, want %#x", x[i], math.Float32bits(x[i]), h[i], want)
				}
			}
			f := newGuarded(n, 3)
			BF16ToF32(f.x, b)
			f.check(t, "bf16 to f32")
			F16ToF32(f.x, h)
			f.check(t, "f16 to f32")
		}
	})
}

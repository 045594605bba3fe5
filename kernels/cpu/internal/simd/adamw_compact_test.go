package simd

import (
	"fmt"
	"math"
	"math/rand/v2"
	"testing"

	"trainerd/kernels"
)

// compactState is what a step on compact moments reads and writes.
type compactState struct {
	p, g  []float32
	m     []int8
	scale []float32
	v     []uint16
}

func (s compactState) clone() compactState {
	return compactState{clone(s.p), clone(s.g), append([]int8(nil), s.m...), clone(s.scale), append([]uint16(nil), s.v...)}
}

// sameAs compares all bits; NaN equals NaN.
func (s compactState) sameAs(t *testing.T, what string, want compactState) {
	t.Helper()
	wantSameBits(t, what+": weights", s.p, want.p)
	wantSameBits(t, what+": scales", s.scale, want.scale)
	for i := range s.m {
		if s.m[i] != want.m[i] {
			t.Fatalf("%s: code %d is %d, want %d", what, i, s.m[i], want.m[i])
		}
	}
	wantSameHalves(t, what+": second moments", s.v, want.v)
}

func wantSameHalves(t *testing.T, what string, got, want []uint16) {
	t.Helper()
	nan := func(h uint16) bool { return h&0x7fff > 0x7f80 }
	for i := range want {
		if got[i] != want[i] && !(nan(got[i]) && nan(want[i])) {
			t.Fatalf("%s: element %d is %#x, want %#x", what, i, got[i], want[i])
		}
	}
}

// compactKinds fill gradients and the state of the step before.
var compactKinds = []struct {
	name string
	fill func(r *rand.Rand, s *compactState)
}{
	{"normal", func(r *rand.Rand, s *compactState) {}},
	{"zeros", func(r *rand.Rand, s *compactState) { clear(s.g); clear(s.m); clear(s.v); clear(s.scale) }},
	{"fresh state", func(r *rand.Rand, s *compactState) { clear(s.m); clear(s.v); clear(s.scale) }},
	{"around the floor", func(r *rand.Rand, s *compactState) {
		clear(s.m)
		for i := range s.g {
			s.g[i] = float32(math.Ldexp(r.NormFloat64(), -87-r.IntN(5)))
		}
	}},
	{"denormal", func(r *rand.Rand, s *compactState) {
		for i := range s.g {
			s.g[i] = math.Float32frombits(r.Uint32() & 0x807fffff)
			s.v[i] &= 0x7f
		}
		for b := range s.scale {
			s.scale[b] = math.Float32frombits(r.Uint32() & 0x7fffff)
		}
	}},
	{"four decades", func(r *rand.Rand, s *compactState) {
		for i := range s.g {
			s.g[i] *= float32(math.Pow(10, -4*r.Float64()))
		}
	}},
	{"huge", func(r *rand.Rand, s *compactState) {
		for i := range s.g {
			s.g[i] *= float32(math.Ldexp(1, 60+r.IntN(66)))
		}
	}},
	{"some NaN and Inf", func(r *rand.Rand, s *compactState) {
		for range 1 + len(s.g)/100 {
			s.g[r.IntN(len(s.g))] = []float32{float32(math.NaN()), float32(math.Inf(1)), float32(math.Inf(-1))}[r.IntN(3)]
		}
	}},
	{"any gradient and scale", func(r *rand.Rand, s *compactState) {
		for i := range s.g {
			s.g[i] = math.Float32frombits(r.Uint32())
			// A NaN whose payload is all ones would carry into the sign of a second moment.
			if s.g[i] != s.g[i] {
				s.g[i] = poison
			}
		}
		for b := range s.scale {
			s.scale[b] = math.Float32frombits(r.Uint32() & 0x7fffffff)
		}
	}},
	{"equal magnitudes", func(r *rand.Rand, s *compactState) { // all at the top code
		clear(s.m)
		for i := range s.g {
			s.g[i] = float32(math.Copysign(0.25, float64(s.g[i])))
		}
	}},
}

// TestCompactLevelsAgree: every level gives the bits of the portable code over
// several steps, whole blocks or not, also where the lower half of the index wraps around.
func TestCompactLevelsAgree(t *testing.T) {
	eachLevel(t, func(t *testing.T) {
		r := newRand(t)
		for _, kind := range compactKinds {
			for _, n := range []int{1, 7, 16, 127, 128, 129, 255, 256, 300, 1280, 1281} {
				s := compactState{normals(r, n), normals(r, n), make([]int8, n), make([]float32, kernels.MomentBlocks(n)), make([]uint16, n)}
				for i := range s.m {
					s.m[i] = int8(r.IntN(255) - 127)
					s.v[i] = uint16(math.Float32bits(r.Float32()) >> 16)
				}
				for b := range s.scale {
					s.scale[b] = r.Float32()
				}
				kind.fill(r, &s)
				key := kernels.RoundingKey(r.Uint64())
				first := []int64{0, 256, 1<<32 - 200, 1<<40 + 12345}[r.IntN(4)]
				want, got := s.clone(), s.clone()
				for step := int64(1); step <= 3; step++ {
					c := NewAdamWCoef(1e-3, 0.9, 0.95, 1e-8, 0.1, step, 0.7)
					adamWCompactGo(want.p, want.g, want.m, want.scale, want.v, &c, key, first)
					AdamWCompact(got.p, got.g, got.m, got.scale, got.v, &c, key, first)
					got.sameAs(t, fmt.Sprintf("%s, %d elements from %d, step %d", kind.name, n, first, step), want)
				}
			}
		}
	})
}

// TestCompactCodesAtTheirEdges rounds moments at and beside every code, with the
// random bits at their ends and in the middle.
func TestCompactCodesAtTheirEdges(t *testing.T) {
	const n = kernels.MomentBlock
	eachLevel(t, func(t *testing.T) {
		if active == Portable {
			return // it is the definition
		}
		r := newRand(t)
		var x []float32
		for q := range 128 {
			for _, between := range []float64{0, 0.25, 0.5, 0.75} {
				v := float32(math.Pow((float64(q)+between)/127, 4))
				down, up := math.Nextafter32(v, 0), math.Nextafter32(v, 2)
				x = append(x, v, -v, down, -up, up)
			}
		}
		for len(x)%n != 0 {
			x = append(x, r.Float32())
		}
		for _, peak := range []float32{1, 0.3, 7e9, 0x1p-90, math.MaxFloat32, float32(math.Inf(1)), poison} {
			inverse := codes * codes / peak
			for _, random := range []uint32{0, 1 << 16, 0x7fff0000, 0x80000000, 0xffffffff, r.Uint32()} {
				for from := 0; from < len(x); from += n {
					var fresh [n]float32
					var bits [n]uint32
					var got [n]int8
					for i := range fresh {
						fresh[i], bits[i] = x[from+i]*peak, random
					}
					if active == AVX512 {
						compactCodes512(n, &got[0], &fresh[0], &bits[0], inverse)
					} else {
						compactCodes2(n, &got[0], &fresh[0], &bits[0], inverse)
					}
					for i, g := range got {
						if want := momentCode(fresh[i], inverse, bits[i]); g != want {
							t.Fatalf("code of %g of %g with bits %#x is %d, want %d", fresh[i], peak, random, g, want)
						}
					}
				}
			}
		}
	})
}

// TestAddGradLevelsAgree adds to every BF16 pattern, and crosses tails and the
// wrap of the index's lower half.
func TestAddGradLevelsAgree(t *testing.T) {
	all := make([]uint16, 1<<16)
	for i := range all {
		all[i] = uint16(i)
	}
	eachLevel(t, func(t *testing.T) {
		r := newRand(t)
		check := func(dst []uint16, src []float32, first int64) {
			t.Helper()
			key := kernels.RoundingKey(r.Uint64())
			want := append([]uint16(nil), dst...)
			got := append(append([]uint16(nil), dst...), 77)
			addGradGo(want, src, key, first)
			AddGrad(got[:len(dst)], src, key, first)
			wantSameHalves(t, fmt.Sprintf("%d elements from %d", len(dst), first), got[:len(dst)], want)
			if got[len(dst)] != 77 {
				t.Fatalf("wrote past %d elements", len(dst))
			}
		}
		src := make([]float32, len(all))
		for _, fill := range []func(i int) float32{
			func(int) float32 { return math.Float32frombits(r.Uint32()) },
			func(i int) float32 { // of the size of what it is added to
				return math.Float32frombits(uint32(i)<<16) * float32(r.NormFloat64())
			},
			func(i int) float32 { return -math.Float32frombits(uint32(i) << 16) }, // cancels
			func(int) float32 { return 0 },
			func(int) float32 { return math.MaxFloat32 },
			func(int) float32 { return float32(math.Inf(-1)) },
			func(int) float32 { return math.Float32frombits(r.Uint32() & 0x807fffff) }, // denormal
		} {
			for i := range src {
				src[i] = fill(i)
			}
			check(all, src, int64(r.Uint32()))
			check(all, src, 1<<32-int64(r.IntN(len(all))))
		}
		for n := range 70 {
			dst := make([]uint16, n)
			for i := range dst {
				dst[i] = uint16(math.Float32bits(float32(r.NormFloat64())) >> 16)
			}
			check(dst, normals(r, n), int64(r.IntN(1000)))
		}
	})
}

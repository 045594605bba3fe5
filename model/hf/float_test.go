package hf

import (
	"encoding/binary"
	"math"
	"math/rand/v2"
	"testing"
)

// halfValue is binary16 by its definition.
func halfValue(h uint16) float64 {
	sign, exp, frac := 1.0, int(h>>10&0x1f), float64(h&0x3ff)
	if h&0x8000 != 0 {
		sign = -1
	}
	switch exp {
	case 0:
		return sign * math.Ldexp(frac, -24)
	case 31:
		if frac != 0 {
			return math.NaN()
		}
		return math.Inf(int(sign))
	}
	return sign * math.Ldexp(1024+frac, exp-25)
}

func TestHalfIsExactAndReturns(t *testing.T) {
	for i := range 1 << 16 {
		h := uint16(i)
		x := fromHalf(h)
		want := halfValue(h)
		if float64(x) != want && !(math.IsNaN(float64(x)) && math.IsNaN(want)) {
			t.Fatalf("%#04x is %v, expected %v", h, x, want)
		}
		if x == 0 && math.Signbit(float64(x)) != (h&0x8000 != 0) {
			t.Fatalf("%#04x lost its sign", h)
		}
		back := toHalf(x)
		if math.IsNaN(want) {
			if !math.IsNaN(halfValue(back)) {
				t.Fatalf("NaN %#04x became %#04x", h, back)
			}
		} else if back != h {
			t.Fatalf("%#04x came back as %#04x", h, back)
		}
	}
}

// checkNearest fails unless got is the nearest to x of its neighbours by bits,
// and even where two are equally near.
func checkNearest(t *testing.T, x float32, got uint16, value func(uint16) float64, infinity uint16) {
	t.Helper()
	distance := func(h uint16) float64 {
		v := value(h)
		if math.IsInf(v, 0) { // rounding treats infinity as the next step of the exponent
			last, before := value(h-1), value(h-2)
			v = last + (last - before)
		}
		return math.Abs(v - float64(x))
	}
	d := distance(got)
	for _, other := range []uint16{got - 1, got + 1} {
		if other&0x7fff > infinity || (got&0x7fff == 0 && other&0x7fff == 0x7fff) || got&0x8000 != other&0x8000 {
			continue
		}
		if e := distance(other); e < d || (e == d && got&1 == 1) {
			t.Fatalf("%v (%#x) rounds to %#04x at %g, but %#04x is at %g", x, math.Float32bits(x), got, d, other, e)
		}
	}
}

func TestRoundingIsToNearestEven(t *testing.T) {
	bfloat := func(b uint16) float64 { return float64(math.Float32frombits(uint32(b) << 16)) }
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	try := func(x float32) {
		if math.IsNaN(float64(x)) || math.IsInf(float64(x), 0) {
			return
		}
		checkNearest(t, x, toBFloat(x), bfloat, 0x7f80)
		if math.Abs(float64(x)) < 131072 { // farther than infinity's place, nothing is near
			checkNearest(t, x, toHalf(x), halfValue, 0x7c00)
		}
	}
	for i := range 1 << 16 { // all ties of binary16, and their neighbours
		lo, hi := halfValue(uint16(i)), halfValue(uint16(i)+1)
		mid := float32((lo + hi) / 2)
		try(mid)
		try(math.Nextafter32(mid, 1e9))
		try(math.Nextafter32(mid, -1e9))
	}
	for _, x := range []float32{65504, 65519.996, 65520, 65521, -65520, 1e-8, 2.9802322e-8, 2.9802326e-8, math.MaxFloat32} {
		try(x)
	}
	for range 300000 {
		x := math.Float32frombits(rng.Uint32())
		try(x)
		try(math.Float32frombits(math.Float32bits(x)&0xffff0000 | 0x8000)) // ties of bfloat16
		try(float32(rng.NormFloat64() * math.Exp(rng.NormFloat64()*8)))
	}
	if x := toBFloat(float32(math.NaN())); !math.IsNaN(bfloat(x)) {
		t.Errorf("NaN became %#04x", x)
	}
}

func TestEncodeReportsOverflow(t *testing.T) {
	for dtype, want := range map[string]int{"F32": -1, "BF16": 2, "F16": 1} {
		if _, got := encode(nil, []float32{1, 70000, math.MaxFloat32, float32(math.Inf(1))}, dtype); got != want {
			t.Errorf("%s: overflow at %d, expected %d", dtype, got, want)
		}
	}
}

// TestFourAtOnce compares the rounding of four numbers with that of each, and
// encode with both at every length and place of a large number.
func TestFourAtOnce(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	edges := []uint32{0, 0x80000000, 1, 0x7fff, 0x8000, 0x8001, 0x18000, 0x3f808000, 0x3f818000, 0x7effffff, 0x7f000000, 0xfeffffff, 0xff000000, 0x7f7f7fff, 0x7f7f8000, 0x7f7fffff, 0x7f800000, 0xff800000, 0x7f800001, 0xffffffff}
	large := func(bits uint32) bool { return bits&0x7fffffff >= 0x7f000000 }
	some := func() float32 {
		if rng.IntN(8) == 0 {
			return math.Float32frombits(edges[rng.IntN(len(edges))])
		}
		return math.Float32frombits(rng.Uint32())
	}
	fast := 0
	for range 200_000 {
		x, want := []float32{some(), some(), some(), some()}, 4
		var data [8]byte
		n := toBFloats(data[:], x)
		for i, v := range x {
			if large(math.Float32bits(v)) {
				want = 0
			}
			if got := binary.LittleEndian.Uint16(data[2*i:]); n == 4 && got != toBFloat(v) {
				t.Fatalf("%v at %d becomes %#04x, expected %#04x", x, i, got, toBFloat(v))
			}
		}
		if n != want {
			t.Fatalf("%v: %d done, expected %d", x, n, want)
		}
		if n == 4 {
			fast++
		}
	}
	if fast < 1000 {
		t.Errorf("only %d of the quadruples had no large number", fast)
	}
	for n := range 14 {
		for at := range n {
			src := make([]float32, n)
			for i := range src {
				src[i] = float32(rng.NormFloat64())
			}
			src[at] = -math.MaxFloat32
			data, overflow := encode(nil, src, "BF16")
			if overflow != at || len(data) != 2*n {
				t.Fatalf("%d values, the one at %d too large: overflow at %d, %d bytes", n, at, overflow, len(data))
			}
			for i, v := range src {
				if got := binary.LittleEndian.Uint16(data[2*i:]); got != toBFloat(v) {
					t.Fatalf("value %d of %d is %#04x, expected %#04x", i, n, got, toBFloat(v))
				}
			}
		}
	}
}

func BenchmarkEncodeBF16(b *testing.B) {
	src, dst := make([]float32, 1<<16), make([]byte, 0, 1<<17)
	for i := range src {
		src[i] = float32(i) * 1e-3
	}
	b.SetBytes(int64(4 * len(src)))
	for b.Loop() {
		encode(dst, src, "BF16")
	}
}

package words

import (
	"encoding/binary"
	"math"
	"math/rand/v2"
	"testing"
)

// TestGreatest holds both ways to one word at a time, for lengths around the
// block, at odd addresses, with the extremes at every place.
func TestGreatest(t *testing.T) {
	t.Logf("assembly: %v", fast)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	mem := make([]byte, 4*300+8)
	for range 4000 {
		off := rng.IntN(5)
		raw := mem[off : off+rng.IntN(len(mem)-off)]
		narrow := rng.IntN(2) == 0
		wantS, wantU := int32(math.MinInt32), uint32(0)
		for i := range len(raw) / 4 {
			x := rng.Uint32()
			if narrow {
				x = x%5 - 2
			}
			switch rng.IntN(200) {
			case 0:
				x = math.MaxInt32
			case 1:
				x = 1 << 31
			case 2:
				x = math.MaxUint32
			}
			binary.NativeEndian.PutUint32(raw[4*i:], x)
			wantS, wantU = max(wantS, int32(x)), max(wantU, x)
		}
		for name, f := range map[string]func([]byte) (int32, uint32){"Greatest": Greatest, "portable": portable} {
			if s, u := f(raw); s != wantS || u != wantU {
				t.Fatalf("%s of %d bytes: %d and %d, expected %d and %d", name, len(raw), s, u, wantS, wantU)
			}
		}
	}
}

// TestGreatestReadsEveryWord: one great word among small ones is found wherever it is.
func TestGreatestReadsEveryWord(t *testing.T) {
	for n := range 100 {
		for at := range n {
			raw := make([]byte, 4*n)
			binary.NativeEndian.PutUint32(raw[4*at:], 7)
			if s, u := Greatest(raw); s != 7 || u != 7 {
				t.Fatalf("word %d of %d: %d and %d, expected 7", at, n, s, u)
			}
			binary.NativeEndian.PutUint32(raw[4*at:], 1<<31|3)
			if s, u := Greatest(raw); u != 1<<31|3 || s > 0 {
				t.Fatalf("word %d of %d: %d and %d, expected 0 at most and %d", at, n, s, u, uint32(1<<31|3))
			}
		}
	}
}

func TestFinite(t *testing.T) {
	const most = 1.0 / 1024
	for _, c := range []struct {
		bits uint32
		want bool
	}{
		{0, true}, {1 << 31, true}, {1, true}, {1<<31 | 1, true},
		{math.Float32bits(most), true}, {math.Float32bits(most) + 1, false},
		{math.Float32bits(-most), true}, {math.Float32bits(-1e30), true}, {math.Float32bits(1), false},
		{math.Float32bits(-math.MaxFloat32), true}, {math.Float32bits(math.MaxFloat32), false},
		{0x7F800000, false}, {0xFF800000, false}, {0x7F800001, false}, {0xFF800001, false}, {0x7FC00000, false}, {0xFFFFFFFF, false}, {0x7FFFFFFF, false},
	} {
		for _, n := range []int{1, 31, 32, 33, 100} {
			for _, at := range []int{0, n / 2, n - 1} {
				raw := make([]byte, 4*n)
				binary.NativeEndian.PutUint32(raw[4*at:], c.bits)
				if got := Finite(raw, most); got != c.want {
					t.Errorf("%#x (%g) at %d of %d: %v", c.bits, math.Float32frombits(c.bits), at, n, got)
				}
			}
		}
	}
}

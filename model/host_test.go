package model

import (
	"math"
	"math/rand/v2"
	"testing"
)

// TestSplitMaster: weight and remainder give every finite float32 back, the
// weight is a bfloat16, and it is a nearest one.
func TestSplitMaster(t *testing.T) {
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 0))
	values := []float32{0, float32(math.Copysign(0, -1)), 1, -1, 1.00390625, math.SmallestNonzeroFloat32, 0x1.7fp-100}
	for range 100000 {
		if x := math.Float32frombits(rng.Uint32()); !math.IsNaN(float64(x)) && math.Abs(float64(x)) < 3e38 {
			values = append(values, x)
		}
	}
	for _, x := range values {
		high, low := splitMaster(x)
		if math.Float32bits(joinMaster(high, low)) != math.Float32bits(x) {
			t.Fatalf("seed %d: %v becomes %v and %d, and %v again", seed, x, high, low, joinMaster(high, low))
		}
		if bits := math.Float32bits(high); bits&0xffff != 0 {
			t.Fatalf("seed %d: high part %v of %v is no bfloat16", seed, high, x)
		}
		// The next bfloat16 toward x must not be nearer.
		step := uint32(0x10000)
		for _, other := range []uint32{math.Float32bits(high) + step, math.Float32bits(high) - step} {
			o := math.Float32frombits(other)
			if math.Abs(float64(o)-float64(x)) < math.Abs(float64(high)-float64(x)) {
				t.Fatalf("seed %d: %v rounds to %v, but %v is nearer", seed, x, high, o)
			}
		}
	}
}

package cpu

import (
	"math/rand/v2"
	"slices"
	"testing"

	"trainerd/kernels"
	"trainerd/kernels/cpu/internal/simd"
)

// TestFingerprint: where the bits of a step differ the fingerprints do, and the
// number of workers is in neither.
func TestFingerprint(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	seen := map[string][]uint32{}
	for _, level := range simd.Levels() {
		was := simd.Use(level)
		for _, workers := range []int{1, 3} {
			d := open(t, workers)
			print := kernels.FingerprintOf(d).Instructions
			bits := step(t, d, seed)
			if before, ok := seen[print]; ok && !slices.Equal(before, bits) {
				t.Errorf("%s with %d workers has other bits than before", print, workers)
			}
			seen[print] = bits
		}
		simd.Use(was)
	}
	if len(seen) != len(simd.Levels()) {
		t.Errorf("%d levels have %d fingerprints", len(simd.Levels()), len(seen))
	}
	for a, x := range seen {
		for b, y := range seen {
			if a < b {
				t.Logf("%s and %s: equal bits: %v", a, b, slices.Equal(x, y))
			}
		}
	}
}

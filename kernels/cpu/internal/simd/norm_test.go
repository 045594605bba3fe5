package simd

import (
	"fmt"
	"testing"
)

// TestNormBackward: the passes give the bits of the single operations, in place
// too, and write nothing beside the row.
func TestNormBackward(t *testing.T) {
	eachLevel(t, func(t *testing.T) {
		rng := newRand(t)
		for _, n := range lengths() {
			for _, add := range []bool{false, true} {
				for _, inPlace := range []bool{false, true} {
					if add && inPlace {
						continue // the sum would be of dy
					}
					x, w, r := normals(rng, n), normals(rng, n), rng.Float32()
					dx, dw, dy, temp := newGuarded(n, 1), newGuarded(n, 2), newGuarded(n, 3), newGuarded(n, 4)
					for _, g := range []guarded{dx, dw, dy} {
						copy(g.x, normals(rng, n))
					}
					wantX, wantW := clone(dx.x), clone(dw.x)
					normBackwardGo(wantX, wantW, dy.x, x, w, make([]float32, n), r, func(dot float32) float32 { return -r * r * r * dot / float32(n) }, add)
					to := dx
					if inPlace {
						to = dy
					}
					NormBackward(to.x, dw.x, dy.x, x, w, temp.x, r, add)
					what := fmt.Sprintf("%d elements, add %t, in place %t", n, add, inPlace)
					for _, g := range []guarded{dx, dw, dy, temp} {
						g.check(t, what)
					}
					wantSameBits(t, what+": dx", to.x, wantX)
					wantSameBits(t, what+": dw", dw.x, wantW)
				}
			}
		}
	})
}

package simd

import (
	"math"

	"trainerd/kernels"
)

// AdamWCompact is AdamW on compact moments: see kernels.AdamW. All slices but
// scale have the length of p; element 0 begins a block and has the given index.
// Every level gives the same bits.
func AdamWCompact(p, g []float32, m []int8, scale []float32, v []uint16, c *AdamWCoef, key kernels.Key, first int64) {
	var fresh [kernels.MomentBlock]float32
	var random [kernels.MomentBlock]uint32
	const n = kernels.MomentBlock
	g, m, v = g[:len(p)], m[:len(p)], v[:len(p)]
	for b := range scale {
		from := b * n
		at := first + int64(from)
		if active == Portable || len(p)-from < n || wraps(at, n) {
			to := min(from+n, len(p))
			adamWCompactGo(p[from:to], g[from:to], m[from:to], scale[b:b+1], v[from:to], c, key, at)
			continue
		}
		var peak float32
		var nan uint32
		if active == AVX512 {
			peak, nan = compactUpdate512(n, &p[from], &g[from], &m[from], &v[from], &fresh[0], &random[0], &c.Grad, scale[b], uint32(at), key.A, highKey(key, at))
		} else {
			peak, nan = compactUpdate2(n, &p[from], &g[from], &m[from], &v[from], &fresh[0], &random[0], &c.Grad, scale[b], uint32(at), key.A, highKey(key, at))
		}
		switch {
		case nan != 0:
			peak = float32(math.NaN())
		case peak < momentFloor:
			scale[b] = 0
			clear(m[from : from+n])
			continue
		}
		scale[b] = peak
		inverse := codes * codes / peak
		if active == AVX512 {
			compactCodes512(n, &m[from], &fresh[0], &random[0], inverse)
		} else {
			compactCodes2(n, &m[from], &fresh[0], &random[0], inverse)
		}
	}
}

// AddGrad adds src to the BF16 values of dst, rounded by the upper random bits;
// see kernels.AddGrad. Every level gives the same bits.
func AddGrad(dst []uint16, src []float32, key kernels.Key, first int64) {
	src = src[:len(dst)]
	done, n := 0, len(dst)
	switch {
	case n == 0 || wraps(first, n):
	case active == AVX512:
		addGrad512(n, &dst[0], &src[0], uint32(first), key.A, highKey(key, first))
		done = n
	case active == AVX2 && n >= 8:
		done = n &^ 7
		addGrad2(done, &dst[0], &src[0], uint32(first), key.A, highKey(key, first))
	}
	addGradGo(dst[done:], src[done:], key, first+int64(done))
}

// wraps reports whether the lower halves of n indices from first on begin anew.
func wraps(first int64, n int) bool { return first>>32 != (first+int64(n)-1)>>32 }

// highKey is what Key.Bits adds for all indices of the same upper half.
func highKey(key kernels.Key, first int64) uint32 { return key.B + uint32(first>>32)*0x9e3779b9 }

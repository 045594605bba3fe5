package simd

import "math"

// Functions on slices work on len(dst) elements, or on len(x) where they have no
// dst; the other slices must be at least as long. A destination may be the same
// slice as a source, but not overlap it otherwise. Any length and alignment is
// right. The order of summation is fixed by level and length.

// Dot returns the sum of x[i]*y[i], accumulated in float32.
func Dot(x, y []float32) float32 {
	y = y[:len(x)]
	if len(x) == 0 {
		return 0
	}
	switch active {
	case AVX512:
		return dot512(len(x), &x[0], &y[0])
	case AVX2:
		return dot2(len(x), &x[0], &y[0])
	}
	return dotGo(x, y)
}

// Axpy computes y += a*x.
func Axpy(a float32, x, y []float32) {
	x = x[:len(y)]
	if len(y) == 0 {
		return
	}
	switch active {
	case AVX512:
		axpy512(len(y), a, &x[0], &y[0])
	case AVX2:
		axpy2(len(y), a, &x[0], &y[0])
	default:
		axpyGo(a, x, y)
	}
}

// Scale computes dst = a*x.
func Scale(dst, x []float32, a float32) {
	x = x[:len(dst)]
	if len(dst) == 0 {
		return
	}
	switch active {
	case AVX512:
		scale512(len(dst), &dst[0], &x[0], a)
	case AVX2:
		scale2(len(dst), &dst[0], &x[0], a)
	default:
		scaleGo(dst, x, a)
	}
}

// Add computes dst = x + y.
func Add(dst, x, y []float32) {
	x, y = x[:len(dst)], y[:len(dst)]
	if len(dst) == 0 {
		return
	}
	switch active {
	case AVX512:
		add512(len(dst), &dst[0], &x[0], &y[0])
	case AVX2:
		add2(len(dst), &dst[0], &x[0], &y[0])
	default:
		addGo(dst, x, y)
	}
}

// Mul computes dst = x * y.
func Mul(dst, x, y []float32) {
	x, y = x[:len(dst)], y[:len(dst)]
	if len(dst) == 0 {
		return
	}
	switch active {
	case AVX512:
		mul512(len(dst), &dst[0], &x[0], &y[0])
	case AVX2:
		mul2(len(dst), &dst[0], &x[0], &y[0])
	default:
		mulGo(dst, x, y)
	}
}

// MulAdd computes dst += x * y.
func MulAdd(dst, x, y []float32) {
	x, y = x[:len(dst)], y[:len(dst)]
	if len(dst) == 0 {
		return
	}
	switch active {
	case AVX512:
		mulAdd512(len(dst), &dst[0], &x[0], &y[0])
	case AVX2:
		mulAdd2(len(dst), &dst[0], &x[0], &y[0])
	default:
		mulAddGo(dst, x, y)
	}
}

// ScaleMul computes dst = a * x * y, the last step of RMSNorm.
func ScaleMul(dst, x, y []float32, a float32) {
	x, y = x[:len(dst)], y[:len(dst)]
	if len(dst) == 0 {
		return
	}
	switch active {
	case AVX512:
		scaleMul512(len(dst), &dst[0], &x[0], &y[0], a)
	case AVX2:
		scaleMul2(len(dst), &dst[0], &x[0], &y[0], a)
	default:
		scaleMulGo(dst, x, y, a)
	}
}

// Lerp computes dst = (1-alpha)*dst + alpha*src.
func Lerp(dst, src []float32, alpha float32) {
	src = src[:len(dst)]
	if len(dst) == 0 {
		return
	}
	switch active {
	case AVX512:
		lerp512(len(dst), &dst[0], &src[0], alpha, 1-alpha)
	case AVX2:
		lerp2(len(dst), &dst[0], &src[0], alpha, 1-alpha)
	default:
		lerpGo(dst, src, alpha)
	}
}

// Sum returns the sum of x, accumulated in float64.
func Sum(x []float32) float64 {
	if len(x) == 0 {
		return 0
	}
	switch active {
	case AVX512:
		return sum512(len(x), &x[0])
	case AVX2:
		return sum2(len(x), &x[0])
	}
	return sumGo(x)
}

// SumSquares returns the sum of x[i]², accumulated in float64.
func SumSquares(x []float32) float64 {
	if len(x) == 0 {
		return 0
	}
	switch active {
	case AVX512:
		return sumSquares512(len(x), &x[0])
	case AVX2:
		return sumSquares2(len(x), &x[0])
	}
	return sumSquaresGo(x)
}

// Max returns the greatest element, NaN when there is one, -Inf for no elements.
func Max(x []float32) float32 {
	if len(x) == 0 {
		return float32(math.Inf(-1))
	}
	var top float32
	var nan uint32
	switch active {
	case AVX512:
		top, nan = max512(len(x), &x[0])
	case AVX2:
		top, nan = max2(len(x), &x[0])
	default:
		return maxGo(x)
	}
	if nan != 0 {
		return float32(math.NaN())
	}
	return top
}

// Rope rotates one head by its position's angles, rotate-half convention: with
// h = len(cos), out[i] = x[i]*cos[i] - x[i+h]*sin[i] and out[i+h] = x[i+h]*cos[i]
// + x[i]*sin[i]. out and x have 2h elements; out may be x.
func Rope(out, x, cos, sin []float32) { rope(out, x, cos, sin, 1) }

// RopeInverse rotates by the negative angles: the inverse and the gradient of Rope.
func RopeInverse(out, x, cos, sin []float32) { rope(out, x, cos, sin, -1) }

func rope(out, x, cos, sin []float32, sign float32) {
	h := len(cos)
	out, x, sin = out[:2*h], x[:2*h], sin[:h]
	if h == 0 {
		return
	}
	switch active {
	case AVX512:
		rope512(h, &out[0], &out[h], &x[0], &x[h], &cos[0], &sin[0], sign)
	case AVX2:
		rope2(h, &out[0], &out[h], &x[0], &x[h], &cos[0], &sin[0], sign)
	default:
		ropeGo(out, x, cos, sin, sign)
	}
}

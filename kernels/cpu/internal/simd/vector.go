package simd

// Functions on slices work on len(dst) elements, or on len(x) where they have no
// dst; the other slices must be at least as long. A destination may be the same
// slice as a source, but not overlap it otherwise. Any length and alignment is
// right. The order of summation is fixed by level and length.

// Dot returns the sum of x[i]*y[i], accumulated in float32.
func Dot(x, y []float32) float32 {
	y = y[:len(x)]
	return dotGo(x, y)
}

// Axpy computes y += a*x.
func Axpy(a float32, x, y []float32) {
	x = x[:len(y)]
	axpyGo(a, x, y)
}

// Scale computes dst = a*x.
func Scale(dst, x []float32, a float32) {
	x = x[:len(dst)]
	scaleGo(dst, x, a)
}

// Add computes dst = x + y.
func Add(dst, x, y []float32) {
	x, y = x[:len(dst)], y[:len(dst)]
	addGo(dst, x, y)
}

// Mul computes dst = x * y.
func Mul(dst, x, y []float32) {
	x, y = x[:len(dst)], y[:len(dst)]
	mulGo(dst, x, y)
}

// MulAdd computes dst += x * y.
func MulAdd(dst, x, y []float32) {
	x, y = x[:len(dst)], y[:len(dst)]
	mulAddGo(dst, x, y)
}

// ScaleMul computes dst = a * x * y, the last step of RMSNorm.
func ScaleMul(dst, x, y []float32, a float32) {
	x, y = x[:len(dst)], y[:len(dst)]
	scaleMulGo(dst, x, y, a)
}

// Lerp computes dst = (1-alpha)*dst + alpha*src.
func Lerp(dst, src []float32, alpha float32) {
	src = src[:len(dst)]
	lerpGo(dst, src, alpha)
}

// Sum returns the sum of x, accumulated in float64.
func Sum(x []float32) float64 { return sumGo(x) }

// SumSquares returns the sum of x[i]², accumulated in float64.
func SumSquares(x []float32) float64 { return sumSquaresGo(x) }

// Max returns the greatest element, NaN when there is one, -Inf for no elements.
func Max(x []float32) float32 { return maxGo(x) }

// Rope rotates one head by its position's angles, rotate-half convention: with
// h = len(cos), out[i] = x[i]*cos[i] - x[i+h]*sin[i] and out[i+h] = x[i+h]*cos[i]
// + x[i]*sin[i]. out and x have 2h elements.
func Rope(out, x, cos, sin []float32) {
	h := len(cos)
	ropeGo(out[:2*h], x[:2*h], cos, sin[:h], 1)
}

// RopeInverse rotates by the negative angles: the inverse and the gradient of Rope.
func RopeInverse(out, x, cos, sin []float32) {
	h := len(cos)
	ropeGo(out[:2*h], x[:2*h], cos, sin[:h], -1)
}

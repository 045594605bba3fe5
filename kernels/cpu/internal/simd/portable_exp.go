package simd

import "math"

// exp is evaluated as 2^n * exp(r): n = round(x*log2(e)), r = x - n*ln2 in two
// parts (Cody & Waite), exp(r) by a polynomial of degree 6 on |r| <= ln2/2. The
// first part of ln2 has 9 significant bits, so n*ln2Hi is exact.
const (
	expLow  = -104 // exp(-104) is under half the least denormal
	expHigh = 89   // exp(89) overflows
	log2E   = 1.4426950408889634
	ln2Hi   = 0.693359375
	ln2Lo   = -2.12194440054690583e-4

	// exp(r) = 1 + r + r²·(C2 + C3·r + ... + C6·r⁴), the bracket interpolated at
	// Chebyshev nodes: relative error 1.04e-8, a sixth of the unit roundoff.
	expC2 = 0.5
	expC3 = 0.16666576266288757
	expC4 = 0.04166655242443085
	expC5 = 0.00836323294788599
	expC6 = 0.0013926250394433737
)

func exp32(x float32) float32 {
	if x != x {
		return x
	}
	if x < expLow {
		x = expLow
	}
	if x > expHigh {
		x = expHigh
	}
	// Adding 1.5*2^23 rounds to an integer, ties to even.
	const round = 0x1.8p23
	n := float32(x*log2E) + round
	n -= round
	r := x - n*ln2Hi
	r -= n * ln2Lo
	p := float32(expC6)
	p = p*r + expC5
	p = p*r + expC4
	p = p*r + expC3
	p = p*r + expC2
	p = p*(r*r) + r
	p += 1
	// 2^n in two factors, since n reaches from -150 to 128.
	n1 := int32(n) >> 1
	n2 := int32(n) - n1
	return p * math.Float32frombits(uint32(n1+127)<<23) * math.Float32frombits(uint32(n2+127)<<23)
}

// affine returns scale*x - shift with one rounding, but for double rounding
// from float64.
func affine(x, scale, shift float32) float32 {
	return float32(float64(scale)*float64(x) - float64(shift))
}

func expScaleShiftGo(dst, x []float32, scale, shift float32) (sum float32) {
	for i, v := range x {
		e := exp32(affine(v, scale, shift))
		dst[i] = e
		sum += e
	}
	return sum
}

func logitStatsGo(z []float32, scale, shift float32) (sumExp, sumExpY float32) {
	for _, v := range z {
		y := clampLow(affine(v, scale, shift))
		e := exp32(y)
		sumExp += e
		sumExpY += e * y
	}
	return sumExp, sumExpY
}

// clampLow keeps exp(y)*y at 0 for y = -Inf. NaN passes.
func clampLow(y float32) float32 {
	if y < expLow {
		return expLow
	}
	return y
}

func dlogitsGo(dst, z []float32, scale, lse, a, b float32) {
	for i, v := range z {
		y := clampLow(affine(v, scale, lse))
		dst[i] = exp32(y) * (a + b*y)
	}
}

func siluMulGo(out, gate, up []float32) {
	for i, g := range gate {
		out[i] = g / (1 + exp32(-g)) * up[i]
	}
}

func siluMulBackwardGo(dgate, dup, dout, gate, up []float32) {
	for i, g := range gate {
		s := 1 / (1 + exp32(-g))
		h := g * s
		d, u := dout[i], up[i]
		// silu' = s + g*s*(1-s)
		dgate[i] = d * u * (s + h*(1-s))
		dup[i] = d * h
	}
}

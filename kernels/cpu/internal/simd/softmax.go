package simd

// Exponentials have a relative error of at most 2 ulp. Arguments below -104
// (-Inf too) give 0, above 88.73 +Inf, and NaN gives NaN.

// ExpShift computes dst = exp(x - shift) and returns the sum of dst.
func ExpShift(dst, x []float32, shift float32) (sum float32) {
	return ExpScaleShift(dst, x, 1, shift)
}

// sumBlock is how many terms of a sum of exponentials are added in float32
// before they join a float64 total.
const sumBlock = 4096

// ExpScaleShift computes dst = exp(scale*x - shift), with one rounding of the
// argument, and returns the sum of dst.
func ExpScaleShift(dst, x []float32, scale, shift float32) (sum float32) {
	x = x[:len(dst)]
	var total float64
	for len(dst) > 0 {
		n := min(len(dst), sumBlock)
		switch active {
		case AVX512:
			sum = expScaleShift512(n, &dst[0], &x[0], scale, shift)
		case AVX2:
			sum = expScaleShift2(n, &dst[0], &x[0], scale, shift)
		default:
			sum = expScaleShiftGo(dst[:n], x[:n], scale, shift)
		}
		total += float64(sum)
		dst, x = dst[n:], x[n:]
	}
	return float32(total)
}

// ExpSum returns the sum of exp(scale*x - shift) without storing the terms.
func ExpSum(x []float32, shift, scale float32) (sum float32) {
	s, _ := LogitStats(x, scale, shift)
	return float32(s)
}

// LogitStats returns, with y = scale*z - shift, the sums of exp(y) and of
// exp(y)*y. With shift = max(scale*z): logsumexp = shift + log(sumExp) and the
// entropy = log(sumExp) - sumExpY/sumExp. Logits of -Inf count as 0 in both.
func LogitStats(z []float32, scale, shift float32) (sumExp, sumExpY float64) {
	for len(z) > 0 {
		n := min(len(z), sumBlock)
		var s, y float32
		switch active {
		case AVX512:
			s, y = logitStats512(n, &z[0], scale, shift)
		case AVX2:
			s, y = logitStats2(n, &z[0], scale, shift)
		default:
			s, y = logitStatsGo(z[:n], scale, shift)
		}
		sumExp += float64(s)
		sumExpY += float64(y)
		z = z[n:]
	}
	return sumExp, sumExpY
}

// DLogits computes, with y = scale*z - lse, dst = exp(y) * (a + b*y). With y the
// log-probs (scale = 1/T, lse = logsumexp(z/T)), a = -(dlogp + dH*H)/T and b =
// -dH/T this is the logit gradient of dlogp*logp[t] + dH*H, but for dlogp/T that
// the caller adds at the target t.
func DLogits(dst, z []float32, scale, lse, a, b float32) {
	z = z[:len(dst)]
	if len(dst) == 0 {
		return
	}
	switch active {
	case AVX512:
		dlogits512(len(dst), &dst[0], &z[0], scale, lse, a, b)
	case AVX2:
		dlogits2(len(dst), &dst[0], &z[0], scale, lse, a, b)
	default:
		dlogitsGo(dst, z, scale, lse, a, b)
	}
}

// SiLUMul computes out = silu(gate) * up, silu(g) = g/(1+exp(-g)).
func SiLUMul(out, gate, up []float32) {
	gate, up = gate[:len(out)], up[:len(out)]
	if len(out) == 0 {
		return
	}
	switch active {
	case AVX512:
		siluMul512(len(out), &out[0], &gate[0], &up[0])
	case AVX2:
		siluMul2(len(out), &out[0], &gate[0], &up[0])
	default:
		siluMulGo(out, gate, up)
	}
}

// SiLUMulBackward computes the gradients of SiLUMul: dgate = dout*up*silu'(gate)
// and dup = dout*silu(gate). dgate may be gate and dup may be up.
func SiLUMulBackward(dgate, dup, dout, gate, up []float32) {
	n := len(dgate)
	dup, dout, gate, up = dup[:n], dout[:n], gate[:n], up[:n]
	if n == 0 {
		return
	}
	switch active {
	case AVX512:
		siluMulBackward512(n, &dgate[0], &dup[0], &dout[0], &gate[0], &up[0])
	case AVX2:
		siluMulBackward2(n, &dgate[0], &dup[0], &dout[0], &gate[0], &up[0])
	default:
		siluMulBackwardGo(dgate, dup, dout, gate, up)
	}
}

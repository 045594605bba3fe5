package simd

// NormBackward is the gradient of one row out = x*r*w, r = 1/sqrt(mean(x²)+eps):
//
//	dx_j = r*dy_j*w_j - x_j*r³/n * sum_k dy_k*w_k*x_k      dw_j += dy_j*x_j*r
//
// or, with add, dx += the same. dx may be dy; temp is scratch of the row's length.
func NormBackward(dx, dw, dy, x, w, temp []float32, r float32, add bool) {
	n := len(dx)
	dw, dy, x, w, temp = dw[:n], dy[:n], x[:n], w[:n], temp[:n]
	if n == 0 {
		return
	}
	// The factor of x after the sum over the row.
	factor := func(dot float32) float32 { return -r * r * r * dot / float32(n) }
	switch active {
	case AVX512:
		c := factor(normBackwardSums512(n, &temp[0], &dw[0], &dy[0], &x[0], &w[0], r))
		if add {
			normBackwardAdd512(n, &dx[0], &temp[0], &x[0], r, c)
		} else {
			normBackwardSet512(n, &dx[0], &temp[0], &x[0], r, c)
		}
	case AVX2:
		c := factor(normBackwardSums2(n, &temp[0], &dw[0], &dy[0], &x[0], &w[0], r))
		if add {
			normBackwardAdd2(n, &dx[0], &temp[0], &x[0], r, c)
		} else {
			normBackwardSet2(n, &dx[0], &temp[0], &x[0], r, c)
		}
	default:
		normBackwardGo(dx, dw, dy, x, w, temp, r, factor, add)
	}
}

// normBackwardGo is NormBackward step by step, at every level the same bits.
func normBackwardGo(dx, dw, dy, x, w, temp []float32, r float32, factor func(dot float32) float32, add bool) {
	ScaleMul(temp, dy, x, r)
	Add(dw, dw, temp)
	Mul(temp, dy, w)
	c := factor(Dot(temp, x))
	if add {
		Axpy(r, temp, dx)
	} else {
		Scale(dx, temp, r)
	}
	Axpy(c, x, dx)
}

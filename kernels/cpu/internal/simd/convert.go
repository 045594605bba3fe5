package simd

// Conversions round to nearest, ties to even; overflow gives infinity; NaN stays
// NaN (quiet, upper payload bits kept). Denormals are exact in both formats.

// F32ToBF16 converts to bfloat16 bit patterns.
func F32ToBF16(dst []uint16, src []float32) {
	src = src[:len(dst)]
	done := 0
	switch n := len(dst); {
	case active == AVX512 && n > 0:
		f32ToBF16512(n, &dst[0], &src[0])
		done = n
	case active == AVX2 && n >= 8:
		done = n &^ 7
		f32ToBF162(done, &dst[0], &src[0])
	}
	f32ToBF16Go(dst[done:], src[done:])
}

// BF16ToF32 converts from bfloat16 bit patterns, exactly.
func BF16ToF32(dst []float32, src []uint16) {
	src = src[:len(dst)]
	done := 0
	switch n := len(dst); {
	case active == AVX512 && n > 0:
		bf16ToF32512(n, &dst[0], &src[0])
		done = n
	case active == AVX2 && n >= 8:
		done = n &^ 7
		bf16ToF322(done, &dst[0], &src[0])
	}
	bf16ToF32Go(dst[done:], src[done:])
}

// F32ToF16 converts to IEEE binary16 bit patterns.
func F32ToF16(dst []uint16, src []float32) {
	src = src[:len(dst)]
	done := 0
	switch n := len(dst); {
	case active == AVX512 && n > 0:
		f32ToF16512(n, &dst[0], &src[0])
		done = n
	case active == AVX2 && n >= 8:
		done = n &^ 7
		f32ToF162(done, &dst[0], &src[0])
	}
	f32ToF16Go(dst[done:], src[done:])
}

// F16ToF32 converts from IEEE binary16 bit patterns, exactly.
func F16ToF32(dst []float32, src []uint16) {
	src = src[:len(dst)]
	done := 0
	switch n := len(dst); {
	case active == AVX512 && n > 0:
		f16ToF32512(n, &dst[0], &src[0])
		done = n
	case active == AVX2 && n >= 8:
		done = n &^ 7
		f16ToF322(done, &dst[0], &src[0])
	}
	f16ToF32Go(dst[done:], src[done:])
}

package simd

// Conversions round to nearest, ties to even; overflow gives infinity; NaN stays
// NaN (quiet, upper payload bits kept). Denormals are exact in both formats.

// F32ToBF16 converts to bfloat16 bit patterns.
func F32ToBF16(dst []uint16, src []float32) { f32ToBF16Go(dst, src[:len(dst)]) }

// BF16ToF32 converts from bfloat16 bit patterns, exactly.
func BF16ToF32(dst []float32, src []uint16) { bf16ToF32Go(dst, src[:len(dst)]) }

// F32ToF16 converts to IEEE binary16 bit patterns.
func F32ToF16(dst []uint16, src []float32) { f32ToF16Go(dst, src[:len(dst)]) }

// F16ToF32 converts from IEEE binary16 bit patterns, exactly.
func F16ToF32(dst []float32, src []uint16) { f16ToF32Go(dst, src[:len(dst)]) }

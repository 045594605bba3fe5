// Package simd is the arithmetic of the CPU device: float32 matrix products and
// the vector primitives that kernels/cpu composes into operations. It knows
// nothing of buffers, models or layouts.
//
// Every function exists at three levels: AVX-512, AVX2 with FMA, and portable
// Go. The best one that the processor has is chosen at start; Use overrides it.
//
// Read sgemm.go first, then vector.go.
package simd

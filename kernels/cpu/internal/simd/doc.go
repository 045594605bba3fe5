// Package simd is the arithmetic of the CPU device: float32 matrix products and
// the vector primitives that kernels/cpu composes into operations. It knows
// nothing of buffers, models or layouts, and nothing here allocates per call.
//
// Every function exists at three levels: AVX-512, AVX2 with FMA, and portable
// Go. The best one that the processor has is chosen at start; Use overrides it.
// The assembly is written by the programs in gen (a module of its own, with avo):
// change them and run `go generate`, never the .s files.
//
// # Determinism
//
// Sums have a fixed order at each level, whatever the number of workers, the
// alignment, or the other rows and columns of a product. Matrix products are
// bitwise the same at both assembly levels: each element is one chain of fused
// multiply-adds in order of k, cut into blocks that depend on k alone. AdamW on
// compact moments and sums of bfloat16 gradients are bitwise the same at all three
// (NaN for NaN): they are the twins of CUDA kernels. The vector reductions (Dot, sums
// of exponentials) depend on the level's lanes.
//
// # Speed
//
// A core with two 512-bit multiply-add ports does 64 float32 operations per
// cycle, the floor that Sgemm is held against. On one core of an Emerald Rapids
// Xeon at about 2.5 GHz (160 GFLOP/s), GFLOP/s with operands as named:
//
//	                      here   PyTorch 2 (oneDNN/MKL)
//	NN 64x64x64           158                     blocks of attention, in place
//	NT 64x64x64           141
//	NT 953x3072x576       137    152
//	NT 1024x1536x576      141    162              x·Wᵀ, per second of processor time
//	NT 953x576x1536       137    156
//	NT 16x1536x576        103     60              decoding
//	NT 28x1536x576        118     85
//
// On both cores at once, the best wall times at NT 1024x1536x576 gave 252 here and
// 290 there.
//
// Of the primitives on 4096 floats in cache, a multiply-add takes 0.05 ns per
// element, an exponential 0.4 ns, an AdamW update 0.5 ns (2.0 on compact moments:
// three roots and two quotients), adding a bfloat16 gradient 0.4 ns: from memory, all
// but the exponentials and compact AdamW run at its bandwidth.
//
// Read sgemm.go first, then blocked.go, tile.go and vector.go.
package simd

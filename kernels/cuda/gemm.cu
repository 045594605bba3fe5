// Matrix products of any shape and alignment, for what cuBLASLt does not take:
//   C[m,n] = op(A)[m,k]·op(B)[k,n] (+ C) (+ bias[m] on every column),
// all matrices in column-major order, as cuBLASLt counts. A and B are bf16, C is
// bf16 or float32, k may be 0.
//
// 2·m·n·k FLOPs on the float32 units: at most 67 TFLOP/s on an H100, and this
// kernel, which is last resort, is not expected to come near. The sum of an
// element runs over k in order, in one float32.
#include "common.cuh"

namespace {

enum { kTile = 64, kDepth = 16, kStride = kTile + 1 };

// stage copies a tile of op(X), kTile along its outer dimension (from row `first` of n)
// and kDepth along k, as floats: s[depth][outer]. Neighbouring threads read neighbouring elements.
TR_INLINE void stage(float *s, const bf16 *x, int first, int n, int from, int k, long long ld, bool k_first) {
	for (int e = threadIdx.x; e < kTile * kDepth; e += 256) {
		int outer = k_first ? e / kDepth : e % kTile, depth = k_first ? e % kDepth : e / kTile;
		long long i = first + outer, l = from + depth;
		bool inside = i < n && l < k;
		s[depth * kStride + outer] = inside ? bf16_float(x[k_first ? i * ld + l : l * ld + i]) : 0.0f;
	}
}

} // namespace

extern "C" __global__ void __launch_bounds__(256) gemm_simple(void *c, const bf16 *a, const bf16 *b, const bf16 *bias, int m, int n, int k, long long lda, long long ldb,
                                                             long long ldc, int transA, int transB, int float32C, int accumulate) {
	TR_SHARED(float, sa, kDepth * kStride);
	TR_SHARED(float, sb, kDepth * kStride);
	int row = blockIdx.x * kTile, column = blockIdx.y * kTile, x = threadIdx.x & 15, y = threadIdx.x >> 4;
	float sum[4][4];
#pragma unroll
	for (int i = 0; i < 4; i++)
#pragma unroll
		for (int j = 0; j < 4; j++) sum[i][j] = 0;
	for (int from = 0; from < k; from += kDepth) {
		stage(sa, a, row, m, from, k, lda, transA != 0);
		stage(sb, b, column, n, from, k, ldb, transB == 0);
		__syncthreads();
		for (int l = 0; l < kDepth && from + l < k; l++) {
			float u[4], v[4];
#pragma unroll
			for (int i = 0; i < 4; i++) u[i] = sa[l * kStride + x + 16 * i], v[i] = sb[l * kStride + y + 16 * i];
#pragma unroll
			for (int i = 0; i < 4; i++)
#pragma unroll
				for (int j = 0; j < 4; j++) sum[i][j] += u[i] * v[j];
		}
		__syncthreads();
	}
#pragma unroll
	for (int j = 0; j < 4; j++) {
#pragma unroll
		for (int i = 0; i < 4; i++) {
			int r = row + x + 16 * i, q = column + y + 16 * j;
			if (r >= m || q >= n) continue;
			long long at = q * ldc + r;
			float t = sum[i][j];
			if (float32C) {
				float *o = static_cast<float *>(c) + at;
				*o = accumulate ? t + *o : t;
				continue;
			}
			bf16 *o = static_cast<bf16 *>(c) + at;
			if (accumulate) t += bf16_float(*o);
			if (bias) t += bf16_float(bias[r]);
			*o = float_bf16(t);
		}
	}
}

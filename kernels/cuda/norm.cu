// RMSNorm over rows of width d (arXiv 1910.07467), with the residual addition
// in the same pass, and its gradient.
//
//   s = x (+ add)      rstd = 1/sqrt(mean(s²)+eps)      out = s·rstd·w
//   dx = rstd·dy·w - s·rstd³/d·sum(dy·w·s)  (+ dx)      dw = sum over rows of dy·s·rstd
//
// At the 0.5b shape (T = 12,314, d = 896; one array is 22 MB), with 3.0 TB/s:
//   forward, no residual   2 arrays, 44 MB, 15 us      with residual   4 arrays, 88 MB, 29 us
//   backward with addTo    4 arrays, 88 MB, 29 us
//
// A row stays in registers between its two uses: 4 chunks of 8 elements a
// thread, with 32 threads for a row up to d = 1024 and 256 threads up to 8192.
#include "common.cuh"

namespace {

const int kChunks = 4; // chunks of 8 elements that a thread keeps

// load_raw takes up to 8 elements as bits, 0 beyond n.
TR_INLINE uint4 load_raw(const bf16 *p, int n, bool vec) {
	if (vec) return *reinterpret_cast<const uint4 *>(p);
	unsigned e[8];
#pragma unroll
	for (int i = 0; i < 8; i++) e[i] = i < n ? p[i] : 0;
	uint4 x = {e[0] | e[1] << 16, e[2] | e[3] << 16, e[4] | e[5] << 16, e[6] | e[7] << 16};
	return x;
}

// Sum over the threads of a row: a warp, or a whole one-dimensional block.
TR_INLINE float row_sum(float x) { return blockDim.x == 32 ? warp_sum(x) : block_sum(x); }

} // namespace

extern "C" __global__ void __launch_bounds__(256)
	rmsnorm_bf16(bf16 *out, float *rstd, const bf16 *x, const bf16 *add, bf16 *sum, const bf16 *w, int t, int d, float eps) {
	int row = blockIdx.x * blockDim.y + threadIdx.y;
	if (row >= t) return;
	long long base = static_cast<long long>(row) * d;
	bool vec = d % 8 == 0 && aligned16(x) && aligned16(out) && aligned16(w) && (!add || (aligned16(add) && aligned16(sum)));
	int chunks = (d + 7) / 8;
	uint4 kept[kChunks];
	float square = 0;
	// What does not fit in registers is read again below, after this thread wrote it.
	const bf16 *again = add ? sum : x;
	auto take = [&](int i) {
		uint4 raw = load_raw(x + base + i * 8, d - i * 8, vec);
		float v[8];
		unpack8(v, raw);
		if (add) {
			float a[8];
			load8(a, add + base + i * 8, d - i * 8, vec);
#pragma unroll
			for (int j = 0; j < 8; j++) v[j] += a[j];
			raw = pack8(v);
			store8(sum + base + i * 8, v, d - i * 8, vec);
			unpack8(v, raw);
		}
#pragma unroll
		for (int j = 0; j < 8; j++) square += v[j] * v[j];
		return raw;
	};
#pragma unroll
	for (int c = 0; c < kChunks; c++) {
		int i = threadIdx.x + c * blockDim.x;
		if (i < chunks) kept[c] = take(i);
	}
	for (int i = threadIdx.x + kChunks * blockDim.x; i < chunks; i += blockDim.x) take(i);
	float r = 1.0f / sqrtf(row_sum(square) / static_cast<float>(d) + eps);
	if (rstd && threadIdx.x == 0) rstd[row] = r;
	auto put = [&](int i, uint4 raw) {
		float v[8], g[8];
		unpack8(v, raw);
		load8(g, w + i * 8, d - i * 8, vec);
#pragma unroll
		for (int j = 0; j < 8; j++) v[j] = v[j] * r * g[j];
		store8(out + base + i * 8, v, d - i * 8, vec);
	};
#pragma unroll
	for (int c = 0; c < kChunks; c++) {
		int i = threadIdx.x + c * blockDim.x;
		if (i < chunks) put(i, kept[c]);
	}
	for (int i = threadIdx.x + kChunks * blockDim.x; i < chunks; i += blockDim.x) put(i, load_raw(again + base + i * 8, d - i * 8, vec));
}

namespace {

// vec is a parameter of the template so that the registers are those of one path.
template <bool vec>
TR_INLINE void rmsnorm_backward(float *sums, bf16 *dx, float *part, const bf16 *dy, const bf16 *x, const bf16 *w, const float *rstd, int t, int d, int add_to) {
	int chunks = (d + 7) / 8;
	float dw[kChunks][8];
#pragma unroll
	for (int c = 0; c < kChunks; c++)
#pragma unroll
		for (int j = 0; j < 8; j++) dw[c][j] = 0;
	for (int row = blockIdx.x * blockDim.y + threadIdx.y; row < t; row += gridDim.x * blockDim.y) {
		long long base = static_cast<long long>(row) * d;
		float r = rstd[row], dot = 0;
		uint4 kept_x[kChunks], kept_dy[kChunks], kept_dx[kChunks]; // all of a row's loads before its sum is waited for
#pragma unroll
		for (int c = 0; c < kChunks; c++) {
			int i = threadIdx.x + c * blockDim.x;
			if (i >= chunks) continue;
			kept_x[c] = load_raw(x + base + i * 8, d - i * 8, vec);
			kept_dy[c] = load_raw(dy + base + i * 8, d - i * 8, vec);
			if (vec && add_to) kept_dx[c] = load_raw(dx + base + i * 8, d - i * 8, vec);
		}
#pragma unroll
		for (int c = 0; c < kChunks; c++) {
			int i = threadIdx.x + c * blockDim.x;
			if (i >= chunks) continue;
			float v[8], g[8], m[8];
			unpack8(v, kept_x[c]);
			unpack8(g, kept_dy[c]);
			load8(m, w + i * 8, d - i * 8, vec);
#pragma unroll
			for (int j = 0; j < 8; j++) {
				dot += g[j] * m[j] * v[j];
				dw[c][j] += g[j] * v[j] * r;
			}
		}
		float k = -r * r * r * row_sum(dot) / static_cast<float>(d);
#pragma unroll
		for (int c = 0; c < kChunks; c++) {
			int i = threadIdx.x + c * blockDim.x;
			if (i >= chunks) continue;
			float v[8], g[8], m[8];
			unpack8(v, kept_x[c]);
			unpack8(g, kept_dy[c]);
			load8(m, w + i * 8, d - i * 8, vec);
#pragma unroll
			for (int j = 0; j < 8; j++) v[j] = r * g[j] * m[j] + k * v[j];
			if (add_to) {
				if (vec) unpack8(g, kept_dx[c]);
				else load8(g, dx + base + i * 8, d - i * 8, vec);
#pragma unroll
				for (int j = 0; j < 8; j++) v[j] += g[j];
			}
			store8(dx + base + i * 8, v, d - i * 8, vec);
		}
	}
	float *mine = part + static_cast<long long>(blockIdx.x) * d;
	float *to = blockDim.y > 1 ? sums + threadIdx.y * d : mine;
#pragma unroll
	for (int c = 0; c < kChunks; c++) {
		int i = threadIdx.x + c * blockDim.x;
		if (i < chunks) store8(to + i * 8, dw[c], d - i * 8, vec && aligned16(to));
	}
	if (blockDim.y == 1) return;
	__syncthreads();
	for (int j = threadIdx.y * blockDim.x + threadIdx.x; j < d; j += blockDim.x * blockDim.y) {
		float total = 0;
		for (int i = 0; i < static_cast<int>(blockDim.y); i++) total += sums[i * d + j];
		mine[j] = total;
	}
}

} // namespace

// part[b] is block b's share of dw. d is at most 8·kChunks·blockDim.x.
extern "C" __global__ void __launch_bounds__(256, 2)
	rmsnorm_backward_bf16(bf16 *dx, float *part, const bf16 *dy, const bf16 *x, const bf16 *w, const float *rstd, int t, int d, int add_to) {
	TR_DYNAMIC(float, sums); // [blockDim.y, d] when blockDim.y > 1
	if (d % 8 == 0 && aligned16(x) && aligned16(dx) && aligned16(dy) && aligned16(w)) rmsnorm_backward<true>(sums, dx, part, dy, x, w, rstd, t, d, add_to);
	else rmsnorm_backward<false>(sums, dx, part, dy, x, w, rstd, t, d, add_to);
}

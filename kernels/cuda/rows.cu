// Rows moved and summed: Gather, ScatterAdd, BiasBackward, and the second stage of
// every two-stage reduction of parameter gradients.
//
// At the 0.5b shape (T = 12,314, d = 896, qkv width 1,152), with 3.0 TB/s:
//   gather       out[T,d] = table[rows]: 4·T·d bytes = 44 MB, 15 us
//   scatter add  dst[u] += sum src: 2·T·d read + 8·U·d for U distinct rows in
//                float32: 22 MB + at most 88 MB, 37 us
//   bias         db[W] += sum dy[T,W]: 2·T·W = 28 MB, 10 us
#include "common.cuh"

namespace {

// One warp copies one row.
template <class T>
TR_INLINE void gather_rows(T *out, const T *table, const int *index, int n, int d, int rows, int *bad) {
	int i = blockIdx.x * blockDim.y + threadIdx.y;
	if (i >= n) return;
	long long r = index[i];
	bool inside = r >= 0 && r < rows;
	if (!inside && bad && threadIdx.x == 0) atomicMin(bad, i);
	const int width = 16 / int(sizeof(T));
	T *o = out + static_cast<long long>(i) * d;
	const T *x = table + (inside ? r : 0) * d;
	if (d % width == 0 && aligned16(out) && aligned16(table)) {
		const uint4 zero = {0, 0, 0, 0};
		for (int j = threadIdx.x; j < d / width; j += 32)
			reinterpret_cast<uint4 *>(o)[j] = inside ? reinterpret_cast<const uint4 *>(x)[j] : zero;
	} else {
		for (int j = threadIdx.x; j < d; j += 32) o[j] = inside ? x[j] : T(0);
	}
}

// A thread owns 8 columns of one bucket and adds its rows in order.
template <class T>
TR_INLINE void scatter_add(T *dst, const bf16 *src, const int *dst_row, const int *start, const int *src_row, int buckets, int d, int dst_rows,
                           int src_rows, int accumulate, int *bad) {
	int u = blockIdx.x * blockDim.y + threadIdx.y, column = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
	if (u >= buckets || column >= d) return;
	int row = dst_row[u], from = start[u], to = start[u + 1], left = d - column;
	if (row < 0 || row >= dst_rows) {
		if (bad && column == 0) atomicMin(bad, u);
		return;
	}
	bool vec = d % 8 == 0 && aligned16(src), vec_dst = d % 8 == 0 && aligned16(dst);
	T *o = dst + static_cast<long long>(row) * d + column;
	float sum[8] = {0, 0, 0, 0, 0, 0, 0, 0};
	if (accumulate) load8(sum, o, left, vec_dst);
	// Four rows are under way at once: a token that comes a thousand times is one bucket.
	for (int first = from; first < to; first += 4) {
		float x[4][8];
		bool inside[4];
#pragma unroll
		for (int i = 0; i < 4; i++) {
			int r = first + i < to ? src_row[first + i] : 0;
			inside[i] = first + i < to && r >= 0 && r < src_rows;
			if (first + i < to && !inside[i] && bad && column == 0) atomicMin(bad, u);
			if (inside[i]) load8(x[i], src + static_cast<long long>(r) * d + column, left, vec);
		}
#pragma unroll
		for (int i = 0; i < 4; i++)
			if (inside[i]) {
#pragma unroll
				for (int j = 0; j < 8; j++) sum[j] += x[i][j];
			}
	}
	store8(o, sum, left, vec_dst);
}

TR_INLINE float get(const float *p) { return *p; }
TR_INLINE float get(const bf16 *p) { return bf16_float(*p); }
TR_INLINE void put(float *p, float x) { *p = x; }
TR_INLINE void put(bf16 *p, float x) { *p = float_bf16(x); }

// A block of kWarps warps takes 32 columns. Its warp w adds parts w, w+kWarps, ... of
// each, and the first warp their sums in order: there are few blocks, and 528 parts are
// 17 a warp, so that two or three latencies of L2 are all there is to wait for.
const int kWarps = 32;

template <class T>
TR_INLINE void reduce_partials(T *out, const float *part, int parts, int n, int stride, int accumulate) {
	TR_SHARED(float, sums, kWarps * 32);
	int lane = threadIdx.x % 32, warp = threadIdx.x / 32, j = blockIdx.x * 32 + lane;
	float sum = 0;
	if (j < n) {
#pragma unroll 8
		for (int p = warp; p < parts; p += kWarps) sum += part[static_cast<long long>(p) * stride + j];
	}
	sums[warp * 32 + lane] = sum;
	__syncthreads();
	if (warp > 0 || j >= n) return;
	for (int i = 1; i < kWarps; i++) sum += sums[i * 32 + lane];
	put(out + j, accumulate ? sum + get(out + j) : sum);
}

} // namespace

extern "C" __global__ void __launch_bounds__(256) gather_rows_bf16(bf16 *out, const bf16 *table, const int *index, int n, int d, int rows, int *bad) {
	gather_rows(out, table, index, n, d, rows, bad);
}
extern "C" __global__ void __launch_bounds__(256) gather_rows_f32(float *out, const float *table, const int *index, int n, int d, int rows, int *bad) {
	gather_rows(out, table, index, n, d, rows, bad);
}

extern "C" __global__ void __launch_bounds__(128) scatter_add_bf16(bf16 *dst, const bf16 *src, const int *dst_row, const int *start, const int *src_row, int buckets,
                                                                  int d, int dst_rows, int src_rows, int accumulate, int *bad) {
	scatter_add(dst, src, dst_row, start, src_row, buckets, d, dst_rows, src_rows, accumulate, bad);
}
extern "C" __global__ void __launch_bounds__(128) scatter_add_f32(float *dst, const bf16 *src, const int *dst_row, const int *start, const int *src_row, int buckets,
                                                                 int d, int dst_rows, int src_rows, int accumulate, int *bad) {
	scatter_add(dst, src, dst_row, start, src_row, buckets, d, dst_rows, src_rows, accumulate, bad);
}

// Block (32,8): 256 columns, 8 each, and 8 rows at a time of this part's share.
extern "C" __global__ void __launch_bounds__(256) bias_backward_partial(float *part, const bf16 *dy, int m, int n, int parts) {
	TR_SHARED(float, sums, 8 * 256);
	int column = (blockIdx.x * 32 + threadIdx.x) * 8, left = n - column;
	int from = static_cast<int>(static_cast<long long>(m) * blockIdx.y / parts), to = static_cast<int>(static_cast<long long>(m) * (blockIdx.y + 1) / parts);
	bool vec = n % 8 == 0 && aligned16(dy);
	float sum[8] = {0, 0, 0, 0, 0, 0, 0, 0}, x[8];
	if (left > 0) {
#pragma unroll 4
		for (int r = from + threadIdx.y; r < to; r += 8) {
			load8(x, dy + static_cast<long long>(r) * n + column, left, vec);
#pragma unroll
			for (int j = 0; j < 8; j++) sum[j] += x[j];
		}
	}
#pragma unroll
	for (int j = 0; j < 8; j++) sums[threadIdx.y * 256 + threadIdx.x * 8 + j] = sum[j];
	__syncthreads();
	int mine = threadIdx.y * 32 + threadIdx.x, at = blockIdx.x * 256 + mine;
	if (at >= n) return;
	float total = 0;
	for (int i = 0; i < 8; i++) total += sums[i * 256 + mine];
	part[static_cast<long long>(blockIdx.y) * n + at] = total;
}

extern "C" __global__ void __launch_bounds__(1024) reduce_partials_f32(float *out, const float *part, int parts, int n, int stride, int accumulate) {
	reduce_partials(out, part, parts, n, stride, accumulate);
}
extern "C" __global__ void __launch_bounds__(1024) reduce_partials_bf16(bf16 *out, const float *part, int parts, int n, int stride, int accumulate) {
	reduce_partials(out, part, parts, n, stride, accumulate);
}

// Attention over segments for any even head size up to 256 and any alignment, by
// plain float32 arithmetic: the path of tiny models and odd strides. Same schedule,
// same results as attention_forward.cu and attention_backward.cu (but for the
// bf16 rounding of p and ds there), perhaps 20 times slower.
//
// A warp takes one stacked query row (forward, dQ) or one key (dK/dV) at a
// time. Scores: one key (query row) a lane. Sums over them: lanes over hd.
#include "attention.cuh"

namespace {

const int kColumns = 8; // columns of hd a lane holds: hd is at most 256

TR_INLINE float dot(const bf16 *x, const bf16 *y, int n) {
	float sum = 0;
	for (int i = 0; i < n; i++) sum += bf16_float(x[i]) * bf16_float(y[i]);
	return sum;
}

// axpy adds w·x to a row that the warp holds.
TR_INLINE void axpy(float (&acc)[kColumns], float w, const bf16 *x, int hd) {
	int lane = threadIdx.x % 32;
#pragma unroll
	for (int i = 0; i < kColumns; i++)
		if (lane + 32 * i < hd) acc[i] += w * bf16_float(x[lane + 32 * i]);
}

TR_INLINE void store_row(bf16 *o, const float (&acc)[kColumns], float factor, int hd) {
	int lane = threadIdx.x % 32;
#pragma unroll
	for (int i = 0; i < kColumns; i++)
		if (lane + 32 * i < hd) o[lane + 32 * i] = float_bf16(acc[i] * factor);
}

// row_of returns row c of prefix ++ own.
TR_INLINE const bf16 *row_of(const Tile &t, const bf16 *prefix, int prefix_stride, const bf16 *own, int own_stride, int c) {
	return c < t.prefix_len ? prefix + static_cast<long long>(t.prefix + c) * prefix_stride : own + static_cast<long long>(t.own + c - t.prefix_len) * own_stride;
}

} // namespace

extern "C" __global__ void __launch_bounds__(128)
	attention_forward_simple(bf16 *out, float *lse, const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *pk, const bf16 *pv, int q_stride, int k_stride,
                             int v_stride, int pk_stride, int pv_stride, const int *items, float *part_o, float *part_ml, int part_rows, int h, int kv, float scale,
                             int hd) {
	const int *item = items + 12 * blockIdx.x;
	Tile t = read_tile(item);
	int from = item[6], to = item[7], part = item[8], head = blockIdx.y, group = h / kv, lane = threadIdx.x % 32;
	float scale2 = scale * kLog2e;
	for (int r = threadIdx.x / 32; r < t.n * group; r += 4) {
		long long token = t.q + r / group, row = token * h + head * group + r % group;
		const bf16 *query = q + token * q_stride + (head * group + r % group) * hd;
		int sees = imin(to, visible(t, r / group));
		float top = negative_infinity(), sum = 0, acc[kColumns];
#pragma unroll
		for (int i = 0; i < kColumns; i++) acc[i] = 0;
		for (int c = from; c < sees; c += 32) {
			float s = negative_infinity();
			if (c + lane < sees) s = scale2 * dot(query, row_of(t, pk, pk_stride, k, k_stride, c + lane) + head * hd, hd);
			float before = top;
			top = fmaxf(top, warp_max(s));
			float base = top == negative_infinity() ? 0.0f : top, shrink = fast_exp2(before - base), p = fast_exp2(s - base);
			sum = sum * shrink + warp_sum(p);
#pragma unroll
			for (int i = 0; i < kColumns; i++) acc[i] *= shrink;
			for (int j = 0; j < imin(32, sees - c); j++) axpy(acc, __shfl_sync(kAllLanes, p, j), row_of(t, pv, pv_stride, v, v_stride, c + j) + head * hd, hd);
		}
		if (part >= 0) {
			long long at = static_cast<long long>(head) * part_rows + part + r;
#pragma unroll
			for (int i = 0; i < kColumns; i++)
				if (lane + 32 * i < hd) part_o[at * hd + lane + 32 * i] = acc[i];
			if (lane == 0) part_ml[at * 2] = top, part_ml[at * 2 + 1] = sum;
			continue;
		}
		store_row(out + row * hd, acc, sum == 0.0f ? 0.0f : 1.0f / sum, hd);
		if (lse && lane == 0) lse[row] = sum == 0.0f ? negative_infinity() : (top + log2f(sum)) * static_cast<float>(kLn2);
	}
}

extern "C" __global__ void __launch_bounds__(128) attention_dq_simple(bf16 *dqkv, const bf16 *qkv, const bf16 *dout, const float *lse, const float *delta,
                                                                     const int *tiles, const int *order, int h, int kv, float scale, int hd) {
	Tile t = read_tile(tiles + 8 * order[blockIdx.x]);
	int head = blockIdx.y, group = h / kv, width = (h + 2 * kv) * hd, lane = threadIdx.x % 32;
	const bf16 *k = qkv + (h + head) * hd, *v = k + kv * hd;
	for (int r = threadIdx.x / 32; r < t.n * group; r += 4) {
		long long token = t.q + r / group, row = token * h + head * group + r % group;
		const bf16 *query = qkv + token * width + (head * group + r % group) * hd;
		int sees = visible(t, r / group);
		float l = lse[row] * kLog2e, e = delta[row], acc[kColumns];
#pragma unroll
		for (int i = 0; i < kColumns; i++) acc[i] = 0;
		for (int c = 0; c < sees; c += 32) {
			float ds = 0;
			if (c + lane < sees) {
				float s = dot(query, row_of(t, k, width, k, width, c + lane), hd), dp = dot(dout + row * hd, row_of(t, v, width, v, width, c + lane), hd);
				ds = fast_exp2(fmaf(s, scale * kLog2e, -l)) * (dp - e);
			}
			for (int j = 0; j < imin(32, sees - c); j++) axpy(acc, __shfl_sync(kAllLanes, ds, j), row_of(t, k, width, k, width, c + j), hd);
		}
		store_row(dqkv + token * width + (head * group + r % group) * hd, acc, scale, hd);
	}
}

extern "C" __global__ void __launch_bounds__(128, 4) // without the 4, ptxas spills on sm_80
	attention_dkv_simple(bf16 *dqkv, float *part, const bf16 *qkv, const bf16 *dout, const float *lse, const float *delta, const int *works, const int *ranges,
                         const int *tiles, int h, int kv, float scale, int hd) {
	const int *work = works + 8 * blockIdx.x;
	int key = work[0], keys = work[1], slot = work[4], head = blockIdx.y, group = h / kv, lane = threadIdx.x % 32;
	long long width = static_cast<long long>(h + 2 * kv) * hd;
	for (int j = threadIdx.x / 32; j < keys; j += 4) {
		const bf16 *k = qkv + (key + j) * width + (h + head) * hd, *v = k + kv * hd;
		float dk[kColumns], dv[kColumns];
#pragma unroll
		for (int i = 0; i < kColumns; i++) dk[i] = dv[i] = 0;
		for (int x = 0; x < work[3]; x++) {
			const int *range = ranges + 4 * (work[2] + x);
			for (int y = range[0]; y < range[0] + range[1]; y++) {
				Tile t = read_tile(tiles + 8 * y);
				const bf16 *query = qkv + t.q * width + head * group * hd, *grad = dout + static_cast<long long>(t.q) * h * hd + head * group * hd;
				for (int first = 0; first < t.n * group; first += 32) {
					int r = first + lane, token = r / group, g = r - token * group;
					float p = 0, ds = 0;
					if (r < t.n * group && (!range[2] || j < t.seen + token + t.own - key)) {
						long long at = static_cast<long long>(t.q + token) * h + head * group + g;
						p = fast_exp2(fmaf(dot(query + token * width + g * hd, k, hd), scale * kLog2e, -lse[at] * kLog2e));
						ds = p * (dot(grad + static_cast<long long>(token) * h * hd + g * hd, v, hd) - delta[at]);
					}
					for (int i = 0; i < imin(32, t.n * group - first); i++) {
						int token_i = (first + i) / group, g_i = (first + i) - token_i * group;
						float pi = __shfl_sync(kAllLanes, p, i), di = __shfl_sync(kAllLanes, ds, i);
						if (range[2] && j >= t.seen + token_i + t.own - key) continue; // 0 times a NaN must not count
						axpy(dv, pi, grad + static_cast<long long>(token_i) * h * hd + g_i * hd, hd);
						axpy(dk, di, query + token_i * width + g_i * hd, hd);
					}
				}
			}
		}
		if (slot >= 0) {
			float *pk = part + (static_cast<long long>(slot) * kv + head) * 2 * kTile * hd + j * hd, *pv = pk + kTile * hd;
#pragma unroll
			for (int i = 0; i < kColumns; i++)
				if (lane + 32 * i < hd) pk[lane + 32 * i] = dk[i] * scale, pv[lane + 32 * i] = dv[i];
			continue;
		}
		bf16 *o = dqkv + (key + j) * width + (h + head) * hd;
		store_row(o, dk, scale, hd);
		store_row(o + kv * hd, dv, 1.0f, hd);
	}
}

// Attention over segments, forward: softmax(q·kᵀ·scale)·v where a query sees a
// shared prefix and then its own keys causally; grouped heads, head size 64 or
// 128, bf16 in and out, online softmax in float32 (FlashAttention-2, arXiv
// 2307.08691). No [T,T] matrix is stored.
//
// A block takes 64 stacked query rows (tokens × the query heads of one key
// head), 4 warps of 16 rows, and walks over 64 keys at a time: two stages of K and
// V in shared memory, filled by cp.async one block ahead; S and P·V by mma.sync
// m16n8k16, or with kWarpgroup by wgmma m64n64k16 in the same order. A few queries of long segments (decoding) are cut along the keys;
// attention_combine joins the pieces in order.
//
// 4·hd·pairs FLOPs for each query head, pairs = sum over queries of the keys they see.
// At the 0.5b shape (14 heads of 64), one segment of 8,192 tokens: 120 GFLOP, 0.16 ms
// at 754 TFLOP/s; bytes are few (q, k, v, out once: 2·T·(2·h+2·kv)·hd = 34 MB, 11 us).
#pragma once
#include "attention.cuh"

namespace {

template <int D, bool kWarpgroup>
TR_INLINE void attention_forward(bf16 *out, float *lse, const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *pk, const bf16 *pv, int q_stride, int k_stride,
                                 int v_stride, int pk_stride, int pv_stride, const int *items, float *part_o, float *part_ml, int part_rows, int h, int kv,
                                 float scale) {
	TR_DYNAMIC(unsigned char, memory);
	bf16 *tile_q = reinterpret_cast<bf16 *>(kWarpgroup ? swizzle_aligned(memory) : memory), *tiles_k = tile_q + kTile * D, *tiles_v = tile_q + 3 * kTile * D; // two stages each
	const int *item = items + 12 * blockIdx.x;
	Tile t = read_tile(item);
	int from = item[6], to = item[7], part = item[8];
	int head = blockIdx.y, group = h / kv, rows = t.n * group;
	int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = warp * 16;
	bool works = kWarpgroup || row < rows;
	Group by = group_of(group);

	const bf16 *own_k = k + static_cast<long long>(t.own) * k_stride + head * D, *own_v = v + static_cast<long long>(t.own) * v_stride + head * D;
	const bf16 *pre_k = pk + static_cast<long long>(t.prefix) * pk_stride + head * D, *pre_v = pv + static_cast<long long>(t.prefix) * pv_stride + head * D;
	auto load = [&](int stage, int c) {
		load_keys<D>(tiles_k + stage * kTile * D, pre_k, pk_stride, t.prefix_len, own_k, k_stride, c, to);
		load_keys<D>(tiles_v + stage * kTile * D, pre_v, pv_stride, t.prefix_len, own_v, v_stride, c, to);
		cp_async_commit();
	};
	load_stacked<D>(tile_q, q + static_cast<long long>(t.q) * q_stride + head * group * D, q_stride, rows, by);
	if (from < to) load(0, from);
	else cp_async_commit();

	// This lane's rows are a and b = a+8; they see keys below sees_a and sees_b.
	int a = row + lane / 4, b = a + 8;
	int sees_a = imin(to, visible(t, a / group)), sees_b = imin(to, visible(t, b / group)), all_see = imin(to, visible(t, 0));
	float scale2 = scale * kLog2e; // scores are kept as powers of 2
	float max_a = negative_infinity(), max_b = max_a, sum_a = 0, sum_b = 0;
	float acc[D / 8][4];
#pragma unroll
	for (int n = 0; n < D / 8; n++)
#pragma unroll
		for (int i = 0; i < 4; i++) acc[n][i] = 0;
	unsigned fq[D / 16][4];

	int stage_now = 0;
	for (int c = from; c < to; c += kTile) {
		if (c + kTile < to) load(stage_now ^ 1, c + kTile);
		else cp_async_commit();
		cp_async_wait<1>();
		if constexpr (kWarpgroup) fence_async();
		__syncthreads();
		if (works) {
			bf16 *tile_k = tiles_k + stage_now * kTile * D, *tile_v = tiles_v + stage_now * kTile * D;
			if (c == from) {
#pragma unroll
				for (int d = 0; d < D / 16; d++) a_fragment<D>(fq[d], tile_q, row, d);
			}
			float s[8][4];
			if constexpr (kWarpgroup) {
				wgmma_begin(s);
#pragma unroll
				for (int d = 0; d < D / 16; d++) {
					unsigned long long keys = describe(tile_k + d / 4 * (kTile * 64) + d % 4 * 16);
					if (d == 0) wgmma64<false, false>(s, fq[d], keys);
					else wgmma64<false, true>(s, fq[d], keys);
				}
				wgmma_end(s);
			} else {
#pragma unroll
				for (int n = 0; n < 8; n++)
#pragma unroll
					for (int i = 0; i < 4; i++) s[n][i] = 0;
#pragma unroll
				for (int d = 0; d < D / 16; d++) {
#pragma unroll
					for (int n = 0; n < 4; n++) {
						unsigned fk[4];
						b_fragment<D>(fk, tile_k, n * 16, d);
						mma16816(s[2 * n], fq[d], fk[0], fk[1]);
						mma16816(s[2 * n + 1], fq[d], fk[2], fk[3]);
					}
				}
			}
			if (c + kTile > all_see) {
#pragma unroll
				for (int n = 0; n < 8; n++) {
					int key = c + n * 8 + lane % 4 * 2;
					if (key >= sees_a) s[n][0] = negative_infinity();
					if (key + 1 >= sees_a) s[n][1] = negative_infinity();
					if (key >= sees_b) s[n][2] = negative_infinity();
					if (key + 1 >= sees_b) s[n][3] = negative_infinity();
				}
			}
			float top_a = max_a, top_b = max_b;
#pragma unroll
			for (int n = 0; n < 8; n++) {
				top_a = fmaxf(top_a, fmaxf(s[n][0], s[n][1]) * scale2);
				top_b = fmaxf(top_b, fmaxf(s[n][2], s[n][3]) * scale2);
			}
			top_a = fmaxf(top_a, __shfl_xor_sync(kAllLanes, top_a, 1));
			top_a = fmaxf(top_a, __shfl_xor_sync(kAllLanes, top_a, 2));
			top_b = fmaxf(top_b, __shfl_xor_sync(kAllLanes, top_b, 1));
			top_b = fmaxf(top_b, __shfl_xor_sync(kAllLanes, top_b, 2));
			// A row that has seen no key yet keeps -inf; 0 in its place avoids inf-inf.
			float base_a = top_a == negative_infinity() ? 0.0f : top_a, base_b = top_b == negative_infinity() ? 0.0f : top_b;
			float shrink_a = fast_exp2(max_a - base_a), shrink_b = fast_exp2(max_b - base_b);
			max_a = top_a, max_b = top_b;
			sum_a *= shrink_a, sum_b *= shrink_b;
#pragma unroll
			for (int n = 0; n < 8; n++) {
				s[n][0] = fast_exp2(fmaf(s[n][0], scale2, -base_a));
				s[n][1] = fast_exp2(fmaf(s[n][1], scale2, -base_a));
				s[n][2] = fast_exp2(fmaf(s[n][2], scale2, -base_b));
				s[n][3] = fast_exp2(fmaf(s[n][3], scale2, -base_b));
				sum_a += s[n][0] + s[n][1];
				sum_b += s[n][2] + s[n][3];
			}
#pragma unroll
			for (int n = 0; n < D / 8; n++) {
				acc[n][0] *= shrink_a, acc[n][1] *= shrink_a;
				acc[n][2] *= shrink_b, acc[n][3] *= shrink_b;
			}
			if constexpr (kWarpgroup) {
				unsigned fp[4][4];
#pragma unroll
				for (int n = 0; n < 4; n++) pack_a(fp[n], s[2 * n], s[2 * n + 1]);
				wgmma_begin(acc);
#pragma unroll
				for (int n = 0; n < 4; n++)
#pragma unroll
					for (int p = 0; p < D / 64; p++) wgmma64<true, true>(acc + 8 * p, fp[n], describe(tile_v + p * (kTile * 64) + n * 16 * 64));
				wgmma_end(acc);
			} else {
#pragma unroll
				for (int n = 0; n < 4; n++) {
					unsigned fp[4];
					pack_a(fp, s[2 * n], s[2 * n + 1]);
#pragma unroll
					for (int d = 0; d < D / 16; d++) {
						unsigned fv[4];
						b_fragment_trans<D>(fv, tile_v, n * 16, d);
						mma16816(acc[2 * d], fp, fv[0], fv[1]);
						mma16816(acc[2 * d + 1], fp, fv[2], fv[3]);
					}
				}
			}
		}
		__syncthreads();
		stage_now ^= 1;
	}
	cp_async_wait<0>();
	__syncthreads();
	if (!works) return;

	sum_a += __shfl_xor_sync(kAllLanes, sum_a, 1);
	sum_a += __shfl_xor_sync(kAllLanes, sum_a, 2);
	sum_b += __shfl_xor_sync(kAllLanes, sum_b, 1);
	sum_b += __shfl_xor_sync(kAllLanes, sum_b, 2);
	if (part >= 0) {
		long long first = static_cast<long long>(head) * part_rows + part;
#pragma unroll
		for (int n = 0; n < D / 8; n++) {
			int column = n * 8 + lane % 4 * 2;
			if (a < rows) *reinterpret_cast<float2 *>(part_o + (first + a) * D + column) = make_float2(acc[n][0], acc[n][1]);
			if (b < rows) *reinterpret_cast<float2 *>(part_o + (first + b) * D + column) = make_float2(acc[n][2], acc[n][3]);
		}
		if (lane % 4 == 0 && a < rows) part_ml[(first + a) * 2] = max_a, part_ml[(first + a) * 2 + 1] = sum_a;
		if (lane % 4 == 0 && b < rows) part_ml[(first + b) * 2] = max_b, part_ml[(first + b) * 2 + 1] = sum_b;
		return;
	}
	if (lse && lane % 4 == 0) {
		float *l = lse + static_cast<long long>(t.q) * h + head * group;
		if (a < rows) l[static_cast<long long>(a / group) * h + a % group] = sum_a == 0.0f ? negative_infinity() : (max_a + log2f(sum_a)) * static_cast<float>(kLn2);
		if (b < rows) l[static_cast<long long>(b / group) * h + b % group] = sum_b == 0.0f ? negative_infinity() : (max_b + log2f(sum_b)) * static_cast<float>(kLn2);
	}
	stage<D>(tile_q, row, acc, sum_a == 0.0f ? 0.0f : 1.0f / sum_a, sum_b == 0.0f ? 0.0f : 1.0f / sum_b);
	__syncwarp();
	store_stacked<D>(out + static_cast<long long>(t.q) * h * D + head * group * D, h * D, tile_q, row, rows, by);
}

} // namespace

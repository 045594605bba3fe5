// Attention over segments, backward: the gradients of packed rows q|k|v [T,W] from
// that of the output, for head size 64 and 128 (FlashAttention-2, arXiv 2307.08691).
//
//   p = exp(s·scale - lse)     delta = sum(dout·out)     ds = p·(dout·vᵀ - delta)
//   dv = pᵀ·dout     dk = scale·dsᵀ·q     dq = scale·ds·k
//
// Nothing is added atomically. attention_dkv gives a block of 64 keys of one key
// head one owner, which walks over all stacked query tiles that see it, in all segments
// that share it as a prefix; the query heads of the group are rows of those tiles, so
// their sum is part of the product. Keys that very many tiles see are cut along
// the queries, into float32 partials that attention_dkv_reduce adds in order.
// attention_dq has one owner per query tile and walks over its keys. Both compute p
// anew. In attention_dkv the scores are kept transposed (keys × queries), so that p and
// ds pass from accumulators to operands in registers. With kWarpgroup products are wgmma's, 64
// score columns at a time where mma.sync has 32, added in the same order.
//
// 7 products of 2·hd·pairs FLOPs a query head (dK/dV 4, dQ 3), where the forward
// pass has 2. At the 0.5b shape, one segment of 8,192 tokens: 421 GFLOP, 0.56 ms at 754
// TFLOP/s; bytes: about 7 passes over 2·T·W = 19 MB, 44 us.
#pragma once
#include "attention.cuh"

namespace {

// How many score columns are held at once.
TR_INLINE constexpr int score_columns(bool warpgroup) { return warpgroup ? kTile : kTile / 2; }

// One stage of attention_dkv: a query tile, its output gradients and its rows' numbers.
template <int D, bool kWarpgroup>
struct alignas(kWarpgroup ? 1024 : 16) QueryStage {
	bf16 q[kTile * D], dout[kTile * D];
	float lse[kTile], delta[kTile];
	int sees[kTile]; // how many of the block's keys the row sees
};

// Cursor walks over the tiles of a work's ranges.
struct Cursor {
	const int *range;
	int ranges, tile, left, own;
	TR_INLINE_MEMBER void settle() {
		while (left == 0 && ranges > 0) {
			tile = range[0], left = range[1], own = range[2];
			range += 4, ranges--;
		}
	}
	TR_INLINE_MEMBER bool done() const { return left == 0; }
	TR_INLINE_MEMBER void next() {
		tile++, left--;
		settle();
	}
};

// multiply_both computes x = a·bᵀ and y = c·dᵀ, for tiles b and d, by products of warpgroups.
template <int D>
TR_INLINE void multiply_both(float (&x)[8][4], const unsigned (&a)[D / 16][4], const bf16 *b, float (&y)[8][4], const unsigned (&c)[D / 16][4], const bf16 *d) {
	wgmma_begin(x, y);
#pragma unroll
	for (int k = 0; k < D / 16; k++) {
		int at = k / 4 * (kTile * 64) + k % 4 * 16;
		if (k == 0) wgmma64<false, false>(x, a[k], describe(b + at)), wgmma64<false, false>(y, c[k], describe(d + at));
		else wgmma64<false, true>(x, a[k], describe(b + at)), wgmma64<false, true>(y, c[k], describe(d + at));
	}
	wgmma_end(x, y);
}

template <int D, bool kWarpgroup>
TR_INLINE void attention_dkv(bf16 *dqkv, float *part, const bf16 *qkv, const bf16 *dout, const float *lse, const float *delta, const int *works, const int *ranges,
                             const int *tiles, int h, int kv, float scale) {
	TR_DYNAMIC(unsigned char, memory);
	bf16 *tile_k = reinterpret_cast<bf16 *>(kWarpgroup ? swizzle_aligned(memory) : memory), *tile_v = tile_k + kTile * D;
	QueryStage<D, kWarpgroup> *stages = reinterpret_cast<QueryStage<D, kWarpgroup> *>(tile_v + kTile * D);
	const int *work = works + 8 * blockIdx.x;
	int key = work[0], keys = work[1], slot = work[4];
	int head = blockIdx.y, group = h / kv, width = (h + 2 * kv) * D;
	int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = warp * 16;
	bool active = kWarpgroup || row < keys;
	Group by = group_of(group), one = group_of(1);
	Cursor cursor = {ranges + 4 * work[2], work[3], 0, 0, 0};
	cursor.settle();

	// load starts the copy of the next tile and says whether all its rows see all keys of the
	// block. Rows beyond the tile are zeros and add 0, whatever they see.
	auto load = [&](int s) {
		Tile t = read_tile(tiles + 8 * cursor.tile);
		int rows = t.n * group;
		bool whole = !cursor.own || t.seen + t.own - key >= kTile;
		QueryStage<D, kWarpgroup> &x = stages[s];
		load_stacked<D>(x.q, qkv + static_cast<long long>(t.q) * width + head * group * D, width, rows, by);
		load_stacked<D>(x.dout, dout + static_cast<long long>(t.q) * h * D + head * group * D, h * D, rows, by);
		int r = threadIdx.x % kTile;
		bool valid = r < rows;
		int token = valid ? token_of(r, by) : 0;
		long long at = static_cast<long long>(t.q + token) * h + head * group + (valid ? r - token * group : 0);
		if (threadIdx.x < kTile) {
			cp_async4(x.lse + r, lse + at, valid);
			x.sees[r] = !valid ? 0 : cursor.own ? t.seen + token + t.own - key : kTile;
		} else {
			cp_async4(x.delta + r, delta + at, valid);
		}
		cp_async_commit();
		cursor.next();
		return whole;
	};
	const bf16 *k = qkv + static_cast<long long>(key) * width + (h + head) * D, *v = k + kv * D;
	load_stacked<D>(tile_k, k, width, keys, one);
	load_stacked<D>(tile_v, v, width, keys, one);
	bool more = !cursor.done(), whole = true, next_whole = true;
	if (more) next_whole = load(0);
	else cp_async_commit();

	float scale2 = scale * kLog2e;
	int a = row + lane / 4, b = a + 8; // this lane's keys
	float dk[D / 8][4], dv[D / 8][4];
#pragma unroll
	for (int n = 0; n < D / 8; n++)
#pragma unroll
		for (int i = 0; i < 4; i++) dk[n][i] = dv[n][i] = 0;

	const int kColumns = score_columns(kWarpgroup);
	unsigned fk[kWarpgroup ? D / 16 : 1][4], fv[kWarpgroup ? D / 16 : 1][4]; // K and V as A operands, read once
	bool first = true;
	for (int now = 0; more; now ^= 1) {
		more = !cursor.done();
		whole = next_whole;
		if (more) next_whole = load(now ^ 1);
		else cp_async_commit();
		cp_async_wait<1>();
		if constexpr (kWarpgroup) fence_async();
		__syncthreads();
		if (active) {
			QueryStage<D, kWarpgroup> &x = stages[now];
			if constexpr (kWarpgroup) {
				if (first) {
#pragma unroll
					for (int d = 0; d < D / 16; d++) a_fragment<D>(fk[d], tile_k, row, d), a_fragment<D>(fv[d], tile_v, row, d);
				}
				first = false;
			}
#pragma unroll 1
			for (int half = 0; half < kTile; half += kColumns) {
				float s[kColumns / 8][4], dp[kColumns / 8][4];
				if constexpr (kWarpgroup) {
					multiply_both<D>(s, fk, x.q, dp, fv, x.dout);
				} else {
#pragma unroll
					for (int n = 0; n < 4; n++)
#pragma unroll
						for (int i = 0; i < 4; i++) s[n][i] = dp[n][i] = 0;
#pragma unroll
					for (int d = 0; d < D / 16; d++) {
						unsigned fb[4];
						a_fragment<D>(fk[0], tile_k, row, d);
						a_fragment<D>(fv[0], tile_v, row, d);
#pragma unroll
						for (int n = 0; n < 2; n++) {
							b_fragment<D>(fb, x.q, half + n * 16, d);
							mma16816(s[2 * n], fk[0], fb[0], fb[1]);
							mma16816(s[2 * n + 1], fk[0], fb[2], fb[3]);
							b_fragment<D>(fb, x.dout, half + n * 16, d);
							mma16816(dp[2 * n], fv[0], fb[0], fb[1]);
							mma16816(dp[2 * n + 1], fv[0], fb[2], fb[3]);
						}
					}
				}
				// s becomes p, dp becomes ds. A key that is not seen adds exactly 0, whatever stands in dp.
				auto weigh = [&](bool masked) {
#pragma unroll
					for (int n = 0; n < kColumns / 8; n++) {
						int query = half + n * 8 + lane % 4 * 2;
						float2 lse2 = *reinterpret_cast<const float2 *>(x.lse + query), delta2 = *reinterpret_cast<const float2 *>(x.delta + query);
						int2 sees2 = masked ? *reinterpret_cast<const int2 *>(x.sees + query) : make_int2(0, 0);
#pragma unroll
						for (int i = 0; i < 2; i++) {
							float l = (i ? lse2.y : lse2.x) * kLog2e, e = i ? delta2.y : delta2.x;
							int sees = i ? sees2.y : sees2.x;
							bool sees_a = !masked || a < sees, sees_b = !masked || b < sees;
							float pa = sees_a ? fast_exp2(fmaf(s[n][i], scale2, -l)) : 0.0f;
							float pb = sees_b ? fast_exp2(fmaf(s[n][i + 2], scale2, -l)) : 0.0f;
							s[n][i] = pa, s[n][i + 2] = pb;
							dp[n][i] = sees_a ? pa * (dp[n][i] - e) : 0.0f;
							dp[n][i + 2] = sees_b ? pb * (dp[n][i + 2] - e) : 0.0f;
						}
					}
				};
				if (whole) weigh(false);
				else weigh(true);
				if constexpr (kWarpgroup) {
					unsigned fp[4][4], fs[4][4];
#pragma unroll
					for (int n = 0; n < 4; n++) pack_a(fp[n], s[2 * n], s[2 * n + 1]), pack_a(fs[n], dp[2 * n], dp[2 * n + 1]);
					wgmma_begin(dv, dk);
#pragma unroll
					for (int n = 0; n < 4; n++) {
#pragma unroll
						for (int p = 0; p < D / 64; p++) {
							int at = p * (kTile * 64) + n * 16 * 64;
							wgmma64<true, true>(dv + 8 * p, fp[n], describe(x.dout + at));
							wgmma64<true, true>(dk + 8 * p, fs[n], describe(x.q + at));
						}
					}
					wgmma_end(dv, dk);
				} else {
#pragma unroll
					for (int n = 0; n < 2; n++) {
						unsigned fp[4], fs[4], fb[4];
						pack_a(fp, s[2 * n], s[2 * n + 1]);
						pack_a(fs, dp[2 * n], dp[2 * n + 1]);
#pragma unroll
						for (int d = 0; d < D / 16; d++) {
							b_fragment_trans<D>(fb, x.dout, half + n * 16, d);
							mma16816(dv[2 * d], fp, fb[0], fb[1]);
							mma16816(dv[2 * d + 1], fp, fb[2], fb[3]);
							b_fragment_trans<D>(fb, x.q, half + n * 16, d);
							mma16816(dk[2 * d], fs, fb[0], fb[1]);
							mma16816(dk[2 * d + 1], fs, fb[2], fb[3]);
						}
					}
				}
			}
		}
		__syncthreads();
	}
	cp_async_wait<0>();
	__syncthreads();
	if (!active) return;

	if (slot >= 0) {
		float *pk = part + (static_cast<long long>(slot) * kv + head) * 2 * kTile * D, *pv = pk + kTile * D;
#pragma unroll
		for (int n = 0; n < D / 8; n++) {
			int column = n * 8 + lane % 4 * 2;
			*reinterpret_cast<float2 *>(pk + a * D + column) = make_float2(dk[n][0] * scale, dk[n][1] * scale);
			*reinterpret_cast<float2 *>(pk + b * D + column) = make_float2(dk[n][2] * scale, dk[n][3] * scale);
			*reinterpret_cast<float2 *>(pv + a * D + column) = make_float2(dv[n][0], dv[n][1]);
			*reinterpret_cast<float2 *>(pv + b * D + column) = make_float2(dv[n][2], dv[n][3]);
		}
		return;
	}
	// The rows of K and V that only this warp read take its gradients.
	stage<D>(tile_k, row, dk, scale, scale);
	stage<D>(tile_v, row, dv, 1.0f, 1.0f);
	__syncwarp();
	bf16 *o = dqkv + static_cast<long long>(key) * width + (h + head) * D;
	store_stacked<D>(o, width, tile_k, row, keys, one);
	store_stacked<D>(o + kv * D, width, tile_v, row, keys, one);
}

template <int D, bool kWarpgroup>
TR_INLINE void attention_dq(bf16 *dqkv, const bf16 *qkv, const bf16 *dout, const float *lse, const float *delta, const int *tiles, const int *order, int h, int kv,
                            float scale) {
	TR_DYNAMIC(unsigned char, memory);
	bf16 *tile_q = reinterpret_cast<bf16 *>(kWarpgroup ? swizzle_aligned(memory) : memory), *tile_dout = tile_q + kTile * D;
	bf16 *tiles_k = tile_q + 2 * kTile * D, *tiles_v = tile_q + 4 * kTile * D;
	Tile t = read_tile(tiles + 8 * order[blockIdx.x]);
	int head = blockIdx.y, group = h / kv, rows = t.n * group, width = (h + 2 * kv) * D;
	int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = warp * 16, to = visible(t, t.n - 1);
	bool active = kWarpgroup || row < rows;
	Group by = group_of(group);

	const bf16 *k = qkv + (h + head) * D;
	auto load = [&](int s, int c) {
		const bf16 *own = k + static_cast<long long>(t.own) * width, *pre = k + static_cast<long long>(t.prefix) * width;
		load_keys<D>(tiles_k + s * kTile * D, pre, width, t.prefix_len, own, width, c, to);
		load_keys<D>(tiles_v + s * kTile * D, pre + kv * D, width, t.prefix_len, own + kv * D, width, c, to);
		cp_async_commit();
	};
	load_stacked<D>(tile_q, qkv + static_cast<long long>(t.q) * width + head * group * D, width, rows, by);
	load_stacked<D>(tile_dout, dout + static_cast<long long>(t.q) * h * D + head * group * D, h * D, rows, by);
	if (to > 0) load(0, 0);
	else cp_async_commit();

	int a = row + lane / 4, b = a + 8;
	int sees_a = imin(to, visible(t, a / group)), sees_b = imin(to, visible(t, b / group)), all_see = imin(to, visible(t, 0));
	float lse_a = 0, lse_b = 0, delta_a = 0, delta_b = 0;
	if (a < rows) {
		long long at = static_cast<long long>(t.q + a / group) * h + head * group + a % group;
		lse_a = lse[at] * kLog2e, delta_a = delta[at];
	}
	if (b < rows) {
		long long at = static_cast<long long>(t.q + b / group) * h + head * group + b % group;
		lse_b = lse[at] * kLog2e, delta_b = delta[at];
	}
	float scale2 = scale * kLog2e;
	float dq[D / 8][4];
#pragma unroll
	for (int n = 0; n < D / 8; n++)
#pragma unroll
		for (int i = 0; i < 4; i++) dq[n][i] = 0;
	unsigned fq[D / 16][4], fo[D / 16][4];

	int now = 0;
	for (int c = 0; c < to; c += kTile) {
		if (c + kTile < to) load(now ^ 1, c + kTile);
		else cp_async_commit();
		cp_async_wait<1>();
		if constexpr (kWarpgroup) fence_async();
		__syncthreads();
		if (active) {
			bf16 *tile_k = tiles_k + now * kTile * D, *tile_v = tiles_v + now * kTile * D;
			if (c == 0) {
#pragma unroll
				for (int d = 0; d < D / 16; d++) a_fragment<D>(fq[d], tile_q, row, d), a_fragment<D>(fo[d], tile_dout, row, d);
			}
			const int kColumns = score_columns(kWarpgroup);
			bool masked = c + kTile > all_see;
#pragma unroll 1
			for (int half = 0; half < kTile; half += kColumns) {
				float s[kColumns / 8][4], dp[kColumns / 8][4];
				if constexpr (kWarpgroup) {
					multiply_both<D>(s, fq, tile_k, dp, fo, tile_v);
				} else {
#pragma unroll
					for (int n = 0; n < 4; n++)
#pragma unroll
						for (int i = 0; i < 4; i++) s[n][i] = dp[n][i] = 0;
#pragma unroll
					for (int d = 0; d < D / 16; d++) {
#pragma unroll
						for (int n = 0; n < 2; n++) {
							unsigned fb[4];
							b_fragment<D>(fb, tile_k, half + n * 16, d);
							mma16816(s[2 * n], fq[d], fb[0], fb[1]);
							mma16816(s[2 * n + 1], fq[d], fb[2], fb[3]);
							b_fragment<D>(fb, tile_v, half + n * 16, d);
							mma16816(dp[2 * n], fo[d], fb[0], fb[1]);
							mma16816(dp[2 * n + 1], fo[d], fb[2], fb[3]);
						}
					}
				}
#pragma unroll
				for (int n = 0; n < kColumns / 8; n++) {
#pragma unroll
					for (int i = 0; i < 2; i++) {
						int key = c + half + n * 8 + lane % 4 * 2 + i;
						float pa = fast_exp2(fmaf(s[n][i], scale2, -lse_a)) * (dp[n][i] - delta_a);
						float pb = fast_exp2(fmaf(s[n][i + 2], scale2, -lse_b)) * (dp[n][i + 2] - delta_b);
						dp[n][i] = masked && key >= sees_a ? 0.0f : pa;
						dp[n][i + 2] = masked && key >= sees_b ? 0.0f : pb;
					}
				}
				if constexpr (kWarpgroup) {
					unsigned fs[4][4];
#pragma unroll
					for (int n = 0; n < 4; n++) pack_a(fs[n], dp[2 * n], dp[2 * n + 1]);
					wgmma_begin(dq);
#pragma unroll
					for (int n = 0; n < 4; n++)
#pragma unroll
						for (int p = 0; p < D / 64; p++) wgmma64<true, true>(dq + 8 * p, fs[n], describe(tile_k + p * (kTile * 64) + n * 16 * 64));
					wgmma_end(dq);
				} else {
#pragma unroll
					for (int n = 0; n < 2; n++) {
						unsigned fs[4], fb[4];
						pack_a(fs, dp[2 * n], dp[2 * n + 1]);
#pragma unroll
						for (int d = 0; d < D / 16; d++) {
							b_fragment_trans<D>(fb, tile_k, half + n * 16, d);
							mma16816(dq[2 * d], fs, fb[0], fb[1]);
							mma16816(dq[2 * d + 1], fs, fb[2], fb[3]);
						}
					}
				}
			}
		}
		__syncthreads();
		now ^= 1;
	}
	cp_async_wait<0>();
	__syncthreads();
	if (!active) return;
	stage<D>(tile_q, row, dq, scale, scale);
	__syncwarp();
	store_stacked<D>(dqkv + static_cast<long long>(t.q) * width + head * group * D, width, tile_q, row, rows, by);
}

} // namespace

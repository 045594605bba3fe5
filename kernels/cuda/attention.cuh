// What the attention kernels share: the schedule's records, tiles of 64 rows in
// shared memory, and the fragments that mma.sync takes from them.
//
// A tile is [64, D] bf16, in panels of 64 columns one after the other. Their 16-byte chunks
// are stored at chunk ^ (row & 7), so that the 8 rows of an ldmatrix lie in different
// banks; it is also the 128-byte swizzle that wgmma.cuh describes.
#pragma once
#include "wgmma.cuh"

static const int kTile = 64; // rows of a tile: stacked queries, or keys

// Tile and Piece are records of the schedule; KERNELS.md describes them.
struct Tile {
	int q, n, own, seen, prefix, prefix_len;
};

TR_INLINE Tile read_tile(const int *p) {
	Tile t = {p[0], p[1], p[2], p[3], p[4], p[5]};
	return t;
}

// visible returns how many keys of prefix ++ own token i of the tile sees.
TR_INLINE int visible(const Tile &t, int i) { return t.prefix_len + imax(0, t.seen + i); }

template <int D>
TR_INLINE bf16 *chunk_at(bf16 *tile, int row, int chunk) {
	if constexpr (D > 64) tile += chunk / 8 * (kTile * 64), chunk %= 8;
	return tile + row * 64 + ((chunk ^ (row & 7)) << 3);
}

// Group is how many stacked rows a token has; token_of divides a row of a tile by it
// (exact for rows and sizes up to 64: emu/test_fragments.cc tries all).
struct Group {
	int size, inverse;
};
TR_INLINE Group group_of(int size) {
	Group g = {size, 65536 / size + 1};
	return g;
}
TR_INLINE int token_of(int r, const Group &g) { return r * g.inverse >> 16; }

// load_stacked starts the copy of a tile's stacked rows: row r is head r%group of
// token r/group. base points at the first head of the tile's first token.
template <int D>
TR_INLINE void load_stacked(bf16 *tile, const bf16 *base, int stride, int rows, const Group &group) {
	const int per_row = D / 8, step = 128 / per_row;
	int chunk = threadIdx.x % per_row;
#pragma unroll
	for (int k = 0; k < kTile / step; k++) {
		int r = threadIdx.x / per_row + k * step;
		bool valid = r < rows;
		int token = valid ? token_of(r, group) : 0, head = valid ? r - token * group.size : 0;
		cp_async16(chunk_at<D>(tile, r, chunk), base + static_cast<long long>(token) * stride + head * D + chunk * 8, valid);
	}
}

// load_keys starts the copy of keys [c, c+64) of prefix ++ own, zeros from `to` on.
// prefix and own point at the first row of each.
template <int D>
TR_INLINE void load_keys(bf16 *tile, const bf16 *prefix, int prefix_stride, int prefix_len, const bf16 *own, int own_stride, int c, int to) {
	const int per_row = D / 8, step = 128 / per_row;
	int chunk = threadIdx.x % per_row, first = threadIdx.x / per_row;
	bool all_own = c >= prefix_len;
	if (c + kTile <= to && (all_own || c + kTile <= prefix_len)) { // a whole tile of one matrix
		long long stride = all_own ? own_stride : prefix_stride;
		const bf16 *p = (all_own ? own : prefix) + (c - (all_own ? prefix_len : 0) + first) * stride + chunk * 8;
#pragma unroll
		for (int k = 0; k < kTile / step; k++, p += step * stride) cp_async16(chunk_at<D>(tile, first + k * step, chunk), p, true);
		return;
	}
#pragma unroll
	for (int k = 0; k < kTile / step; k++) {
		int r = first + k * step, key = c + r;
		const bf16 *p = own;
		if (key < to) p = key < prefix_len ? prefix + static_cast<long long>(key) * prefix_stride : own + static_cast<long long>(key - prefix_len) * own_stride;
		cp_async16(chunk_at<D>(tile, r, chunk), p + chunk * 8, key < to);
	}
}

// a_fragment takes rows [row, row+16) and columns [16·k, 16·k+16) as the A
// operand; with the tile's rows as the depth of the product, b_fragment_trans
// takes the same block as the B operands of columns 16·k (r0, r1) and 16·k+8 (r2, r3).
template <int D>
TR_INLINE void a_fragment(unsigned (&r)[4], bf16 *tile, int row, int k) {
	int lane = threadIdx.x % 32;
	ldmatrix4(r, chunk_at<D>(tile, row + lane % 16, 2 * k + lane / 16));
}
template <int D>
TR_INLINE void b_fragment_trans(unsigned (&r)[4], bf16 *tile, int row, int k) {
	int lane = threadIdx.x % 32;
	ldmatrix4_trans(r, chunk_at<D>(tile, row + lane % 16, 2 * k + lane / 16));
}
// b_fragment takes rows [row, row+16) as columns of the product, and tile columns
// [16·k, 16·k+16) as its depth: B operands of rows row.. (r0, r1) and row+8.. (r2, r3).
template <int D>
TR_INLINE void b_fragment(unsigned (&r)[4], bf16 *tile, int row, int k) {
	int lane = threadIdx.x % 32;
	ldmatrix4(r, chunk_at<D>(tile, row + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
}

// pack_a turns two neighbouring accumulators (columns 16·k.. and 16·k+8..) into an A operand.
TR_INLINE void pack_a(unsigned (&a)[4], const float (&x)[4], const float (&y)[4]) {
	a[0] = pack_bf16(x[0], x[1]);
	a[1] = pack_bf16(x[2], x[3]);
	a[2] = pack_bf16(y[0], y[1]);
	a[3] = pack_bf16(y[2], y[3]);
}

// stage writes a warp's accumulators [16, D], row a scaled by fa and row a+8 by fb,
// into its 16 rows of a tile, to be stored by 16-byte accesses after __syncwarp.
template <int D>
TR_INLINE void stage(bf16 *tile, int row, const float (&acc)[D / 8][4], float fa, float fb) {
	int lane = threadIdx.x % 32, a = row + lane / 4;
#pragma unroll
	for (int n = 0; n < D / 8; n++) {
		reinterpret_cast<unsigned *>(chunk_at<D>(tile, a, n))[lane % 4] = pack_bf16(acc[n][0] * fa, acc[n][1] * fa);
		reinterpret_cast<unsigned *>(chunk_at<D>(tile, a + 8, n))[lane % 4] = pack_bf16(acc[n][2] * fb, acc[n][3] * fb);
	}
}

// store_stacked stores a warp's 16 rows of a tile as stacked rows; see load_stacked.
template <int D>
TR_INLINE void store_stacked(bf16 *base, int stride, bf16 *tile, int row, int rows, const Group &group) {
	int lane = threadIdx.x % 32;
	const int per_row = D / 8;
#pragma unroll
	for (int k = 0; k < 16 * per_row / 32; k++) {
		int r = row + (lane + 32 * k) / per_row, chunk = (lane + 32 * k) % per_row;
		if (r >= rows) continue;
		int token = token_of(r, group), head = r - token * group.size;
		*reinterpret_cast<uint4 *>(base + static_cast<long long>(token) * stride + head * D + chunk * 8) = *reinterpret_cast<const uint4 *>(chunk_at<D>(tile, r, chunk));
	}
}

// What mma.sync and ldmatrix do to a warp's registers, written from the text of the PTX
// ISA (sections "Matrix fragments for mma.m16n8k16 with floating point type" and
// "ldmatrix") and not from emu.h: the emulator that judges the attention kernels
// must agree with it. And the arithmetic of attention.cuh that has no test of its own.
#include "check.h"

#include "../attention.cuh"

namespace {

// The ISA's names: groupID = laneid >> 2, threadID_in_group = laneid % 4. Element i of
// A is half i%2 of register i/2; so for B and C.
int a_row(int lane, int i) { return (i < 2 || (i >= 4 && i < 6)) ? lane >> 2 : (lane >> 2) + 8; }
int a_column(int lane, int i) { return lane % 4 * 2 + (i & 1) + (i >= 4 ? 8 : 0); }
int b_row(int lane, int i) { return lane % 4 * 2 + (i & 1) + (i >= 2 ? 8 : 0); }
int b_column(int lane, int) { return lane >> 2; }
int c_row(int lane, int i) { return (lane >> 2) + (i >= 2 ? 8 : 0); }
int c_column(int lane, int i) { return lane % 4 * 2 + (i & 1); }

unsigned two(double low, double high) { return unsigned(to_bf16(low)) | unsigned(to_bf16(high)) << 16; }

} // namespace

TEST(mma_fragments) {
	double a[16][16], b[16][8], want[16][8], got[16][8];
	for (auto &r : a)
		for (auto &x : r) x = c.below(17) - 8; // integers: every product and sum is exact
	for (auto &r : b)
		for (auto &x : r) x = c.below(17) - 8;
	for (int i = 0; i < 16; i++)
		for (int j = 0; j < 8; j++) {
			want[i][j] = 100 * i + j; // the accumulator's start
			for (int k = 0; k < 16; k++) want[i][j] += a[i][k] * b[k][j];
		}
	emu::launch(d3(1), d3(32), 0, [&] {
		int l = int(threadIdx.x);
		unsigned fa[4], fb[2];
		float fc[4];
		for (int r = 0; r < 4; r++) fa[r] = two(a[a_row(l, 2 * r)][a_column(l, 2 * r)], a[a_row(l, 2 * r + 1)][a_column(l, 2 * r + 1)]);
		for (int r = 0; r < 2; r++) fb[r] = two(b[b_row(l, 2 * r)][b_column(l, 2 * r)], b[b_row(l, 2 * r + 1)][b_column(l, 2 * r + 1)]);
		for (int i = 0; i < 4; i++) fc[i] = float(100 * c_row(l, i) + c_column(l, i));
		mma16816(fc, fa, fb[0], fb[1]);
		for (int i = 0; i < 4; i++) got[c_row(l, i)][c_column(l, i)] = fc[i];
	});
	for (int i = 0; i < 128; i++) c.equal("c", i, got[i / 8][i % 8], want[i / 8][i % 8]);
}

// Lane l gives the address of row l%8 of matrix l/8. Row r of a matrix goes to lanes
// 4r..4r+3, two elements each, into register `matrix`; with .trans column r does.
TEST(ldmatrix_fragments) {
	unsigned short m[4][8][8];
	for (int i = 0; i < 256; i++) m[i / 64][i / 8 % 8][i % 8] = static_cast<unsigned short>(i);
	emu::launch(d3(1), d3(32), 0, [&] {
		TR_SHARED(unsigned short, shared, 256);
		int l = int(threadIdx.x);
		for (int i = l; i < 256; i += 32) shared[(i / 64 * 8 + i / 8 % 8) * 8 + i % 8] = m[i / 64][i / 8 % 8][i % 8];
		__syncwarp();
		unsigned plain[4], trans[4];
		ldmatrix4(plain, shared + l * 8);
		ldmatrix4_trans(trans, shared + l * 8);
		for (int x = 0; x < 4; x++)
			for (int e = 0; e < 2; e++) {
				c.equal("ldmatrix", l, plain[x] >> 16 * e & 0xffff, m[x][l / 4][l % 4 * 2 + e]);
				c.equal("ldmatrix.trans", l, trans[x] >> 16 * e & 0xffff, m[x][l % 4 * 2 + e][l / 4]);
			}
	});
}

// The fragments that attention.cuh takes from a tile, against the ISA's layouts.
template <int D>
static void fragments(Check &c) {
	emu::launch(d3(1), d3(32), 64 * D * 2, [&] {
		TR_DYNAMIC(bf16, tile);
		int l = int(threadIdx.x);
		auto value = [](int row, int column) { return static_cast<unsigned short>(row * D + column); };
		for (int i = l; i < 64 * D; i += 32) chunk_at<D>(tile, i / D, i % D / 8)[i % 8] = value(i / D, i % D);
		__syncwarp();
		for (int row = 0; row < 64; row += 16)
			for (int k = 0; k < D / 16; k++) {
				unsigned fa[4], fb[4], ft[4];
				a_fragment<D>(fa, tile, row, k);
				b_fragment<D>(fb, tile, row, k);
				b_fragment_trans<D>(ft, tile, row, k);
				for (int i = 0; i < 8; i++) {
					c.equal("a", i, fa[i / 2] >> i % 2 * 16 & 0xffff, value(row + a_row(l, i), 16 * k + a_column(l, i)));
					// two operands of 8 columns: B[depth][column] is tile[column][depth], and tile[depth][column] with trans
					int depth = b_row(l, i % 4), column = b_column(l, i % 4) + i / 4 * 8;
					c.equal("b", i, fb[i / 2] >> i % 2 * 16 & 0xffff, value(row + column, 16 * k + depth));
					c.equal("b trans", i, ft[i / 2] >> i % 2 * 16 & 0xffff, value(row + depth, 16 * k + column));
				}
			}
	});
}
TEST(attention_fragments) {
	fragments<64>(c);
	fragments<128>(c);
	// An accumulator pair becomes an A operand: columns n of c at k = n, of the next at k = 8+n.
	emu::launch(d3(1), d3(32), 0, [&] {
		int l = int(threadIdx.x);
		float x[4], y[4];
		for (int i = 0; i < 4; i++) x[i] = float(16 * c_row(l, i) + c_column(l, i)), y[i] = x[i] + 8;
		unsigned fa[4];
		pack_a(fa, x, y);
		for (int i = 0; i < 8; i++) c.equal("pack_a", i, emu::bf(static_cast<unsigned short>(fa[i / 2] >> i % 2 * 16)), 16 * a_row(l, i) + a_column(l, i));
	});
	for (int size = 1; size <= 64; size++)
		for (int r = 0; r < 64; r++) c.equal("token_of", r, token_of(r, group_of(size)), r / size);
}

// wgmma64 on tiles as attention.cuh lays them out. The accumulator's layout is the ISA's for
// m64n64: row 16·warp + groupID (+8), column 8·n + 2·threadID_in_group (+1).
template <int D>
static void warpgroup_products(Check &c) {
	std::vector<int> a(64 * 64), b(64 * D);
	for (auto &x : a) x = c.below(17) - 8;
	for (auto &x : b) x = c.below(17) - 8;
	std::vector<bf16> source(64 * D);
	for (size_t i = 0; i < source.size(); i++) source[i] = to_bf16(b[i]);
	Buf<bf16> from(source);
	if (uintptr_t(from.p) % 16) return;
	emu::launch(d3(1), d3(128), 64 * D * 2 + 1008, [&] {
		TR_DYNAMIC(unsigned char, memory);
		bf16 *tile = reinterpret_cast<bf16 *>(swizzle_aligned(memory));
		int t = int(threadIdx.x), warp = t / 32, l = t % 32;
		load_stacked<D>(tile, from.p, D, 64, group_of(1));
		cp_async_commit();
		cp_async_wait<0>();
		fence_async();
		__syncthreads();
		for (int panel = 0; panel < D / 64; panel++) {
			float plain[8][4], trans[8][4]; // a[64,64]·tile[n,k], and a[64,64]·tile[k,n]
			unsigned fa[4][4];
			for (int k = 0; k < 4; k++)
				for (int r = 0; r < 4; r++)
					fa[k][r] = two(a[(16 * warp + a_row(l, 2 * r)) * 64 + 16 * k + a_column(l, 2 * r)], a[(16 * warp + a_row(l, 2 * r + 1)) * 64 + 16 * k + a_column(l, 2 * r + 1)]);
			for (auto &x : trans)
				for (auto &y : x) y = 5;
			bf16 *p = tile + panel * 64 * 64;
			wgmma_begin(plain, trans);
			for (int k = 0; k < 4; k++) {
				if (k == 0) wgmma64<false, false>(plain, fa[k], describe(p + 16 * k));
				else wgmma64<false, true>(plain, fa[k], describe(p + 16 * k));
				wgmma64<true, true>(trans, fa[k], describe(p + 16 * 64 * k));
			}
			c.equal("in the background", t, plain[0][0], NAN);
			wgmma_end(plain, trans);
			for (int n = 0; n < 8; n++)
				for (int i = 0; i < 4; i++) {
					int row = 16 * warp + c_row(l, i), column = 8 * n + c_column(l, i);
					double want = 0, want_trans = 5;
					for (int k = 0; k < 64; k++) want += a[row * 64 + k] * b[column * D + panel * 64 + k], want_trans += a[row * 64 + k] * b[k * D + panel * 64 + column];
					c.equal("wgmma", row * 64 + column, plain[n][i], want);
					c.equal("wgmma trans", row * 64 + column, trans[n][i], want_trans);
				}
		}
		// A second copy is not seen before the fence and the barrier.
		__syncthreads();
		load_stacked<D>(tile, from.p, D, 64, group_of(1));
		cp_async_commit();
		cp_async_wait<0>();
		__syncthreads();
		float x[8][4];
		unsigned ones[4] = {two(1, 1), two(1, 1), two(1, 1), two(1, 1)};
		wgmma_begin(x);
		wgmma64<false, false>(x, ones, describe(tile));
		wgmma_end(x);
		c.equal("without fence_async", t, x[0][0], NAN);
	});
}
TEST(wgmma_fragments) {
	warpgroup_products<64>(c);
	warpgroup_products<128>(c);
}

// A NaN as a card's arithmetic makes it stays one in the weight, and in its master.
TEST(master_not_a_number) {
	for (unsigned bits : {0x7fffffffu, 0xffffffffu, 0x7fc00000u, 0x7fff8000u, 0x7fff7fffu}) {
		std::vector<float> x(9, __uint_as_float(bits));
		Buf<float> src(x), back(9), m(std::vector<float>(9, __uint_as_float(bits))), v(std::vector<float>(9)), coef(std::vector<float>{1});
		Buf<bf16> p(9), q(std::vector<bf16>(9)), g(std::vector<bf16>(9));
		Buf<short> rem(9), low(std::vector<short>(9));
		emu::launch(d3(1), d3(256), 0, [&] { split_master(p, rem, src, 9); });
		emu::launch(d3(1), d3(256), 0, [&] { join_master(back, p, rem, 9); });
		emu::launch(d3(1), d3(256), 0, [&] { adamw_bf16_gbf16(q, low, g, m, v, coef, 9, 1, 0.9f, 0.1f, 0.9f, 0.1f, 0.1f, 1, 1e-8f); });
		for (int i = 0; i < 9; i++) {
			c.equal("split", i, widen(p[i]), NAN);
			c.equal("joined", i, back[i], NAN);
			c.equal("weight behind a moment", i, widen(q[i]), NAN);
		}
	}
}

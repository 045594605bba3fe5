// rows.cu and elementwise.cu.
#include "check.h"

#include <array>

TEST(gather) {
	for (auto s : {std::array<int, 3>{1, 1, 1}, {5, 3, 7}, {13, 64, 20}, {9, 72, 4}}) {
		int n = s[0], d = s[1], rows = s[2];
		std::vector<int> index(n);
		for (auto &i : index) i = c.below(rows);
		if (n > 4) index[2] = rows, index[4] = -1;
		auto table = normals<bf16>(c, rows * d);
		auto table32 = normals<float>(c, rows * d);
		Buf<bf16> out(n * d), t(table);
		Buf<float> out32(n * d), t32(table32);
		Buf<int> ix(index), bad(std::vector<int>{0x7fffffff});
		run(c, {out, out32, bad}, [&] {
			emu::launch(d3(up(n, 8)), d3(32, 8), 0, [&] { gather_rows_bf16(out, t, ix, n, d, rows, bad); });
			emu::launch(d3(up(n, 8)), d3(32, 8), 0, [&] { gather_rows_f32(out32, t32, ix, n, d, rows, nullptr); });
		});
		c.equal("bad", 0, bad[0], n > 4 ? 2 : 0x7fffffff);
		for (int i = 0; i < n * d; i++) {
			int r = index[i / d];
			bool in = r >= 0 && r < rows;
			c.equal("bf16", i, widen(out[i]), in ? widen(table[r * d + i % d]) : 0);
			c.equal("f32", i, out32[i], in ? table32[r * d + i % d] : 0);
		}
	}
}

template <class T>
static void scatter(Check &c, void (*kernel)(T *, const bf16 *, const int *, const int *, const int *, int, int, int, int, int, int *), double u) {
	for (int d : {1, 7, 64, 200, 1032}) {
		const int dstRows = 9, srcRows = 11;
		std::vector<int> dst = {4, 0, 8, 2}, start = {0, 3, 3, 4, 9}, src = {1, 5, 1, 10, 0, 2, 3, 4, 6};
		auto x = normals<bf16>(c, srcRows * d), x0 = x;
		auto before = normals<T>(c, dstRows * d);
		for (int accumulate : {0, 1}) {
			Buf<T> o(before);
			Buf<bf16> s(x);
			Buf<int> a(dst), b(start), e(src);
			int tx = 1;
			while (tx < 128 && tx * 8 < d) tx *= 2;
			int ty = 128 / tx;
			run(c, {o}, [&] { emu::launch(d3(up(4, ty), up(d, 8 * tx)), d3(tx, ty), 0, [&] { kernel(o, s, a, b, e, 4, d, dstRows, srcRows, accumulate, nullptr); }); });
			std::vector<double> want = wide(before), tol(want.size());
			for (int k = 0; k < 4; k++)
				for (int j = 0; j < d; j++) {
					double v = accumulate ? want[dst[k] * d + j] : 0, mag = std::abs(v);
					for (int i = start[k]; i < start[k + 1]; i++) v += widen(x[src[i] * d + j]), mag += std::abs(widen(x[src[i] * d + j]));
					want[dst[k] * d + j] = v, tol[dst[k] * d + j] = 8 * kU32 * mag + u * std::abs(v);
				}
			for (size_t i = 0; i < want.size(); i++) c.near("dst", i, widen(o[i]), want[i], tol[i]);
		}
	}
}
TEST(scatter_add) {
	scatter<float>(c, scatter_add_f32, kU32);
	scatter<bf16>(c, scatter_add_bf16, kUBf16);
	// An index out of range is reported and adds nothing.
	Buf<float> o(std::vector<float>(6, 1.0f));
	Buf<bf16> s(std::vector<bf16>(6, to_bf16(2)));
	Buf<int> dst(std::vector<int>{7, 1}), start(std::vector<int>{0, 1, 3}), src(std::vector<int>{0, 1, -1}), bad(std::vector<int>{0x7fffffff});
	run(c, {o, bad}, [&] { emu::launch(d3(1), d3(1, 128), 0, [&] { scatter_add_f32(o, s, dst, start, src, 2, 3, 2, 2, 1, bad); }); });
	c.equal("bad", 0, bad[0], 0);
	for (int i = 0; i < 6; i++) c.equal("dst", i, o[i], i < 3 ? 1 : 3);
}

TEST(bias_backward) {
	for (auto s : {std::array<int, 2>{1, 1}, {3, 7}, {130, 264}, {700, 40}}) {
		int m = s[0], n = s[1], parts = clamp(int(up(m, 64)), 1, 64);
		auto dy = normals<bf16>(c, m * n);
		auto before = normals<float>(c, n);
		std::vector<bf16> before16(n);
		for (int j = 0; j < n; j++) before16[j] = to_bf16(before[j]);
		Buf<float> part(parts * n), db(before);
		Buf<bf16> db16(before16), x(dy);
		run(c, {part, db, db16}, [&] {
			emu::launch(d3(up(n, 256), parts), d3(32, 8), 0, [&] { bias_backward_partial(part, x, m, n, parts); });
			emu::launch(d3(up(n, 32)), d3(1024), 0, [&] { reduce_partials_f32(db, part, parts, n, n, 1); });
			emu::launch(d3(up(n, 32)), d3(1024), 0, [&] { reduce_partials_bf16(db16, part, parts, n, n, 0); });
		});
		for (int j = 0; j < n; j++) {
			double sum = 0, mag = 0;
			for (int i = 0; i < m; i++) sum += widen(dy[i * n + j]), mag += std::abs(widen(dy[i * n + j]));
			c.near("db f32", j, db[j], sum + before[j], (m + 4) * kU32 * (mag + std::abs(before[j])));
			c.near("db bf16", j, widen(db16[j]), sum, (m + 4) * kU32 * mag + kUBf16 * std::abs(sum));
		}
	}
}

TEST(elementwise) {
	for (i64 n : {1, 7, 8, 33, 5000}) {
		auto x = normals<float>(c, n, 3), y = normals<float>(c, n);
		x[0] = -INFINITY;
		std::vector<bf16> xb(n), yb(n);
		for (i64 i = 0; i < n; i++) xb[i] = to_bf16(x[i]), yb[i] = to_bf16(y[i]);
		Buf<float> fx(x), back(n), joined(n), lf(y);
		Buf<bf16> b(n), p(n), lb(yb), bx(xb);
		Buf<short> rem(n);
		size_t count = n;
		Buf<u8> bytes(count + 3), copied(count);
		Buf<u8> source(fx.bytes());
		auto grid = d3(std::min(up(n, 2048), 2112u));
		run(c, {b, back, p, rem, joined, lf, lb, bytes, copied}, [&] {
			emu::launch(grid, d3(256), 0, [&] { cast_f32_bf16(b, fx, n); });
			emu::launch(grid, d3(256), 0, [&] { cast_bf16_f32(back, b, n); });
			emu::launch(grid, d3(256), 0, [&] { split_master(p, rem, fx, n); });
			emu::launch(grid, d3(256), 0, [&] { join_master(joined, p, rem, n); });
			emu::launch(grid, d3(256), 0, [&] { lerp_f32(lf, fx, 0.6f, n); });
			emu::launch(grid, d3(256), 0, [&] { lerp_bf16(lb, bx, 0.6f, n); });
			emu::launch(grid, d3(256), 0, [&] { zero_bytes(bytes + 3, n); });
			emu::launch(grid, d3(256), 0, [&] { copy_bytes(copied, source, n); });
		});
		for (i64 i = 0; i < n; i++) {
			c.equal("cast", i, widen(b[i]), widen(to_bf16(x[i])));
			c.equal("cast back", i, back[i], widen(b[i]));
			c.equal("joined", i, joined[i], x[i]);
			if (i) c.near("upper half", i, widen(p[i]), x[i], kUBf16 * std::abs(x[i]));
			if (i) c.near("lerp f32", i, lf[i], 0.4 * y[i] + 0.6 * x[i], 4 * kU32 * (std::abs(x[i]) + std::abs(y[i])));
			if (i) c.near("lerp bf16", i, widen(lb[i]), 0.4 * widen(yb[i]) + 0.6 * widen(xb[i]), (4 * kU32 + kUBf16) * (std::abs(x[i]) + std::abs(y[i])));
			c.equal("zero", i, bytes[i + 3], 0);
			c.equal("copy", i, copied[i], source[i]);
		}
		c.equal("not zeroed", 2, bytes[2], 0xfb);
	}
}

TEST(first_not_finite) {
	for (int n : {1, 9, 3000}) {
		for (int first : {-1, 0, n / 2, n - 1}) {
			auto x = normals<float>(c, n);
			if (first >= 0) x[first] = first % 2 ? INFINITY : NAN, x[n - 1] = -INFINITY;
			std::vector<bf16> y(n);
			for (int i = 0; i < n; i++) y[i] = to_bf16(x[i]);
			Buf<float> fx(x);
			Buf<bf16> bx(y);
			Buf<u64> a(std::vector<u64>{~0ull}), b(std::vector<u64>{~0ull});
			run(c, {a, b}, [&] {
				emu::launch(d3(up(n, 2048)), d3(256), 0, [&] { first_not_finite_f32(a, fx, n); });
				emu::launch(d3(up(n, 2048)), d3(256), 0, [&] { first_not_finite_bf16(b, bx, n); });
			});
			if (a[0] != u64(first) || b[0] != u64(first)) c.fail("found at " + std::to_string(a[0]) + " and " + std::to_string(b[0]) + ", expected " + std::to_string(first));
		}
	}
}

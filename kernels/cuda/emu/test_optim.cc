// optim.cu and advantages.cu.
#include "check.h"

#include <array>

TEST(sum_squares_and_clip) {
	for (int n : {1, 13, 8192, 20001}) {
		auto x = normals<float>(c, n, 3);
		std::vector<bf16> y(n);
		double want = 2.5, want16 = 0;
		for (int i = 0; i < n; i++) y[i] = to_bf16(x[i]), want += double(x[i]) * x[i], want16 += widen(y[i]) * widen(y[i]);
		int parts = clamp(int(up(n, 8192)), 1, 1056);
		Buf<double> part(parts), part16(parts);
		Buf<float> fx(x), out(std::vector<float>{2.5f}), out16(std::vector<float>{0}), coef(1);
		Buf<bf16> bx(y);
		run(c, {part, part16, out, out16, coef}, [&] {
			emu::launch(d3(parts), d3(256), 0, [&] { sum_squares_partial_f32(part, fx, n); });
			emu::launch(d3(1), d3(32), 0, [&] { sum_squares_finish(out, part, parts); });
			emu::launch(d3(parts), d3(256), 0, [&] { sum_squares_partial_bf16(part16, bx, n); });
			emu::launch(d3(1), d3(32), 0, [&] { sum_squares_finish(out16, part16, parts); });
			emu::launch(d3(1), d3(32), 0, [&] { clip_coef(coef, out, 0.5f, 1.0f); });
		});
		c.near("sum", 0, out[0], want, kU32 * want);
		c.near("sum bf16", 0, out16[0], want16, kU32 * want16);
		c.near("coefficient", 0, coef[0], 0.5 * std::min(1.0, 1 / (0.5 * sqrt(want) + 1e-6)), 2 * kU32);
	}
	const double nan = NAN, inf = INFINITY;
	for (auto s : {std::array<double, 4>{4, 1, 0, 1}, {4, 0.5, 0, 0.5}, {4, 1, 10, 1}, {0, 1, 1, 1}, {nan, 1, 1, nan}, {inf, 1, 1, nan}, {inf, 1, 0, nan}, {1, nan, 1, nan}}) {
		Buf<float> coef(1), sum(std::vector<float>{float(s[0])});
		run(c, {coef}, [&] { emu::launch(d3(1), d3(32), 0, [&] { clip_coef(coef, sum, float(s[1]), float(s[2])); }); });
		c.equal("coefficient", 0, coef[0], s[3]);
	}
}

TEST(adamw) {
	const double lr = 1e-2, b1 = 0.9, b2 = 0.95, eps = 1e-8, wd = 0.1;
	for (int n : {1, 19, 3000}) {
		for (int step : {1, 1000}) {
			for (double coef : {0.25, double(NAN), double(INFINITY)}) {
				auto p = normals<float>(c, n), m = normals<float>(c, n, 0.1), v = normals<float>(c, n, 0.01);
				auto g16 = normals<bf16>(c, n, 0.1);
				std::vector<float> g(n);
				for (int i = 0; i < n; i++) {
					v[i] *= v[i];
					if (i % 11 == 0) g16[i] = 0, m[i] = v[i] = 0;
					g[i] = float(widen(g16[i]));
				}
				Buf<float> fp(p), fm(m), fv(v), fg(g), m1(m), v1(v), m2(m), v2(v), master1(n), master2(n), cf(std::vector<float>{float(coef)}), start(p);
				Buf<bf16> p1(n), p2(n), bg(g16);
				Buf<short> r1(n), r2(n);
				auto grid = d3(up(n, 2048));
				float s[8] = {float(1 - lr * wd), float(b1), float(1 - b1), float(b2), float(1 - b2), float(lr / (1 - pow(b1, step))), float(1 / sqrt(1 - pow(b2, step))), float(eps)};
				run(c, {fp, fm, fv, p1, r1, m1, v1, p2, r2, m2, v2, master1, master2}, [&] {
					emu::launch(grid, d3(256), 0, [&] { split_master(p1, r1, start, n); });
					emu::launch(grid, d3(256), 0, [&] { split_master(p2, r2, start, n); });
					emu::launch(grid, d3(256), 0, [&] { adamw_f32_gf32(fp, fg, fm, fv, cf, n, s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7]); });
					emu::launch(grid, d3(256), 0, [&] { adamw_bf16_gf32(p1, r1, fg, m1, v1, cf, n, s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7]); });
					emu::launch(grid, d3(256), 0, [&] { adamw_bf16_gbf16(p2, r2, bg, m2, v2, cf, n, s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7]); });
					emu::launch(grid, d3(256), 0, [&] { join_master(master1, p1, r1, n); });
					emu::launch(grid, d3(256), 0, [&] { join_master(master2, p2, r2, n); });
				});
				bool moves = coef == 0.25;
				for (int i = 0; i < n; i++) {
					double gi = g[i] * coef, mi = b1 * m[i] + (1 - b1) * gi, vi = b2 * v[i] + (1 - b2) * gi * gi;
					double root = sqrt(vi / (1 - pow(b2, step))) + eps, update = lr * mi / (1 - pow(b1, step)) / root;
					double want = moves ? p[i] * (1 - lr * wd) - update : p[i], mag = b1 * std::abs(m[i]) + (1 - b1) * std::abs(gi);
					// a dozen roundings of the update, four of the weight
					c.near("weight", i, fp[i], want, moves ? 4 * kU32 * std::abs(p[i]) + 24 * kU32 * lr * mag / (1 - pow(b1, step)) / root : 0);
					c.near("m", i, fm[i], moves ? mi : m[i], moves ? 6 * kU32 * mag : 0);
					c.near("v", i, fv[i], moves ? vi : v[i], moves ? 8 * kU32 * vi : 0);
					// The master is exact: the same bits as the float32 weight.
					c.equal("master, float32 gradient", i, master1[i], fp[i]);
					c.equal("master, bf16 gradient", i, master2[i], fp[i]);
					c.equal("m of bf16", i, m2[i], fm[i]);
				}
			}
		}
	}
}

// The update is that of moments in float32 from the same values, bit for bit: only what is stored is rounded.
// What it is rounded to is held to a reference by package kerneltest.
TEST(adamw_compact) {
	for (int n : {1, 19, 127, 128, 129, 3000}) {
		for (double coef : {0.25, double(NAN)}) {
			int blocks = int(up(n, 128));
			auto p = normals<float>(c, n);
			auto g16 = normals<bf16>(c, n, 0.1), v16 = normals<bf16>(c, n, 0.01);
			auto scale = normals<float>(c, blocks, 0.1);
			for (auto &x : scale) x = std::abs(x);
			std::vector<signed char> code(n);
			std::vector<float> g(n), m(n), v(n);
			for (int i = 0; i < n; i++) {
				v16[i] &= 0x7fff;
				code[i] = static_cast<signed char>(c.below(255) - 127);
				float root = float(code[i] * code[i]) * (1.0f / 16129.0f);
				m[i] = (code[i] < 0 ? -root * root : root * root) * scale[i / 128];
				g[i] = float(widen(g16[i])), v[i] = float(widen(v16[i]));
			}
			Buf<float> fm(m), fv(v), fg(g), s32(scale), s16(scale), cf(std::vector<float>{float(coef)}), start(p);
			Buf<bf16> p0(n), p1(n), p2(n), bg(g16), v1(v16), v2(v16);
			Buf<short> r0(n), r1(n), r2(n);
			Buf<signed char> m1(code), m2(code);
			auto grid = d3(up(n, 2048));
			float s[8] = {0.999f, 0.9f, 0.1f, 0.95f, 0.05f, 0.01f, 1.1f, 1e-8f};
			run(c, {p0, r0, fm, fv, p1, r1, m1, s32, v1, p2, r2, m2, s16, v2}, [&] {
				emu::launch(grid, d3(256), 0, [&] { split_master(p0, r0, start, n); });
				emu::launch(grid, d3(256), 0, [&] { split_master(p1, r1, start, n); });
				emu::launch(grid, d3(256), 0, [&] { split_master(p2, r2, start, n); });
				emu::launch(grid, d3(256), 0, [&] { adamw_bf16_gf32(p0, r0, fg, fm, fv, cf, n, s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7]); });
				emu::launch(grid, d3(256), 0, [&] { adamw_compact_gf32(p1, r1, fg, m1, s32, v1, cf, n, s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], 1ll << 33, 12345, -67890); });
				emu::launch(grid, d3(256), 0, [&] { adamw_compact_gbf16(p2, r2, bg, m2, s16, v2, cf, n, s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], 1ll << 33, 12345, -67890); });
			});
			for (int i = 0; i < n; i++) {
				c.equal("weight", i, widen(p1[i]), widen(p0[i]));
				c.equal("remainder", i, r1[i], r0[i]);
				c.equal("weight, bf16 gradient", i, widen(p2[i]), widen(p0[i]));
				c.equal("code, bf16 gradient", i, m2[i], m1[i]);
				c.equal("second moment, bf16 gradient", i, widen(v2[i]), widen(v1[i]));
				if (coef != 0.25) c.equal("code", i, m1[i], code[i]), c.equal("scale", i, s32[i / 128], scale[i / 128]), c.equal("second moment", i, widen(v1[i]), widen(v16[i]));
				else c.near("second moment", i, widen(v1[i]), fv[i], fv[i] / 128);
			}
		}
	}
}

namespace {

// Key.Bits of package kernels.
unsigned random_of(unsigned long long i, unsigned a, unsigned b) {
	unsigned x = unsigned(i) ^ a;
	x = (x ^ x >> 16) * 0x7feb352du;
	x = ((x ^ x >> 15) + b + unsigned(i >> 32) * 0x9e3779b9u) * 0x846ca68bu;
	return x ^ x >> 16;
}

// momentCode of package simd; t and the quotient are rounded, whatever is contracted elsewhere.
int code_of(float t, unsigned random) {
	int q = int(sqrtf(sqrtf(t)));
	if (q >= 127) return 127;
	int square = q * q;
	volatile float below = float(square) * float(square), above = t - below, share = above / float((2 * square + 2 * q + 1) * (2 * q + 1));
	return float(random >> 16) + 0.5f < share * 65536.0f ? q + 1 : q;
}

} // namespace

// Codes are those of the definition, bit for bit, around every fourth power and around the
// moments whose share of the way to the next code is that of their random bits.
TEST(adamw_compact_codes) {
	const int n = 128 * 300;
	const float peak = 127.0f * 127.0f * 127.0f * 127.0f; // a block's greatest: its inverse is 1
	for (int round = 0; round < 4; round++) {
		int key_a = int(c.rng()), key_b = int(c.rng());
		long long first = (1ll << 32) - 128 * 150 + round;
		std::vector<float> g(n);
		for (int i = 0; i < n; i++) {
			int q = c.below(127);
			double from = pow(q, 4), share = ((random_of(first + i, key_a, key_b) >> 16) + 0.5) / 65536;
			float t = float(round % 2 ? from + share * (pow(q + 1, 4) - from) : from);
			t = std::max(0.0f, __int_as_float(__float_as_int(t) + c.below(9) - 4));
			if (!(t < peak)) t = 0;
			g[i] = i % 128 == 77 ? peak : c.below(2) ? t : -t;
		}
		Buf<float> bg(g), scale(n / 128), coef(std::vector<float>{1});
		Buf<bf16> p(std::vector<bf16>(n, 0)), v(std::vector<bf16>(n, 0));
		Buf<short> rem(std::vector<short>(n, 0));
		Buf<signed char> m(std::vector<signed char>(n, 0));
		for (int i = 0; i < n / 128; i++) scale[i] = 0;
		run(c, {p, rem, m, scale, v}, [&] {
			emu::launch(d3(3), d3(256), 0, [&] { adamw_compact_gf32(p, rem, bg, m, scale, v, coef, n, 1, 0, 1, 0.5f, 0.5f, 1e-3f, 1, 1e-8f, first, key_a, key_b); });
		});
		for (int i = 0; i < n; i++) {
			int q = code_of(std::abs(g[i]), random_of(first + i, key_a, key_b));
			c.equal("code of " + std::to_string(g[i]), i, m[i], g[i] < 0 ? -q : q);
		}
		for (int i = 0; i < n / 128; i++) c.equal("scale", i, scale[i], peak);
	}
}

TEST(add_gradient) {
	for (int n : {1, 19, 3000}) {
		auto src = normals<float>(c, n, 0.01);
		auto start = normals<bf16>(c, n);
		if (n > 9) src[3] = NAN, src[5] = INFINITY;
		Buf<float> from(src);
		Buf<bf16> sum(start);
		run(c, {sum}, [&] { emu::launch(d3(up(n, 2048)), d3(256), 0, [&] { add_gradient(sum, from, n, 1ll << 32, 1, 2); }); });
		for (int i = 0; i < n; i++) {
			double want = widen(start[i]) + src[i];
			if (want - want != 0) c.equal("sum", i, widen(sum[i]), want);
			else c.near("sum", i, widen(sum[i]), want, std::abs(want) / 128);
		}
	}
}

TEST(advantages) {
	for (auto sizes : std::vector<std::vector<int>>{{1}, {7}, {0, 3, 0}, {7, 7, 7, 7}, {2, 100, 33}}) {
		for (int std : {0, 1}) {
			std::vector<int> start = {0};
			std::vector<double> r;
			for (int n : sizes) {
				for (int i = 0; i < n; i++) r.push_back(c.normal() + 3);
				start.push_back(int(r.size()));
			}
			int groups = int(sizes.size());
			Buf<double> out(r.size()), in(r);
			Buf<int> st(start);
			run(c, {out}, [&] { emu::launch(d3(up(groups, 4)), d3(128), 0, [&] { group_advantages(out, in, st, groups, std); }); });
			for (int g = 0; g < groups; g++) {
				double n = start[g + 1] - start[g], mean = 0, square = 0;
				for (int i = start[g]; i < start[g + 1]; i++) mean += r[i] / n;
				for (int i = start[g]; i < start[g + 1]; i++) square += (r[i] - mean) * (r[i] - mean);
				for (int i = start[g]; i < start[g + 1]; i++)
					c.near("advantage", i, out[i], (r[i] - mean) / (std ? sqrt(square / std::max(n - 1, 1.0)) + 1e-4 : 1), std ? 1e-10 : 1e-13);
			}
		}
	}
	double common = c.normal() * 1e6;
	for (int std : {0, 1}) {
		Buf<double> out(7), in(std::vector<double>(7, common));
		Buf<int> st(std::vector<int>{0, 7});
		run(c, {out}, [&] { emu::launch(d3(1), d3(128), 0, [&] { group_advantages(out, in, st, 1, std); }); });
		for (int i = 0; i < 7; i++) c.equal("equal rewards", i, out[i], 0);
	}
}

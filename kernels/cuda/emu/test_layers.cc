// norm.cu, rope.cu and swiglu.cu.
#include "check.h"

#include <array>

TEST(rmsnorm) {
	const float eps = 1e-5f;
	for (auto s : {std::array<int, 2>{1, 1}, {3, 7}, {17, 64}, {9, 576}, {6, 1024}, {4, 1032}, {3, 8192}, {2, 9001}}) {
		int t = s[0], d = s[1];
		for (int variant = 0; variant < 4; variant++) {
			bool residual = variant & 1, more = variant & 2;
			auto x = normals<bf16>(c, t * d, 2), add = normals<bf16>(c, t * d, 2), w = normals<bf16>(c, d);
			Buf<bf16> bx(x), ba(add), bw(w), out(t * d), sum(t * d);
			Buf<float> rstd(t);
			auto block = d <= 1024 ? d3(32, 4) : d3(256);
			auto grid = d3(d <= 1024 ? up(t, 4) : t);
			run(c, {out, rstd, sum, bx}, [&] {
				emu::launch(grid, block, 0, [&] { rmsnorm_bf16(out, rstd, bx, residual ? ba.p : nullptr, residual ? (more ? bx.p : sum.p) : nullptr, bw, t, d, eps); });
			});
			std::vector<double> in(t * d), want_rstd(t);
			for (int i = 0; i < t * d; i++) {
				in[i] = widen(x[i]);
				if (residual) {
					double got = widen(more ? bx[i] : sum[i]), y = widen(x[i]) + widen(add[i]);
					c.near("sum", i, got, y, (kU32 + kUBf16) * std::abs(y));
					in[i] = got;
				}
			}
			double rel = (d / 2 + 4) * kU32;
			for (int i = 0; i < t; i++) {
				double square = 0;
				for (int j = 0; j < d; j++) square += in[i * d + j] * in[i * d + j];
				want_rstd[i] = 1 / sqrt(square / d + eps);
				c.near("rstd", i, rstd[i], want_rstd[i], rel * want_rstd[i]);
				for (int j = 0; j < d; j++) {
					double y = in[i * d + j] * want_rstd[i] * widen(w[j]);
					c.near("out", i * d + j, widen(out[i * d + j]), y, (rel + 3 * kU32 + kUBf16) * std::abs(y));
				}
			}
			if (d > 8192) continue;

			// The gradient, on the stored values; more: dx over dy.
			std::vector<bf16> xs(t * d);
			for (int i = 0; i < t * d; i++) xs[i] = to_bf16(in[i]);
			auto dy = normals<bf16>(c, t * d), before = more ? dy : normals<bf16>(c, t * d);
			int parts = clamp(d <= 1024 ? int(up(t, 4)) : t, 1, 264);
			if (variant == 3) parts = clamp(parts, 1, 2); // rows per block above one
			Buf<bf16> dx(before), bdy(dy), bxs(xs);
			Buf<float> part(parts * d), dw(d);
			run(c, {dx, part, dw}, [&] {
				emu::launch(d3(parts), block, d <= 1024 ? 16 * d : 0, [&] { rmsnorm_backward_bf16(dx, part, more ? dx.p : bdy.p, bxs, bw, rstd, t, d, residual); });
				emu::launch(d3(up(d, 32)), d3(1024), 0, [&] { reduce_partials_f32(dw, part, parts, d, d, 0); });
			});
			std::vector<double> want_dw(d), mag_dw(d);
			for (int i = 0; i < t; i++) {
				double r = rstd[i], dot = 0, dot_mag = 0;
				for (int j = 0; j < d; j++) {
					double y = widen(dy[i * d + j]) * widen(w[j]) * in[i * d + j];
					dot += y, dot_mag += std::abs(y);
					want_dw[j] += widen(dy[i * d + j]) * in[i * d + j] * r;
					mag_dw[j] += std::abs(widen(dy[i * d + j]) * in[i * d + j] * r);
				}
				for (int j = 0; j < d; j++) {
					double a = r * widen(dy[i * d + j]) * widen(w[j]), b = in[i * d + j] * r * r * r / d, old = residual ? widen(before[i * d + j]) : 0;
					double y = a - b * dot + old, mag = std::abs(a) + std::abs(b) * dot_mag + std::abs(old);
					c.near("dx", i * d + j, widen(dx[i * d + j]), y, (d + 10) * kU32 * mag + kUBf16 * std::abs(y));
				}
			}
			for (int j = 0; j < d; j++) c.near("dw", j, dw[j], want_dw[j], (t + 6) * kU32 * mag_dw[j]);
		}
	}
	// A NaN stays in its row.
	std::vector<bf16> x(2 * 8, to_bf16(0));
	x[3] = kNaN;
	Buf<bf16> bx(x), w(std::vector<bf16>(8, to_bf16(1))), out(16);
	run(c, {out}, [&] { emu::launch(d3(1), d3(32, 4), 0, [&] { rmsnorm_bf16(out, nullptr, bx, nullptr, nullptr, w, 2, 8, 1e-6f); }); });
	for (int i = 0; i < 16; i++) c.equal("out of NaN and zeros", i, widen(out[i]), i < 8 ? NAN : 0);
}

struct RopeShape {
	int t, h, kv, hd;
	double theta;
};

TEST(rope) {
	for (RopeShape s : {RopeShape{1, 1, 1, 2, 1e4}, {5, 3, 1, 6, 1e4}, {9, 3, 1, 64, 1e5}, {6, 4, 2, 128, 1e6}, {7, 2, 2, 80, 1e4}, {3, 2, 1, 256, 1e6}}) {
		for (bool norm : {false, true}) {
			int half = s.hd / 2, w = (s.h + 2 * s.kv) * s.hd, heads = s.h + s.kv;
			std::vector<int> pos(s.t);
			for (int i = 0; i < s.t; i++) pos[i] = i;
			pos[s.t - 1] = 32767;
			if (s.t > 2) pos[1] = 131071;
			std::vector<double> turns(half);
			for (int i = 0; i < half; i++) turns[i] = pow(s.theta, -2.0 * i / s.hd) / (2 * M_PI);
			auto in = normals<bf16>(c, s.t * w), qw = normals<bf16>(c, s.hd), kw = normals<bf16>(c, s.hd), grad = normals<bf16>(c, s.t * w);
			Buf<bf16> bin(in), bqw(qw), bkw(kw), out(s.t * w), in_place(in), d(grad);
			Buf<float> rstd(s.t * heads), dqw(s.hd), dkw(s.hd);
			Buf<int> bpos(pos);
			Buf<double> bturns(turns);
			int parts = norm ? clamp(int(up(s.t, 4)), 1, 2) : int(up(s.t, 4));
			Buf<float> part(parts * 2 * s.hd);
			run(c, {out, rstd, in_place, d, part, dqw, dkw}, [&] {
				emu::launch(d3(up(s.t, 4)), d3(128), 16 * s.hd, [&] { rope_bf16(out, bin, bpos, bturns, norm ? bqw.p : nullptr, bkw, rstd, s.t, s.h, s.kv, s.hd, 1e-6f); });
				if (!norm) emu::launch(d3(up(s.t, 4)), d3(128), 16 * s.hd, [&] { rope_bf16(in_place, in_place, bpos, bturns, nullptr, nullptr, nullptr, s.t, s.h, s.kv, s.hd, 0); });
				emu::launch(d3(parts), d3(128), 16 * s.hd + (norm ? 32 * s.hd : 0), [&] {
					rope_backward_bf16(d, norm ? bin.p : nullptr, bpos, bturns, norm ? bqw.p : nullptr, bkw, rstd, part, s.t, s.h, s.kv, s.hd, parts);
				});
				if (norm) {
					emu::launch(d3(up(s.hd, 32)), d3(1024), 0, [&] { reduce_partials_f32(dqw, part, parts, s.hd, 2 * s.hd, 0); });
					emu::launch(d3(up(s.hd, 32)), d3(1024), 0, [&] { reduce_partials_f32(dkw, part + s.hd, parts, s.hd, 2 * s.hd, 0); });
				}
			});
			std::vector<double> want_dw(2 * s.hd), mag_dw(2 * s.hd);
			double extra = norm ? s.hd / 2 + 6 : 0;
			for (int i = 0; i < s.t; i++) {
				for (int j = heads * s.hd; j < w; j++) c.equal("v", i * w + j, widen(out[i * w + j]), widen(in[i * w + j])), c.equal("dv", i * w + j, widen(d[i * w + j]), widen(grad[i * w + j]));
				for (int head = 0; head < heads; head++) {
					int at = i * w + head * s.hd;
					auto &weight = head < s.h ? qw : kw;
					double square = 0, r = 1;
					for (int j = 0; j < s.hd; j++) square += widen(in[at + j]) * widen(in[at + j]);
					if (norm) {
						r = 1 / sqrt(square / s.hd + 1e-6f);
						c.near("rstd", i * heads + head, rstd[i * heads + head], r, (s.hd / 2 + 4) * kU32 * r);
					}
					std::vector<double> g(s.hd), gmag(s.hd);
					for (int j = 0; j < half; j++) {
						double a = 2 * M_PI * turns[j] * pos[i], co = cos(a), si = sin(a);
						double p = widen(in[at + j]), q = widen(in[at + half + j]);
						if (norm) p *= r * widen(weight[j]), q *= r * widen(weight[half + j]);
						double length = sqrt(p * p + q * q), x = p * co - q * si, y = q * co + p * si;
						double tol = (6 + extra) * kU32 * 1.5 * length;
						c.near("out", at + j, widen(out[at + j]), x, tol + kUBf16 * std::abs(x));
						c.near("out", at + half + j, widen(out[at + half + j]), y, tol + kUBf16 * std::abs(y));
						if (!norm) c.equal("in place", at + j, widen(in_place[at + j]), widen(out[at + j])), c.equal("in place", at + half + j, widen(in_place[at + half + j]), widen(out[at + half + j]));
						p = widen(grad[at + j]), q = widen(grad[at + half + j]);
						g[j] = p * co + q * si, g[half + j] = q * co - p * si;
						gmag[j] = gmag[half + j] = sqrt(p * p + q * q);
					}
					double dot = 0, dot_mag = 0;
					for (int j = 0; j < s.hd; j++) {
						double x = widen(in[at + j]), m = widen(weight[j]);
						dot += g[j] * m * x, dot_mag += gmag[j] * std::abs(m * x);
						want_dw[(head < s.h ? 0 : s.hd) + j] += g[j] * x * r;
						mag_dw[(head < s.h ? 0 : s.hd) + j] += gmag[j] * std::abs(x * r);
					}
					for (int j = 0; j < s.hd; j++) {
						double y = g[j], mag = gmag[j];
						if (norm) {
							double x = widen(in[at + j]) * r * r * r / s.hd, m = r * widen(weight[j]);
							y = m * g[j] - x * dot, mag = std::abs(m) * gmag[j] + std::abs(x) * dot_mag;
						}
						c.near("dx", at + j, widen(d[at + j]), y, (3 * s.hd + 32) * kU32 * mag + kUBf16 * std::abs(y));
					}
				}
			}
			if (norm)
				for (int j = 0; j < 2 * s.hd; j++) c.near("dw", j, j < s.hd ? dqw[j] : dkw[j - s.hd], want_dw[j], (s.t * heads + s.hd + 16) * kU32 * mag_dw[j]);
		}
	}
}

TEST(swiglu) {
	for (auto s : {std::array<int, 2>{1, 1}, {3, 7}, {2, 1032}, {5, 64}}) {
		int t = s[0], f = s[1];
		auto gu = normals<bf16>(c, t * 2 * f, 3), grad = normals<bf16>(c, t * f);
		gu[0] = to_bf16(-100);
		if (f > 4) gu[2] = to_bf16(100), gu[3] = to_bf16(-80);
		Buf<bf16> in(gu), over(gu), out(t * f), dout(grad);
		run(c, {out, over}, [&] {
			emu::launch(d3(t, up(f, 1024)), d3(128), 0, [&] { swiglu_bf16(out, in, t, f); });
			emu::launch(d3(t, up(f, 1024)), d3(128), 0, [&] { swiglu_backward_bf16(over, dout, over, t, f); });
		});
		for (int i = 0; i < t * f; i++) {
			int gate = i / f * 2 * f + i % f;
			double g = widen(gu[gate]), u = widen(gu[gate + f]), sig = 1 / (1 + exp(-g)), d = widen(grad[i]);
			double y = g * sig * u, dg = d * u * sig * (1 + g * (1 - sig)), du = d * g * sig;
			// the exponent's argument is rounded: |g| roundings
			double rel = (16 + 3 * std::abs(g)) * kU32;
			// a sigmoid below 2^-126 may be 0
			double tiny = ldexp(1, -126) * (1 + std::abs(g)) * (1 + std::abs(d)) * (1 + std::abs(u));
			c.near("out", i, widen(out[i]), y, (rel + kUBf16) * std::abs(y) + tiny);
			c.near("dgate", i, widen(over[gate]), dg, rel * std::abs(d * u) * sig * (1 + std::abs(g)) + kUBf16 * std::abs(dg) + tiny);
			c.near("dup", i, widen(over[gate + f]), du, (rel + kUBf16) * std::abs(du) + tiny);
		}
	}
}

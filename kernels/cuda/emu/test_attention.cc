// attention_forward.cu, attention_backward.cu and attention_simple.cu on the
// schedules that schedule.go makes (testdata/schedules.txt).
#include "check.h"

#include <array>
#include <fstream>
#include <sstream>

namespace {

struct Case {
	int h, kv, hd, backward, part_rows, slots;
	std::vector<int> segments, tiles, items, combines, order, works, ranges, splits;
	std::string label() const {
		return std::to_string(h) + "." + std::to_string(kv) + "." + std::to_string(hd) + "/" + std::to_string(segments.size() / 6) + " segments";
	}
};

std::vector<Case> read_cases() {
	std::ifstream f("testdata/schedules.txt");
	std::vector<Case> out;
	std::string word;
	while (f >> word) {
		Case c;
		f >> c.h >> c.kv >> c.hd >> c.backward >> c.part_rows >> c.slots;
		for (auto *v : {&c.segments, &c.tiles, &c.items, &c.combines, &c.order, &c.works, &c.ranges, &c.splits}) {
			size_t n;
			f >> n;
			v->resize(n);
			for (auto &x : *v) f >> x;
		}
		out.push_back(c);
	}
	if (out.empty()) puts("FAIL: testdata/schedules.txt is missing"), abort();
	return out;
}

// Rows is a matrix with rows a stride apart.
struct Rows {
	const bf16 *p;
	int stride;
	double at(i64 row, int column) const { return widen(p[row * stride + column]); }
};

// One query row and head by the definition, in float64, from stored values.
struct Reference {
	const Case &c;
	Rows q, k, v, pk, pv;

	struct Key {
		const Rows *k, *v;
		int row;
	};
	std::vector<Key> keys(const int *s, int i) const {
		std::vector<Key> out;
		for (int j = 0; j < s[5]; j++) out.push_back({&pk, &pv, s[4] + j});
		for (int j = 0; j < s[3] && j <= i + s[3] - s[1]; j++) out.push_back({&k, &v, s[2] + j});
		return out;
	}
	double scale() const { return 1 / sqrt(double(c.hd)); }
	double score(int row, int head, const Key &key, double *mag) const {
		double s = 0, m = 0;
		for (int d = 0; d < c.hd; d++) {
			double x = q.at(row, head * c.hd + d) * key.k->at(key.row, head / (c.h / c.kv) * c.hd + d);
			s += x, m += std::abs(x);
		}
		*mag = std::max(*mag, m * scale());
		return s * scale();
	}
};

typedef void (*Forward)(bf16 *, float *, const bf16 *, const bf16 *, const bf16 *, const bf16 *, const bf16 *, int, int, int, int, int, const int *, float *, float *, int, int, int, float);

// Kind is which kernels run. Where there is no wgmma kernel it is mma.sync's.
enum Kind { kPlain, kMma, kWgmma };

// The tiles of the wgmma kernels start at a multiple of 1,024 bytes.
const size_t kAligning = 1008;

void forward(Check &check, const Case &c, Kind kind, const Reference &r, Buf<bf16> &out, Buf<float> &lse) {
	Buf<int> items(c.items), combines(c.combines);
	Buf<float> part_o(size_t(c.kv) * c.part_rows * c.hd), part_ml(size_t(c.kv) * c.part_rows * 2);
	float scale = float(r.scale());
	unsigned n = unsigned(c.items.size() / 12);
	run(check, {out, lse}, [&] {
		if (kind != kPlain) {
			Forward f = kind == kMma ? (c.hd == 64 ? attention_forward_64 : attention_forward_128) : c.hd == 64 ? attention_forward_64_wgmma : attention_forward_128_wgmma;
			emu::launch(d3(n, c.kv), d3(128), (c.hd == 64 ? 40960 : 81920) + (kind == kWgmma ? kAligning : 0), [&] {
				f(out, lse, r.q.p, r.k.p, r.v.p, r.pk.p, r.pv.p, r.q.stride, r.k.stride, r.v.stride, r.pk.stride, r.pv.stride, items, part_o, part_ml, c.part_rows, c.h, c.kv, scale);
			});
		} else {
			emu::launch(d3(n, c.kv), d3(128), 0, [&] {
				attention_forward_simple(out, lse, r.q.p, r.k.p, r.v.p, r.pk.p, r.pv.p, r.q.stride, r.k.stride, r.v.stride, r.pk.stride, r.pv.stride, items, part_o, part_ml,
				                         c.part_rows, c.h, c.kv, scale, c.hd);
			});
		}
		if (combines.n) emu::launch(d3(unsigned(combines.n / 4), c.kv), d3(128), 0, [&] { attention_combine(out, lse, part_o, part_ml, combines, c.part_rows, c.h, c.kv, c.hd); });
	});
}

void check_forward(Check &check, const Case &c, double stored, const Reference &r, Buf<bf16> &out, Buf<float> &lse) {
	std::string what_out = c.label() + " out", what_lse = c.label() + " lse";
	for (size_t x = 0; x < c.segments.size(); x += 6) {
		const int *s = &c.segments[x];
		for (int i = 0; i < s[1]; i++) {
			auto keys = r.keys(s, i);
			for (int head = 0; head < c.h; head++) {
				std::vector<double> p(keys.size()), o(c.hd), mag(c.hd);
				double top = -INFINITY, sum = 0, score_mag = 0;
				for (size_t j = 0; j < keys.size(); j++) p[j] = r.score(s[0] + i, head, keys[j], &score_mag), top = std::max(top, p[j]);
				for (auto &y : p) sum += y = exp(y - top);
				for (size_t j = 0; j < keys.size(); j++)
					for (int d = 0; d < c.hd; d++) {
						double y = p[j] / sum * keys[j].v->at(keys[j].row, head / (c.h / c.kv) * c.hd + d);
						o[d] += y, mag[d] += std::abs(y);
					}
				double delta = (c.hd + 4) * kU32 * score_mag, n = double(keys.size());
				i64 at = i64(s[0] + i) * c.h + head;
				for (int d = 0; d < c.hd; d++)
					check.near(what_out, at * c.hd + d, widen(out[at * c.hd + d]), o[d], (2 * delta + (2 * n + 16) * kU32 + stored) * mag[d] + kUBf16 * std::abs(o[d]));
				double want = keys.empty() ? -INFINITY : top + log(sum);
				check.near(what_lse, at, lse[at], want, delta + (n + 8) * kU32 + 4 * kU32 * std::abs(want));
			}
		}
	}
}

void backward(Check &check, const Case &c, Kind kind, int t, const bf16 *qkv, const bf16 *dout, Buf<bf16> &out, Buf<float> &lse, Buf<bf16> &dqkv) {
	Buf<int> tiles(c.tiles), order(c.order), works(c.works), ranges(c.ranges), splits(c.splits);
	Buf<float> delta(size_t(t) * c.h), part(size_t(c.slots) * c.kv * 2 * 64 * c.hd);
	float scale = float(1 / sqrt(double(c.hd)));
	i64 rows = i64(t) * c.h;
	unsigned n = unsigned(works.n / 8), m = unsigned(order.n);
	size_t smem_dkv = c.hd == 64 ? 50688 : 99840, smem_dq = c.hd == 64 ? 49152 : 98304;
	if (kind == kWgmma) smem_dq += kAligning, smem_dkv += c.hd == 64 ? 512 + kAligning : 0;
	run(check, {dqkv}, [&] {
		emu::launch(d3(up(dqkv.n * 2, 4096)), d3(256), 0, [&] { zero_bytes(reinterpret_cast<u8 *>(dqkv.p), i64(dqkv.n) * 2); });
		emu::launch(d3(up(rows, 16)), d3(128), 0, [&] { attention_delta(delta, dout, out, rows, c.hd); });
		if (kind != kPlain) {
			auto dkv = c.hd == 128 ? attention_dkv_128 : kind == kMma ? attention_dkv_64 : attention_dkv_64_wgmma;
			auto dq = kind == kMma ? (c.hd == 64 ? attention_dq_64 : attention_dq_128) : c.hd == 64 ? attention_dq_64_wgmma : attention_dq_128_wgmma;
			emu::launch(d3(n, c.kv), d3(128), smem_dkv, [&] { dkv(dqkv, part, qkv, dout, lse, delta, works, ranges, tiles, c.h, c.kv, scale); });
			emu::launch(d3(m, c.kv), d3(128), smem_dq, [&] { dq(dqkv, qkv, dout, lse, delta, tiles, order, c.h, c.kv, scale); });
		} else {
			emu::launch(d3(n, c.kv), d3(128), 0, [&] { attention_dkv_simple(dqkv, part, qkv, dout, lse, delta, works, ranges, tiles, c.h, c.kv, scale, c.hd); });
			emu::launch(d3(m, c.kv), d3(128), 0, [&] { attention_dq_simple(dqkv, qkv, dout, lse, delta, tiles, order, c.h, c.kv, scale, c.hd); });
		}
		if (splits.n) emu::launch(d3(unsigned(splits.n / 4), c.kv), d3(256), 0, [&] { attention_dkv_reduce(dqkv, part, splits, c.h, c.kv, c.hd); });
	});
}

void check_backward(Check &check, const Case &c, double stored, int t, const Reference &r, const bf16 *dout, Buf<bf16> &out, Buf<float> &lse, Buf<bf16> &dqkv) {
	int group = c.h / c.kv, w = (c.h + 2 * c.kv) * c.hd, hd = c.hd;
	std::vector<double> want(size_t(t) * w), mag(want.size());
	double most_score = 0, most_lse = 0, most_terms = 0;
	for (size_t x = 0; x < c.segments.size(); x += 6) {
		const int *s = &c.segments[x];
		for (int i = 0; i < s[1]; i++) {
			auto keys = r.keys(s, i);
			most_terms = std::max(most_terms, double(keys.size()));
			for (int head = 0; head < c.h; head++) {
				i64 row = s[0] + i, at = row * c.h + head;
				double delta = 0, delta_mag = 0;
				for (int d = 0; d < hd; d++) {
					double y = widen(dout[at * hd + d]) * widen(out[at * hd + d]);
					delta += y, delta_mag += std::abs(y);
				}
				most_lse = std::max(most_lse, std::abs(double(lse[at])));
				for (auto &key : keys) {
					double p = exp(r.score(int(row), head, key, &most_score) - lse[at]), dp = 0, dp_mag = 0;
					int kh = head / group;
					for (int d = 0; d < hd; d++) {
						double y = widen(dout[at * hd + d]) * key.v->at(key.row, kh * hd + d);
						dp += y, dp_mag += std::abs(y);
					}
					double ds = p * (dp - delta) * r.scale(), ds_mag = p * (dp_mag + delta_mag) * r.scale();
					for (int d = 0; d < hd; d++) {
						size_t iq = row * w + head * hd + d, ik = i64(key.row) * w + (c.h + kh) * hd + d, iv = ik + c.kv * hd;
						double kx = key.k->at(key.row, kh * hd + d), qx = r.q.at(row, head * hd + d), ox = widen(dout[at * hd + d]);
						want[iq] += ds * kx, mag[iq] += ds_mag * std::abs(kx);
						want[ik] += ds * qx, mag[ik] += ds_mag * std::abs(qx);
						want[iv] += p * ox, mag[iv] += p * std::abs(ox);
					}
				}
			}
		}
	}
	double rel = (hd + 4) * kU32 * most_score + 4 * kU32 * most_lse + (hd + 12) * kU32 + stored + (most_terms + t * group + 16) * kU32;
	std::string what = c.label() + " dqkv";
	for (size_t i = 0; i < want.size(); i++) check.near(what, i, widen(dqkv[i]), want[i], rel * mag[i] + kUBf16 * std::abs(want[i]));
}

template <class T>
void equal_bits(Check &c, const std::string &what, const Buf<T> &got, const Buf<T> &want) {
	if (got.bytes() == want.bytes()) return;
	for (size_t i = 0; i < got.n; i++)
		if (memcmp(got.p + i, want.p + i, sizeof(T))) c.fail(what + "[" + std::to_string(i) + "] is " + std::to_string(widen(got.p[i])) + ", by mma.sync " + std::to_string(widen(want.p[i])));
}

} // namespace

TEST(attention_training) {
	for (auto &s : read_cases()) {
		if (!s.backward) continue;
		bool fast = (s.hd == 64 || s.hd == 128) && !flush_mode();
		Kind kind = fast ? kMma : kPlain;
		if (flush_mode() && s.h * s.hd > 600) continue; // the plain kernels are slow here
		int t = 0, w = (s.h + 2 * s.kv) * s.hd;
		for (size_t x = 0; x < s.segments.size(); x += 6) t = std::max(t, s.segments[x] + s.segments[x + 1]);
		double std = s.h == 6 ? 3 : 1; // once with sharp softmaxes
		std::vector<bf16> in(size_t(t) * w);
		for (size_t i = 0; i < in.size(); i++) in[i] = to_bf16(c.normal() * (int(i % w) < (s.h + s.kv) * s.hd ? std : 1));
		auto grad = normals<bf16>(c, size_t(t) * s.h * s.hd);
		Buf<bf16> qkv(in), dout(grad), out(size_t(t) * s.h * s.hd), dqkv(in.size());
		Buf<float> lse(size_t(t) * s.h);
		Rows k = {qkv.p + s.h * s.hd, w}, v = {qkv.p + (s.h + s.kv) * s.hd, w};
		Reference r{s, {qkv.p, w}, k, v, k, v};
		double stored = fast ? 2 * kUBf16 : 0; // p and ds as bf16 operands
		forward(c, s, kind, r, out, lse);
		check_forward(c, s, stored, r, out, lse);
		backward(c, s, kind, t, qkv, dout, out, lse, dqkv);
		check_backward(c, s, stored, t, r, dout, out, lse, dqkv);
		if (fast) { // wgmma adds in the order of mma.sync
			Buf<bf16> out2(out.n), dqkv2(dqkv.n);
			Buf<float> lse2(lse.n);
			forward(c, s, kWgmma, r, out2, lse2);
			backward(c, s, kWgmma, t, qkv, dout, out2, lse2, dqkv2);
			equal_bits(c, s.label() + " wgmma out", out2, out);
			equal_bits(c, s.label() + " wgmma lse", lse2, lse);
			equal_bits(c, s.label() + " wgmma dqkv", dqkv2, dqkv);
		}

		// NaN in one group's rows leaves every bit of the others alone.
		if (s.segments.size() < 12) continue;
		const int *last = &s.segments[s.segments.size() - 6];
		if (last[1] == 0) continue;
		auto out_before = std::vector<bf16>(out.p, out.p + out.n), d_before = std::vector<bf16>(dqkv.p, dqkv.p + dqkv.n);
		int from = last[0], to = last[0] + last[1];
		for (int i = from * w; i < to * w; i++) qkv[i] = kNaN;
		for (int i = from * s.h * s.hd; i < to * s.h * s.hd; i++) dout[i] = kNaN;
		forward(c, s, kind, r, out, lse);
		std::string what = s.label() + " beside NaN: ", what_out = what + "out", what_d = what + "dqkv";
		for (i64 i = 0; i < t * s.h * s.hd; i++) {
			bool inside = i >= from * s.h * s.hd && i < to * s.h * s.hd;
			c.equal(what_out, i, widen(out[i]), inside ? double(NAN) : widen(out_before[i]));
		}
		if (last[5]) continue; // its prefix's gradients are NaN as well
		backward(c, s, kind, t, qkv, dout, out, lse, dqkv);
		for (i64 i = 0; i < from * w; i++) c.equal(what_d, i, widen(dqkv[i]), widen(d_before[i]));
	}
}

TEST(attention_cache) {
	for (auto &s : read_cases()) {
		if (s.backward) continue;
		int t = 0, own = 0, prefix = 0;
		for (size_t x = 0; x < s.segments.size(); x += 6) {
			const int *g = &s.segments[x];
			t = std::max(t, g[0] + g[1]), own = std::max(own, g[2] + g[3]), prefix = std::max(prefix, g[4] + g[5]);
		}
		for (bool fast : {true, false}) {
			if (fast && (flush_mode() || (s.hd != 64 && s.hd != 128))) continue;
			if (!fast && !flush_mode() && s.hd == 128) continue;
			int pad = fast ? 8 : 3, q_stride = s.h * s.hd + pad, k_stride = 2 * s.kv * s.hd + 2 * pad, p_stride = s.kv * s.hd + pad;
			Buf<bf16> q(normals<bf16>(c, size_t(t) * q_stride)), cache(normals<bf16>(c, size_t(own) * k_stride)), keys(normals<bf16>(c, size_t(prefix) * p_stride)),
				values(normals<bf16>(c, size_t(prefix) * p_stride)), out(size_t(t) * s.h * s.hd);
			Buf<float> lse(size_t(t) * s.h);
			// Rows of the cache that no segment sees hold NaN.
			std::vector<bool> seen(own);
			for (size_t x = 0; x < s.segments.size(); x += 6)
				for (int j = 0; j < s.segments[x + 3]; j++) seen[s.segments[x + 2] + j] = true;
			for (int i = 0; i < own * k_stride; i++)
				if (!seen[i / k_stride]) cache[i] = kNaN;
			Reference r{s, {q.p, q_stride}, {cache.p, k_stride}, {cache.p + s.kv * s.hd + pad, k_stride}, {keys.p, p_stride}, {values.p, p_stride}};
			forward(c, s, fast ? kMma : kPlain, r, out, lse);
			check_forward(c, s, fast ? 2 * kUBf16 : 0, r, out, lse);
			if (!fast) continue;
			Buf<bf16> out2(out.n);
			Buf<float> lse2(lse.n);
			forward(c, s, kWgmma, r, out2, lse2);
			equal_bits(c, s.label() + " wgmma out", out2, out);
			equal_bits(c, s.label() + " wgmma lse", lse2, lse);
		}
	}
}

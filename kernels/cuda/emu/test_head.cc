// head.cu and sample.cu.
#include "check.h"

#include <algorithm>
#include <array>
#include <numeric>

namespace {

struct HeadShape {
	int n, v, ld;
	double temperature, std;
};

struct Coefficients {
	double loss = 0, dlogp = 0, dentropy = 0;
};

struct Settings {
	int kind;
	float low, high, delta, cap, beta, entropy;
};

// The loss of a token as surrogate.go documents it.
Coefficients surrogate(const Settings &s, double logp, double old, double ref, double adv, double weight, double tis, double entropy) {
	Coefficients r;
	if (weight == 0) return r;
	double g = exp(logp - old);
	if (s.kind == 2) {
		r.loss = -logp, r.dlogp = -1;
	} else if (s.kind == 1) {
		g = std::min(g, double(s.cap));
		r.loss = -g * adv * logp, r.dlogp = -g * adv;
	} else {
		double clipped = std::min(std::max(g, 1 - double(s.low)), 1 + double(s.high)), a = g * adv, b = clipped * adv;
		if (adv < 0 && s.delta > 0) a = std::min(g, double(s.delta)) * adv;
		r.loss = -std::min(a, b);
		r.dlogp = b < a || (adv < 0 && s.delta > 0 && g > s.delta) ? 0 : -g * adv;
	}
	r.loss *= tis, r.dlogp *= tis;
	if (s.beta != 0) r.loss += s.beta * (exp(ref - logp) - (ref - logp) - 1), r.dlogp += s.beta * (1 - exp(ref - logp));
	r.loss = (r.loss - s.entropy * entropy) * weight;
	r.dlogp *= weight;
	r.dentropy = s.entropy == 0 ? 0 : -s.entropy * weight;
	return r;
}

struct Row {
	std::vector<double> p; // log-probs
	double logp, entropy, mag;
};

Row reference(const float *z, int v, int target, double scale) {
	Row r;
	double top = -INFINITY, sum = 0;
	for (int j = 0; j < v; j++) top = std::max(top, z[j] * scale);
	for (int j = 0; j < v; j++) sum += exp(z[j] * scale - top);
	r.p.resize(v), r.entropy = 0, r.mag = std::abs(top);
	for (int j = 0; j < v; j++) {
		r.p[j] = z[j] * scale - top - log(sum);
		double p = exp(r.p[j]);
		if (p > 0) r.entropy -= p * r.p[j];
	}
	r.logp = r.p[target];
	r.mag += std::abs(z[target] * scale);
	return r;
}

// launch_head runs head_rows, or head_rows_cluster, on n rows of v.
template <class... A>
void launch_head(bool cluster, int n, int v, A... a) {
	if (cluster) emu::launch(d3(n * 8), d3(512), up(up(v, 8), 8) * 8 * sizeof(float), [&] { head_rows_cluster(a...); }, cluster_blocks("head_rows_cluster"));
	else emu::launch(d3(n), d3(1024), 0, [&] { head_rows(a...); });
}
// The cluster's kernel wants vectors.
bool can_cluster(const float *logits, int ld) { return (reinterpret_cast<uintptr_t>(logits) & 15) == 0 && ld % 4 == 0; }

} // namespace

TEST(head) {
	for (bool cluster : {false, true})
	for (HeadShape s : {HeadShape{1, 1, 8, 1, 1}, {3, 2, 2, 0.7, 1}, {6, 300, 304, 1, 2}, {5, 4099, 4104, 0.6, 80}, {4, 9000, 9000, 1.3, 14}, {3, 20001, 20003, 1, 3}, {4, 16384, 16384, 1, 1}}) {
		std::vector<float> z(s.n * s.ld, NAN); // the padding must not matter
		std::vector<int> target(s.n);
		for (int i = 0; i < s.n; i++) {
			for (int j = 0; j < s.v; j++) z[i * s.ld + j] = float(s.std > 40 ? (c.below(3) - 1) * s.std : c.normal() * s.std);
			target[i] = i == 0 ? 0 : i == 1 ? s.v - 1 : c.below(s.v);
		}
		if (s.v > 4) z[3] = -INFINITY;
		double scale = double(1 / float(s.temperature));
		auto dlp = normals<float>(c, s.n), dent = normals<float>(c, s.n, 0.3);
		dlp[0] = s.n > 1 ? 0 : dlp[0];
		if (s.n > 2) dlp[2] = 0, dent[2] = 0;
		std::vector<float> zero(z);
		if (s.n > 3)
			for (int j = 0; j < s.v; j++) z[2 * s.ld + j] = NAN; // a row without gradient
		Buf<float> logits(z), untouched(z), logp(s.n), entropy(s.n), logp0(s.n), entropy0(s.n), bdlp(dlp), bdent(dent);
		Buf<int> tg(target);
		if (cluster && !can_cluster(logits, s.ld)) continue;
		const float *none = nullptr;
		run(c, {logits, untouched, logp, entropy, logp0, entropy0}, [&] {
			launch_head(cluster, s.n, s.v, untouched.p, s.ld, s.n, s.v, tg.p, float(scale), logp0.p, entropy0.p, 0, none, none, none, none, none, none, none, 0, 0, 0, 0, 0, 0, 0, nullptr, nullptr);
			launch_head(cluster, s.n, s.v, logits.p, s.ld, s.n, s.v, tg.p, float(scale), logp.p, entropy.p, 2, none, none, none, none, none, bdlp.p, bdent.p, 0, 0, 0, 0, 0, 0, 0, nullptr, nullptr);
		});
		if (memcmp(untouched, z.data(), z.size() * 4)) c.fail("mode 0 changed the logits");
		for (int i = 0; i < s.n; i++) {
			const bf16 *g = reinterpret_cast<bf16 *>(logits.p + i * s.ld);
			if (i == 2 && s.n > 3) {
				c.equal("log-prob of a NaN row", i, logp[i], NAN);
				c.equal("entropy of a NaN row", i, entropy[i], NAN);
				for (int j = 0; j < s.v; j++) c.equal("gradient of a masked NaN row", j, widen(g[j]), 0);
				continue;
			}
			Row r = reference(&z[i * s.ld], s.v, target[i], scale);
			// 1024 threads' sums are of at most 150 terms; arguments are off by a rounding of the logit
			double tol = (200 + 4 * r.mag + 4 * std::abs(r.logp)) * kU32;
			c.near("log-prob", i, logp[i], r.logp, tol);
			c.near("entropy", i, entropy[i], r.entropy, (200 + 6 * r.mag) * kU32 * (1 + r.entropy + log(double(s.v))));
			if (memcmp(&logp[i], &logp0[i], 4) || memcmp(&entropy[i], &entropy0[i], 4)) c.fail("modes differ in log-prob or entropy");
			for (int j = 0; j < s.v; j++) {
				double p = exp(r.p[j]), a = dlp[i] * ((j == target[i]) - p), b = p > 0 ? dent[i] * p * (r.p[j] + r.entropy) : 0;
				double want = scale * (a - b), by_p = p > 0 ? scale * (std::abs(dlp[i]) + std::abs(dent[i]) * (std::abs(r.p[j]) + r.entropy)) : 1;
				double mag = p * by_p + scale * std::abs(dlp[i]) * (j == target[i]);
				// A card's probability below 2^-126 is 0; half of bf16's smallest step is 2^-134.
				c.near("gradient", i * s.v + j, widen(g[j]), want, 4 * tol * mag + kUBf16 * std::abs(want) + 0x1p-126 * by_p + 0x1p-134);
			}
		}
	}
	// A target out of range is reported, and its row has no gradient.
	for (bool cluster : {false, true}) {
		Buf<float> logits(std::vector<float>(3 * 8, 1.0f)), logp(3), one(std::vector<float>(3, 1.0f));
		Buf<int> target(std::vector<int>{1, 5, -1}), bad(std::vector<int>{0x7fffffff});
		float *no = nullptr;
		run(c, {logits, logp, bad}, [&] { launch_head(cluster, 3, 5, logits.p, 8, 3, 5, target.p, 1, logp.p, no, 2, no, no, no, no, no, one.p, no, 0, 0, 0, 0, 0, 0, 0, no, bad.p); });
		c.equal("bad", 0, bad[0], 1);
		for (int i = 8; i < 24; i++)
			for (int j = 0; j < 5; j++) c.equal("gradient", j, widen(reinterpret_cast<bf16 *>(logits.p + i / 8 * 8)[j]), 0);
	}
}

TEST(surrogate) {
	if (flush_mode()) return; // loads and stores are those of the head test
	for (Settings s : {Settings{2, 0, 0, 0, 0, 0, 0}, {2, 0, 0, 0, 0, 0, 0.02f}, {0, 0.2f, 0.28f, 0, 0, 0, 0}, {0, 0.2f, 0.28f, 1.7f, 0, 0.04f, 0.01f}, {0, 0.2f, 0.2f, 0, 0, 0.5f, 0},
	                   {1, 0, 0, 0, 1.5f, 0, 0}, {1, 0, 0, 0, 1.5f, 0.1f, 0.01f}}) {
		for (int way = 0; way < 3; way++) {
			const int n = 26, v = 131, ld = 136;
			bool given = way > 0, cluster = way == 2;
			if (cluster && !(s.kind == 0 && s.beta != 0 && s.entropy != 0)) continue; // the cluster's kernel shares the loss of a token
			auto z = normals<float>(c, n * ld);
			std::vector<int> target(n);
			std::vector<float> old(n), ref(n), adv(n), weight(n), tis(n);
			std::vector<Row> rows;
			const double ratios[] = {0.3, 0.79, 0.81, 1, 1.19, 1.21, 1.27, 1.29, 1.49, 1.51, 1.69, 1.71, 4};
			for (int i = 0; i < n; i++) {
				target[i] = c.below(v);
				rows.push_back(reference(&z[i * ld], v, target[i], 1 / 0.8f));
				old[i] = float(rows[i].logp - log(ratios[i % 13]));
				ref[i] = float(rows[i].logp + 0.3 * c.normal());
				adv[i] = i % 7 == 3 ? 0 : float(c.normal()), weight[i] = float(c.uniform()), tis[i] = float(2 * c.uniform());
				if (i % 7 == 5) old[i] = ref[i] = adv[i] = NAN, tis[i] = INFINITY, weight[i] = 0;
			}
			Buf<float> logits(z), logp(n), entropy(n), loss(n), bo(old), br(ref), ba(adv), bw(weight), bt(tis);
			Buf<int> tg(target);
			run(c, {logits, logp, entropy, loss}, [&] {
				float *no = nullptr;
				launch_head(cluster, n, v, logits.p, ld, n, v, tg.p, 1 / 0.8f, logp.p, entropy.p, 1, given ? bo.p : no, s.beta != 0 ? br.p : no, s.kind == 2 ? no : ba.p, bw.p, given ? bt.p : no, no,
				     no, s.kind, s.low, s.high, s.delta, s.cap, s.beta, s.entropy, loss.p, nullptr);
			});
			for (int i = 0; i < n; i++) {
				auto want = surrogate(s, rows[i].logp, given ? old[i] : rows[i].logp, s.beta != 0 ? ref[i] : 0, s.kind == 2 ? 0 : adv[i], weight[i], given ? tis[i] : 1, rows[i].entropy);
				double mag = weight[i] == 0 ? 0 : (1 + std::abs(s.kind == 2 ? 1 : adv[i]) * 8 * (1 + std::abs(rows[i].logp))) * (given ? 1 + tis[i] : 1);
				c.near("loss", i, loss[i], want.loss, 600 * kU32 * mag);
				for (int j = 0; j < v; j++) {
					double p = exp(rows[i].p[j]), x = 1 / 0.8f * (want.dlogp * ((j == target[i]) - p) - want.dentropy * p * (rows[i].p[j] + rows[i].entropy));
					c.near("gradient", i * v + j, widen(reinterpret_cast<bf16 *>(logits.p + i * ld)[j]), x, 1200 * kU32 * mag + kUBf16 * std::abs(x));
				}
			}
		}
	}
}

namespace {

// The nucleus of a row: shortest run of ids by falling e, lower id first, whose mass reaches top_p.
std::vector<bool> nucleus(const std::vector<double> &p, double top_p) {
	std::vector<int> ids(p.size());
	std::iota(ids.begin(), ids.end(), 0);
	std::stable_sort(ids.begin(), ids.end(), [&](int a, int b) { return p[a] > p[b]; });
	std::vector<bool> keep(p.size());
	double mass = 0;
	for (int i : ids) {
		keep[i] = p[i] > 0;
		if ((mass += p[i]) >= top_p) break;
	}
	return keep;
}

void draw(Check &c, const std::vector<float> &z, int n, int v, int ld, const std::vector<float> &u, float temperature, float top_p, std::vector<int> &token, std::vector<float> &logp) {
	Buf<float> logits(z), bu(u), lp(n);
	Buf<int> tok(n);
	run(c, {logits, lp, tok}, [&] { emu::launch(d3(n), d3(1024), 0, [&] { sample_rows(tok, lp, logits, ld, bu, n, v, temperature, top_p); }); });
	token.assign(tok.p, tok.p + n), logp.assign(lp.p, lp.p + n);
}

} // namespace

TEST(sample) {
	std::vector<int> token;
	std::vector<float> logp;
	for (auto s : {std::array<int, 2>{1, 4}, {37, 40}, {5003, 5004}, {4098, 4098}}) {
		int v = s[0], ld = s[1];
		const int n = 3;
		if (flush_mode() && v > 100) continue;
		auto row = normals<float>(c, v, 2);
		if (v > 8) row[5] = row[2] = row[7], row[3] = -INFINITY;
		std::vector<float> z(n * ld, NAN), u(n);
		for (int i = 0; i < n; i++) std::copy(row.begin(), row.end(), z.begin() + i * ld), u[i] = float(c.uniform());
		u[0] = 0, u[1] = 1 - float(kU32);
		for (auto t : {std::array<float, 2>{1, 1}, {0.7f, 1}, {1, 0.9f}, {1.5f, 0.5f}, {1, 1e-6f}, {0, 1}}) {
			double temperature = t[0] == 0 ? 1 : t[0];
			draw(c, z, n, v, ld, u, t[0], t[1], token, logp);
			double top = *std::max_element(row.begin(), row.end()), sum = 0;
			std::vector<double> p(v);
			for (int j = 0; j < v; j++) sum += p[j] = exp((row[j] - top) / temperature);
			for (auto &x : p) x /= sum;
			auto keep = nucleus(p, t[1]);
			double mass = 0;
			for (int j = 0; j < v; j++) mass += keep[j] ? p[j] : 0;
			for (int i = 0; i < n; i++) {
				if (token[i] < 0 || token[i] >= v) {
					c.fail("token out of range");
					continue;
				}
				c.near("log-prob", i, logp[i], log(p[token[i]]), 200 * kU32);
				if (t[0] == 0) {
					c.equal("arg-max", i, token[i], double(std::max_element(row.begin(), row.end()) - row.begin()));
					continue;
				}
				if (!keep[token[i]]) c.fail("token " + std::to_string(token[i]) + " is outside the nucleus of " + std::to_string(t[1]));
				double below = 0, slack = 200 * kU32;
				for (int j = 0; j < token[i]; j++) below += keep[j] ? p[j] / mass : 0;
				if (u[i] < below - slack || u[i] > below + p[token[i]] / mass + slack) c.fail("u " + std::to_string(u[i]) + " gave token " + std::to_string(token[i]));
			}
		}
	}
	// Eight equal logits: a nucleus of mass 0.45 is ids 0..3, of 0.5 as well, of 0.51 ids 0..4.
	for (auto t : {std::array<float, 2>{0.01f, 0}, {0.45f, 3}, {0.5f, 3}, {0.51f, 4}, {0.99f, 7}}) {
		const int n = 8;
		if (flush_mode()) break;
		std::vector<float> u(n);
		for (int i = 0; i < n; i++) u[i] = (float(i) + 0.3f) / n;
		draw(c, std::vector<float>(n * 8, 0.0f), n, 8, 8, u, 1, t[0], token, logp);
		for (int i = 0; i < n; i++) c.equal("token of equal logits", i, token[i], int(u[i] * (t[1] + 1)));
	}
	// Ties that span warps: 300 equal logits among lower ones, half of them in the nucleus.
	{
		const int v = 9000, n = 3;
		std::vector<float> z(n * v), u = {0, 0.5f, 0.999f};
		std::vector<int> ids;
		for (int j = 0; j < v; j++) {
			bool high = j % 30 == 7;
			if (high) ids.push_back(j);
			for (int i = 0; i < n; i++) z[i * v + j] = high ? 3 : -90;
		}
		draw(c, z, n, v, v, u, 1, 0.5f, token, logp);
		for (int i = 0; i < n; i++) c.equal("token of ties", i, token[i], ids[int(u[i] * 150)]);
	}
	// One id holds nearly all mass; a row with NaN or of nothing but -inf gives id 0 and NaN.
	for (int at : {0, 5, 30}) {
		std::vector<float> z(31, 0.0f);
		z[at] = 60;
		for (float top_p : {0.5f, 0.999f, 1.0f}) {
			draw(c, z, 1, 31, 31, {0.5f}, 1, top_p, token, logp);
			c.equal("token", 0, token[0], at);
			c.near("log-prob", 0, logp[0], 0, 64 * kU32);
		}
	}
	for (float temperature : {0.0f, 1.0f}) {
		draw(c, {1, NAN, 2}, 1, 3, 3, {0.5f}, temperature, 0.9f, token, logp);
		c.equal("token of a NaN row", 0, token[0], 0), c.equal("log-prob", 0, logp[0], NAN);
		draw(c, {-INFINITY, -INFINITY, -INFINITY}, 1, 3, 3, {0.5f}, temperature, 0.9f, token, logp);
		c.equal("token of an empty row", 0, token[0], 0), c.equal("log-prob", 0, logp[0], NAN);
	}
}

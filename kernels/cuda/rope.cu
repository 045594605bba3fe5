// Rotary position embedding (rotate-half: pairs (i, i+hd/2), angle
// pos·theta^(-2i/hd)) on the q and k heads of packed rows q|k|v, after an RMSNorm
// of each head where weights are given (QK-norm, Qwen3), and its gradient.
//
// At the 0.5b shape (T = 12,314, W = 1,152) with 3.0 TB/s: 4·T·W = 57 MB, 19 us,
// forward (out of place, v copied); backward in place on q and k: 50 MB, 17 us.
//
// Angles are exact to float32 at any position: the number of turns is taken in
// float64, and only its distance to the nearest quarter in float32. A block's 4
// tokens compute theirs once for all heads. With QK-norm a warp takes a token.
#include "common.cuh"

namespace {

const int kTokens = 4; // of a block of 128 threads; rotate counts to 4

// cos and sin of 2π·pos·turns.
TR_INLINE float2 angle(int pos, double turns) {
	double x = static_cast<double>(pos) * turns;
	double quarter = rint(4.0 * x);
	float s, c;
	sincospif(static_cast<float>(2.0 * (x - 0.25 * quarter)), &s, &c);
	switch (static_cast<int>(static_cast<long long>(quarter) & 3)) {
	case 0: return make_float2(c, s);
	case 1: return make_float2(-s, c);
	case 2: return make_float2(-c, -s);
	default: return make_float2(s, -c);
	}
}

// fill computes the angles of tokens [first, first+kTokens) into cs[kTokens, half].
TR_INLINE void fill(float2 *cs, const int *pos, const double *turns, int first, int t, int half) {
	for (int i = threadIdx.x; i < kTokens * half; i += blockDim.x) {
		int token = first + i / half;
		if (token < t) cs[i] = angle(pos[token], turns[i % half]);
	}
}

// rotate turns chunks of 8 pairs of the block's tokens, by +angle or, with sign -1, by
// -angle, and fills cs meanwhile: a thread's first kUnits chunks are under way before
// positions and angles are waited for. At the 0.5b shape these are all it has.
const int kUnits = 3;

TR_INLINE void rotate(bf16 *out, const bf16 *in, float2 *cs, const int *pos, const double *turns, int first, int t, int h, int kv, int hd, float sign) {
	int half = hd / 2, per_head = half / 8, turned = (h + kv) * per_head;
	int copied = out == in ? 0 : kv * hd / 8, units = turned + copied, all = imin(kTokens, t - first) * units;
	long long width = static_cast<long long>(h + 2 * kv) * hd;
	for (int from = threadIdx.x; from - static_cast<int>(threadIdx.x) < all; from += kUnits * blockDim.x) {
		uint4 x[kUnits], y[kUnits];
		long long at[kUnits];
		int angle[kUnits]; // of the chunk's first pair; -1: copied
#pragma unroll
		for (int k = 0; k < kUnits; k++) {
			int i = from + k * blockDim.x;
			if (i >= all) continue;
			int slot = (i >= units) + (i >= 2 * units) + (i >= 3 * units), u = i - slot * units, head = u / per_head, chunk = u - head * per_head;
			bool turns_it = u < turned;
			at[k] = (first + slot) * width + (turns_it ? head * hd + chunk * 8 : (h + kv) * hd + (u - turned) * 8);
			angle[k] = turns_it ? slot * half + chunk * 8 : -1;
			x[k] = *reinterpret_cast<const uint4 *>(in + at[k]);
			if (turns_it) y[k] = *reinterpret_cast<const uint4 *>(in + at[k] + half);
		}
		if (from == static_cast<int>(threadIdx.x)) {
			fill(cs, pos, turns, first, t, half);
			__syncthreads();
		}
#pragma unroll
		for (int k = 0; k < kUnits; k++) {
			if (from + k * static_cast<int>(blockDim.x) >= all) continue;
			if (angle[k] >= 0) {
				const float2 *a = cs + angle[k];
				float p[8], q[8];
				unpack8(p, x[k]);
				unpack8(q, y[k]);
#pragma unroll
				for (int j = 0; j < 8; j++) {
					float c = a[j].x, s = sign * a[j].y, r = p[j];
					p[j] = r * c - q[j] * s;
					q[j] = q[j] * c + r * s;
				}
				x[k] = pack8(p);
				*reinterpret_cast<uint4 *>(out + at[k] + half) = pack8(q);
			}
			*reinterpret_cast<uint4 *>(out + at[k]) = x[k];
		}
	}
}

} // namespace

extern "C" __global__ void __launch_bounds__(128) rope_bf16(bf16 *out, const bf16 *in, const int *pos, const double *turns, const bf16 *qw, const bf16 *kw,
                                                           float *rstd, int t, int h, int kv, int hd, float eps) {
	TR_DYNAMIC(float2, cs); // [kTokens, hd/2]
	int first = blockIdx.x * kTokens, half = hd / 2;
	if (!qw && half % 8 == 0 && aligned16(out) && aligned16(in)) {
		rotate(out, in, cs, pos, turns, first, t, h, kv, hd, 1.0f);
		return;
	}
	fill(cs, pos, turns, first, t, half);
	__syncthreads();
	int slot = threadIdx.x / 32, lane = threadIdx.x % 32, token = first + slot;
	if (token >= t) return;
	long long row = static_cast<long long>(token) * (h + 2 * kv) * hd;
	for (int head = 0; head < h + kv; head++) {
		const bf16 *x = in + row + head * hd;
		bf16 *o = out + row + head * hd;
		const bf16 *w = head < h ? qw : kw;
		float r = 1.0f;
		if (qw) {
			float square = 0;
			for (int i = lane; i < hd; i += 32) square += bf16_float(x[i]) * bf16_float(x[i]);
			r = 1.0f / sqrtf(warp_sum(square) / static_cast<float>(hd) + eps);
			if (rstd && lane == 0) rstd[static_cast<long long>(token) * (h + kv) + head] = r;
		}
		for (int i = lane; i < half; i += 32) {
			float p = bf16_float(x[i]), q = bf16_float(x[i + half]);
			if (qw) p *= r * bf16_float(w[i]), q *= r * bf16_float(w[i + half]);
			float2 a = cs[slot * half + i];
			o[i] = float_bf16(p * a.x - q * a.y);
			o[i + half] = float_bf16(q * a.x + p * a.y);
		}
	}
	if (out != in)
		for (int i = lane; i < kv * hd; i += 32) out[row + (h + kv) * hd + i] = in[row + (h + kv) * hd + i];
}

// part[b] is block b's share of dqw | dkw, with qw.
extern "C" __global__ void __launch_bounds__(128)
	rope_backward_bf16(bf16 *d, const bf16 *in, const int *pos, const double *turns, const bf16 *qw, const bf16 *kw, const float *rstd, float *part, int t, int h,
                       int kv, int hd, int parts) {
	TR_DYNAMIC(float2, cs); // [kTokens, hd/2], then float[kTokens, 2·hd] with qw
	int half = hd / 2;
	float *sums = reinterpret_cast<float *>(cs + kTokens * half);
	bool vec = !qw && half % 8 == 0 && aligned16(d);
	int slot = threadIdx.x / 32, lane = threadIdx.x % 32;
	float *dw = sums + slot * 2 * hd; // only this warp's
	if (qw)
		for (int i = lane; i < 2 * hd; i += 32) dw[i] = 0;
	__syncwarp();
	for (int first = blockIdx.x * kTokens; first < t; first += parts * kTokens) {
		__syncthreads();
		if (vec) {
			rotate(d, d, cs, pos, turns, first, t, h, kv, hd, -1.0f);
			continue;
		}
		fill(cs, pos, turns, first, t, half);
		__syncthreads();
		int token = first + slot;
		if (token >= t) continue;
		long long row = static_cast<long long>(token) * (h + 2 * kv) * hd;
		for (int head = 0; head < h + kv; head++) {
			bf16 *g = d + row + head * hd;
			const bf16 *x = in + row + head * hd, *w = head < h ? qw : kw;
			float *dwh = dw + (head < h ? 0 : hd);
			float r = 1.0f, k = 0.0f;
			if (qw) {
				r = rstd[static_cast<long long>(token) * (h + kv) + head];
				float dot = 0;
				for (int i = lane; i < half; i += 32) {
					float2 a = cs[slot * half + i];
					float p = bf16_float(g[i]), q = bf16_float(g[i + half]);
					float gp = p * a.x + q * a.y, gq = q * a.x - p * a.y, xp = bf16_float(x[i]), xq = bf16_float(x[i + half]);
					dot += gp * bf16_float(w[i]) * xp + gq * bf16_float(w[i + half]) * xq;
					dwh[i] += gp * xp * r;
					dwh[i + half] += gq * xq * r;
				}
				k = -r * r * r * warp_sum(dot) / static_cast<float>(hd);
			}
			for (int i = lane; i < half; i += 32) {
				float2 a = cs[slot * half + i];
				float p = bf16_float(g[i]), q = bf16_float(g[i + half]);
				float gp = p * a.x + q * a.y, gq = q * a.x - p * a.y;
				if (qw) {
					gp = r * gp * bf16_float(w[i]) + k * bf16_float(x[i]);
					gq = r * gq * bf16_float(w[i + half]) + k * bf16_float(x[i + half]);
				}
				g[i] = float_bf16(gp);
				g[i + half] = float_bf16(gq);
			}
		}
	}
	if (!qw) return;
	__syncthreads();
	for (int i = threadIdx.x; i < 2 * hd; i += blockDim.x) {
		float total = 0;
		for (int s = 0; s < kTokens; s++) total += sums[s * 2 * hd + i];
		part[static_cast<long long>(blockIdx.x) * 2 * hd + i] = total;
	}
}

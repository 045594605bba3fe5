// The optimizer over flat buffers: sum of squares in float64, the clip coefficient
// and AdamW (Loshchilov & Hutter 2019, as in PyTorch: p -= lr·wd·p, then the update).
//
// A bf16 weight has an exact float32 master: the weight holds its upper half,
// rounded half up, and a signed 16-bit remainder the rest. No update is lost.
//
// For 494 million parameters (0.5b) at 3.0 TB/s: sum of squares 4 (float32) or 2
// bytes an element, 0.66 or 0.33 ms; AdamW 2·(2+2+4+4)+4 = 28 bytes (26 with bf16
// gradients), 4.6 ms (4.3 ms); with compact moments 2·(2+2+1.03+2)+4 = 18.1 (16.1),
// 3.0 ms (2.7 ms); adding a micro-batch's gradient 2+4+2 = 8 bytes, 1.3 ms.
//
// Issue: 106 instructions an element of adamw_compact_gbf16, 1.8 ms at 4 a clock an SM.
//
// Compact moments and their rounding are defined at AdamW in package kernels.
#include "common.cuh"

namespace {

template <class T>
TR_INLINE void sum_squares_partial(double *part, const T *x, long long n) {
	bool aligned = aligned16(x);
	long long step = static_cast<long long>(gridDim.x) * blockDim.x;
	double sum = 0;
	for (long long c = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; c * 8 < n; c += step) {
		long long left = n - c * 8;
		float v[8];
		load8(v, x + c * 8, left < 8 ? static_cast<int>(left) : 8, aligned && left >= 8);
#pragma unroll
		for (int j = 0; j < 8; j++) sum += static_cast<double>(v[j]) * v[j];
	}
	sum = block_sum(sum);
	if (threadIdx.x == 0) part[blockIdx.x] = sum;
}

struct Adam {
	float grad, decay, beta1, alpha1, beta2, alpha2, step_size, inv_bias2, eps;
};

TR_INLINE float adam(const Adam &c, float p, float g, float &m, float &v) {
	g *= c.grad;
	m = c.beta1 * m + c.alpha1 * g;
	v = c.beta2 * v + c.alpha2 * g * g;
	return c.decay * p - c.step_size * m / (sqrtf(v) * c.inv_bias2 + c.eps);
}

TR_INLINE bool finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }

template <class G>
TR_INLINE void adamw_bf16(bf16 *p, short *rem, const G *g, float *m, float *v, long long n, const Adam &c) {
	bool aligned = aligned16(p) && aligned16(rem) && aligned16(g) && aligned16(m) && aligned16(v);
	long long step = static_cast<long long>(gridDim.x) * blockDim.x;
	for (long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; i * 8 < n; i += step) {
		long long at = i * 8, rest = n - at;
		int left = rest < 8 ? static_cast<int>(rest) : 8;
		bool vec = aligned && rest >= 8;
		float gv[8], mv[8], vv[8];
		unsigned high[8], low[8];
		load8(gv, g + at, left, vec);
		load8(mv, m + at, left, vec);
		load8(vv, v + at, left, vec);
		if (vec) {
			uint4 a = *reinterpret_cast<const uint4 *>(p + at), b = *reinterpret_cast<const uint4 *>(rem + at);
			unsigned aw[4] = {a.x, a.y, a.z, a.w}, bw[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
			for (int j = 0; j < 8; j++) high[j] = aw[j / 2] >> (j % 2 * 16) & 0xffffu, low[j] = bw[j / 2] >> (j % 2 * 16) & 0xffffu;
		} else {
#pragma unroll
			for (int j = 0; j < 8; j++) high[j] = j < left ? p[at + j] : 0, low[j] = j < left ? static_cast<unsigned short>(rem[at + j]) : 0;
		}
#pragma unroll
		for (int j = 0; j < 8; j++) {
			int signed_low = static_cast<int>(low[j] << 16) >> 16;
			float x = adam(c, __uint_as_float((high[j] << 16) + static_cast<unsigned>(signed_low)), gv[j], mv[j], vv[j]);
			unsigned bits = __float_as_uint(x);
			high[j] = master_high(bits);
			low[j] = (bits - (high[j] << 16)) & 0xffffu;
		}
		store8(m + at, mv, left, vec);
		store8(v + at, vv, left, vec);
		if (vec) {
			uint4 a = {high[0] | high[1] << 16, high[2] | high[3] << 16, high[4] | high[5] << 16, high[6] | high[7] << 16};
			uint4 b = {low[0] | low[1] << 16, low[2] | low[3] << 16, low[4] | low[5] << 16, low[6] | low[7] << 16};
			*reinterpret_cast<uint4 *>(p + at) = a;
			*reinterpret_cast<uint4 *>(rem + at) = b;
		} else {
#pragma unroll
			for (int j = 0; j < 8; j++)
				if (j < left) p[at + j] = static_cast<bf16>(high[j]), rem[at + j] = static_cast<short>(low[j]);
		}
	}
}

// The 32 random bits of element i: Key.Bits of package kernels.
TR_INLINE unsigned random_bits(long long i, unsigned key_a, unsigned key_b) {
	unsigned x = static_cast<unsigned>(i) ^ key_a;
	x ^= x >> 16;
	x *= 0x7feb352du;
	x ^= x >> 15;
	x += key_b + static_cast<unsigned>(static_cast<unsigned long long>(i) >> 32) * 0x9e3779b9u;
	x *= 0x846ca68bu;
	return x ^ x >> 16;
}

// One of the two bf16 neighbours of x by the lower 16 random bits, as a float; x is finite.
TR_INLINE float round_bf16(float x, unsigned random) { return __uint_as_float((__float_as_uint(x) + (random & 0xffffu)) & 0xffff0000u); }

const int kMomentBlock = 128;          // elements of a scale: 16 threads of 8
const float kCodes = 127.0f * 127.0f;  // in which the squares of all codes are whole
const float kMomentFloor = 8.0779357e-28f; // 2^-90: below it a block is zero

// What a code stands for in units of its block's scale.
TR_INLINE float moment_value(int code) {
	float root = static_cast<float>(code * code) * (1.0f / kCodes);
	return code < 0 ? -root * root : root * root;
}

// A first moment as a code, in two's complement in the lowest byte; inverse is kCodes²
// over the block's scale. The code is q or q+1, where q = int(sqrtf(sqrtf(t))) is at
// most 127 and (random>>16) + 0.5 < (t-q⁴)/((q+1)⁴-q⁴)·65536 decides, the division
// rounded: what package simd of the CPU computes, bit for bit, without its two roots
// and its division, which are 40 instructions of nvcc's.
TR_INLINE unsigned moment_code(float x, float inverse, unsigned random) {
	float t = fmaxf(fabsf(x * inverse), 0.0f); // NaN is 0
	// An approximate root, a little smaller than the true one, so that q is right or one too small.
	// 8388607.5 is 2^23 - 0.5: the sum is rounded to a whole number.
	float q = fmaf(fast_sqrt(fast_sqrt(t)), 1.0f - 0x1p-20f, 8388607.5f) - 8388608.0f;
	q = fmaxf(q, 0.0f);
	float over = (q + 1.0f) * (q + 1.0f);
	if (t >= over * over) q += 1.0f;
	// Where the roots' rounding makes another q than the comparison, both round to the same code.
	float square = q * q, odd = fmaf(2.0f, q, 1.0f), gap = fmaf(2.0f, square, odd) * odd;
	float above = t - fmaf(square, square, 0.0f); // q⁴ rounded: a product could be contracted with the subtraction
	// quotient > share, rounded to nearest even, is above - share·gap > half a step of
	// share times gap: share has 17 bits, and the difference is exact where it matters.
	float share = fmaf(static_cast<float>(random >> 16), 0x1p-16f, 0x1p-17f);
	float half_step = __uint_as_float((__float_as_uint(share) & 0x7f800000u) - (24u << 23));
	if (fmaf(-share, gap, above) > half_step * gap) q += 1.0f;
	q = fminf(q, 127.0f);
	// The lowest bits of 1.5·2^23 + q are q's.
	return __float_as_uint((x < 0.0f ? -q : q) + 12582912.0f);
}

template <class G>
TR_INLINE void adamw_compact(bf16 *p, short *rem, const G *g, signed char *m, float *scale, bf16 *v, long long n, const Adam &c, long long first, unsigned key_a,
                             unsigned key_b) {
	bool aligned = aligned16(p) && aligned16(rem) && aligned16(g) && aligned16(m) && aligned16(v);
	long long step = static_cast<long long>(gridDim.x) * blockDim.x;
	int lane = threadIdx.x & 31;
	// A warp's lanes go round together: the greatest of a block is found by shuffles.
	for (long long w = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x - lane; w * 8 < n; w += step) {
		long long at = (w + lane) * 8, rest = n - at;
		int left = rest < 0 ? 0 : rest < 8 ? static_cast<int>(rest) : 8;
		bool vec = aligned && rest >= 8;
		float gv[8], vv[8], fresh[8];
		unsigned high[8], low[8], random[8];
		int code[8];
		load8(gv, g + at, left, vec);
		load8(vv, v + at, left, vec);
		if (vec) {
			uint4 a = *reinterpret_cast<const uint4 *>(p + at), b = *reinterpret_cast<const uint4 *>(rem + at);
			uint2 q = *reinterpret_cast<const uint2 *>(m + at);
			unsigned aw[4] = {a.x, a.y, a.z, a.w}, bw[4] = {b.x, b.y, b.z, b.w}, qw[2] = {q.x, q.y};
#pragma unroll
			for (int j = 0; j < 8; j++) {
				high[j] = aw[j / 2] >> (j % 2 * 16) & 0xffffu, low[j] = bw[j / 2] >> (j % 2 * 16) & 0xffffu;
				code[j] = static_cast<int>(qw[j / 4] << (24 - j % 4 * 8)) >> 24;
			}
		} else {
#pragma unroll
			for (int j = 0; j < 8; j++) {
				high[j] = j < left ? p[at + j] : 0, low[j] = j < left ? static_cast<unsigned short>(rem[at + j]) : 0;
				code[j] = j < left ? m[at + j] : 0;
			}
		}
		float unit = left > 0 ? scale[at / kMomentBlock] : 0.0f, peak = 0.0f;
#pragma unroll
		for (int j = 0; j < 8; j++) {
			random[j] = random_bits(first + at + j, key_a, key_b);
			fresh[j] = moment_value(code[j]) * unit;
			int signed_low = static_cast<int>(low[j] << 16) >> 16;
			float x = adam(c, __uint_as_float((high[j] << 16) + static_cast<unsigned>(signed_low)), gv[j], fresh[j], vv[j]);
			unsigned bits = __float_as_uint(x);
			high[j] = master_high(bits);
			low[j] = (bits - (high[j] << 16)) & 0xffffu;
			vv[j] = round_bf16(vv[j], random[j]);
			peak = fmaxf(peak, fabsf(fresh[j])); // 0 or NaN, which is passed over, beyond the end
		}
#pragma unroll
		for (int k = 8; k; k >>= 1) peak = fmaxf(peak, __shfl_xor_sync(kAllLanes, peak, k));
		bool kept = peak >= kMomentFloor;
		float inverse = kept ? kCodes * kCodes / peak : 0.0f;
#pragma unroll
		for (int j = 0; j < 8; j++) code[j] = static_cast<int>(moment_code(fresh[j], inverse, random[j])); // 0 when inverse is
		if (left > 0 && lane % 16 == 0) scale[at / kMomentBlock] = kept ? peak : 0.0f;
		store8(v + at, vv, left, vec);
		if (vec) {
			uint4 a = {high[0] | high[1] << 16, high[2] | high[3] << 16, high[4] | high[5] << 16, high[6] | high[7] << 16};
			uint4 b = {low[0] | low[1] << 16, low[2] | low[3] << 16, low[4] | low[5] << 16, low[6] | low[7] << 16};
			*reinterpret_cast<uint4 *>(p + at) = a;
			*reinterpret_cast<uint4 *>(rem + at) = b;
			uint2 q = {0, 0};
#pragma unroll
			for (int j = 0; j < 4; j++) q.x |= (static_cast<unsigned>(code[j]) & 0xffu) << (8 * j), q.y |= (static_cast<unsigned>(code[j + 4]) & 0xffu) << (8 * j);
			*reinterpret_cast<uint2 *>(m + at) = q;
		} else {
#pragma unroll
			for (int j = 0; j < 8; j++)
				if (j < left) p[at + j] = static_cast<bf16>(high[j]), rem[at + j] = static_cast<short>(low[j]), m[at + j] = static_cast<signed char>(code[j]);
		}
	}
}

} // namespace

extern "C" __global__ void __launch_bounds__(256) sum_squares_partial_f32(double *part, const float *x, long long n) { sum_squares_partial(part, x, n); }
extern "C" __global__ void __launch_bounds__(256) sum_squares_partial_bf16(double *part, const bf16 *x, long long n) { sum_squares_partial(part, x, n); }

// One warp: lane l takes parts l, l+32, ...
extern "C" __global__ void __launch_bounds__(32) sum_squares_finish(float *out, const double *part, int parts) {
	double sum = 0;
	for (int i = threadIdx.x; i < parts; i += 32) sum += part[i];
	sum = warp_sum(sum);
	if (threadIdx.x == 0) out[0] = static_cast<float>(out[0] + sum);
}

extern "C" __global__ void __launch_bounds__(32) clip_coef(float *coef, const float *sumsq, float scale, float max_norm) {
	if (threadIdx.x != 0) return;
	double norm = scale * sqrt(static_cast<double>(sumsq[0])), c = scale;
	if (max_norm > 0.0f) {
		double shrink = max_norm / (norm + 1e-6);
		c *= shrink < 1.0 ? shrink : 1.0;
	}
	bool good = norm - norm == 0.0 && scale - scale == 0.0f; // finite
	coef[0] = good ? static_cast<float>(c) : __uint_as_float(0x7fc00000u);
}

extern "C" __global__ void __launch_bounds__(256) adamw_bf16_gf32(bf16 *p, short *rem, const float *g, float *m, float *v, const float *coef, long long n, float decay,
                                                                 float beta1, float alpha1, float beta2, float alpha2, float step_size, float inv_bias2, float eps) {
	Adam c = {coef[0], decay, beta1, alpha1, beta2, alpha2, step_size, inv_bias2, eps};
	if (finite(c.grad)) adamw_bf16(p, rem, g, m, v, n, c);
}
extern "C" __global__ void __launch_bounds__(256) adamw_bf16_gbf16(bf16 *p, short *rem, const bf16 *g, float *m, float *v, const float *coef, long long n, float decay,
                                                                  float beta1, float alpha1, float beta2, float alpha2, float step_size, float inv_bias2, float eps) {
	Adam c = {coef[0], decay, beta1, alpha1, beta2, alpha2, step_size, inv_bias2, eps};
	if (finite(c.grad)) adamw_bf16(p, rem, g, m, v, n, c);
}
extern "C" __global__ void __launch_bounds__(256) adamw_f32_gf32(float *p, const float *g, float *m, float *v, const float *coef, long long n, float decay, float beta1,
                                                                float alpha1, float beta2, float alpha2, float step_size, float inv_bias2, float eps) {
	Adam c = {coef[0], decay, beta1, alpha1, beta2, alpha2, step_size, inv_bias2, eps};
	if (!finite(c.grad)) return;
	bool aligned = aligned16(p) && aligned16(g) && aligned16(m) && aligned16(v);
	long long step = static_cast<long long>(gridDim.x) * blockDim.x;
	for (long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; i * 8 < n; i += step) {
		long long at = i * 8, rest = n - at;
		int left = rest < 8 ? static_cast<int>(rest) : 8;
		bool vec = aligned && rest >= 8;
		float pv[8], gv[8], mv[8], vv[8];
		load8(pv, p + at, left, vec);
		load8(gv, g + at, left, vec);
		load8(mv, m + at, left, vec);
		load8(vv, v + at, left, vec);
#pragma unroll
		for (int j = 0; j < 8; j++) pv[j] = adam(c, pv[j], gv[j], mv[j], vv[j]);
		store8(p + at, pv, left, vec);
		store8(m + at, mv, left, vec);
		store8(v + at, vv, left, vec);
	}
}

extern "C" __global__ void __launch_bounds__(256) adamw_compact_gf32(bf16 *p, short *rem, const float *g, signed char *m, float *scale, bf16 *v, const float *coef, long long n,
                                                                    float decay, float beta1, float alpha1, float beta2, float alpha2, float step_size, float inv_bias2,
                                                                    float eps, long long first, int key_a, int key_b) {
	Adam c = {coef[0], decay, beta1, alpha1, beta2, alpha2, step_size, inv_bias2, eps};
	if (finite(c.grad)) adamw_compact(p, rem, g, m, scale, v, n, c, first, static_cast<unsigned>(key_a), static_cast<unsigned>(key_b));
}
extern "C" __global__ void __launch_bounds__(256) adamw_compact_gbf16(bf16 *p, short *rem, const bf16 *g, signed char *m, float *scale, bf16 *v, const float *coef, long long n,
                                                                     float decay, float beta1, float alpha1, float beta2, float alpha2, float step_size, float inv_bias2,
                                                                     float eps, long long first, int key_a, int key_b) {
	Adam c = {coef[0], decay, beta1, alpha1, beta2, alpha2, step_size, inv_bias2, eps};
	if (finite(c.grad)) adamw_compact(p, rem, g, m, scale, v, n, c, first, static_cast<unsigned>(key_a), static_cast<unsigned>(key_b));
}

// dst += src, rounded stochastically by the upper 16 random bits.
extern "C" __global__ void __launch_bounds__(256) add_gradient(bf16 *dst, const float *src, long long n, long long first, int key_a, int key_b) {
	bool aligned = aligned16(dst) && aligned16(src);
	long long step = static_cast<long long>(gridDim.x) * blockDim.x;
	for (long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; i * 8 < n; i += step) {
		long long at = i * 8, rest = n - at;
		int left = rest < 8 ? static_cast<int>(rest) : 8;
		bool vec = aligned && rest >= 8;
		float a[8], b[8];
		load8(a, dst + at, left, vec);
		load8(b, src + at, left, vec);
#pragma unroll
		for (int j = 0; j < 8; j++) {
			a[j] += b[j];
			if (finite(a[j])) a[j] = round_bf16(a[j], random_bits(first + at + j, static_cast<unsigned>(key_a), static_cast<unsigned>(key_b)) >> 16);
		}
		store8(dst + at, a, left, vec);
	}
}

// Flat arrays: casts, the float32 master split into bf16 and its remainder, Lerp,
// copies, and the search for the first element that is not finite.
//
// All are bound by memory. For 494 million parameters (0.5b) at 3.0 TB/s:
//   cast f32 <-> bf16    6 bytes an element, 1.0 ms
//   split, join          8 bytes, 1.3 ms
//   lerp (bf16)          6 bytes, 1.0 ms
//   first not finite     2 or 4 bytes, 0.3 or 0.7 ms
#include "common.cuh"

namespace {

// each calls f(first element, elements left, whether 8 may be taken at once).
template <class F>
TR_INLINE void each8(long long n, bool aligned, F f) {
	long long step = static_cast<long long>(gridDim.x) * blockDim.x;
	for (long long c = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; c * 8 < n; c += step) {
		long long left = n - c * 8;
		f(c * 8, left < 8 ? static_cast<int>(left) : 8, aligned && left >= 8);
	}
}

template <class A, class B>
TR_INLINE void cast(A *dst, const B *src, long long n) {
	each8(n, aligned16(dst) && aligned16(src), [=](long long i, int left, bool vec) {
		float x[8];
		load8(x, src + i, left, vec);
		store8(dst + i, x, left, vec);
	});
}

template <class T>
TR_INLINE void lerp(T *dst, const T *src, float alpha, long long n) {
	each8(n, aligned16(dst) && aligned16(src), [=](long long i, int left, bool vec) {
		float x[8], y[8];
		load8(x, dst + i, left, vec);
		load8(y, src + i, left, vec);
#pragma unroll
		for (int j = 0; j < 8; j++) x[j] = (1.0f - alpha) * x[j] + alpha * y[j];
		store8(dst + i, x, left, vec);
	});
}

template <class T>
TR_INLINE void first_not_finite(unsigned long long *first, const T *x, long long n) {
	each8(n, aligned16(x), [=](long long i, int left, bool vec) {
		float v[8];
		load8(v, x + i, left, vec);
#pragma unroll
		for (int j = 7; j >= 0; j--)
			if ((__float_as_uint(v[j]) & 0x7f800000u) == 0x7f800000u) atomicMin(first, static_cast<unsigned long long>(i + j));
	});
}

} // namespace

extern "C" __global__ void __launch_bounds__(256) cast_f32_bf16(bf16 *dst, const float *src, long long n) { cast(dst, src, n); }
extern "C" __global__ void __launch_bounds__(256) cast_bf16_f32(float *dst, const bf16 *src, long long n) { cast(dst, src, n); }

extern "C" __global__ void __launch_bounds__(256) split_master(bf16 *p, short *rem, const float *src, long long n) {
	each8(n, aligned16(p) && aligned16(rem) && aligned16(src), [=](long long i, int left, bool vec) {
		float x[8];
		unsigned high[8], low[8];
		load8(x, src + i, left, vec);
#pragma unroll
		for (int j = 0; j < 8; j++) {
			unsigned bits = __float_as_uint(x[j]);
			high[j] = master_high(bits);
			low[j] = (bits - (high[j] << 16)) & 0xffffu;
		}
		if (vec) {
			uint4 a = {high[0] | high[1] << 16, high[2] | high[3] << 16, high[4] | high[5] << 16, high[6] | high[7] << 16};
			uint4 b = {low[0] | low[1] << 16, low[2] | low[3] << 16, low[4] | low[5] << 16, low[6] | low[7] << 16};
			*reinterpret_cast<uint4 *>(p + i) = a;
			*reinterpret_cast<uint4 *>(rem + i) = b;
			return;
		}
#pragma unroll
		for (int j = 0; j < 8; j++)
			if (j < left) p[i + j] = static_cast<bf16>(high[j]), rem[i + j] = static_cast<short>(low[j]);
	});
}

extern "C" __global__ void __launch_bounds__(256) join_master(float *dst, const bf16 *p, const short *rem, long long n) {
	each8(n, aligned16(dst), [=](long long i, int left, bool vec) {
		float x[8];
#pragma unroll
		for (int j = 0; j < 8; j++)
			if (j < left) x[j] = __uint_as_float((static_cast<unsigned>(p[i + j]) << 16) + static_cast<unsigned>(static_cast<int>(rem[i + j])));
		store8(dst + i, x, left, vec);
	});
}

extern "C" __global__ void __launch_bounds__(256) lerp_bf16(bf16 *dst, const bf16 *src, float alpha, long long n) { lerp(dst, src, alpha, n); }
extern "C" __global__ void __launch_bounds__(256) lerp_f32(float *dst, const float *src, float alpha, long long n) { lerp(dst, src, alpha, n); }

extern "C" __global__ void __launch_bounds__(256) first_not_finite_bf16(unsigned long long *first, const bf16 *x, long long n) { first_not_finite(first, x, n); }
extern "C" __global__ void __launch_bounds__(256) first_not_finite_f32(unsigned long long *first, const float *x, long long n) { first_not_finite(first, x, n); }

extern "C" __global__ void __launch_bounds__(256) copy_bytes(unsigned char *dst, const unsigned char *src, long long bytes) {
	long long step = static_cast<long long>(gridDim.x) * blockDim.x, first = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
	long long wide = aligned16(dst) && aligned16(src) ? bytes / 16 : 0;
	for (long long i = first; i < wide; i += step) reinterpret_cast<uint4 *>(dst)[i] = reinterpret_cast<const uint4 *>(src)[i];
	for (long long i = wide * 16 + first; i < bytes; i += step) dst[i] = src[i];
}

extern "C" __global__ void __launch_bounds__(256) zero_bytes(unsigned char *dst, long long bytes) {
	long long step = static_cast<long long>(gridDim.x) * blockDim.x, first = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
	long long wide = aligned16(dst) ? bytes / 16 : 0;
	const uint4 zero = {0, 0, 0, 0};
	for (long long i = first; i < wide; i += step) reinterpret_cast<uint4 *>(dst)[i] = zero;
	for (long long i = wide * 16 + first; i < bytes; i += step) dst[i] = 0;
}

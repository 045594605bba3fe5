// A CPU emulator of the part of CUDA that the kernels use, so that the same
// sources run without a GPU: one fiber per thread of a block or cluster, these one after the
// other. Fibers switch only at barriers and warp operations, in an order that the
// caller picks; a race between barriers shows as results that differ by order.
//
// It checks what hardware does not: every thread of a block (lane of a warp)
// must reach the same barrier (warp operation) by source line; shared memory is
// poisoned with NaN before every block and ends at a guard page; the target of
// a cp.async is poison until its group has been waited for. Warpgroup products read what
// they would see on a card (emu.cc), and their accumulators are NaN until then.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __align__(n) alignas(n)

struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(8) int2 { int x, y; };
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline int2 make_int2(int x, int y) { return {x, y}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace emu {
struct dim3 { unsigned x = 1, y = 1, z = 1; };
struct Thread; // one fiber
extern dim3 thread_idx, block_idx, block_dim, grid_dim;

// order of the threads of a block between two switches
enum Order { kForward, kReverse, kShuffled };
extern Order order;

// Blocks of a cluster are neighbours in x and run together.
void launch(dim3 grid, dim3 block, size_t smem, const std::function<void()> &kernel, unsigned cluster = 1);
void barrier(const char *file, int line);
void cluster_arrive();
void cluster_wait();
int cluster_rank();
// The place of this block's static shared memory in another block of the cluster.
const void *cluster_shared(const void *mine, int rank);
// exchange gives the data (at most 64 bytes) of all 32 lanes of the warp, 64 bytes apart.
const unsigned char *exchange(const void *mine, size_t bytes, int line);
void *block_shared(const void *key, size_t bytes);
void *dynamic_shared();
int lane();
void copy_async(void *dst, const void *src, int bytes, bool valid);
void copy_commit();
void copy_wait(int pending);
// Warpgroup products, see wgmma.cuh.
unsigned shared_address(const void *p);
void fence_async();
void products_begin();
void product(float (*c)[4], const unsigned (&a)[4], unsigned long long b, bool trans, bool add);
void products_end(int line);

template <class T>
T from_lane(T x, int source, int line) {
	T r;
	memcpy(&r, exchange(&x, sizeof x, line) + 64 * (source & 31), sizeof r);
	return r;
}
inline float bf(unsigned short b) {
	unsigned u = unsigned(b) << 16;
	float f;
	memcpy(&f, &u, 4);
	return f;
}
} // namespace emu

#define threadIdx emu::thread_idx
#define blockIdx emu::block_idx
#define blockDim emu::block_dim
#define gridDim emu::grid_dim
#define __syncthreads() emu::barrier(__FILE__, __LINE__)
#define __syncwarp() emu::exchange("", 1, __LINE__)
#define __shfl_xor_sync(mask, x, m) emu::from_lane(x, emu::lane() ^ (m), __LINE__)
#define __shfl_sync(mask, x, l) emu::from_lane(x, l, __LINE__)
// the lane d below, or the own value
#define __shfl_up_sync(mask, x, d) emu::from_lane(x, emu::lane() >= int(d) ? emu::lane() - int(d) : emu::lane(), __LINE__)
#define TR_SHARED(T, name, n) \
	static const char name##_key = 0; \
	T *name = static_cast<T *>(emu::block_shared(&name##_key, sizeof(T) * (n)))
#define TR_DYNAMIC(T, name) T *name = static_cast<T *>(emu::dynamic_shared())

static inline unsigned __ballot_sync(unsigned, bool p) {
	unsigned char mine = p;
	const unsigned char *all = emu::exchange(&mine, 1, -2);
	unsigned r = 0;
	for (int i = 0; i < 32; i++) r |= unsigned(all[64 * i]) << i;
	return r;
}
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
static inline int __ffs(unsigned x) { return __builtin_ffs(int(x)); }
static inline float __int_as_float(int x) { float f; memcpy(&f, &x, 4); return f; }
static inline int __float_as_int(float x) { int i; memcpy(&i, &x, 4); return i; }
static inline float __uint_as_float(unsigned x) { float f; memcpy(&f, &x, 4); return f; }
static inline unsigned __float_as_uint(float x) { unsigned i; memcpy(&i, &x, 4); return i; }
template <class T>
static inline T atomicMin(T *p, T x) {
	T old = *p;
	if (x < old) *p = x;
	return old;
}
static inline void sincospif(float x, float *s, float *c) { *s = float(sin(M_PI * double(x))), *c = float(cos(M_PI * double(x))); }
static inline float rsqrtf(float x) { return float(1 / sqrt(double(x))); }

#ifdef TRAINERD_EMU_CARD
// Arithmetic that errs as far as a card's may (PTX ISA 9, CUDA programming guide):
// ex2.approx.ftz by 2^-22 of its result, sqrt.approx.ftz by 2^-23, __fdividef by 2 ulp and to 0 for divisors beyond
// 2^126, mma.sync by adding 8 products at a time to the accumulator, each cut (not rounded)
// 24 bits below the greatest of them and the sum cut to float32 (Fasi et al., PeerJ CS
// 7:e330, for sm_80). Errors are a hash of the operand, so a kernel stays a function of
// its inputs. The Makefile contracts a*b+c with it, as nvcc does.
namespace emu {
inline double error_of(float x) { // in [-1,1]
	uint64_t h = (uint64_t(__float_as_uint(x)) + 1) * 0x9e3779b97f4a7c15ull;
	return double(int64_t(h ^ h << 31)) / 9223372036854775808.0;
}
inline float cut(double x) {
	float f = float(x);
	return std::abs(double(f)) > std::abs(x) ? nextafterf(f, 0) : f;
}
inline float mma_sum(float c, const float (&x)[16], const float (&y)[16]) {
	for (int from = 0; from < 16; from += 8) {
		double term[9] = {c}, top = std::abs(double(c)), plain = c;
		for (int k = 0; k < 8; k++) {
			term[k + 1] = double(x[from + k]) * y[from + k];
			plain += term[k + 1];
			if (std::abs(term[k + 1]) > top) top = std::abs(term[k + 1]);
		}
		if (!std::isfinite(plain) || top == 0) {
			c = float(plain);
			continue;
		}
		double unit = ldexp(1, ilogb(top) - 24), sum = 0;
		for (double t : term) sum += trunc(t / unit);
		c = cut(sum * unit);
	}
	return c;
}
} // namespace emu
static inline float __fdividef(float a, float b) {
	if (std::abs(b) > 0x1p126f && std::abs(b) < INFINITY) return 0 * a;
	return float(a / double(b) * (1 + 0x1p-22 * emu::error_of(b)));
}
static inline float fast_sqrt(float x) {
	return std::abs(x) < 0x1p-126f ? 0 * x : float(sqrt(double(x)) * (1 + 0x1p-23 * emu::error_of(x)));
}
static inline float fast_exp2(float x) {
	if (std::abs(x) < 0x1p-126f) return 1;
	float y = float(exp2(double(x)) * (1 + 0x1p-22 * emu::error_of(x)));
	return y < 0x1p-126f ? 0 : y;
}
#else
namespace emu {
inline float mma_sum(float c, const float (&x)[16], const float (&y)[16]) {
	for (int k = 0; k < 16; k++) c += x[k] * y[k];
	return c;
}
} // namespace emu
static inline float __fdividef(float a, float b) { return a / b; }
static inline float fast_sqrt(float x) { return sqrtf(x); }
static inline float fast_exp2(float x) { return exp2f(x); }
#endif

// The PTX instructions of common.cuh.
static inline unsigned short emu_bf16(float x) {
	unsigned u = __float_as_uint(x);
	if (x != x) return 0x7fff; // what cvt.rn.bf16 gives for NaN
	return static_cast<unsigned short>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
static inline unsigned pack_bf16(float lo, float hi) { return unsigned(emu_bf16(lo)) | unsigned(emu_bf16(hi)) << 16; }
static inline void emu_ldmatrix(unsigned (&r)[4], const void *row, bool trans) {
	if (uintptr_t(row) & 15) {
		fprintf(stderr, "ldmatrix: row address is not 16-byte aligned\n");
		abort();
	}
	unsigned char mine[16];
	memcpy(mine, row, 16);
	const unsigned char *all = emu::exchange(mine, 16, trans ? -4 : -3);
	int l = emu::lane();
	for (int i = 0; i < 4; i++) {
		unsigned short e[2];
		for (int j = 0; j < 2; j++) {
			int at = trans ? 2 * (l % 4) + j : l / 4, column = trans ? l / 4 : 2 * (l % 4) + j;
			memcpy(&e[j], all + 64 * (8 * i + at) + 2 * column, 2);
		}
		r[i] = unsigned(e[0]) | unsigned(e[1]) << 16;
	}
}
static inline void ldmatrix4(unsigned (&r)[4], const void *row) { emu_ldmatrix(r, row, false); }
static inline void ldmatrix4_trans(unsigned (&r)[4], const void *row) { emu_ldmatrix(r, row, true); }
static inline void mma16816(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
	unsigned mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
	const unsigned char *all = emu::exchange(mine, sizeof mine, -5);
	auto half = [&](int lane, int reg, int high) {
		unsigned short x;
		memcpy(&x, all + 64 * lane + 4 * reg + 2 * high, 2);
		return emu::bf(x);
	};
	int l = emu::lane();
	for (int i = 0; i < 4; i++) {
		int row = l / 4 + (i >= 2 ? 8 : 0), column = 2 * (l % 4) + i % 2;
		float x[16], y[16];
		for (int k = 0; k < 16; k++) {
			// a(row,k): lane (row%8)*4 + (k%8)/2, register (k/8)*2 + row/8; b(k,column): lane column*4 + (k%8)/2, register k/8
			x[k] = half(row % 8 * 4 + k % 8 / 2, k / 8 * 2 + row / 8, k % 2);
			y[k] = half(column * 4 + k % 8 / 2, 4 + k / 8, k % 2);
		}
		c[i] = emu::mma_sum(c[i], x, y);
	}
}
static inline void cp_async16(void *dst, const void *src, bool valid) { emu::copy_async(dst, src, 16, valid); }
static inline void cp_async4(void *dst, const void *src, bool valid) { emu::copy_async(dst, src, 4, valid); }
static inline int cluster_rank() { return emu::cluster_rank(); }
static inline void cluster_arrive() { emu::cluster_arrive(); }
static inline void cluster_wait() { emu::cluster_wait(); }
static inline float cluster_load(const float *mine, int rank) { return *static_cast<const float *>(emu::cluster_shared(mine, rank)); }
static inline void cp_async_commit() { emu::copy_commit(); }
template <int n>
static inline void cp_async_wait() { emu::copy_wait(n); }

// The PTX instructions of wgmma.cuh.
static inline unsigned shared_address(const void *p) { return emu::shared_address(p); }
static inline void fence_async() { emu::fence_async(); }
#define wgmma_begin(...) emu::products_begin()
#define wgmma_end(...) emu::products_end(__LINE__)
template <bool trans, bool add>
static inline void wgmma64(float (*c)[4], const unsigned (&a)[4], unsigned long long b) {
	emu::product(c, a, b, trans, add);
}

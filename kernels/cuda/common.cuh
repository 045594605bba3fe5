// What all kernels share: bf16 as raw bits, 16-byte accesses with scalar
// fallbacks, reductions in a fixed order, and the few PTX instructions that are
// used, each behind one small function. With TRAINERD_EMU the same names come
// from emu/emu.h and the kernels run on a CPU, thread by thread.
#pragma once

#ifdef TRAINERD_EMU
#include "emu/emu.h"
#else

// TR_SHARED declares a static shared array, TR_DYNAMIC the dynamic one.
#define TR_SHARED(T, name, n) __shared__ __align__(16) T name[n]
#define TR_DYNAMIC(T, name)                                  \
	extern __shared__ __align__(128) unsigned char tr_dynamic[]; \
	T *name = reinterpret_cast<T *>(tr_dynamic)

// 2^x; relative error below 2^-22. -inf gives 0, NaN stays NaN.
__device__ __forceinline__ float fast_exp2(float x) {
	float y;
	asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
	return y;
}

// The root of x; relative error below 2^-22. Subnormal x gives 0, NaN stays NaN.
__device__ __forceinline__ float fast_sqrt(float x) {
	float y;
	asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
	return y;
}

// Two floats to packed bf16, nearest even, lo in the low half.
__device__ __forceinline__ unsigned pack_bf16(float lo, float hi) {
	unsigned r;
	asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
	return r;
}

// Four 8x8 bf16 matrices from shared memory: lane l gives the address of row
// l%8 of matrix l/8 (16-byte aligned) and receives elements (l/4, 2*(l%4)..+1)
// of each; with _trans, elements (2*(l%4)..+1, l/4).
__device__ __forceinline__ void ldmatrix4(unsigned (&r)[4], const void *row) {
	unsigned a = static_cast<unsigned>(__cvta_generic_to_shared(row));
	asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(a) : "memory");
}
__device__ __forceinline__ void ldmatrix4_trans(unsigned (&r)[4], const void *row) {
	unsigned a = static_cast<unsigned>(__cvta_generic_to_shared(row));
	asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(a) : "memory");
}

// c[16,8] += a[16,16]·b[16,8]. Lane l holds c at rows l/4 and l/4+8, columns
// 2*(l%4)..+1; a at those rows, columns 2*(l%4)..+1 (a0, a1) and 8 further (a2,
// a3); b at rows 2*(l%4)..+1 (b0) and 8 further (b1), column l/4.
__device__ __forceinline__ void mma16816(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
	asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
	             : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
	             : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 16 bytes from global to shared memory in the background; zeros when !valid
// (src must still be a pointer into the same buffer).
__device__ __forceinline__ void cp_async16(void *dst, const void *src, bool valid) {
	unsigned d = static_cast<unsigned>(__cvta_generic_to_shared(dst));
	int bytes = valid ? 16 : 0;
	asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(d), "l"(src), "r"(bytes) : "memory");
}
// The same for 4 bytes.
__device__ __forceinline__ void cp_async4(void *dst, const void *src, bool valid) {
	unsigned d = static_cast<unsigned>(__cvta_generic_to_shared(dst));
	int bytes = valid ? 4 : 0;
	asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(d), "l"(src), "r"(bytes) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// sm_90 only. Blocks of a cluster run at the same time on neighbouring SMs. Every thread
// of a cluster arrives, and what was written before is seen by all who then wait; between
// the two a thread may do what others need not see. A block must not end while its
// shared memory may be read.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ __forceinline__ int cluster_rank() {
	int r;
	asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
	return r;
}
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
// What another block of the cluster has at the place of this block's shared memory.
__device__ __forceinline__ float cluster_load(const float *mine, int rank) {
	unsigned a = static_cast<unsigned>(__cvta_generic_to_shared(mine)), other;
	float x;
	asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(other) : "r"(a), "r"(rank));
	asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(other) : "memory");
	return x;
}
#endif
// Waits until at most n of this thread's groups are under way.
template <int n>
__device__ __forceinline__ void cp_async_wait() {
	asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
}
#endif

typedef unsigned short bf16;

#define TR_INLINE static __device__ __forceinline__
#define TR_INLINE_MEMBER __device__ __forceinline__

static const unsigned kAllLanes = 0xffffffffu;
static const float kLog2e = 1.4426950408889634f;
static const double kLn2 = 0.69314718055994530942;

TR_INLINE float negative_infinity() { return __int_as_float(static_cast<int>(0xff800000u)); }
TR_INLINE float bf16_float(bf16 x) { return __uint_as_float(static_cast<unsigned>(x) << 16); }
TR_INLINE float bf16_low(unsigned x) { return __uint_as_float(x << 16); }
TR_INLINE float bf16_high(unsigned x) { return __uint_as_float(x & 0xffff0000u); }
TR_INLINE bf16 float_bf16(float x) { return static_cast<bf16>(pack_bf16(x, 0.0f) & 0xffffu); }

// The upper half of a float32 master's bits, rounded half up: the bf16 weight. A card's
// arithmetic makes the NaN 0x7fffffff, which would round up to -0: such a one is cut.
TR_INLINE unsigned master_high(unsigned bits) { return ((bits & 0x7fffffffu) >= 0x7fff8000u ? bits : bits + 0x8000u) >> 16 & 0xffffu; }

TR_INLINE bool aligned16(const void *p) { return (reinterpret_cast<unsigned long long>(p) & 15) == 0; }
TR_INLINE int imin(int a, int b) { return a < b ? a : b; }
TR_INLINE int imax(int a, int b) { return a > b ? a : b; }

TR_INLINE void unpack8(float (&v)[8], uint4 x) {
	v[0] = bf16_low(x.x), v[1] = bf16_high(x.x), v[2] = bf16_low(x.y), v[3] = bf16_high(x.y);
	v[4] = bf16_low(x.z), v[5] = bf16_high(x.z), v[6] = bf16_low(x.w), v[7] = bf16_high(x.w);
}
TR_INLINE uint4 pack8(const float (&v)[8]) {
	uint4 x;
	x.x = pack_bf16(v[0], v[1]), x.y = pack_bf16(v[2], v[3]), x.z = pack_bf16(v[4], v[5]), x.w = pack_bf16(v[6], v[7]);
	return x;
}

// load8 and store8 move up to 8 consecutive elements: with vec all 8 at once
// (the pointer is 16-byte aligned and n is at least 8), otherwise the first n.
// Missing elements are loaded as 0.
TR_INLINE void load8(float (&v)[8], const bf16 *p, int n, bool vec) {
	if (vec) {
		unpack8(v, *reinterpret_cast<const uint4 *>(p));
		return;
	}
#pragma unroll
	for (int i = 0; i < 8; i++) v[i] = i < n ? bf16_float(p[i]) : 0.0f;
}
TR_INLINE void load8(float (&v)[8], const float *p, int n, bool vec) {
	if (vec) {
		float4 a = reinterpret_cast<const float4 *>(p)[0], b = reinterpret_cast<const float4 *>(p)[1];
		v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
		return;
	}
#pragma unroll
	for (int i = 0; i < 8; i++) v[i] = i < n ? p[i] : 0.0f;
}
TR_INLINE void store8(bf16 *p, const float (&v)[8], int n, bool vec) {
	if (vec) {
		*reinterpret_cast<uint4 *>(p) = pack8(v);
		return;
	}
#pragma unroll
	for (int i = 0; i < 8; i++)
		if (i < n) p[i] = float_bf16(v[i]);
}
TR_INLINE void store8(float *p, const float (&v)[8], int n, bool vec) {
	if (vec) {
		reinterpret_cast<float4 *>(p)[0] = make_float4(v[0], v[1], v[2], v[3]);
		reinterpret_cast<float4 *>(p)[1] = make_float4(v[4], v[5], v[6], v[7]);
		return;
	}
#pragma unroll
	for (int i = 0; i < 8; i++)
		if (i < n) p[i] = v[i];
}

// Reductions over a warp: a butterfly, so every lane gets the same bits.
template <class T>
TR_INLINE T warp_sum(T x) {
#pragma unroll
	for (int m = 16; m; m >>= 1) x += __shfl_xor_sync(kAllLanes, x, m);
	return x;
}
TR_INLINE float warp_max(float x) {
#pragma unroll
	for (int m = 16; m; m >>= 1) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, m));
	return x;
}

// Sum over a one-dimensional block of whole warps, to every thread: lanes first,
// then warps in order. The trailing barrier lets it be called again at once.
template <class T>
TR_INLINE T block_sum(T x) {
	TR_SHARED(T, warps, 32);
	x = warp_sum(x);
	if ((threadIdx.x & 31) == 0) warps[threadIdx.x >> 5] = x;
	__syncthreads();
	T sum = 0;
	for (unsigned i = 0; i < (blockDim.x + 31) >> 5; i++) sum += warps[i];
	__syncthreads();
	return sum;
}

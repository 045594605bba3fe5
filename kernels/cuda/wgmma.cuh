// Products of a warpgroup on Hopper (PTX ISA, "Asynchronous warpgroup level matrix
// instructions"): wgmma64 is D[64,64] += A[64,16]·B[16,64] of four warps, A in registers
// as mma16816's, warp w holding rows [16·w, 16·w+16); B is read from shared memory through a
// descriptor. Products run in the background: accumulators may be touched only before
// wgmma_begin and after wgmma_end, and all four warps must take part.
//
// B sees what cp.async wrote once the thread that waited for it has called fence_async and
// then the block a barrier.
#pragma once
#include "common.cuh"

#ifndef TRAINERD_EMU

__device__ __forceinline__ unsigned shared_address(const void *p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }

// What this thread wrote to shared memory becomes visible to the products after a barrier.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// pin keeps the compiler from moving accesses to accumulators over this point.
template <int N>
__device__ __forceinline__ void pin(float (&c)[N][4]) {
#pragma unroll
	for (int n = 0; n < N; n++)
#pragma unroll
		for (int i = 0; i < 4; i++) asm volatile("" : "+f"(c[n][i])::"memory");
}

template <int... N>
__device__ __forceinline__ void wgmma_begin(float (&...c)[N][4]) {
	(pin(c), ...);
	asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
template <int... N>
__device__ __forceinline__ void wgmma_end(float (&...c)[N][4]) {
	asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
	asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
	(pin(c), ...);
}

// c is 8 fragments of 8 columns. With trans the rows of B's tile are its depth, without
// it its columns. Without add the product replaces c.
template <bool trans, bool add>
__device__ __forceinline__ void wgmma64(float (*c)[4], const unsigned (&a)[4], unsigned long long b) {
	asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
	             "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, "
	             "{%32,%33,%34,%35}, %36, %37, 1, 1, %38;"
	             : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]), "+f"(c[1][3]), //
	               "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]), "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3]), //
	               "+f"(c[4][0]), "+f"(c[4][1]), "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]), "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]), //
	               "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]), "+f"(c[7][0]), "+f"(c[7][1]), "+f"(c[7][2]), "+f"(c[7][3])
	             : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(add ? 1 : 0), "n"(trans ? 1 : 0)
	             : "memory");
}
#endif

// describe gives the descriptor of 64 rows of 128 bytes, 16-byte chunks at chunk ^ (row & 7)
// (the 128-byte swizzle: bits 4-6 of an address are exchanged with their exclusive or with bits
// 7-9). Its fields, from bit 0, 16, 32, 62: address, leading offset (unused where a product has
// one panel of 64 columns), stride offset (1,024 bytes from 8 rows to the next), swizzle of
// 128 bytes; offsets in units of 16 bytes. p is where the product's first row or chunk
// would be without the swizzle; the tile starts at a multiple of 1,024 bytes.
TR_INLINE unsigned long long describe(const bf16 *p) {
	return static_cast<unsigned long long>(shared_address(p) >> 4 & 0x3fff) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

// The first place from p on where a tile may start.
TR_INLINE unsigned char *swizzle_aligned(unsigned char *p) { return p + (-shared_address(p) & 1023u); }

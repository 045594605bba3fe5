// Attention by Hopper's warpgroup products: the bodies of attention_forward.cuh and
// attention_backward.cuh with wgmma in place of mma.sync. Code for sm_90a runs on compute
// capability 9.0 alone; for other architectures this file has no kernel. dK/dV of head size
// 128 has none either: its accumulators and operands need more than 255 registers.
//
// Parameters are those of the kernels of the same name without _wgmma; shared memory is
// 1,008 bytes more, so that tiles can start at a multiple of 1,024, and in dK/dV
// 512 more for two stages of that size.
#include "attention_backward.cuh"
#include "attention_forward.cuh"

#if defined(TRAINERD_EMU) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
extern "C" __global__ void __launch_bounds__(128)
	attention_forward_64_wgmma(bf16 *out, float *lse, const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *pk, const bf16 *pv, int q_stride, int k_stride,
                               int v_stride, int pk_stride, int pv_stride, const int *items, float *part_o, float *part_ml, int part_rows, int h, int kv, float scale) {
	attention_forward<64, true>(out, lse, q, k, v, pk, pv, q_stride, k_stride, v_stride, pk_stride, pv_stride, items, part_o, part_ml, part_rows, h, kv, scale);
}
extern "C" __global__ void __launch_bounds__(128)
	attention_forward_128_wgmma(bf16 *out, float *lse, const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *pk, const bf16 *pv, int q_stride, int k_stride,
                               int v_stride, int pk_stride, int pv_stride, const int *items, float *part_o, float *part_ml, int part_rows, int h, int kv, float scale) {
	attention_forward<128, true>(out, lse, q, k, v, pk, pv, q_stride, k_stride, v_stride, pk_stride, pv_stride, items, part_o, part_ml, part_rows, h, kv, scale);
}

extern "C" __global__ void __launch_bounds__(128)
	attention_dkv_64_wgmma(bf16 *dqkv, float *part, const bf16 *qkv, const bf16 *dout, const float *lse, const float *delta, const int *works, const int *ranges,
                           const int *tiles, int h, int kv, float scale) {
	attention_dkv<64, true>(dqkv, part, qkv, dout, lse, delta, works, ranges, tiles, h, kv, scale);
}

extern "C" __global__ void __launch_bounds__(128) attention_dq_64_wgmma(bf16 *dqkv, const bf16 *qkv, const bf16 *dout, const float *lse, const float *delta,
                                                                        const int *tiles, const int *order, int h, int kv, float scale) {
	attention_dq<64, true>(dqkv, qkv, dout, lse, delta, tiles, order, h, kv, scale);
}
extern "C" __global__ void __launch_bounds__(128) attention_dq_128_wgmma(bf16 *dqkv, const bf16 *qkv, const bf16 *dout, const float *lse, const float *delta,
                                                                         const int *tiles, const int *order, int h, int kv, float scale) {
	attention_dq<128, true>(dqkv, qkv, dout, lse, delta, tiles, order, h, kv, scale);
}
#endif

// The backward attention by mma.sync (attention_backward.cuh), its row sums and what joins
// the pieces of keys that many tiles see.
#include "attention_backward.cuh"

// delta[i] = sum(dout·out) of row i of hd elements; 8 lanes a row.
extern "C" __global__ void __launch_bounds__(128) attention_delta(float *delta, const bf16 *dout, const bf16 *out, long long rows, int hd) {
	long long row = static_cast<long long>(blockIdx.x) * 16 + threadIdx.x / 8;
	bool vec = hd % 8 == 0 && aligned16(dout) && aligned16(out);
	float sum = 0;
	if (row < rows) {
		for (int i = threadIdx.x % 8 * 8; i < hd; i += 64) {
			float x[8], y[8];
			load8(x, dout + row * hd + i, hd - i, vec);
			load8(y, out + row * hd + i, hd - i, vec);
#pragma unroll
			for (int j = 0; j < 8; j++) sum += x[j] * y[j];
		}
	}
	sum += __shfl_xor_sync(kAllLanes, sum, 4);
	sum += __shfl_xor_sync(kAllLanes, sum, 2);
	sum += __shfl_xor_sync(kAllLanes, sum, 1);
	if (row < rows && threadIdx.x % 8 == 0) delta[row] = sum;
}

extern "C" __global__ void __launch_bounds__(128)
	attention_dkv_64(bf16 *dqkv, float *part, const bf16 *qkv, const bf16 *dout, const float *lse, const float *delta, const int *works, const int *ranges,
                     const int *tiles, int h, int kv, float scale) {
	attention_dkv<64, false>(dqkv, part, qkv, dout, lse, delta, works, ranges, tiles, h, kv, scale);
}
extern "C" __global__ void __launch_bounds__(128)
	attention_dkv_128(bf16 *dqkv, float *part, const bf16 *qkv, const bf16 *dout, const float *lse, const float *delta, const int *works, const int *ranges,
                      const int *tiles, int h, int kv, float scale) {
	attention_dkv<128, false>(dqkv, part, qkv, dout, lse, delta, works, ranges, tiles, h, kv, scale);
}

extern "C" __global__ void __launch_bounds__(256) attention_dkv_reduce(bf16 *dqkv, const float *part, const int *splits, int h, int kv, int hd) {
	const int *s = splits + 4 * blockIdx.x;
	int key = s[0], keys = s[1], slot = s[2], slots = s[3], head = blockIdx.y;
	long long width = static_cast<long long>(h + 2 * kv) * hd, size = static_cast<long long>(kTile) * hd;
	for (int i = threadIdx.x; i < 2 * keys * hd; i += blockDim.x) {
		int which = i >= keys * hd, at = i - which * keys * hd;
		float sum = 0;
		for (int p = 0; p < slots; p++) sum += part[((static_cast<long long>(slot + p) * kv + head) * 2 + which) * size + at];
		dqkv[(key + at / hd) * width + (h + which * kv + head) * hd + at % hd] = float_bf16(sum);
	}
}

extern "C" __global__ void __launch_bounds__(128) attention_dq_64(bf16 *dqkv, const bf16 *qkv, const bf16 *dout, const float *lse, const float *delta,
                                                                  const int *tiles, const int *order, int h, int kv, float scale) {
	attention_dq<64, false>(dqkv, qkv, dout, lse, delta, tiles, order, h, kv, scale);
}
extern "C" __global__ void __launch_bounds__(128) attention_dq_128(bf16 *dqkv, const bf16 *qkv, const bf16 *dout, const float *lse, const float *delta,
                                                                   const int *tiles, const int *order, int h, int kv, float scale) {
	attention_dq<128, false>(dqkv, qkv, dout, lse, delta, tiles, order, h, kv, scale);
}

// The forward attention by mma.sync (attention_forward.cuh), and what joins its pieces.
#include "attention_forward.cuh"

extern "C" __global__ void __launch_bounds__(128)
	attention_forward_64(bf16 *out, float *lse, const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *pk, const bf16 *pv, int q_stride, int k_stride, int v_stride,
                         int pk_stride, int pv_stride, const int *items, float *part_o, float *part_ml, int part_rows, int h, int kv, float scale) {
	attention_forward<64, false>(out, lse, q, k, v, pk, pv, q_stride, k_stride, v_stride, pk_stride, pv_stride, items, part_o, part_ml, part_rows, h, kv, scale);
}
extern "C" __global__ void __launch_bounds__(128)
	attention_forward_128(bf16 *out, float *lse, const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *pk, const bf16 *pv, int q_stride, int k_stride, int v_stride,
                          int pk_stride, int pv_stride, const int *items, float *part_o, float *part_ml, int part_rows, int h, int kv, float scale) {
	attention_forward<128, false>(out, lse, q, k, v, pk, pv, q_stride, k_stride, v_stride, pk_stride, pv_stride, items, part_o, part_ml, part_rows, h, kv, scale);
}

// A warp joins the pieces of one stacked row, lanes over hd.
extern "C" __global__ void __launch_bounds__(128)
	attention_combine(bf16 *out, float *lse, const float *part_o, const float *part_ml, const int *combines, int part_rows, int h, int kv, int hd) {
	const int *c = combines + 4 * blockIdx.x;
	int q = c[0], n = c[1], part = c[2], pieces = c[3], head = blockIdx.y, group = h / kv, rows = n * group, lane = threadIdx.x % 32;
	for (int r = threadIdx.x / 32; r < rows; r += blockDim.x / 32) {
		long long first = static_cast<long long>(head) * part_rows + part + r;
		float top = negative_infinity(), sum = 0;
		for (int p = 0; p < pieces; p++) top = fmaxf(top, part_ml[(first + static_cast<long long>(p) * rows) * 2]);
		float base = top == negative_infinity() ? 0.0f : top;
		for (int p = 0; p < pieces; p++) {
			long long at = first + static_cast<long long>(p) * rows;
			sum += part_ml[at * 2 + 1] * fast_exp2(part_ml[at * 2] - base);
		}
		float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
		long long token = q + r / group, row = token * h + head * group + r % group;
		for (int d = lane; d < hd; d += 32) {
			float x = 0;
			for (int p = 0; p < pieces; p++) {
				long long at = first + static_cast<long long>(p) * rows;
				x += part_o[at * hd + d] * fast_exp2(part_ml[at * 2] - base);
			}
			out[row * hd + d] = float_bf16(x * inverse);
		}
		if (lse && lane == 0) lse[row] = sum == 0.0f ? negative_infinity() : (top + log2f(sum)) * static_cast<float>(kLn2);
	}
}

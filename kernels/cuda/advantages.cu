// Group-relative advantages in float64: out = (r - mean of the group), over the
// sample standard deviation + 1e-4 on request (Shao et al. 2024, arXiv 2402.03300).
//
// The mean is taken twice, the second time over the centred values, so that equal
// rewards give exactly 0 and a large common offset costs no digits. A warp a
// group; bytes and FLOPs are those of a few thousand rewards: a launch, 5 us.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(128) group_advantages(double *out, const double *r, const int *start, int groups, int std) {
	int g = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
	if (g >= groups) return;
	int from = start[g], to = start[g + 1];
	if (from >= to) return;
	double n = to - from, mean = 0, rest = 0, square = 0;
	for (int i = from + lane; i < to; i += 32) mean += r[i] / n;
	mean = warp_sum(mean);
	for (int i = from + lane; i < to; i += 32) rest += r[i] - mean;
	rest = warp_sum(rest) / n;
	for (int i = from + lane; i < to; i += 32) {
		double x = r[i] - mean - rest;
		out[i] = x;
		square += x * x;
	}
	if (!std) return;
	square = warp_sum(square);
	double scale = sqrt(square / (n > 2 ? n - 1 : 1)) + 1e-4;
	for (int i = from + lane; i < to; i += 32) out[i] /= scale;
}

// Sampling one token a row from float32 logits z [n,V]: temperature, then top-p on
// the tempered distribution, then inversion of the cumulative sum in id order at
// u; temperature 0 takes the arg-max, lowest id on a tie. The log-prob is that of
// the full tempered softmax. Deterministic: sums are float64 in a fixed order.
//
// The row becomes e = exp(z·scale - max). The nucleus is {e > t} and the first `ties`
// ids with e = t, where t is the largest value whose mass {e >= t} reaches topP:
// found by search over the bits of t, three pivots a pass. Each warp owns a
// contiguous span of ids, so one warp alone scans for the drawn id.
//
// A block of 1,024 threads a row. Bytes a row: 4·V read, 4·V written, then reads from
// L2 (two passes; top-p < 1: about 15 more). 64 rows of 151,936: 78 MB, 26 us at
// 3.0 TB/s, and with top-p about 15 · 5 us of L2 time.
#include "common.cuh"

namespace {

const int kStep = 128; // ids a warp takes at a time, 4 a lane

// four loads ids [i, i+4) of a row, 0 from v on.
TR_INLINE void four(float (&x)[4], const float *z, int i, int v, bool aligned, float missing) {
	if (aligned && i + 4 <= v) {
		float4 y = *reinterpret_cast<const float4 *>(z + i);
		x[0] = y.x, x[1] = y.y, x[2] = y.z, x[3] = y.w;
		return;
	}
#pragma unroll
	for (int j = 0; j < 4; j++) x[j] = i + j < v ? z[i + j] : missing;
}

// inclusive sum over the lanes up to this one.
template <class T>
TR_INLINE T warp_scan(T x) {
	int lane = threadIdx.x % 32;
#pragma unroll
	for (int d = 1; d < 32; d <<= 1) {
		T y = __shfl_up_sync(kAllLanes, x, d);
		if (lane >= d) x += y;
	}
	return x;
}

// block_sums sums three values over the block as block_sum does, with one pair of barriers.
TR_INLINE void block_sums(double &a, double &b, double &c) {
	TR_SHARED(double, warps, 3 * 32);
	a = warp_sum(a), b = warp_sum(b), c = warp_sum(c);
	int warp = threadIdx.x / 32;
	if (threadIdx.x % 32 == 0) warps[warp] = a, warps[32 + warp] = b, warps[64 + warp] = c;
	__syncthreads();
	a = b = c = 0;
	for (int i = 0; i < 32; i++) a += warps[i], b += warps[32 + i], c += warps[64 + i];
	__syncthreads();
}

} // namespace

extern "C" __global__ void __launch_bounds__(1024)
	sample_rows(int *token, float *logp, float *logits, long long ld, const float *u, int n, int v, float temperature, float top_p) {
	TR_SHARED(float, tops, 32);
	TR_SHARED(int, ids, 32);
	TR_SHARED(double, masses, 32);
	TR_SHARED(int, ties_of, 32);
	int row = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
	float *z = logits + row * ld;
	bool aligned = ld % 4 == 0 && aligned16(logits), greedy = temperature == 0.0f;
	// Span of ids of this warp.
	int span = (v + 32 * kStep - 1) / (32 * kStep) * kStep, from = imin(v, warp * span), to = imin(v, from + span);

	float top = negative_infinity();
	int best = 0x7fffffff;
	for (int i = from + lane * 4; i < to; i += kStep) {
		float x[4];
		four(x, z, i, v, aligned, negative_infinity());
#pragma unroll
		for (int j = 0; j < 4; j++)
			if (i + j < v && x[j] > top) top = x[j], best = i + j;
	}
#pragma unroll
	for (int m = 16; m; m >>= 1) {
		float other = __shfl_xor_sync(kAllLanes, top, m);
		int id = __shfl_xor_sync(kAllLanes, best, m);
		if (other > top || (other == top && id < best)) top = other, best = id;
	}
	if (lane == 0) tops[warp] = top, ids[warp] = best;
	__syncthreads();
	top = tops[0], best = ids[0];
	for (int i = 1; i < 32; i++)
		if (tops[i] > top || (tops[i] == top && ids[i] < best)) top = tops[i], best = ids[i];

	float scale2 = (greedy ? 1.0f : 1.0f / temperature) * kLog2e, shift = top == negative_infinity() ? 0.0f : top * scale2;
	double mass = 0;
	for (int i = from + lane * 4; i < to; i += kStep) {
		float x[4];
		four(x, z, i, v, aligned, negative_infinity());
#pragma unroll
		for (int j = 0; j < 4; j++) {
			x[j] = fast_exp2(fmaf(x[j], scale2, -shift));
			mass += x[j];
		}
		if (greedy) continue;
		if (aligned && i + 4 <= v) {
			*reinterpret_cast<float4 *>(z + i) = make_float4(x[0], x[1], x[2], x[3]);
		} else {
#pragma unroll
			for (int j = 0; j < 4; j++)
				if (i + j < v) z[i + j] = x[j];
		}
	}
	double total = block_sum(mass);
	// A NaN makes the total NaN; a row of nothing but -inf has total 0.
	bool usable = total > 0;
	if (greedy || !usable) {
		if (threadIdx.x == 0) {
			token[row] = usable ? best : 0;
			logp[row] = usable ? static_cast<float>(-log(total)) : __uint_as_float(0x7fc00000u);
		}
		return;
	}

	// The threshold, as bits: every lane reads only what it wrote itself.
	unsigned low = 0, high = 0;
	double target = static_cast<double>(top_p) * total;
	if (top_p < 1.0f) {
		low = 1, high = 0x7f800000u; // mass {e >= low} reaches the target, {e >= high} does not
		while (high - low > 1) {
			unsigned quarter = (high - low) / 4, p1 = low + quarter, p2 = low + (high - low) / 2, p3 = high - quarter;
			if (p3 == high) p3 = high - 1;
			double m1 = 0, m2 = 0, m3 = 0;
			for (int i = from + lane * 4; i < to; i += kStep) {
				float x[4];
				four(x, z, i, v, aligned, 0.0f);
				float f1 = 0, f2 = 0, f3 = 0;
#pragma unroll
				for (int j = 0; j < 4; j++) {
					unsigned bits = __float_as_uint(x[j]);
					f1 += bits >= p1 ? x[j] : 0.0f;
					f2 += bits >= p2 ? x[j] : 0.0f;
					f3 += bits >= p3 ? x[j] : 0.0f;
				}
				m1 += f1, m2 += f2, m3 += f3;
			}
			block_sums(m1, m2, m3);
			if (m3 >= target) low = p3;
			else if (m2 >= target) low = p2, high = p3;
			else if (m1 >= target) low = p1, high = p2;
			else high = p1;
		}
	}

	double above = 0;
	int equal = 0;
	for (int i = from + lane * 4; i < to; i += kStep) {
		float x[4];
		four(x, z, i, v, aligned, 0.0f);
#pragma unroll
		for (int j = 0; j < 4; j++) {
			unsigned bits = __float_as_uint(x[j]);
			above += bits > low ? x[j] : 0.0f;
			equal += i + j < v && bits == low ? 1 : 0;
		}
	}
	above = warp_sum(above), equal = warp_sum(equal);
	if (lane == 0) masses[warp] = above, ties_of[warp] = equal;
	__syncthreads();
	// Every thread finds the nucleus's mass and the warp whose span holds the aim.
	double all_above = 0, t = __uint_as_float(low);
	int all_equal = 0, ties = 0;
	for (int i = 0; i < 32; i++) all_above += masses[i], all_equal += ties_of[i];
	if (low > 0 && all_equal > 0) {
		double need = ceil((target - all_above) / t);
		ties = need < 1 ? 1 : need > all_equal ? all_equal : static_cast<int>(need);
		while (ties > 1 && all_above + (ties - 1) * t >= target) ties--;
		while (ties < all_equal && all_above + ties * t < target) ties++;
	}
	double aim = static_cast<double>(u[row]) * (all_above + ties * t), seen = 0, before = 0;
	int chosen = -1, tied = 0, tied_before = 0;
	for (int i = 0; i < 32; i++) {
		int mine = imin(imax(ties - tied, 0), ties_of[i]);
		double m = masses[i] + mine * t;
		if (m > 0) {
			chosen = i, before = seen, tied_before = tied;
			if (seen + m > aim) break;
		}
		seen += m;
		tied += ties_of[i];
	}
	if (warp != chosen) return;

	int id = 0;
	float value = 0;
	bool found = false;
	for (int first = from; first < to && !found; first += kStep) {
		int i = first + lane * 4;
		float x[4];
		four(x, z, i, v, aligned, 0.0f);
		int mine = 0;
#pragma unroll
		for (int j = 0; j < 4; j++) mine += low > 0 && __float_as_uint(x[j]) == low ? 1 : 0;
		int rank = tied_before + warp_scan(mine) - mine; // ties before this lane's ids
		double local = 0;
#pragma unroll
		for (int j = 0; j < 4; j++) {
			unsigned bits = __float_as_uint(x[j]);
			if (low > 0 && bits == low) {
				if (rank++ >= ties) x[j] = 0.0f;
			} else if (bits < low || bits == 0) {
				x[j] = 0.0f;
			}
			local += x[j];
		}
		double up_to = before + warp_scan(local), sum = up_to - local;
		// This lane's first id whose cumulative sum exceeds the aim, and its last in the nucleus.
		int hit = -1, last = -1;
		float hit_value = 0, last_value = 0;
#pragma unroll
		for (int j = 0; j < 4; j++) {
			if (x[j] > 0.0f) {
				sum += x[j];
				last = i + j, last_value = x[j];
				if (hit < 0 && sum > aim) hit = i + j, hit_value = x[j];
			}
		}
		unsigned hits = __ballot_sync(kAllLanes, hit >= 0), any = __ballot_sync(kAllLanes, last >= 0);
		if (hits) {
			int source = __ffs(hits) - 1;
			id = __shfl_sync(kAllLanes, hit, source), value = __shfl_sync(kAllLanes, hit_value, source);
			found = true;
		} else if (any) {
			// Kept in case rounding leaves no id beyond the aim.
			int source = 31 - __clz(any);
			id = __shfl_sync(kAllLanes, last, source), value = __shfl_sync(kAllLanes, last_value, source);
		}
		before = __shfl_sync(kAllLanes, up_to, 31);
		tied_before += warp_sum(mine);
	}
	if (lane == 0) {
		token[row] = id;
		logp[row] = static_cast<float>(log(static_cast<double>(value)) - log(total));
	}
}

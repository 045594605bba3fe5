// The rows of the LM head: log-prob of the target, entropy, the loss of one token
// and the gradient of the logits, from a chunk of float32 logits z [n,V].
//
//   y = z·scale (1/temperature)    logp = y[target] - lse(y)    H = -sum p·log p
//   dz_j = scale·(dlogp·([j = target] - p_j) - dH·p_j·(log p_j + H))
//
// Logits are float32, straight from the GEMM's accumulators: a log-sum-exp of bf16
// logits errs by up to 0.06 at |z| of 16-32. The gradient is bf16 and goes into the
// front half of its own row (KERNELS.md): a row is walked in blocks of 8,192 from
// the left with a barrier between reading and writing a block, and block b of the
// gradient covers only logits of blocks <= b/2.
//
// One block of 1,024 threads a row. Bytes an element: 4 for the statistics, then 4
// (from L2 in part: 600 KB a row) + 2. 8,192 rows × 151,936 at 3.0 TB/s: 12.4 GB,
// 4.1 ms, of which the floor without the second read is 7.5 GB, 2.5 ms. FLOPs:
// about 12 an element forward and backward, far below.
#include "common.cuh"

namespace {

// Stat is a running softmax in powers of 2: top, sum of 2^(x-top), and sum of
// 2^(x-top)·(x-top).
struct Stat {
	float top, sum, weighted;
};

TR_INLINE Stat merge(Stat a, Stat b) {
	float top = fmaxf(a.top, b.top), base = top == negative_infinity() ? 0.0f : top;
	float da = a.top - base, db = b.top - base, fa = fast_exp2(da), fb = fast_exp2(db);
	// A part without finite logits has sum 0, or NaN.
	float wa = a.top == negative_infinity() ? a.sum : a.weighted + a.sum * da;
	float wb = b.top == negative_infinity() ? b.sum : b.weighted + b.sum * db;
	Stat r = {top, a.sum * fa + b.sum * fb, wa * fa + wb * fb};
	return r;
}

TR_INLINE void add8(Stat &s, const float (&z)[8], float scale2) {
	float top = z[0];
#pragma unroll
	for (int j = 1; j < 8; j++) top = fmaxf(top, z[j]);
	top *= scale2;
	if (top > s.top) {
		if (s.top == negative_infinity()) {
			s.weighted = s.sum; // 0, or NaN
		} else {
			float d = s.top - top, f = fast_exp2(d);
			s.weighted = (s.weighted + s.sum * d) * f;
			s.sum *= f;
		}
		s.top = top;
	}
	float base = s.top == negative_infinity() ? 0.0f : s.top;
#pragma unroll
	for (int j = 0; j < 8; j++) {
		float d = fmaf(z[j], scale2, -base), e = fast_exp2(d);
		s.sum += e;
		s.weighted += e == 0.0f ? 0.0f : e * d;
	}
}

TR_INLINE float exp32(float x) { return static_cast<float>(exp(static_cast<double>(x))); }

struct Surrogate {
	int kind; // 0 clip, 1 CISPO, 2 NLL
	float eps_low, eps_high, delta, ratio_cap, beta, entropy_coef;
};

// token is Surrogate.Token of surrogate.go, statement for statement.
TR_INLINE void token(const Surrogate &s, float logp, float old, float ref, float adv, float weight, float tis, float entropy, float &loss, float &dlogp, float &dentropy) {
	loss = dlogp = dentropy = 0.0f;
	if (weight == 0.0f) return;
	if (s.kind == 2) {
		loss = -logp, dlogp = -1.0f;
	} else {
		float g = exp32(logp - old);
		if (s.kind == 1) {
			g = g > s.ratio_cap ? s.ratio_cap : g;
			loss = -g * adv * logp, dlogp = -g * adv;
		} else {
			float ratio = g;
			bool clipped = true;
			if (adv > 0.0f && g > 1.0f + s.eps_high) ratio = 1.0f + s.eps_high;
			else if (adv < 0.0f && g < 1.0f - s.eps_low) ratio = 1.0f - s.eps_low;
			else if (adv < 0.0f && s.delta > 0.0f && g > s.delta) ratio = s.delta;
			else clipped = false;
			loss = -ratio * adv;
			if (!clipped) dlogp = -g * adv;
		}
	}
	loss *= tis;
	dlogp *= tis;
	if (s.beta != 0.0f) {
		float d = ref - logp, e = exp32(d);
		loss += s.beta * (e - d - 1.0f);
		dlogp += s.beta * (1.0f - e);
	}
	if (s.entropy_coef != 0.0f) {
		loss -= s.entropy_coef * entropy;
		dentropy = -s.entropy_coef * weight;
	}
	loss *= weight;
	dlogp *= weight;
}

} // namespace

extern "C" __global__ void __launch_bounds__(1024)
	head_rows(float *logits, long long ld, int n, int v, const int *target, float scale, float *logp, float *entropy, int mode, const float *old, const float *ref,
              const float *adv, const float *weight, const float *tis, const float *dlogp, const float *dentropy, int kind, float eps_low, float eps_high, float delta,
              float ratio_cap, float beta, float entropy_coef, float *loss, int *bad) {
	TR_SHARED(float, stats, 3 * 32);
	TR_SHARED(float, shared, 3); // lse in powers of 2, and the gradient's two coefficients
	int row = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
	float *z = logits + row * ld, scale2 = scale * kLog2e;
	bool aligned = ld % 4 == 0 && aligned16(logits);

	Stat s = {negative_infinity(), 0.0f, 0.0f};
	for (int i = threadIdx.x * 8; i < v; i += 8192) {
		float x[8];
		if (v - i >= 8) {
			load8(x, z + i, 8, aligned);
		} else {
#pragma unroll
			for (int j = 0; j < 8; j++) x[j] = i + j < v ? z[i + j] : negative_infinity();
		}
		add8(s, x, scale2);
	}
	// Down the lanes, then down the warps: only lane 0's result is used, as merge
	// need not give the same bits when its arguments are swapped.
#pragma unroll
	for (int m = 16; m; m >>= 1) {
		Stat o = {__shfl_xor_sync(kAllLanes, s.top, m), __shfl_xor_sync(kAllLanes, s.sum, m), __shfl_xor_sync(kAllLanes, s.weighted, m)};
		s = merge(s, o);
	}
	if (lane == 0) stats[warp] = s.top, stats[32 + warp] = s.sum, stats[64 + warp] = s.weighted;
	__syncthreads();
	if (threadIdx.x == 0) {
		for (int i = 1; i < 32; i++) {
			Stat o = {stats[i], stats[32 + i], stats[64 + i]};
			s = merge(s, o);
		}
		int t = target[row];
		bool inside = t >= 0 && t < v;
		if (!inside && bad) atomicMin(bad, row);
		double sum = s.sum, log_sum = log(sum), top = static_cast<double>(s.top) * kLn2;
		float lp = inside ? static_cast<float>(static_cast<double>(scale) * z[t] - top - log_sum) : 0.0f;
		float h = static_cast<float>(log_sum - kLn2 * s.weighted / sum);
		logp[row] = lp;
		if (entropy) entropy[row] = h;
		float l = 0, dl = 0, dh = 0;
		if (inside && mode == 1) {
			Surrogate x = {kind, eps_low, eps_high, delta, ratio_cap, beta, entropy_coef};
			token(x, lp, old ? old[row] : lp, ref ? ref[row] : 0.0f, adv ? adv[row] : 0.0f, weight[row], tis ? tis[row] : 1.0f, h, l, dl, dh);
		} else if (inside && mode == 2) {
			dl = dlogp[row], dh = dentropy ? dentropy[row] : 0.0f;
		}
		if (loss) loss[row] = l;
		// dz = p·(a + b·log p), with log p in powers of 2, and scale·dl more at the target.
		shared[0] = static_cast<float>(s.top + log_sum / kLn2);
		shared[1] = dl, shared[2] = dh;
		stats[0] = -scale * (dl + dh * h);
	}
	if (mode == 0) return;
	__syncthreads();
	float lse2 = shared[0], dl = shared[1], dh = shared[2], a = stats[0], b = -scale * dh * static_cast<float>(kLn2);
	bool none = dl == 0.0f && dh == 0.0f;
	int t = target[row];
	bf16 *dz = reinterpret_cast<bf16 *>(z);
	for (int first = 0; first < v; first += 8192) {
		int i = first + threadIdx.x * 8, left = v - i;
		float x[8];
#pragma unroll
		for (int j = 0; j < 8; j++) x[j] = 0.0f;
		if (left > 0 && !none) {
			load8(x, z + i, left, aligned && left >= 8);
#pragma unroll
			for (int j = 0; j < 8; j++) {
				float y = fmaf(x[j], scale2, -lse2), p = fast_exp2(y);
				x[j] = p == 0.0f ? 0.0f : p * (a + b * y);
				if (i + j == t) x[j] += scale * dl;
			}
		}
		__syncthreads();
		if (left > 0) store8(dz + i, x, left, aligned && left >= 8);
	}
}

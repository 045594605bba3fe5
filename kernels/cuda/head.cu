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
// head_rows_cluster keeps the row: a cluster of 8 blocks on 8 SMs holds it in shared
// memory (76 KB a block of V = 151,936; two blocks an SM, three where it gives all of
// its 228 KB) and exchanges the statistics of its parts. 4 + 2 bytes an element: 8,192 rows × 151,936 at 3.0 TB/s are 7.5 GB,
// 2.5 ms. head_rows, for cards without clusters and for rows of which those under way
// fit into L2, takes a block of 1,024 threads a row and reads it twice: the two rows
// of each SM are 160 MB in flight, far more than L2, so 4 + 4 + 2 bytes, 12.4 GB,
// 4.1 ms. FLOPs: about 12 an element forward and backward, far below.
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

template <int n>
TR_INLINE void add(Stat &s, const float (&z)[n], float scale2) {
	float top = z[0];
#pragma unroll
	for (int j = 1; j < n; j++) top = fmaxf(top, z[j]);
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
	for (int j = 0; j < n; j++) {
		float d = fmaf(z[j], scale2, -base), e = fast_exp2(d);
		s.sum += e;
		s.weighted += e == 0.0f ? 0.0f : e * d;
	}
}

// Down `lanes` lanes of a warp, and for a block down the lanes, then down its warps:
// only lane 0's (thread 0's) result is used, as merge need not give the same bits when
// its arguments are swapped.
TR_INLINE Stat warp_stat(Stat s, int lanes) {
#pragma unroll
	for (int m = lanes / 2; m; m >>= 1) {
		Stat o = {__shfl_xor_sync(kAllLanes, s.top, m), __shfl_xor_sync(kAllLanes, s.sum, m), __shfl_xor_sync(kAllLanes, s.weighted, m)};
		s = merge(s, o);
	}
	return s;
}
template <int warps>
TR_INLINE Stat block_stat(Stat s) {
	TR_SHARED(float, stats, 3 * warps);
	int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
	s = warp_stat(s, 32);
	if (lane == 0) stats[warp] = s.top, stats[warps + warp] = s.sum, stats[2 * warps + warp] = s.weighted;
	__syncthreads();
	if (warp > 0) return s;
	lane = imin(lane, warps - 1);
	Stat w = {stats[lane], stats[warps + lane], stats[2 * warps + lane]};
	return warp_stat(w, warps);
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

// Row is what the kernels take of a row but its logits: pointers to its element, or null.
struct Row {
	const int *target;
	float *logp, *entropy;
	const float *old, *ref, *adv, *weight, *tis, *dlogp, *dentropy;
	float *loss;
	int *bad, index, mode;
};

// Slope gives a logit's gradient: p·(a + b·log p), with log p in powers of 2, and `extra` more at the target.
struct Slope {
	float lse2, a, b, extra;
	int target; // -1: all are 0

	TR_INLINE_MEMBER float of(float z, int j, float scale2) const {
		float y = fmaf(z, scale2, -lse2), p = fast_exp2(y), d = p == 0.0f ? 0.0f : p * (a + b * y);
		return j == target ? d + extra : d;
	}
};

// finish is for one thread: the row's results, written where `writes`, and its slope. z is the target's logit.
TR_INLINE Slope finish(const Row &r, const Surrogate &x, Stat s, float z, bool inside, float scale, bool writes) {
	if (!inside && r.bad && writes) atomicMin(r.bad, r.index);
	double sum = s.sum, log_sum = log(sum), top = static_cast<double>(s.top) * kLn2;
	float lp = inside ? static_cast<float>(static_cast<double>(scale) * z - top - log_sum) : 0.0f;
	float h = static_cast<float>(log_sum - kLn2 * s.weighted / sum);
	float l = 0, dl = 0, dh = 0;
	if (inside && r.mode == 1) {
		token(x, lp, r.old ? *r.old : lp, r.ref ? *r.ref : 0.0f, r.adv ? *r.adv : 0.0f, *r.weight, r.tis ? *r.tis : 1.0f, h, l, dl, dh);
	} else if (inside && r.mode == 2) {
		dl = *r.dlogp, dh = r.dentropy ? *r.dentropy : 0.0f;
	}
	if (writes) {
		*r.logp = lp;
		if (r.entropy) *r.entropy = h;
		if (r.loss) *r.loss = l;
	}
	bool none = dl == 0.0f && dh == 0.0f;
	Slope g = {static_cast<float>(s.top + log_sum / kLn2), -scale * (dl + dh * h), -scale * dh * static_cast<float>(kLn2), scale * dl, none ? -1 : *r.target};
	return g;
}


} // namespace

extern "C" __global__ void __launch_bounds__(1024, 2)
	head_rows(float *logits, long long ld, int n, int v, const int *target, float scale, float *logp, float *entropy, int mode, const float *old, const float *ref,
              const float *adv, const float *weight, const float *tis, const float *dlogp, const float *dentropy, int kind, float eps_low, float eps_high, float delta,
              float ratio_cap, float beta, float entropy_coef, float *loss, int *bad) {
	TR_SHARED(Slope, shared, 1);
	int row = blockIdx.x, t = target[row];
	float *z = logits + row * ld, scale2 = scale * kLog2e;
	bool aligned = ld % 4 == 0 && aligned16(logits), inside = t >= 0 && t < v;

	Stat s = {negative_infinity(), 0.0f, 0.0f};
	for (int i = threadIdx.x * 8; i < v; i += 8192) {
		float x[8];
		if (v - i >= 8) {
			load8(x, z + i, 8, aligned);
		} else {
#pragma unroll
			for (int j = 0; j < 8; j++) x[j] = i + j < v ? z[i + j] : negative_infinity();
		}
		add(s, x, scale2);
	}
	s = block_stat<32>(s);
	if (threadIdx.x == 0) {
		Row r = {target + row, logp + row, entropy ? entropy + row : nullptr, old ? old + row : nullptr, ref ? ref + row : nullptr, adv ? adv + row : nullptr,
		         weight ? weight + row : nullptr, tis ? tis + row : nullptr, dlogp ? dlogp + row : nullptr, dentropy ? dentropy + row : nullptr, loss ? loss + row : nullptr, bad, row, mode};
		Surrogate x = {kind, eps_low, eps_high, delta, ratio_cap, beta, entropy_coef};
		shared[0] = finish(r, x, s, inside ? z[t] : 0.0f, inside, scale, true);
	}
	if (mode == 0) return;
	__syncthreads();
	Slope g = shared[0];
	bf16 *dz = reinterpret_cast<bf16 *>(z);
	for (int first = 0; first < v; first += 8192) {
		int i = first + threadIdx.x * 8, left = v - i;
		float x[8];
#pragma unroll
		for (int j = 0; j < 8; j++) x[j] = 0.0f;
		if (left > 0 && g.target >= 0) {
			load8(x, z + i, left, aligned && left >= 8);
#pragma unroll
			for (int j = 0; j < 8; j++) x[j] = g.of(x[j], i + j, scale2);
		}
		__syncthreads();
		if (left > 0) store8(dz + i, x, left, aligned && left >= 8);
	}
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
namespace {
const int kParts = 8, kPartThreads = 512; // a cluster's blocks, a block's threads
}

// A cluster of kParts blocks a row. ld is a multiple of 4 and logits is 16-byte aligned.
extern "C" __cluster_dims__(8, 1, 1) __global__ void __launch_bounds__(512, 2)
	head_rows_cluster(float *logits, long long ld, int n, int v, const int *target, float scale, float *logp, float *entropy, int mode, const float *old, const float *ref,
                      const float *adv, const float *weight, const float *tis, const float *dlogp, const float *dentropy, int kind, float eps_low, float eps_high, float delta,
                      float ratio_cap, float beta, float entropy_coef, float *loss, int *bad) {
	TR_DYNAMIC(float4, kept); // this block's part of the row
	TR_SHARED(float, mine, 3); // its Stat
	TR_SHARED(Slope, shared, 1);
	int row = blockIdx.x / kParts, rank = cluster_rank(), t = target[row];
	int part = ((v + 7) / 8 + kParts - 1) / kParts * 8, from = rank * part, count = imin(imax(v - from, 0), part), units = (count + 3) / 4;
	float *z = logits + row * ld, scale2 = scale * kLog2e;
	bool inside = t >= 0 && t < v;

	for (int i = threadIdx.x; i < units; i += kPartThreads) cp_async16(kept + i, z + from + i * 4, true);
	cp_async_commit();
	// Read before the barrier: gradients take the place of logits behind it.
	float at_target = threadIdx.x == 0 && inside ? z[t] : 0.0f;
	cp_async_wait<0>(); // a thread reads what it copied itself
	Stat s = {negative_infinity(), 0.0f, 0.0f};
	for (int i = threadIdx.x; i < units; i += kPartThreads) {
		float4 y = kept[i];
		float x[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
		for (int j = 1; j < 4; j++) x[j] = i * 4 + j < count ? x[j] : negative_infinity();
		add(s, x, scale2);
	}
	s = block_stat<kPartThreads / 32>(s);
	if (threadIdx.x == 0) mine[0] = s.top, mine[1] = s.sum, mine[2] = s.weighted;
	cluster_arrive();
	cluster_wait();
	// Every block merges the parts in the same order.
	if (threadIdx.x < 32) {
		int from_rank = imin(threadIdx.x, kParts - 1);
		s.top = cluster_load(mine, from_rank), s.sum = cluster_load(mine + 1, from_rank), s.weighted = cluster_load(mine + 2, from_rank);
		s = warp_stat(s, kParts);
	}
	cluster_arrive();
	if (threadIdx.x == 0) {
		Row r = {target + row, logp + row, entropy ? entropy + row : nullptr, old ? old + row : nullptr, ref ? ref + row : nullptr, adv ? adv + row : nullptr,
		         weight ? weight + row : nullptr, tis ? tis + row : nullptr, dlogp ? dlogp + row : nullptr, dentropy ? dentropy + row : nullptr, loss ? loss + row : nullptr, bad, row, mode};
		Surrogate x = {kind, eps_low, eps_high, delta, ratio_cap, beta, entropy_coef};
		shared[0] = finish(r, x, s, at_target, inside, scale, rank == 0);
	}
	if (mode != 0) {
		__syncthreads();
		Slope g = shared[0];
		bf16 *dz = reinterpret_cast<bf16 *>(z) + from;
		for (int i = threadIdx.x; i < units; i += kPartThreads) {
			float4 y = kept[i];
			float x[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
			for (int j = 0; j < 4; j++) x[j] = g.target < 0 ? 0.0f : g.of(x[j], from + i * 4 + j, scale2);
			if (i * 4 + 4 <= count) {
				uint2 packed = {pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3])};
				*reinterpret_cast<uint2 *>(dz + i * 4) = packed;
			} else {
#pragma unroll
				for (int j = 0; j < 3; j++)
					if (i * 4 + j < count) dz[i * 4 + j] = float_bf16(x[j]);
			}
		}
	}
	cluster_wait(); // the others have read `mine`
}
#endif

package kernels

// AdamW is one step of Adam with decoupled weight decay (Loshchilov & Hutter
// 2019, arXiv 1711.05101, as in PyTorch: p -= lr*wd*p, then the update) over
// flat buffers. A Coef that is not finite leaves everything untouched.
//
// Moments are float32, or compact: 3.03 bytes an element instead of 8. The
// update of a step is computed from its new moments before they are rounded, in
// float32; only what the next step starts from is rounded.
//
// A compact first moment is a code c in I8 and the scale s of its block of
// MomentBlock elements: m = sign(c)·(c/127)⁴·s, s = the greatest |m| of the
// block. Block-wise scales are those of Dettmers et al. 2022 (arXiv 2110.02861);
// the fourth power gives small values their share of the codes, steps of 4/c of
// the value itself: where gradients span four decades within a block it follows
// the exact course more closely than their code, linear codes not at all (the
// figures are in kernels/cpu's TestCompactMomentsFollowFloat32). A block whose
// greatest |m| is below 2^-90 is all zeros. A compact second moment is BF16.
//
// Both are rounded stochastically, to one of the two neighbours with the
// probability that makes the mean exact: to nearest, a moment that moves by less
// than half a code each step would never move (v by 1-Beta2 = 0.05 or 0.001 of
// itself, where a bf16 code is up to 2^-7 of it). The random bits of element i are
// RoundingKey(Seed, Step).Bits(First+i): the upper 16 decide about m, the lower 16 about v.
type AdamW struct {
	P     Buffer // [n], weights
	Rem   Buffer // I16[n], low halves of the float32 masters; nil when P is F32
	G     Buffer // [n], gradients, F32 or BF16; multiplied by Coef
	M     Buffer // F32[n], first moments; compact: I8[n], element 0 begins a block
	Scale Buffer // F32[MomentBlocks(n)] with compact moments, else nil
	V     Buffer // F32[n], second moments; compact: BF16[n]
	Coef  Buffer // F32[1]

	LR, Beta1, Beta2, Eps, WeightDecay float64
	Step                               int64 // from 1, for bias correction and rounding

	Seed  uint64 // of the rounding; with compact moments only
	First int64  // index of element 0 among all of the model's, for the rounding
}

// MomentBlock is how many elements of a compact first moment share a scale.
const MomentBlock = 128

// MomentBlocks returns the scales of n elements.
func MomentBlocks(n int) int { return (n + MomentBlock - 1) / MomentBlock }

// AddGrad is Dst = Src with Fresh, rounded to nearest even, or Dst += Src,
// rounded stochastically: to nearest, an addend below 2^-9 of the sum would be
// lost each time. The random bits of element i are the upper 16 of Key.Bits(First+i).
type AddGrad struct {
	Dst   Buffer // BF16[n], accumulated gradients
	Src   Buffer // F32[n], gradients of one micro-batch
	Fresh bool
	Key   Key
	First int64
}

// Key selects a stream of random bits for stochastic rounding.
type Key struct{ A, B uint32 }

// RoundingKey mixes a seed with counters (step, micro-batch): every combination
// of them is a stream of its own.
func RoundingKey(seed uint64, counters ...uint64) Key {
	k := splitmix(seed)
	for _, c := range counters {
		k = splitmix(k ^ c)
	}
	return Key{uint32(k), uint32(k >> 32)}
}

// splitmix is the output function of SplitMix64 (Steele et al. 2014).
func splitmix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// Bits returns the 32 random bits of an element: a function of key and index
// alone, so that they depend neither on workers nor on how a span is cut into calls.
func (k Key) Bits(i int64) uint32 {
	x := uint32(i) ^ k.A
	x ^= x >> 16
	x *= 0x7feb352d
	x ^= x >> 15
	x += k.B + uint32(i>>32)*0x9e3779b9
	x *= 0x846ca68b
	return x ^ x>>16
}

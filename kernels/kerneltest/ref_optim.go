package kerneltest

import (
	"math"

	"trainerd/kernels"
)

// refAdvantages centres the rewards of each group and scales them.
func refAdvantages(r []float64, start []int32, scale kernels.AdvantageScale) []float64 {
	out := make([]float64, len(r))
	for g := 0; g+1 < len(start); g++ {
		group := r[start[g]:start[g+1]]
		mean := 0.0
		for _, v := range group {
			mean += v / float64(len(group))
		}
		variance := 0.0
		for _, v := range group {
			variance += (v - mean) * (v - mean) / float64(len(group)-1)
		}
		for i, v := range group {
			out[int(start[g])+i] = v - mean
			if scale == kernels.ScaleStd {
				out[int(start[g])+i] /= math.Sqrt(variance) + 1e-4
			}
		}
	}
	return out
}

// refAdamW is one step on one element, written as PyTorch documents it.
func refAdamW(p, g, m, v float64, x kernels.AdamW, coef float64) (p2, m2, v2 float64) {
	g *= coef
	p -= x.LR * x.WeightDecay * p
	m = x.Beta1*m + (1-x.Beta1)*g
	v = x.Beta2*v + (1-x.Beta2)*g*g
	mHat := m / (1 - math.Pow(x.Beta1, float64(x.Step)))
	vHat := v / (1 - math.Pow(x.Beta2, float64(x.Step)))
	return p - x.LR*mHat/(math.Sqrt(vHat)+x.Eps), m, v
}

// refMoment is the value of a compact first moment.
func refMoment(code int8, scale float64) float64 {
	return math.Copysign(math.Pow(float64(code)/127, 4), float64(code)) * scale
}

// refCode rounds t = 127⁴·m/scale stochastically: of the fourth powers on both sides of
// |t| the greater is taken when the 16 random bits, as a fraction, are below the way to it.
func refCode(t float64, random uint32) float64 {
	a := math.Abs(t)
	q := math.Floor(math.Pow(a, 0.25))
	if q >= 127 {
		return math.Copysign(127, t)
	}
	if below, above := math.Pow(q, 4), math.Pow(q+1, 4); (float64(random)+0.5)/65536 < (a-below)/(above-below) {
		q++
	}
	return math.Copysign(q, t)
}

// refHalf rounds to bf16 stochastically: away from zero when the dropped 16 bits
// of the float32 and the random ones add up to one more.
func refHalf(x float64, random uint32) float64 {
	bits := math.Float32bits(float32(x))
	kept, dropped := bits>>16, bits&0xffff
	if dropped+random > 0xffff {
		kept++
	}
	return float64(math.Float32frombits(kept << 16))
}

// refRandom are the random bits of element i in stream (seed, counter), refRandom2
// in (seed, counter, another): SplitMix64's output over seed and counters, the
// halves of which key a hash of 32 bits.
func refRandom(seed, counter uint64, i int64) uint32 { return refHash(refMix(refMix(seed)^counter), i) }

func refRandom2(seed, counter, another uint64, i int64) uint32 {
	return refHash(refMix(refMix(refMix(seed)^counter)^another), i)
}

func refMix(z uint64) uint64 {
	z += 0x9e3779b97f4a7c15
	z ^= z >> 30
	z *= 0xbf58476d1ce4e5b9
	z ^= z >> 27
	z *= 0x94d049bb133111eb
	z ^= z >> 31
	return z
}

func refHash(key uint64, i int64) uint32 {
	lo, hi := uint32(uint64(i)), uint32(uint64(i)>>32)
	h := lo ^ uint32(key)
	h = (h ^ h>>16) * 2146121005
	h = h ^ h>>15
	h = (h + uint32(key>>32) + hi*2654435769) * 2221713035
	return h ^ h>>16
}

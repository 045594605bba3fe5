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

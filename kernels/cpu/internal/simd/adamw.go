package simd

import "math"

// AdamWCoef are the scalars of one AdamW step, computed in float64 and rounded
// once. The assembly reads the fields in this order.
type AdamWCoef struct {
	Grad     float32 // gradients are multiplied by it (clipping, loss scale)
	Decay    float32 // 1 - lr*weight decay
	Beta1    float32
	Alpha1   float32 // 1 - Beta1
	Beta2    float32
	Alpha2   float32 // 1 - Beta2
	StepSize float32 // lr / (1 - Beta1^step)
	InvBias2 float32 // 1 / sqrt(1 - Beta2^step)
	Eps      float32
}

// NewAdamWCoef computes the scalars of the given step, counted from 1.
func NewAdamWCoef(lr, beta1, beta2, eps, weightDecay float64, step int64, grad float32) AdamWCoef {
	return AdamWCoef{
		Grad:     grad,
		Decay:    float32(1 - lr*weightDecay),
		Beta1:    float32(beta1),
		Alpha1:   float32(1 - beta1),
		Beta2:    float32(beta2),
		Alpha2:   float32(1 - beta2),
		StepSize: float32(lr / (1 - math.Pow(beta1, float64(step)))),
		InvBias2: float32(1 / math.Sqrt(1-math.Pow(beta2, float64(step)))),
		Eps:      float32(eps),
	}
}

// AdamW updates weights p and moments m and v from gradients g:
//
//	g' = Grad*g;  m = Beta1*m + Alpha1*g';  v = Beta2*v + Alpha2*g'²
//	p = Decay*p - StepSize * m / (sqrt(v)*InvBias2 + Eps)
func AdamW(p, g, m, v []float32, c *AdamWCoef) {
	n := len(p)
	g, m, v = g[:n], m[:n], v[:n]
	if n == 0 {
		return
	}
	switch active {
	case AVX512:
		adamW512(n, &p[0], &g[0], &m[0], &v[0], &c.Grad)
	case AVX2:
		adamW2(n, &p[0], &g[0], &m[0], &v[0], &c.Grad)
	default:
		adamWGo(p, g, m, v, c)
	}
}

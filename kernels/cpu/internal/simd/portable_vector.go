package simd

import "math"

// The portable twins. Sums run over four interleaved partial sums, so that the
// additions do not wait for each other.

func dotGo(x, y []float32) float32 {
	var s0, s1, s2, s3 float32
	i := 0
	for ; i+4 <= len(x); i += 4 {
		s0 += x[i] * y[i]
		s1 += x[i+1] * y[i+1]
		s2 += x[i+2] * y[i+2]
		s3 += x[i+3] * y[i+3]
	}
	for ; i < len(x); i++ {
		s0 += x[i] * y[i]
	}
	return (s0 + s1) + (s2 + s3)
}

func axpyGo(a float32, x, y []float32) {
	for i := range y {
		y[i] += a * x[i]
	}
}

func scaleGo(dst, x []float32, a float32) {
	for i := range dst {
		dst[i] = a * x[i]
	}
}

func addGo(dst, x, y []float32) {
	for i := range dst {
		dst[i] = x[i] + y[i]
	}
}

func mulGo(dst, x, y []float32) {
	for i := range dst {
		dst[i] = x[i] * y[i]
	}
}

func mulAddGo(dst, x, y []float32) {
	for i := range dst {
		dst[i] += x[i] * y[i]
	}
}

func scaleMulGo(dst, x, y []float32, a float32) {
	for i := range dst {
		dst[i] = a * x[i] * y[i]
	}
}

func lerpGo(dst, src []float32, alpha float32) {
	beta := 1 - alpha
	for i := range dst {
		dst[i] = beta*dst[i] + alpha*src[i]
	}
}

func sumGo(x []float32) float64 {
	var s0, s1, s2, s3 float64
	i := 0
	for ; i+4 <= len(x); i += 4 {
		s0 += float64(x[i])
		s1 += float64(x[i+1])
		s2 += float64(x[i+2])
		s3 += float64(x[i+3])
	}
	for ; i < len(x); i++ {
		s0 += float64(x[i])
	}
	return (s0 + s1) + (s2 + s3)
}

func sumSquaresGo(x []float32) float64 {
	var s0, s1, s2, s3 float64
	i := 0
	for ; i+4 <= len(x); i += 4 {
		s0 += float64(x[i]) * float64(x[i])
		s1 += float64(x[i+1]) * float64(x[i+1])
		s2 += float64(x[i+2]) * float64(x[i+2])
		s3 += float64(x[i+3]) * float64(x[i+3])
	}
	for ; i < len(x); i++ {
		s0 += float64(x[i]) * float64(x[i])
	}
	return (s0 + s1) + (s2 + s3)
}

func maxGo(x []float32) float32 {
	top := float32(math.Inf(-1))
	for _, v := range x {
		if v > top || v != v {
			top = v
		}
		if top != top {
			return top
		}
	}
	return top
}

func ropeGo(out, x, cos, sin []float32, sign float32) {
	h := len(cos)
	for i, c := range cos {
		s := sign * sin[i]
		a, b := x[i], x[i+h]
		out[i] = a*c - b*s
		out[i+h] = b*c + a*s
	}
}

func adamWGo(p, g, m, v []float32, c *AdamWCoef) {
	for i := range p {
		gi := c.Grad * g[i]
		mi := c.Beta1*m[i] + c.Alpha1*gi
		vi := c.Beta2*v[i] + c.Alpha2*gi*gi
		root := float32(math.Sqrt(float64(vi)))
		p[i] = c.Decay*p[i] - c.StepSize*(mi/(root*c.InvBias2+c.Eps))
		m[i], v[i] = mi, vi
	}
}

package kerneltest

import "math"

// refGemmAt is one element of op(A)·op(B).
func refGemmAt(a, b []float64, m, n, k int, ta, tb bool, i, j int) value {
	var r value
	for p := range k {
		x, y := i*k+p, p*n+j
		if ta {
			x = p*m + i
		}
		if tb {
			y = j*k + p
		}
		r.v += a[x] * b[y]
		r.mag += math.Abs(a[x] * b[y])
	}
	return r
}

func refGemm(a, b []float64, m, n, k int, ta, tb bool) []value {
	c := make([]value, m*n)
	for i := range m {
		for j := range n {
			c[i*n+j] = refGemmAt(a, b, m, n, k, ta, tb, i, j)
		}
	}
	return c
}

// refColumnSums is the sum over rows of x[m,n].
func refColumnSums(x []float64, m, n int) []value {
	s := make([]value, n)
	for i := range m {
		for j := range n {
			s[j].v += x[i*n+j]
			s[j].mag += math.Abs(x[i*n+j])
		}
	}
	return s
}

func silu(x float64) float64 { return x / (1 + math.Exp(-x)) }

// siluSlope is the derivative of silu.
func siluSlope(x float64) float64 {
	s := 1 / (1 + math.Exp(-x))
	return s * (1 + x*(1-s))
}

// refSwiGLU is silu(gate)*up over rows gate|up.
func refSwiGLU(gu []float64, t, f int) []value {
	out := make([]value, t*f)
	for i := range t {
		for j := range f {
			v := silu(gu[i*2*f+j]) * gu[i*2*f+f+j]
			out[i*f+j] = value{v, math.Abs(v)}
		}
	}
	return out
}

func refSwiGLUBackward(dout, gu []float64, t, f int) []value {
	d := make([]value, t*2*f)
	for i := range t {
		for j := range f {
			g, u, dy := gu[i*2*f+j], gu[i*2*f+f+j], dout[i*f+j]
			// 1 + g(1-s) cancels near its root: errors scale with its terms.
			s := 1 / (1 + math.Exp(-g))
			d[i*2*f+j] = value{dy * u * siluSlope(g), math.Abs(dy*u) * s * (1 + math.Abs(g*(1-s)))}
			d[i*2*f+f+j] = value{dy * silu(g), math.Abs(dy * silu(g))}
		}
	}
	return d
}

package cpu

import "math"

func axpy(a float32, x, y []float32) {
	y = y[:len(x)]
	for i, v := range x {
		y[i] += a * v
	}
}

func dot(x, y []float32) float32 {
	y = y[:len(x)]
	var s [8]float32
	i := 0
	for ; i+8 <= len(x); i += 8 {
		for j := range s {
			s[j] += x[i+j] * y[i+j]
		}
	}
	t := (s[0] + s[1]) + (s[2] + s[3]) + ((s[4] + s[5]) + (s[6] + s[7]))
	for ; i < len(x); i++ {
		t += x[i] * y[i]
	}
	return t
}

func exp(x float32) float32 { return float32(math.Exp(float64(x))) }

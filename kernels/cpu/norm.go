package cpu

import (
	"math"

	"trainerd/kernels"
)

func (d *device) RMSNorm(x kernels.Norm) {
	const op = "rmsnorm"
	t, n := x.T, x.D
	must(t >= 0 && n > 0, op, "T %d D %d", t, n)
	out, in, w := floats(op, "Out", x.Out, t*n), floats(op, "X", x.X, t*n), floats(op, "W", x.W, n)
	rstd, add := optional(op, "Rstd", x.Rstd, t), optional(op, "Add", x.Add, t*n)
	var sum []float32
	if add != nil {
		sum = floats(op, "Sum", x.Sum, t*n)
	}
	d.blocks(t, rowBlock(n), func(from, to int) {
		for i := from; i < to; i++ {
			row := in[i*n:][:n]
			if add != nil {
				s := sum[i*n:][:n]
				for j, v := range add[i*n:][:n] {
					s[j] = row[j] + v
				}
				row = s
			}
			r := inverseRMS(row, x.Eps)
			if rstd != nil {
				rstd[i] = r
			}
			o := out[i*n:][:n]
			for j, v := range row {
				o[j] = v * r * w[j]
			}
		}
	})
}

// inverseRMS returns 1/sqrt(mean(x²)+eps).
func inverseRMS(x []float32, eps float32) float32 {
	return float32(1 / math.Sqrt(float64(dot(x, x))/float64(len(x))+float64(eps)))
}

func (d *device) RMSNormBackward(x kernels.NormBackward) {
	const op = "rmsnorm backward"
	t, n := x.T, x.D
	must(t >= 0 && n > 0, op, "T %d D %d", t, n)
	dx, dw := floats(op, "DX", x.DX, t*n), floats(op, "DW", x.DW, n)
	dy, in, w := floats(op, "DY", x.DY, t*n), floats(op, "X", x.X, t*n), floats(op, "W", x.W, n)
	rstd := floats(op, "Rstd", x.Rstd, t)
	d.reduceRows(dw, t, x.Accumulate, func(sum []float32, from, to int) {
		for i := from; i < to; i++ {
			normRowBackward(dx[i*n:][:n], sum, dy[i*n:][:n], in[i*n:][:n], w, rstd[i], x.AddTo)
		}
	})
}

// normRowBackward is the gradient of one row out = x*r*w, r = 1/sqrt(mean(x²)+eps):
//
//	dx_j = r*dy_j*w_j - x_j*r³/n * sum_k dy_k*w_k*x_k      dw_j += dy_j*x_j*r
//
// dx may alias dy.
func normRowBackward(dx, dw, dy, x, w []float32, r float32, add bool) {
	var s float32
	for j, g := range dy {
		s += g * w[j] * x[j]
		dw[j] += g * x[j] * r
	}
	c := r * r * r * s / float32(len(x))
	for j, g := range dy {
		v := r*g*w[j] - c*x[j]
		if add {
			v += dx[j]
		}
		dx[j] = v
	}
}

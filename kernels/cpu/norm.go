package cpu

import (
	"math"

	"trainerd/kernels"
	"trainerd/kernels/cpu/internal/simd"
)

func (d *device) RMSNorm(x kernels.Norm) {
	const op = "rmsnorm"
	t, n := x.T, x.D
	must(t >= 0 && n > 0, op, "T %d D %d", t, n)
	out, in, w := floats(op, "Out", x.Out, t*n), floats(op, "X", x.X, t*n), floats(op, "W", x.W, n)
	rstd, add := optional(op, "Rstd", x.Rstd, t), optional(op, "Add", x.Add, t*n)
	var sum []float32
	if x.Add != nil {
		sum = floats(op, "Sum", x.Sum, t*n)
	}
	d.blocks(t, rowBlock(n), func(from, to int) {
		for i := from; i < to; i++ {
			row := in[i*n:][:n]
			if x.Add != nil {
				s := sum[i*n:][:n]
				simd.Add(s, row, add[i*n:])
				row = s
			}
			r := inverseRMS(row, x.Eps)
			if x.Rstd != nil {
				rstd[i] = r
			}
			simd.ScaleMul(out[i*n:][:n], row, w, r)
		}
	})
}

// inverseRMS returns 1/sqrt(mean(x²)+eps).
func inverseRMS(x []float32, eps float32) float32 {
	return float32(1 / math.Sqrt(float64(simd.Dot(x, x))/float64(len(x))+float64(eps)))
}

func (d *device) RMSNormBackward(x kernels.NormBackward) {
	const op = "rmsnorm backward"
	t, n := x.T, x.D
	must(t >= 0 && n > 0, op, "T %d D %d", t, n)
	dx, dw := floats(op, "DX", x.DX, t*n), floats(op, "DW", x.DW, n)
	dy, in, w := floats(op, "DY", x.DY, t*n), floats(op, "X", x.X, t*n), floats(op, "W", x.W, n)
	rstd := floats(op, "Rstd", x.Rstd, t)
	d.reduceRows(dw, t, x.Accumulate, func(wk *worker, sum []float32, from, to int) {
		temp := wk.floats(n)
		for i := from; i < to; i++ {
			simd.NormBackward(dx[i*n:][:n], sum, dy[i*n:], in[i*n:], w, temp, rstd[i], x.AddTo)
		}
	})
}

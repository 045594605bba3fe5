package cpu

import "trainerd/kernels"

func (d *device) SwiGLU(out, gu kernels.Buffer, t, f int) {
	const op = "swiglu"
	o, x := floats(op, "out", out, t*f), floats(op, "gu", gu, t*2*f)
	d.blocks(t, rowBlock(f), func(from, to int) {
		for i := from; i < to; i++ {
			g, u, y := x[i*2*f:][:f], x[i*2*f+f:][:f], o[i*f:][:f]
			for j, v := range g {
				y[j] = v / (1 + exp(-v)) * u[j]
			}
		}
	})
}

func (d *device) SwiGLUBackward(dgu, dout, gu kernels.Buffer, t, f int) {
	const op = "swiglu backward"
	dx, dy, x := floats(op, "dgu", dgu, t*2*f), floats(op, "dout", dout, t*f), floats(op, "gu", gu, t*2*f)
	d.blocks(t, rowBlock(f), func(from, to int) {
		for i := from; i < to; i++ {
			g, u, gy := x[i*2*f:][:f], x[i*2*f+f:][:f], dy[i*f:][:f]
			dg, du := dx[i*2*f:][:f], dx[i*2*f+f:][:f]
			for j, v := range g {
				s := 1 / (1 + exp(-v))
				a, b := gy[j]*u[j]*s*(1+v*(1-s)), gy[j]*v*s
				dg[j], du[j] = a, b
			}
		}
	})
}

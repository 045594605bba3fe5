package cpu

import (
	"trainerd/kernels"
	"trainerd/kernels/cpu/internal/simd"
)

func (d *device) SwiGLU(out, gu kernels.Buffer, t, f int) {
	const op = "swiglu"
	o, x := floats(op, "out", out, t*f), floats(op, "gu", gu, t*2*f)
	d.blocks(t, rowBlock(f), func(from, to int) {
		for i := from; i < to; i++ {
			simd.SiLUMul(o[i*f:][:f], x[i*2*f:][:f], x[i*2*f+f:][:f])
		}
	})
}

func (d *device) SwiGLUBackward(dgu, dout, gu kernels.Buffer, t, f int) {
	const op = "swiglu backward"
	dx, dy, x := floats(op, "dgu", dgu, t*2*f), floats(op, "dout", dout, t*f), floats(op, "gu", gu, t*2*f)
	d.blocks(t, rowBlock(f), func(from, to int) {
		for i := from; i < to; i++ {
			simd.SiLUMulBackward(dx[i*2*f:][:f], dx[i*2*f+f:][:f], dy[i*f:][:f], x[i*2*f:][:f], x[i*2*f+f:][:f])
		}
	})
}

package cuda

import (
	"math"

	"trainerd/kernels"
)

// maxNormWidth is the widest row that the backward kernel of RMSNorm takes.
const maxNormWidth = 8192

// RMSNorm implements kernels.Device.
func (d *Device) RMSNorm(x kernels.Norm) {
	const op = "rmsnorm"
	must(x.T >= 0 && x.D > 0, op, "T %d D %d", x.T, x.D)
	must(x.Add == nil || x.Sum != nil, op, "Add without Sum")
	n := x.T * x.D
	out, rstd, in := place(op, "Out", x.Out, n, kernels.BF16), placeOr0(op, "Rstd", x.Rstd, x.T, kernels.F32), place(op, "X", x.X, n, kernels.BF16)
	add, w := placeOr0(op, "Add", x.Add, n, kernels.BF16), place(op, "W", x.W, x.D, kernels.BF16)
	var sum address
	if x.Add != nil {
		sum = place(op, "Sum", x.Sum, n, kernels.BF16)
	}
	if x.T == 0 {
		return
	}
	grid, block := size2{ceil(x.T, 4), 1}, size2{32, 4}
	if x.D > 1024 {
		grid, block = size2{x.T, 1}, size2{256, 1}
	}
	d.enqueue(of(op, "T %d D %d", x.T, x.D), func(c driver) error {
		return c.launch("rmsnorm_bf16", grid, block, 0, out, rstd, in, add, sum, w, int32(x.T), int32(x.D), x.Eps)
	})
}

// RMSNormBackward implements kernels.Device.
func (d *Device) RMSNormBackward(x kernels.NormBackward) {
	const op = "rmsnorm backward"
	must(x.T >= 0 && x.D > 0 && x.D <= maxNormWidth, op, "T %d D %d, expected D in [1,%d]", x.T, x.D, maxNormWidth)
	n := x.T * x.D
	grad := span(op, "DW", x.DW, kernels.F32, kernels.BF16)
	dx, dw, dy := place(op, "DX", x.DX, n, kernels.BF16), place(op, "DW", x.DW, x.D, grad.t), place(op, "DY", x.DY, n, kernels.BF16)
	in, w, rstd := place(op, "X", x.X, n, kernels.BF16), place(op, "W", x.W, x.D, kernels.BF16), place(op, "Rstd", x.Rstd, x.T, kernels.F32)
	if x.T == 0 {
		if !x.Accumulate {
			d.Zero(x.DW)
		}
		return
	}
	parts, block, shared, t := clamp(ceil(x.T, 4), 1, 528), size2{32, 4}, 16*x.D, grad.t
	if x.D > 1024 {
		parts, block, shared = clamp(x.T, 1, 264), size2{256, 1}, 0
	}
	d.enqueue(of(op, "T %d D %d", x.T, x.D), func(c driver) error {
		err := c.launch("rmsnorm_backward_bf16", size2{parts, 1}, block, shared, dx, d.partials, dy, in, w, rstd, int32(x.T), int32(x.D), flag32(x.AddTo))
		if err != nil {
			return err
		}
		return d.reduce(c, dw, t, 0, parts, x.D, x.D, x.Accumulate)
	})
}

// turnsKey names a table of rotary frequencies.
type turnsKey struct {
	theta float64
	hd    int
}

// frequencies returns theta^(-2i/hd)/(2π) for i < hd/2: turns by position.
func (k turnsKey) frequencies() []float64 {
	x := make([]float64, k.hd/2)
	for i := range x {
		x[i] = math.Pow(k.theta, -2*float64(i)/float64(k.hd)) / (2 * math.Pi)
	}
	return x
}

// frequencies returns the device's copy of a table. It lives as long as the device,
// a few hundred bytes for each model shape.
func (d *Device) frequencies(k turnsKey) address {
	if at, ok := d.turns[k]; ok {
		return at
	}
	x := raw(k.frequencies())
	at, err := d.take("rotary frequencies", int64(len(x)))
	if err != nil {
		d.enqueue(of("rope", "head dimension %d", k.hd), func(driver) error { return err })
		return 0
	}
	d.send("rope", at, x, false)
	d.turns[k] = at
	return at
}

// Rope implements kernels.Device.
func (d *Device) Rope(x kernels.Rope) {
	const op = "rope"
	must(x.T >= 0 && x.H > 0 && x.KV > 0 && x.HD > 0 && x.HD%2 == 0, op, "T %d H %d KV %d hd %d", x.T, x.H, x.KV, x.HD)
	must((x.QW == nil) == (x.KW == nil), op, "only one of QW and KW is given")
	n := x.T * (x.H + 2*x.KV) * x.HD
	out, in, pos := place(op, "Out", x.Out, n, kernels.BF16), place(op, "In", x.In, n, kernels.BF16), place(op, "Pos", x.Pos, x.T, kernels.I32)
	qw, kw := placeOr0(op, "QW", x.QW, x.HD, kernels.BF16), placeOr0(op, "KW", x.KW, x.HD, kernels.BF16)
	must(qw == 0 || out != in, op, "Out aliases In and QW is given")
	var rstd address
	if qw != 0 {
		rstd = placeOr0(op, "Rstd", x.Rstd, x.T*(x.H+x.KV), kernels.F32)
	}
	if x.T == 0 {
		return
	}
	turns := d.frequencies(turnsKey{x.Theta, x.HD})
	d.enqueue(of(op, "T %d H %d KV %d hd %d", x.T, x.H, x.KV, x.HD), func(c driver) error {
		return c.launch("rope_bf16", size2{ceil(x.T, 4), 1}, size2{128, 1}, 16*x.HD, out, in, pos, turns, qw, kw, rstd,
			int32(x.T), int32(x.H), int32(x.KV), int32(x.HD), x.Eps)
	})
}

// RopeBackward implements kernels.Device.
func (d *Device) RopeBackward(x kernels.RopeBackward) {
	const op = "rope backward"
	must(x.T >= 0 && x.H > 0 && x.KV > 0 && x.HD > 0 && x.HD%2 == 0, op, "T %d H %d KV %d hd %d", x.T, x.H, x.KV, x.HD)
	must((x.QW == nil) == (x.KW == nil), op, "only one of QW and KW is given")
	n := x.T * (x.H + 2*x.KV) * x.HD
	g, pos := place(op, "D", x.D, n, kernels.BF16), place(op, "Pos", x.Pos, x.T, kernels.I32)
	var in, qw, kw, rstd, dqw, dkw, partials address
	var t kernels.DType
	parts, shared := ceil(x.T, 4), 16*x.HD
	if x.QW != nil {
		in, rstd = place(op, "In", x.In, n, kernels.BF16), place(op, "Rstd", x.Rstd, x.T*(x.H+x.KV), kernels.F32)
		qw, kw = place(op, "QW", x.QW, x.HD, kernels.BF16), place(op, "KW", x.KW, x.HD, kernels.BF16)
		t = span(op, "DQW", x.DQW, kernels.F32, kernels.BF16).t
		dqw, dkw = place(op, "DQW", x.DQW, x.HD, t), place(op, "DKW", x.DKW, x.HD, t)
		parts, shared, partials = clamp(parts, 1, 264), 48*x.HD, d.partials
	}
	if x.T == 0 {
		if x.QW != nil && !x.Accumulate {
			d.Zero(x.DQW)
			d.Zero(x.DKW)
		}
		return
	}
	turns := d.frequencies(turnsKey{x.Theta, x.HD})
	d.enqueue(of(op, "T %d H %d KV %d hd %d", x.T, x.H, x.KV, x.HD), func(c driver) error {
		err := c.launch("rope_backward_bf16", size2{parts, 1}, size2{128, 1}, shared, g, in, pos, turns, qw, kw, rstd, partials,
			int32(x.T), int32(x.H), int32(x.KV), int32(x.HD), int32(parts))
		if err != nil || qw == 0 {
			return err
		}
		if err := d.reduce(c, dqw, t, 0, parts, x.HD, 2*x.HD, x.Accumulate); err != nil {
			return err
		}
		return d.reduce(c, dkw, t, x.HD, parts, x.HD, 2*x.HD, x.Accumulate)
	})
}

package cuda

import (
	"fmt"
	"math"

	"trainerd/kernels"
)

// SumSquares implements kernels.Device.
func (d *Device) SumSquares(out, x kernels.Buffer) {
	const op = "sum of squares"
	to, v := place(op, "out", out, 1, kernels.F32), span(op, "x", x, kernels.F32, kernels.BF16)
	if v.n == 0 {
		return
	}
	kernel, n, at := "sum_squares_partial_f32", v.n, v.at
	if v.t == kernels.BF16 {
		kernel = "sum_squares_partial_bf16"
	}
	parts := clamp(ceil(n, 8192), 1, 1056)
	d.enqueue(of(op, "%d elements", n), func(c driver) error {
		if err := c.launch(kernel, size2{parts, 1}, size2{256, 1}, 0, d.partials, at, int64(n)); err != nil {
			return err
		}
		return c.launch("sum_squares_finish", size2{1, 1}, size2{32, 1}, 0, to, d.partials, int32(parts))
	})
}

// ClipCoef implements kernels.Device.
func (d *Device) ClipCoef(coef, sumsq kernels.Buffer, scale, maxNorm float32) {
	const op = "clip coefficient"
	to, from := place(op, "coef", coef, 1, kernels.F32), place(op, "sumsq", sumsq, 1, kernels.F32)
	d.enqueue(of(op, ""), func(c driver) error {
		return c.launch("clip_coef", size2{1, 1}, size2{32, 1}, 0, to, from, scale, maxNorm)
	})
}

// AdamW implements kernels.Device.
func (d *Device) AdamW(x kernels.AdamW) {
	const op = "adamw"
	must(x.Step >= 1, op, "Step %d, expected 1 or more", x.Step)
	p, g := span(op, "P", x.P, kernels.BF16, kernels.F32), span(op, "G", x.G, kernels.F32, kernels.BF16)
	n, master, compact := p.n, p.t == kernels.F32, x.Scale != nil
	must(master == (x.Rem == nil), op, "P is %v and Rem given: %v", p.t, x.Rem != nil)
	must(!master || g.t == kernels.F32, op, "P is f32 and G %v", g.t)
	must(!master || !compact, op, "P is f32 and moments are compact, expected a bf16 P")
	must(g.n == n, op, "G holds %d elements, expected %d", g.n, n)
	first, second := kernels.F32, kernels.F32
	var scale address
	if compact {
		first, second = kernels.I8, kernels.BF16
		scale = place(op, "Scale", x.Scale, kernels.MomentBlocks(n), kernels.F32)
	}
	rem := placeOr0(op, "Rem", x.Rem, n, kernels.I16)
	m, v, coef := place(op, "M", x.M, n, first), place(op, "V", x.V, n, second), place(op, "Coef", x.Coef, 1, kernels.F32)
	if n == 0 {
		return
	}
	scalars := []any{
		int64(n), float32(1 - x.LR*x.WeightDecay), float32(x.Beta1), float32(1 - x.Beta1), float32(x.Beta2), float32(1 - x.Beta2),
		float32(x.LR / (1 - math.Pow(x.Beta1, float64(x.Step)))), float32(1 / math.Sqrt(1-math.Pow(x.Beta2, float64(x.Step)))), float32(x.Eps),
	}
	var kernel string
	var args []any
	switch {
	case compact:
		key := kernels.RoundingKey(x.Seed, uint64(x.Step))
		kernel, args = "adamw_compact_g"+g.t.String(), []any{p.at, rem, g.at, m, scale, v, coef}
		scalars = append(scalars, x.First, int32(key.A), int32(key.B))
	case master:
		kernel, args = "adamw_f32_gf32", []any{p.at, g.at, m, v, coef}
	default:
		kernel, args = "adamw_bf16_g"+g.t.String(), []any{p.at, rem, g.at, m, v, coef}
	}
	args = append(args, scalars...)
	d.enqueue(of(op, "%d elements", n), func(c driver) error {
		return c.launch(kernel, size2{min(ceil(n, 2048), 2112), 1}, size2{256, 1}, 0, args...)
	})
}

// AddGrad implements kernels.Device.
func (d *Device) AddGrad(x kernels.AddGrad) {
	const op = "add gradient"
	src := span(op, "Src", x.Src, kernels.F32)
	n, from, to := src.n, src.at, place(op, "Dst", x.Dst, src.n, kernels.BF16)
	if n == 0 {
		return
	}
	d.enqueue(of(op, "%d elements", n), func(c driver) error {
		if x.Fresh {
			return elementwise(c, "cast_f32_bf16", n, to, from)
		}
		return c.launch("add_gradient", size2{min(ceil(n, 2048), 2112), 1}, size2{256, 1}, 0, to, from, int64(n), x.First, int32(x.Key.A), int32(x.Key.B))
	})
}

// Advantages implements kernels.Device. Rewards and advantages are on the host, so it waits for the card;
// an error leaves Out untouched and is Sync's to return.
func (d *Device) Advantages(a kernels.Advantages) {
	const op = "advantages"
	must(len(a.Out) == len(a.R), op, "Out has %d rows, R %d", len(a.Out), len(a.R))
	for g := 0; g+1 < len(a.Start); g++ {
		from, to := a.Start[g], a.Start[g+1]
		must(from >= 0 && from <= to && int(to) <= len(a.R), op, "group %d is [%d,%d) of %d rows", g, from, to, len(a.R))
	}
	groups := len(a.Start) - 1
	if groups < 1 || len(a.R) == 0 {
		return
	}
	// out, r and start, one after the other. Rows of no group keep what Out holds.
	rows, starts := kernels.Round(int64(8*len(a.R)), alignment), int64(4*len(a.Start))
	at, err := d.take("advantages", 2*rows+starts)
	if err != nil {
		d.enqueue(of(op, "%d rows", len(a.R)), func(driver) error { return fmt.Errorf("advantages: %w", err) })
		return
	}
	defer d.give(at)
	r, start := at+address(rows), at+2*address(rows)
	d.send(op, at, raw(a.Out), false)
	d.send(op, r, raw(a.R), false)
	d.send(op, start, raw(a.Start), false)
	std := flag32(a.Scale == kernels.ScaleStd)
	d.enqueue(of(op, "%d rows in %d groups", len(a.R), groups), func(c driver) error {
		return c.launch("group_advantages", size2{ceil(groups, 4), 1}, size2{128, 1}, 0, at, r, start, int32(groups), std)
	})
	_ = d.receive(op, raw(a.Out), at, false)
}

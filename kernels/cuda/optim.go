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
	n, master := p.n, p.t == kernels.F32
	must(master == (x.Rem == nil), op, "P is %v and Rem given: %v", p.t, x.Rem != nil)
	must(!master || g.t == kernels.F32, op, "P is f32 and G %v", g.t)
	must(g.n == n, op, "G holds %d elements, expected %d", g.n, n)
	rem := placeOr0(op, "Rem", x.Rem, n, kernels.I16)
	m, v, coef := place(op, "M", x.M, n, kernels.F32), place(op, "V", x.V, n, kernels.F32), place(op, "Coef", x.Coef, 1, kernels.F32)
	if n == 0 {
		return
	}
	scalars := []any{
		int64(n), float32(1 - x.LR*x.WeightDecay), float32(x.Beta1), float32(1 - x.Beta1), float32(x.Beta2), float32(1 - x.Beta2),
		float32(x.LR / (1 - math.Pow(x.Beta1, float64(x.Step)))), float32(1 / math.Sqrt(1-math.Pow(x.Beta2, float64(x.Step)))), float32(x.Eps),
	}
	kernel, args := "adamw_f32_gf32", []any{p.at, g.at, m, v, coef}
	if !master {
		kernel, args = "adamw_bf16_g"+g.t.String(), []any{p.at, rem, g.at, m, v, coef}
	}
	args = append(args, scalars...)
	d.enqueue(of(op, "%d elements", n), func(c driver) error {
		return c.launch(kernel, size2{min(ceil(n, 2048), 2112), 1}, size2{256, 1}, 0, args...)
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

package cuda

import (
	"math/bits"

	"trainerd/kernels"
	"trainerd/kernels/internal/seal"
)

// Gather implements kernels.Device.
func (d *Device) Gather(out, table, rows kernels.Buffer, width int) {
	const op = "gather"
	must(width > 0, op, "rows of %d", width)
	t := span(op, "table", table, kernels.BF16, kernels.F32)
	index := span(op, "rows", rows, kernels.I32)
	must(t.n%width == 0, op, "table of %d elements, rows of %d", t.n, width)
	to, n, tableRows := place(op, "out", out, index.n*width, t.t), index.n, t.n/width
	if n == 0 {
		return
	}
	kernel := "gather_rows_bf16"
	if t.t == kernels.F32 {
		kernel = "gather_rows_f32"
	}
	from, at := t.at, index.at
	d.enqueue(of(op, "%d rows of %d from %d", n, width, tableRows), func(c driver) error {
		return c.launch(kernel, size2{ceil(n, 8), 1}, size2{32, 8}, 0, to, from, at, int32(n), int32(width), int32(tableRows), d.flag(flagGather))
	})
}

// scatter is an index in an arena.
type scatter struct {
	seal.Mark
	dst, start, src address
	buckets         int
}

// Scatter implements kernels.Device.
func (d *Device) Scatter(a kernels.Arena, s kernels.ScatterIndex) kernels.Scatter {
	const op = "scatter"
	must(len(s.Start) == len(s.Dst)+1 || len(s.Dst) == 0 && len(s.Start) == 0, op, "%d starts for %d rows, expected one more", len(s.Start), len(s.Dst))
	for u := range s.Dst {
		must(s.Start[u] >= 0 && s.Start[u] <= s.Start[u+1] && int(s.Start[u+1]) <= len(s.Src), op,
			"bucket %d is [%d,%d) of %d source rows", u, s.Start[u], s.Start[u+1], len(s.Src))
	}
	keep := func(x []int32) address {
		at := a.Alloc(kernels.I32, len(x)).(*buffer).at
		d.send(op, at, raw(x), false)
		return at
	}
	return scatter{dst: keep(s.Dst), start: keep(s.Start), src: keep(s.Src), buckets: len(s.Dst)}
}

// ScatterAdd implements kernels.Device.
func (d *Device) ScatterAdd(dst, src kernels.Buffer, s kernels.Scatter, width int, accumulate bool) {
	const op = "scatter add"
	to, from := span(op, "dst", dst, kernels.F32, kernels.BF16), span(op, "src", src, kernels.BF16)
	must(width > 0 && from.n%width == 0 && to.n%width == 0, op, "dst of %d and src of %d elements, rows of %d", to.n, from.n, width)
	x := s.(scatter)
	if x.buckets == 0 {
		return
	}
	kernel := "scatter_add_bf16"
	if to.t == kernels.F32 {
		kernel = "scatter_add_f32"
	}
	tx := min(128, 1<<bits.Len(uint(ceil(width, 8)-1)))
	ty := 128 / tx
	grid, block := size2{ceil(x.buckets, ty), ceil(width, 8*tx)}, size2{tx, ty}
	dstRows, srcRows, toAt, fromAt := to.n/width, from.n/width, to.at, from.at
	d.enqueue(of(op, "%d buckets of %d into %d rows", x.buckets, width, dstRows), func(c driver) error {
		return c.launch(kernel, grid, block, 0, toAt, fromAt, x.dst, x.start, x.src, int32(x.buckets), int32(width), int32(dstRows), int32(srcRows),
			flag32(accumulate), d.flag(flagScatter))
	})
}

func flag32(b bool) int32 {
	if b {
		return 1
	}
	return 0
}

// reduce sums rows of the workspace of partial sums, from element skip of each, into out[n].
func (d *Device) reduce(c driver, out address, t kernels.DType, skip, parts, n, stride int, accumulate bool) error {
	kernel := "reduce_partials_bf16"
	if t == kernels.F32 {
		kernel = "reduce_partials_f32"
	}
	return c.launch(kernel, size2{ceil(n, 32), 1}, size2{1024, 1}, 0, out, d.partials+address(4*skip), int32(parts), int32(n), int32(stride), flag32(accumulate))
}

// partialFloats is what the workspace of partial sums holds.
const partialFloats = partialBytes / 4

// BiasBackward implements kernels.Device.
func (d *Device) BiasBackward(db, dy kernels.Buffer, m, n int, accumulate bool) {
	const op = "bias backward"
	must(m >= 0 && n > 0 && n <= partialFloats, op, "M %d N %d", m, n)
	out := span(op, "db", db, kernels.F32, kernels.BF16)
	to, from, t := place(op, "db", db, n, out.t), place(op, "dy", dy, m*n, kernels.BF16), out.t
	if m == 0 {
		if !accumulate {
			d.Zero(db)
		}
		return
	}
	parts := clamp(ceil(m, 64), 1, min(208, partialFloats/n)) // 8 blocks an SM at the 0.5b shape
	d.enqueue(of(op, "M %d N %d", m, n), func(c driver) error {
		if err := c.launch("bias_backward_partial", size2{ceil(n, 256), parts}, size2{32, 8}, 0, d.partials, from, int32(m), int32(n), int32(parts)); err != nil {
			return err
		}
		return d.reduce(c, to, t, 0, parts, n, n, accumulate)
	})
}

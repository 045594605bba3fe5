package cpu

import (
	"fmt"

	"gorgonia.org/tensor"

	"trainerd/kernels"
	"trainerd/kernels/cpu/internal/simd"
	"trainerd/kernels/internal/seal"
)

// host returns the backing slice of a contiguous host tensor.
func host(op string, x *tensor.Dense) any {
	must(x != nil, op, "host tensor is nil")
	must(!x.RequiresIterator() && !x.DataOrder().IsColMajor(), op, "host tensor of shape %v is not contiguous row-major", x.Shape())
	switch data := x.Data().(type) {
	case float32: // a scalar tensor hands out its value; its memory is behind Get and Set
		return x.Float32s()
	case int32:
		return x.Int32s()
	default:
		return data
	}
}

func (d *device) Upload(dst kernels.Buffer, src *tensor.Dense) {
	const op = "upload"
	data := host(op, src)
	b := dst.(*buffer)
	switch x := data.(type) {
	case []float32:
		if b.t == kernels.BF16 {
			simd.F32ToBF16(halves(op, "dst", dst, len(x)), x)
			return
		}
		copy(floats(op, "dst", dst, len(x)), x)
	case []int32:
		copy(ints(op, "dst", dst, len(x)), x)
	case []int16:
		must((b.t == kernels.I16 || b.t == kernels.BF16) && b.Len() == len(x), op, "dst holds %d %v, source %d int16", b.Len(), b.t, len(x))
		copy(b.h, x)
		for i := range b.u {
			b.u[i] = uint16(x[i])
		}
	case []int8:
		must(b.t == kernels.I8 && len(b.b) == len(x), op, "dst holds %d %v, source %d int8", b.Len(), b.t, len(x))
		copy(b.b, x)
	default:
		panic(fmt.Sprintf("%s: host tensor of %v, expected float32, int32, int16 or int8", op, src.Dtype()))
	}
}

func (d *device) Download(dst *tensor.Dense, src kernels.Buffer) error {
	const op = "download"
	b := src.(*buffer)
	switch x := host(op, dst).(type) {
	case []float32:
		if b.t == kernels.BF16 {
			simd.BF16ToF32(x, halves(op, "src", src, len(x)))
			return nil
		}
		from := floats(op, "src", src, len(x))
		d.blocks(len(x), grain, func(a, b int) { copy(x[a:b], from[a:b]) })
	case []int32:
		copy(x, ints(op, "src", src, len(x)))
	case []int16:
		must((b.t == kernels.I16 || b.t == kernels.BF16) && b.Len() == len(x), op, "src holds %d %v, host tensor %d int16", b.Len(), b.t, len(x))
		copy(x, b.h)
		for i, bits := range b.u {
			x[i] = int16(bits)
		}
	case []int8:
		must(b.t == kernels.I8 && len(b.b) == len(x), op, "src holds %d %v, host tensor %d int8", b.Len(), b.t, len(x))
		copy(x, b.b)
	default:
		panic(fmt.Sprintf("%s: host tensor of %v, expected float32, int32, int16 or int8", op, dst.Dtype()))
	}
	return nil
}

func (d *device) Zero(dst kernels.Buffer) {
	b := dst.(*buffer)
	clear(b.i)
	clear(b.h)
	clear(b.b)
	clear(b.u)
	d.blocks(len(b.f), grain, func(from, to int) { clear(b.f[from:to]) })
}

func (d *device) Copy(dst, src kernels.Buffer) {
	const op = "copy"
	a, b := dst.(*buffer), src.(*buffer)
	converts := a.t == kernels.BF16 && b.t == kernels.F32 || a.t == kernels.F32 && b.t == kernels.BF16
	must((a.t == b.t || converts) && a.Len() == b.Len(), op, "dst is %d %v, src %d %v", a.Len(), a.t, b.Len(), b.t)
	switch {
	case converts && a.t == kernels.BF16:
		d.blocks(len(a.u), grain, func(from, to int) { simd.F32ToBF16(a.u[from:to], b.f[from:to]) })
		return
	case converts:
		d.blocks(len(b.u), grain, func(from, to int) { simd.BF16ToF32(a.f[from:to], b.u[from:to]) })
		return
	}
	copy(a.i, b.i)
	copy(a.h, b.h)
	copy(a.b, b.b)
	copy(a.u, b.u)
	d.blocks(len(a.f), grain, func(from, to int) { copy(a.f[from:to], b.f[from:to]) })
}

func (d *device) Lerp(dst, src kernels.Buffer, alpha float32) {
	const op = "lerp"
	x := anyFloats(op, "dst", dst)
	y := floats(op, "src", src, len(x))
	d.blocks(len(x), grain, func(from, to int) {
		simd.Lerp(x[from:to], y[from:to], alpha)
	})
}

func (d *device) Gather(out, table, rows kernels.Buffer, width int) {
	const op = "gather"
	index := ints(op, "rows", rows, -1)
	o := floats(op, "out", out, len(index)*width)
	t := anyFloats(op, "table", table)
	must(width > 0 && len(t)%width == 0, op, "table of %d elements, rows of %d", len(t), width)
	inside(op, "rows", index, len(t)/width)
	d.blocks(len(index), rowBlock(width), func(from, to int) {
		for i := from; i < to; i++ {
			copy(o[i*width:][:width], t[int(index[i])*width:][:width])
		}
	})
}

// scatter keeps the index where a device would: in the arena.
type scatter struct {
	seal.Mark
	kernels.ScatterIndex
}

func (d *device) Scatter(a kernels.Arena, s kernels.ScatterIndex) kernels.Scatter {
	const op = "scatter"
	must(len(s.Start) == len(s.Dst)+1 || len(s.Dst) == 0 && len(s.Start) == 0, op, "%d starts for %d rows, expected one more", len(s.Start), len(s.Dst))
	for u := range s.Dst {
		must(s.Start[u] >= 0 && s.Start[u] <= s.Start[u+1] && int(s.Start[u+1]) <= len(s.Src), op,
			"bucket %d is [%d,%d) of %d source rows", u, s.Start[u], s.Start[u+1], len(s.Src))
	}
	keep := func(x []int32) []int32 {
		y := a.Alloc(kernels.I32, len(x)).(*buffer).i
		copy(y, x)
		return y
	}
	return scatter{ScatterIndex: kernels.ScatterIndex{Dst: keep(s.Dst), Start: keep(s.Start), Src: keep(s.Src)}}
}

func (d *device) ScatterAdd(dst, src kernels.Buffer, s kernels.Scatter, width int, accumulate bool) {
	const op = "scatter add"
	x, o := anyFloats(op, "src", src), anyFloats(op, "dst", dst)
	must(width > 0 && len(x)%width == 0 && len(o)%width == 0, op, "dst of %d and src of %d elements, rows of %d", len(o), len(x), width)
	ix := s.(scatter)
	inside(op, "Dst", ix.Dst, len(o)/width)
	inside(op, "Src", ix.Src, len(x)/width)
	d.blocks(len(ix.Dst), rowBlock(width), func(from, to int) {
		for u := from; u < to; u++ {
			row := o[int(ix.Dst[u])*width:][:width]
			if !accumulate {
				clear(row)
			}
			for _, r := range ix.Src[ix.Start[u]:ix.Start[u+1]] {
				simd.Add(row, row, x[int(r)*width:])
			}
		}
	})
}

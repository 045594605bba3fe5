package model

import (
	"math"

	"gorgonia.org/tensor"

	"trainerd/kernels"
)

func denseF32(x []float32) *tensor.Dense {
	return tensor.New(tensor.WithShape(len(x)), tensor.WithBacking(x))
}

func denseI32(x []int32) *tensor.Dense {
	return tensor.New(tensor.WithShape(len(x)), tensor.WithBacking(x))
}

func denseI16(x []int16) *tensor.Dense {
	return tensor.New(tensor.WithShape(len(x)), tensor.WithBacking(x))
}

func denseI8(x []int8) *tensor.Dense {
	return tensor.New(tensor.WithShape(len(x)), tensor.WithBacking(x))
}

// putF32 and putI32 upload host values to fresh scratch memory; nil stays nil.
func (m *Model) putF32(x []float32) kernels.Buffer {
	if x == nil {
		return nil
	}
	b := m.arena.Alloc(kernels.F32, len(x))
	m.dev.Upload(b, denseF32(x))
	return b
}

func (m *Model) putI32(x []int32) kernels.Buffer {
	b := m.arena.Alloc(kernels.I32, len(x))
	m.dev.Upload(b, denseI32(x))
	return b
}

// act takes scratch memory for n elements of an activation.
func (m *Model) act(n int) kernels.Buffer { return m.arena.Alloc(m.policy.flat.Type(), n) }

// putMaster writes exact float32 weights at an offset of the flat buffer. On a
// BF16 device the value is split over the weight and its signed remainder.
func (m *Model) putMaster(off int, x []float32) {
	dst := m.policy.flat.Slice(off, off+len(x))
	if dst.Type() == kernels.F32 || m.rem == nil {
		m.dev.Upload(dst, denseF32(x))
		return
	}
	high, low := make([]float32, len(x)), make([]int16, len(x))
	for i, v := range x {
		high[i], low[i] = splitMaster(v)
	}
	m.dev.Upload(dst, denseF32(high))
	m.dev.Upload(m.rem.Slice(off, off+len(x)), denseI16(low))
}

// getMaster reads exact float32 weights back.
func (m *Model) getMaster(off int, x []float32) error {
	src := m.policy.flat.Slice(off, off+len(x))
	if r, ok := m.dev.(kernels.Rounder); ok && m.rem != nil {
		return r.DownloadMasters(x, src, m.rem.Slice(off, off+len(x)))
	}
	if err := m.dev.Download(denseF32(x), src); err != nil || m.rem == nil {
		return err
	}
	low := make([]int16, len(x))
	if err := m.dev.Download(denseI16(low), m.rem.Slice(off, off+len(x))); err != nil {
		return err
	}
	for i := range x {
		x[i] = joinMaster(x[i], low[i])
	}
	return nil
}

// getRounded reads weights as bfloat16; ok is false when one of them is not finite then.
func (m *Model) getRounded(r kernels.Rounder, off int, x []uint16) (ok bool, err error) {
	rem := kernels.Buffer(nil)
	if m.rem != nil {
		rem = m.rem.Slice(off, off+len(x))
	}
	return r.DownloadRounded(x, m.policy.flat.Slice(off, off+len(x)), rem)
}

// splitMaster returns a float32 as a bfloat16 value (rounded half up, exact as
// a float32) and the signed 16-bit remainder of its bits.
func splitMaster(x float32) (high float32, low int16) {
	bits := math.Float32bits(x)
	top := (bits + 0x8000) >> 16 << 16
	return math.Float32frombits(top), int16(bits - top)
}

// joinMaster undoes splitMaster.
func joinMaster(high float32, low int16) float32 {
	return math.Float32frombits(math.Float32bits(high) + uint32(low))
}

package bench

import (
	"context"
	"time"

	"trainerd/kernels"
)

// Ceilings is what the device reaches at best, by our own copy and our own products.
type Ceilings struct {
	Name         string  `json:"name"`
	Device       string  `json:"device"`
	Model        string  `json:"model"`
	Workers      int     `json:"workers"`
	CopyBytes    int64   `json:"copy_bytes"` // copied; twice as many are moved
	CopyGBs      float64 `json:"copy_gb_s"`  // read and written
	Matmul       int     `json:"matmul_n"`   // of an n x n x n product
	MatmulTFLOPS float64 `json:"matmul_tflop_s"`
}

// MeasureCeilings times a copy and a product that are large for the device.
func MeasureCeilings(ctx context.Context, dev kernels.Device) (Ceilings, error) {
	info := dev.Info()
	c := Ceilings{Name: "ceilings", Device: info.Name, Model: info.Model, Workers: info.Workers, CopyBytes: 1 << 30, Matmul: 8192}
	budget := 200 * time.Millisecond
	if info.Compute == kernels.F32 { // the CPU
		c.CopyBytes, c.Matmul, budget = 256<<20, 1536, 200*time.Millisecond
	}
	m := newMeter(dev, budget)
	b := newBuffers(dev)
	defer b.free()
	n := int(c.CopyBytes) / info.Compute.Size()
	x, y := b.random(info.Compute, n), b.random(info.Compute, n)
	if b.err != nil {
		return c, b.err
	}
	t, err := m.seconds(ctx, func(int) { m.dev.Copy(y, x) })
	if err != nil {
		return c, err
	}
	c.CopyGBs = 2 * float64(c.CopyBytes) / t / 1e9
	nn := c.Matmul * c.Matmul
	g := kernels.Gemm{A: x.Slice(0, nn), B: y.Slice(0, nn), C: b.random(info.Compute, nn), M: c.Matmul, N: c.Matmul, K: c.Matmul, TransB: true}
	if b.err != nil {
		return c, b.err
	}
	if t, err = m.seconds(ctx, func(int) { m.dev.Gemm(g) }); err != nil {
		return c, err
	}
	c.MatmulTFLOPS = 2 * float64(c.Matmul) * float64(nn) / t / 1e12
	return c, nil
}

// buffers are a measurement's allocations; the first error sticks.
type buffers struct {
	dev   kernels.Device
	taken []kernels.Buffer
	tile  kernels.Buffer // normal numbers to fill others from
	err   error
}

func newBuffers(dev kernels.Device) *buffers { return &buffers{dev: dev} }

// tileFloats is the length of what random buffers repeat.
const tileFloats = 1 << 18

func (b *buffers) raw(t kernels.DType, n int) kernels.Buffer {
	if b.err != nil {
		return nil
	}
	var x kernels.Buffer
	if x, b.err = b.dev.Alloc("bench", t, n); b.err != nil {
		return nil
	}
	b.taken = append(b.taken, x)
	return x
}

// random returns n numbers of standard deviation 1: the power that products draw, and so a card's clock, depends on the data.
func (b *buffers) random(t kernels.DType, n int) kernels.Buffer {
	if b.tile == nil {
		if b.tile = b.raw(kernels.F32, tileFloats); b.err == nil {
			b.dev.Upload(b.tile, randomTensor(tileFloats))
		}
	}
	x := b.raw(t, n)
	if b.err != nil {
		return nil
	}
	m := min(n, tileFloats)
	b.dev.Copy(x.Slice(0, m), b.tile.Slice(0, m))
	for at := m; at < n; at += m {
		m = min(n-at, at)
		b.dev.Copy(x.Slice(at, at+m), x.Slice(0, m))
	}
	return x
}

// zeros returns n cleared elements.
func (b *buffers) zeros(t kernels.DType, n int) kernels.Buffer {
	x := b.raw(t, n)
	if b.err == nil {
		b.dev.Zero(x)
	}
	return x
}

// ints uploads indices.
func (b *buffers) ints(x []int32) kernels.Buffer {
	t := b.raw(kernels.I32, len(x))
	if b.err == nil {
		b.dev.Upload(t, denseInts(x))
	}
	return t
}

func (b *buffers) free() {
	for _, x := range b.taken {
		b.dev.Free(x)
	}
	b.taken, b.tile = nil, nil
}

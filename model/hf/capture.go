package hf

import (
	"context"
	"math"
	"runtime"
	"slices"
	"sync"

	"gorgonia.org/tensor"

	"trainerd/internal/fault"
	"trainerd/model"
)

// Capture is a model's weights in host memory, rounded to the type that they
// will be written in: a Source that stays as it is while the model trains on.
type Capture struct {
	cfg   model.Config
	dtype string
	names []string
	index map[string]captured
	mem   CaptureMemory
}

// captured is one tensor's place in the memory of its type.
type captured struct {
	shape   []int
	from, n int
}

// CaptureMemory is what a capture is written to. The caller gives it, so that it
// may be counted, used again and, with a GPU, be pinned; it is the capture's
// until the caller is done with the capture.
type CaptureMemory struct {
	Floats []float32 // of F32
	Halves []uint16  // of BF16 and F16
}

// CaptureElements is how many values a capture of src takes: Floats when dtype
// is F32, otherwise Halves.
func CaptureElements(src model.Source) int {
	n := 0
	for _, name := range src.Config().Names() {
		n += elements(src, name)
	}
	return n
}

func elements(src model.Source, name string) int {
	shape, ok := src.Shape(name)
	if !ok {
		return 0
	}
	n := 1
	for _, d := range shape {
		n *= d
	}
	return n
}

// TakeCapture copies the tensors that src's config needs to mem, of which the
// values' half has at least CaptureElements. What Write then writes of the
// capture in the same dtype is what it would have written of src.
func TakeCapture(ctx context.Context, src model.Source, dtype string, mem CaptureMemory) (*Capture, error) {
	if itemSize[dtype] == 0 || torchDType[dtype] == "" {
		return nil, fault.BadField("dtype", dtype, "F32, F16 or BF16")
	}
	c := &Capture{cfg: src.Config(), dtype: dtype, names: src.Config().Names(), index: map[string]captured{}, mem: mem}
	longest := 0
	for _, name := range c.names {
		longest = max(longest, elements(src, name))
	}
	var wide []float32 // one tensor before it is rounded
	direct, _ := src.(model.BF16Reader)
	at := 0
	for _, name := range c.names {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		shape, ok := src.Shape(name)
		if !ok {
			return nil, fault.New(fault.Invalid, "invalid_tensor", "capture weights: no tensor %q", name)
		}
		t := captured{shape: shape, from: at, n: elements(src, name)}
		at += t.n
		c.index[name] = t
		if dtype == "BF16" && direct != nil {
			ok, err := direct.ReadBF16(name, mem.Halves[t.from:at])
			if err != nil {
				return nil, err
			}
			if ok {
				continue
			}
		}
		if dtype != "F32" && wide == nil {
			wide = make([]float32, longest)
		}
		values := wide
		if dtype == "F32" {
			values = mem.Floats[t.from:]
		}
		values = values[:t.n]
		if err := src.Read(name, tensor.New(tensor.WithShape(shape...), tensor.WithBacking(values))); err != nil {
			return nil, err
		}
		if dtype != "F32" {
			if bad := round(mem.Halves[t.from:t.from+t.n], values, dtype); bad >= 0 {
				return nil, fault.New(fault.Invalid, "dtype_overflow", "tensor %q holds %v, which does not fit in %s", name, values[bad], dtype)
			}
		}
	}
	return c, nil
}

// roundChunk is the least worth a goroutine of its own.
const roundChunk = 1 << 16

// round writes values as half floats and returns the index of the first finite
// one that rounds to infinity, or -1.
func round(dst []uint16, values []float32, dtype string) int {
	convert, infinity := toBFloat, uint16(0x7f80)
	if dtype == "F16" {
		convert, infinity = toHalf, 0x7c00
	}
	per := max(roundChunk, (len(values)+runtime.GOMAXPROCS(0)-1)/runtime.GOMAXPROCS(0))
	bad := make([]int, (len(values)+per-1)/per)
	var work sync.WaitGroup
	for k := range bad {
		work.Go(func() {
			bad[k] = -1
			for i := k * per; i < min((k+1)*per, len(values)); i++ {
				h := convert(values[i])
				dst[i] = h
				if h&0x7fff == infinity && bad[k] < 0 && !math.IsInf(float64(values[i]), 0) {
					bad[k] = i
				}
			}
		})
	}
	work.Wait()
	for _, i := range bad {
		if i >= 0 {
			return i
		}
	}
	return -1
}

// Config implements model.Source.
func (c *Capture) Config() model.Config { return c.cfg }

// Names implements model.Source.
func (c *Capture) Names() []string { return slices.Clone(c.names) }

// DType implements model.Source.
func (c *Capture) DType() string { return c.dtype }

// Close implements model.Source. The memory stays the caller's.
func (c *Capture) Close() error { return nil }

// Shape implements model.Source.
func (c *Capture) Shape(name string) ([]int, bool) {
	t, ok := c.index[name]
	return t.shape, ok
}

// Read implements model.Source.
func (c *Capture) Read(name string, dst *tensor.Dense) error {
	t, ok := c.index[name]
	if !ok || dst.Dtype() != tensor.Float32 || dst.Shape().TotalSize() != t.n {
		return fault.New(fault.Invalid, "invalid_tensor", "capture: tensor %q of shape %v, wanted as %v %v", name, t.shape, dst.Dtype(), dst.Shape())
	}
	out := dst.Float32s()
	switch c.dtype {
	case "F32":
		copy(out, c.mem.Floats[t.from:])
	case "BF16":
		for i, h := range c.mem.Halves[t.from : t.from+t.n] {
			out[i] = math.Float32frombits(uint32(h) << 16)
		}
	default:
		for i, h := range c.mem.Halves[t.from : t.from+t.n] {
			out[i] = fromHalf(h)
		}
	}
	return nil
}

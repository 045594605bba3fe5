package cpu

import (
	"unsafe"

	"trainerd/internal/fault"
	"trainerd/kernels"
	"trainerd/kernels/hostmem"
	"trainerd/kernels/internal/seal"
)

// buffer is a span of one element type; exactly the slice of its type is set.
// BF16 is for optimizer state and kept gradients only: nothing is computed in it.
type buffer struct {
	seal.Mark
	t    kernels.DType
	f    []float32
	i    []int32
	h    []int16
	b    []int8
	u    []uint16 // bits of BF16
	slab *slab    // what to give back; nil for slices, arena memory and no elements
}

func (b *buffer) Type() kernels.DType { return b.t }
func (b *buffer) Len() int            { return len(b.f) + len(b.i) + len(b.h) + len(b.b) + len(b.u) }

func (b *buffer) Slice(from, to int) kernels.Buffer {
	must(from >= 0 && to >= from && to <= b.Len(), "slice", "[%d,%d) of a buffer of %d", from, to, b.Len())
	s := &buffer{t: b.t}
	switch b.t {
	case kernels.F32:
		s.f = b.f[from:to:to]
	case kernels.I32:
		s.i = b.i[from:to:to]
	case kernels.I16:
		s.h = b.h[from:to:to]
	case kernels.I8:
		s.b = b.b[from:to:to]
	case kernels.BF16:
		s.u = b.u[from:to:to]
	}
	return s
}

// view types n elements at the start of raw memory.
func view(t kernels.DType, n int, raw []byte) *buffer {
	b := &buffer{t: t}
	if n == 0 {
		return b
	}
	p := unsafe.Pointer(unsafe.SliceData(raw))
	switch t {
	case kernels.F32:
		b.f = unsafe.Slice((*float32)(p), n)
	case kernels.I32:
		b.i = unsafe.Slice((*int32)(p), n)
	case kernels.I16:
		b.h = unsafe.Slice((*int16)(p), n)
	case kernels.I8:
		b.b = unsafe.Slice((*int8)(p), n)
	case kernels.BF16:
		b.u = unsafe.Slice((*uint16)(p), n)
	}
	return b
}

func (d *device) Alloc(purpose string, t kernels.DType, n int) (kernels.Buffer, error) {
	must(n >= 0, "alloc", "%d elements for %s", n, purpose)
	bytes := kernels.Round(int64(n)*int64(t.Size()), alignment)
	s, err := d.take(purpose, bytes)
	if err != nil {
		return nil, err
	}
	b := view(t, n, s.Bytes)
	if bytes > 0 {
		b.slab = s
	}
	return b, nil
}

func (d *device) Free(b kernels.Buffer) {
	if b == nil {
		return
	}
	c := b.(*buffer)
	must(c.slab != nil || c.Len() == 0, "free", "buffer of %d %v is a slice, or was freed before", c.Len(), c.t)
	if c.slab != nil {
		d.give(c.slab)
	}
	*c = buffer{t: c.t}
}

// take is takeSlab within the device's own limit.
func (d *device) take(purpose string, bytes int64) (*slab, error) {
	if d.limit > 0 && bytes > d.limit-d.used {
		return nil, fault.New(fault.TooLarge, "out_of_memory", "allocate %s: %d bytes wanted, %d of the device's %d free", purpose, bytes, d.limit-d.used, d.limit)
	}
	s, err := takeSlab(purpose, bytes)
	if err == nil {
		d.used += int64(len(s.Bytes))
	}
	return s, err
}

func (d *device) give(s *slab) {
	d.used -= int64(len(s.Bytes))
	s.Free()
}

// slab is host memory of one allocation.
type slab = hostmem.Span

// takeSlab returns zeroed memory. It refuses what is not there, where the
// system would promise it and end the process later.
func takeSlab(purpose string, bytes int64) (*slab, error) {
	if bytes < hostmem.Large {
		return hostmem.Take(bytes, hostmem.Huge)
	}
	_, free := hostMemory()
	if bytes > free {
		return nil, fault.New(fault.TooLarge, "out_of_memory", "allocate %s: %d bytes wanted, %d free", purpose, bytes, free)
	}
	s, err := hostmem.Take(bytes, hostmem.Huge)
	if err != nil {
		return nil, fault.New(fault.TooLarge, "out_of_memory", "allocate %s: %d bytes wanted, %d free: %w", purpose, bytes, free, err)
	}
	return s, nil
}

// arena is one slab used as a stack.
type arena struct {
	slab         *slab
	height, peak int64
}

func (d *device) NewArena(capacity int64) (kernels.Arena, error) {
	must(capacity >= 0, "new arena", "capacity %d", capacity)
	s, err := d.take("scratch", capacity)
	if err != nil {
		return nil, err
	}
	return &arena{slab: s}, nil
}

func (d *device) FreeArena(a kernels.Arena) {
	c := a.(*arena)
	must(c.slab != nil, "free arena", "it was freed before")
	d.give(c.slab)
	*c = arena{}
}

func (a *arena) Alloc(t kernels.DType, n int) kernels.Buffer {
	must(n >= 0, "arena alloc", "%d elements", n)
	bytes := kernels.Round(int64(n)*int64(t.Size()), alignment)
	if a.height+bytes > int64(len(a.slab.Bytes)) {
		panic(&kernels.OutOfArena{Want: bytes, Height: a.height, Capacity: int64(len(a.slab.Bytes))})
	}
	b := view(t, n, a.slab.Bytes[a.height:])
	a.height += bytes
	a.peak = max(a.peak, a.height)
	return b
}

func (a *arena) Mark() int64 { return a.height }

func (a *arena) Release(mark int64) {
	must(mark >= 0 && mark <= a.height, "arena release", "mark %d of a height of %d", mark, a.height)
	a.height = mark
}

func (a *arena) Peak() int64 { return a.peak }

// scratch takes n floats of an operation's own scratch from its caller's arena.
func scratch(op string, a kernels.Arena, n int) []float32 {
	must(a != nil, op, "Scratch is nil")
	return a.Alloc(kernels.F32, n).(*buffer).f
}

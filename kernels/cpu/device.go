package cpu

import (
	"errors"
	"fmt"
	"math"
	"runtime"

	"trainerd/kernels"
	"trainerd/kernels/cpu/internal/simd"
	"trainerd/kernels/internal/seal"
)

// alignment is what every allocation starts at and is rounded up to: a cache
// line and the widest vector register.
const alignment = 64

// device implements kernels.Device and kernels.Scratcher.
type device struct {
	seal.Mark
	pool    *simd.Pool
	workers []worker
	model   string
	rope    map[ropeKey]*ropeTable
	partial []float32 // partial sums of the reductions over rows, see reduceRows

	limit, used int64 // bytes of allocations: at most, 0 for no limit of its own; now
}

// Option changes what New returns.
type Option func(*device)

// Memory limits what the device may allocate to a number of bytes, within what
// the host has; 0: no limit. Allocations beyond it fail as on a card that is full.
func Memory(bytes int64) Option { return func(d *device) { d.limit = bytes } }

// New returns a CPU device with the given number of workers; 0 means all cores.
// The results do not depend on the number.
func New(workers int, options ...Option) (kernels.Device, error) {
	if workers < 0 {
		return nil, fmt.Errorf("open cpu device: %d workers, expected 0 (all cores) or more", workers)
	}
	if workers == 0 {
		workers = runtime.GOMAXPROCS(0)
	}
	d := &device{
		pool: simd.NewPool(workers), workers: make([]worker, workers),
		model: processorName(), rope: map[ropeKey]*ropeTable{},
	}
	for _, o := range options {
		o(d)
	}
	if d.limit < 0 {
		return nil, errors.Join(fmt.Errorf("open cpu device: a memory limit of %d bytes, expected 0 (none) or more", d.limit), d.Close())
	}
	return d, nil
}

func (d *device) Info() kernels.Info {
	total, free := hostMemory()
	if d.limit > 0 {
		total, free = min(total, d.limit), min(free, d.limit-d.used)
	}
	return kernels.Info{
		Name: "cpu", Model: d.model, Compute: kernels.F32, GradType: kernels.F32,
		Workers: len(d.workers), MemTotal: total, MemFree: free, Alignment: alignment,
	}
}

// Sync returns nil: operations are done when they return.
func (d *device) Sync() error { return nil }

// Close ends the device's workers. Buffers that were not freed stay mapped.
func (d *device) Close() error {
	d.pool.Close()
	d.rope, d.partial = nil, nil
	return nil
}

// must panics with a programmer's shape error that names the operation.
func must(ok bool, op, format string, args ...any) {
	if !ok {
		panic(op + ": " + fmt.Sprintf(format, args...))
	}
}

// floats returns the n float32 values of a buffer that must hold exactly that many.
func floats(op, name string, b kernels.Buffer, n int) []float32 {
	x := anyFloats(op, name, b)
	must(len(x) == n, op, "%s holds %d elements, expected %d", name, len(x), n)
	return x
}

// own returns a buffer that must be of this device.
func own(op, name string, b kernels.Buffer) *buffer {
	must(b != nil, op, "%s is nil", name)
	c, ok := b.(*buffer)
	must(ok, op, "%s is a %T, expected a buffer of the cpu device", name, b)
	return c
}

// anyFloats returns all float32 values of a buffer.
func anyFloats(op, name string, b kernels.Buffer) []float32 {
	c := own(op, name, b)
	must(c.t == kernels.F32, op, "%s is %v, expected f32", name, c.t)
	return c.f
}

// halves returns the bits of a BF16 buffer that must hold exactly n elements.
func halves(op, name string, b kernels.Buffer, n int) []uint16 {
	c := own(op, name, b)
	must(c.t == kernels.BF16 && len(c.u) == n, op, "%s is %d %v, expected %d bf16", name, c.Len(), c.t, n)
	return c.u
}

// codesOf returns the values of an I8 buffer that must hold exactly n elements.
func codesOf(op, name string, b kernels.Buffer, n int) []int8 {
	c := own(op, name, b)
	must(c.t == kernels.I8 && len(c.b) == n, op, "%s is %d %v, expected %d i8", name, c.Len(), c.t, n)
	return c.b
}

// optional is floats for a buffer that may be nil.
func optional(op, name string, b kernels.Buffer, n int) []float32 {
	if b == nil {
		return nil
	}
	return floats(op, name, b, n)
}

// ints returns the n int32 values of a buffer that must hold exactly that many.
func ints(op, name string, b kernels.Buffer, n int) []int32 {
	c := own(op, name, b)
	must(c.t == kernels.I32, op, "%s is %v, expected i32", name, c.t)
	must(n < 0 || len(c.i) == n, op, "%s holds %d elements, expected %d", name, len(c.i), n)
	return c.i
}

// inside panics when an index is outside [0,n). It runs before work is handed
// to other goroutines, where a panic could not be recovered.
func inside(op, name string, index []int32, n int) {
	for i, v := range index {
		if v < 0 || int(v) >= n {
			panic(fmt.Sprintf("%s: %s[%d] is %d, expected [0,%d)", op, name, i, v, n))
		}
	}
}

func finite(x float64) bool { return !math.IsNaN(x) && !math.IsInf(x, 0) }

var (
	_ kernels.Device    = (*device)(nil)
	_ kernels.Scratcher = (*device)(nil)
)

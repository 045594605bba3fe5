package cuda

import (
	"errors"
	"fmt"

	"trainerd/internal/fault"
	"trainerd/kernels"
	"trainerd/kernels/internal/seal"
)

// alignment is what every allocation starts at and is rounded up to.
const alignment = 256

// errNoMemory is what a driver's alloc wraps when the card is full.
var errNoMemory = errors.New("out of device memory")

// buffer is a span of device memory.
type buffer struct {
	seal.Mark
	t     kernels.DType
	n     int
	at    address // 0 when it holds nothing
	owned bool    // an allocation of its own, to be given back by Free
}

func (b *buffer) Type() kernels.DType { return b.t }
func (b *buffer) Len() int            { return b.n }

func (b *buffer) Slice(from, to int) kernels.Buffer {
	must(from >= 0 && to >= from && to <= b.n, "slice", "[%d,%d) of a buffer of %d", from, to, b.n)
	s := &buffer{t: b.t, n: to - from}
	if s.n > 0 {
		s.at = b.at + address(from*b.t.Size())
	}
	return s
}

// bytes is the size of the buffer's elements.
func (b *buffer) bytes() int64 { return int64(b.n) * int64(b.t.Size()) }

// take allocates n bytes on the card, for a named purpose.
func (d *Device) take(purpose string, n int64) (address, error) {
	return d.takeBy(purpose, n, driver.alloc, "")
}

// takeBy allocates by one of the driver's ways; where says what memory it is.
func (d *Device) takeBy(purpose string, n int64, alloc func(driver, int64) (address, error), where string) (address, error) {
	if n == 0 {
		return 0, nil
	}
	var at address
	var failed error
	var free int64
	err := d.q.call(command{label: of("allocate "+purpose, ""), run: func(c driver) error {
		at, failed = alloc(c, n)
		if errors.Is(failed, errNoMemory) {
			free, _, _ = c.memory()
			return nil // nothing is wrong with the device
		}
		return failed
	}})
	if err != nil {
		return 0, err
	}
	if failed != nil && where != "" {
		return 0, fault.New(fault.TooLarge, "out_of_memory", "allocate %s for %s: %d bytes of %s wanted: %w", purpose, d.info.Name, n, where, failed)
	}
	if failed != nil {
		return 0, fault.New(fault.TooLarge, "out_of_memory", "allocate %s on %s: %d bytes wanted, %d free: %w", purpose, d.info.Name, n, free, failed)
	}
	return at, nil
}

// give frees an allocation once the operations before it are done.
func (d *Device) give(at address) {
	if at == 0 {
		return
	}
	// CUDA's own free waits for the card; the queue's order does the rest.
	d.q.put(command{label: of("free", ""), always: true, run: func(c driver) error {
		if err := c.free(at); err != nil && !c.lost(err) {
			return err
		}
		return nil
	}})
}

// Alloc implements kernels.Device.
func (d *Device) Alloc(purpose string, t kernels.DType, n int) (kernels.Buffer, error) {
	must(n >= 0, "alloc", "%d elements for %s", n, purpose)
	at, err := d.take(purpose, kernels.Round(int64(n)*int64(t.Size()), alignment))
	if err != nil {
		return nil, err
	}
	return &buffer{t: t, n: n, at: at, owned: true}, nil
}

// AllocHost implements kernels.HostAllocator.
func (d *Device) AllocHost(purpose string, t kernels.DType, n int) (kernels.Buffer, error) {
	must(n >= 0, "alloc", "%d elements for %s", n, purpose)
	at, err := d.takeBy(purpose, kernels.Round(int64(n)*int64(t.Size()), alignment), driver.mapped, "page-locked host memory")
	if err != nil {
		return nil, err
	}
	return &buffer{t: t, n: n, at: at, owned: true}, nil
}

// Free implements kernels.Device.
func (d *Device) Free(b kernels.Buffer) {
	if b == nil {
		return
	}
	c := b.(*buffer)
	must(c.owned, "free", "buffer of %d %v is a slice, or was freed before", c.n, c.t)
	d.give(c.at)
	*c = buffer{t: c.t}
}

// arena is one allocation used as a stack.
type arena struct {
	at                     address
	height, peak, capacity int64
	freed                  bool
}

// NewArena implements kernels.Device.
func (d *Device) NewArena(capacity int64) (kernels.Arena, error) {
	must(capacity >= 0, "new arena", "capacity %d", capacity)
	at, err := d.take("scratch", kernels.Round(capacity, alignment))
	if err != nil {
		return nil, err
	}
	return &arena{at: at, capacity: capacity}, nil
}

// FreeArena implements kernels.Device.
func (d *Device) FreeArena(a kernels.Arena) {
	c := a.(*arena)
	must(!c.freed, "free arena", "it was freed before")
	d.give(c.at)
	*c = arena{freed: true}
}

func (a *arena) Alloc(t kernels.DType, n int) kernels.Buffer {
	must(n >= 0, "arena alloc", "%d elements", n)
	bytes := kernels.Round(int64(n)*int64(t.Size()), alignment)
	if a.height+bytes > a.capacity {
		panic(&kernels.OutOfArena{Want: bytes, Height: a.height, Capacity: a.capacity})
	}
	b := &buffer{t: t, n: n}
	if n > 0 {
		b.at = a.at + address(a.height)
	}
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

// must panics with a programmer's shape error that names the operation.
func must(ok bool, op, format string, args ...any) {
	if !ok {
		panic(op + ": " + fmt.Sprintf(format, args...))
	}
}

// place returns where a buffer lies that must hold exactly n elements of one of the types.
func place(op, name string, b kernels.Buffer, n int, types ...kernels.DType) address {
	c := span(op, name, b, types...)
	must(c.n == n, op, "%s holds %d elements, expected %d", name, c.n, n)
	return c.at
}

// placeOr0 is place for a buffer that may be nil.
func placeOr0(op, name string, b kernels.Buffer, n int, types ...kernels.DType) address {
	if b == nil {
		return 0
	}
	return place(op, name, b, n, types...)
}

// span returns a buffer that must be this device's and of one of the types.
func span(op, name string, b kernels.Buffer, types ...kernels.DType) *buffer {
	must(b != nil, op, "%s is nil", name)
	c, ok := b.(*buffer)
	must(ok, op, "%s is a %T, expected a buffer of a cuda device", name, b)
	for _, t := range types {
		if c.t == t {
			return c
		}
	}
	panic(fmt.Sprintf("%s: %s is %v, expected %v", op, name, c.t, types))
}

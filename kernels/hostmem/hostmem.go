package hostmem

import "unsafe"

// Alignment in bytes is what every span starts at: a cache line and the widest
// vector register.
const Alignment = 64

// Large is from where on a span is a mapping of its own; smaller ones come from
// the Go heap, since a mapping costs at least a page and two system calls.
const Large = 4 << 20

// Span is host memory. After Free nothing may touch Bytes: the pages are gone.
type Span struct {
	Bytes []byte // zero when it is taken
	raw   []byte // the mapping it lies in; nil when it came from the Go heap
}

// Pages says what a span lies in.
type Pages uint8

const (
	// Huge pages are worth it for memory that is read again and again. Where the
	// system's memory is full of cached files it has to put them together first,
	// which takes up to ten times as long as small ones do.
	Huge Pages = iota
	// Small pages are there soon.
	Small
)

// Take returns a span of n bytes whose pages are there: the error says that the
// system has not got them, where it would otherwise end the process later.
func Take(n int64, pages Pages) (*Span, error) {
	if n < Large {
		return heap(n), nil
	}
	return mapped(n, pages)
}

func heap(n int64) *Span {
	raw := make([]byte, n+Alignment)
	skip := int64(-uintptr(unsafe.Pointer(unsafe.SliceData(raw))) & (Alignment - 1))
	return &Span{Bytes: raw[skip : skip+n : skip+n]}
}

// Floats views the first n values of memory that a span holds as float32, and
// returns the rest of it.
func Floats(b []byte, n int) (x []float32, rest []byte) { return view[float32](b, n) }

// Halves is Floats for 16-bit values.
func Halves(b []byte, n int) (x []uint16, rest []byte) { return view[uint16](b, n) }

func view[T float32 | uint16](b []byte, n int) (x []T, rest []byte) {
	size := n * int(unsafe.Sizeof(*new(T)))
	if n == 0 {
		return nil, b
	}
	_ = b[size-1] // a programmer's error
	p := unsafe.Pointer(unsafe.SliceData(b))
	if uintptr(p)%unsafe.Alignof(*new(T)) != 0 {
		panic("hostmem: view of memory that is not aligned to its values")
	}
	return unsafe.Slice((*T)(p), n), b[size:]
}

package checked

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"math"
	"time"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// ErrDamaged is wrapped by what a Reader says of bytes that no Writer wrote.
var ErrDamaged = errors.New("damaged")

// magicSize is the length of a file's first bytes.
const magicSize = 8

// Writer writes a file. The first error stays: Close returns it.
type Writer struct {
	out *bufio.Writer
	sum hash.Hash32
	err error
	buf [1 << 12]byte
}

// NewWriter begins a file: magic (of 8 bytes), version u32.
func NewWriter(w io.Writer, magic string, version uint32) *Writer {
	if len(magic) != magicSize {
		panic("checked: magic is not of 8 bytes")
	}
	e := &Writer{out: bufio.NewWriterSize(w, 1<<14), sum: crc32.New(castagnoli)}
	e.Raw([]byte(magic))
	e.Uint32(version)
	return e
}

// Raw writes bytes without their length.
func (e *Writer) Raw(b []byte) {
	if e.err != nil {
		return
	}
	e.sum.Write(b)
	_, e.err = e.out.Write(b)
}

// Uint8 writes one byte.
func (e *Writer) Uint8(v uint8) { e.buf[0] = v; e.Raw(e.buf[:1]) }

// Bool writes 0 or 1.
func (e *Writer) Bool(v bool) {
	if v {
		e.Uint8(1)
	} else {
		e.Uint8(0)
	}
}

// Uint32 writes four bytes.
func (e *Writer) Uint32(v uint32) { binary.LittleEndian.PutUint32(e.buf[:], v); e.Raw(e.buf[:4]) }

// Uint64 writes eight bytes.
func (e *Writer) Uint64(v uint64) { binary.LittleEndian.PutUint64(e.buf[:], v); e.Raw(e.buf[:8]) }

// Int64 writes eight bytes.
func (e *Writer) Int64(v int64) { e.Uint64(uint64(v)) }

// Float64 writes the bits of v.
func (e *Writer) Float64(v float64) { e.Uint64(math.Float64bits(v)) }

// Time writes nanoseconds since 1970, or that there is no time.
func (e *Writer) Time(t time.Time) {
	e.Bool(!t.IsZero())
	if !t.IsZero() {
		e.Int64(t.UnixNano())
	}
}

// Len writes the length of a list.
func (e *Writer) Len(n int) { e.Uint64(uint64(n)) }

// String writes a length u32 and the bytes.
func (e *Writer) String(s string) {
	e.Uint32(uint32(len(s)))
	e.Raw([]byte(s))
}

// Int32s writes a list. nil and empty read alike.
func (e *Writer) Int32s(v []int32) { words(e, v, func(x int32) uint32 { return uint32(x) }) }

// Float32s writes a list. nil and empty read alike.
func (e *Writer) Float32s(v []float32) { words(e, v, math.Float32bits) }

func words[T any](e *Writer, v []T, bits func(T) uint32) {
	e.Len(len(v))
	for len(v) > 0 {
		n := min(len(v), len(e.buf)/4)
		for i, x := range v[:n] {
			binary.LittleEndian.PutUint32(e.buf[4*i:], bits(x))
		}
		e.Raw(e.buf[:4*n])
		v = v[n:]
	}
}

// Float64s writes a list. nil and empty read alike.
func (e *Writer) Float64s(v []float64) {
	e.Len(len(v))
	for _, x := range v {
		e.Float64(x)
	}
}

// Close ends the file with the CRC-32C of all of it. It does not close what is below.
func (e *Writer) Close() error {
	sum := e.sum.Sum32()
	e.Uint32(sum)
	if e.err != nil {
		return e.err
	}
	return e.out.Flush()
}

// Reader reads what a Writer wrote. The first error stays, and everything read
// after it is zero: callers check Err before they use what they read, and Close
// before they trust it.
type Reader struct {
	in  *bufio.Reader
	sum hash.Hash32
	err error
	buf [1 << 12]byte
}

// NewReader reads magic and version, which may be from 1 to newest.
func NewReader(r io.Reader, magic string, newest uint32) (d *Reader, version uint32, err error) {
	d = &Reader{in: bufio.NewReaderSize(r, 1<<14), sum: crc32.New(castagnoli)}
	got := string(d.bytes(magicSize))
	if d.err == nil && got != magic {
		d.Fail("it begins with %q, expected %q", got, magic)
	}
	version = d.Uint32()
	if d.err == nil && (version < 1 || version > newest) {
		d.Fail("version %d, expected 1 to %d", version, newest)
	}
	return d, version, d.err
}

// Fail makes the bytes read so far damaged for a reason of the caller's.
func (d *Reader) Fail(format string, args ...any) {
	if d.err == nil {
		d.err = fmt.Errorf("%w: %w", ErrDamaged, fmt.Errorf(format, args...))
	}
}

// Err is the first error.
func (d *Reader) Err() error { return d.err }

// fill reads len(b) bytes.
func (d *Reader) fill(b []byte) {
	if d.err != nil {
		clear(b)
		return
	}
	if _, err := io.ReadFull(d.in, b); err != nil {
		clear(b)
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			d.Fail("it ends early")
			return
		}
		d.err = err
		return
	}
	d.sum.Write(b)
}

// bytes reads n of at most len(buf) bytes, which are valid until the next read.
func (d *Reader) bytes(n int) []byte {
	d.fill(d.buf[:n])
	return d.buf[:n]
}

// Raw fills b.
func (d *Reader) Raw(b []byte) { d.fill(b) }

// Uint8 reads one byte.
func (d *Reader) Uint8() uint8 { return d.bytes(1)[0] }

// Bool reads 0 or 1.
func (d *Reader) Bool() bool {
	v := d.Uint8()
	if v > 1 {
		d.Fail("a flag of %d", v)
	}
	return v == 1
}

// Uint32 reads four bytes.
func (d *Reader) Uint32() uint32 { return binary.LittleEndian.Uint32(d.bytes(4)) }

// Uint64 reads eight bytes.
func (d *Reader) Uint64() uint64 { return binary.LittleEndian.Uint64(d.bytes(8)) }

// Int64 reads eight bytes.
func (d *Reader) Int64() int64 { return int64(d.Uint64()) }

// Float64 reads a float's bits.
func (d *Reader) Float64() float64 { return math.Float64frombits(d.Uint64()) }

// Time reads a time in UTC.
func (d *Reader) Time() time.Time {
	if !d.Bool() {
		return time.Time{}
	}
	return time.Unix(0, d.Int64()).UTC()
}

// Len reads the length of a list. It may be a lie: a list grows as it is read.
func (d *Reader) Len() int {
	n := d.Uint64()
	if n > math.MaxInt32<<8 {
		d.Fail("a list of %d", n)
		return 0
	}
	return int(n)
}

// String reads a string.
func (d *Reader) String() string {
	n := int(d.Uint32())
	var out []byte
	for n > 0 && d.err == nil {
		part := d.bytes(min(n, len(d.buf)))
		out = append(out, part...)
		n -= len(part)
	}
	if d.err != nil {
		return ""
	}
	return string(out)
}

// Each calls read n times, until a read fails.
func Each(d *Reader, n int, read func()) {
	for range n {
		if read(); d.err != nil {
			return
		}
	}
}

// List calls read once for each of n elements until one fails, and collects them.
func List[T any](d *Reader, n int, read func() T) []T {
	if n == 0 {
		return nil
	}
	out := make([]T, 0, min(n, 1024))
	for range n {
		v := read()
		if d.err != nil {
			return nil
		}
		out = append(out, v)
	}
	return out
}

// Int32s reads a list, nil when it is empty.
func (d *Reader) Int32s() []int32 { return readWords(d, func(x uint32) int32 { return int32(x) }) }

// Float32s reads a list, nil when it is empty.
func (d *Reader) Float32s() []float32 { return readWords(d, math.Float32frombits) }

func readWords[T any](d *Reader, of func(uint32) T) []T {
	var out []T
	for left := d.Len(); left > 0; {
		n := min(left, len(d.buf)/4)
		b := d.bytes(4 * n)
		if d.err != nil {
			return nil
		}
		if out == nil {
			out = make([]T, 0, n)
		}
		for i := range n {
			out = append(out, of(binary.LittleEndian.Uint32(b[4*i:])))
		}
		left -= n
	}
	return out
}

// Float64s reads a list, nil when it is empty.
func (d *Reader) Float64s() []float64 { return List(d, d.Len(), d.Float64) }

// Close checks the sum and that nothing follows.
func (d *Reader) Close() error {
	want := d.sum.Sum32()
	if got := d.Uint32(); d.err == nil && got != want {
		d.Fail("its checksum is wrong")
	}
	if d.err == nil {
		if _, err := d.in.ReadByte(); err == nil {
			d.Fail("bytes after its end")
		} else if !errors.Is(err, io.EOF) {
			d.err = err
		}
	}
	return d.err
}

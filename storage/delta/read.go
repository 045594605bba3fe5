package delta

import (
	"bufio"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math"

	"trainerd/internal/fault"
)

// ErrResult says that a delta was applied whole and did not give its target:
// what it was applied to is not its base.
var ErrResult = errors.New("the result is not the delta's target")

// Reader reads a delta: Next, then Apply, for each file. Whatever the stream
// says, it holds a few hundred kilobytes at most.
type Reader struct {
	in    *bufio.Reader
	sum   uint32
	file  File
	open  bool // file is to be applied
	files uint64
	err   error // for ever
}

// NewReader reads a delta's beginning.
func NewReader(r io.Reader) (*Reader, error) {
	d := &Reader{in: bufio.NewReaderSize(r, 64<<10)}
	head := make([]byte, len(magic)+1)
	if err := d.full(head); err != nil {
		return nil, err
	}
	if string(head[:len(magic)]) != magic {
		return nil, malformed("it does not begin as one")
	}
	if v := head[len(magic)]; v != version {
		return nil, malformed("version %d, expected %d", v, version)
	}
	return d, nil
}

func malformed(format string, args ...any) error {
	return fault.New(fault.Malformed, "bad_delta", "read delta: "+format, args...)
}

// full fills p; a stream that ends is cut off, wherever it does.
func (r *Reader) full(p []byte) error {
	if _, err := io.ReadFull(r.in, p); err != nil {
		return cut(err)
	}
	r.sum = crc32.Update(r.sum, castagnoli, p)
	return nil
}

func cut(err error) error {
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return malformed("it is cut off")
	}
	return fmt.Errorf("read delta: %w", err)
}

// ReadByte implements io.ByteReader for uvarints, counting the checksum.
func (r *Reader) ReadByte() (byte, error) {
	b, err := r.in.ReadByte()
	if err == nil {
		r.sum = crc32.Update(r.sum, castagnoli, []byte{b})
	}
	return b, err
}

func (r *Reader) uvarint(what string) (uint64, error) {
	v, err := binary.ReadUvarint(r)
	switch {
	case err == nil:
		return v, nil
	case err == io.EOF, err == io.ErrUnexpectedEOF:
		return 0, cut(err)
	case r.overflow(err):
		return 0, malformed("%s does not fit in 64 bits", what)
	}
	return 0, cut(err)
}

// overflow tells encoding/binary's own error, which has no name, from a reader's.
func (r *Reader) overflow(err error) bool {
	return err.Error() == "binary: varint overflows a 64-bit integer"
}

// Next returns what the next part is about; io.EOF at the delta's end. A part
// that is not wanted cannot be skipped: leave the delta there.
func (r *Reader) Next() (File, error) {
	if r.err == nil && r.open {
		r.err = errors.New("read delta: the file before was not applied")
	}
	if r.err != nil {
		return File{}, r.err
	}
	f, err := r.next()
	r.err, r.file, r.open = err, f, err == nil
	return f, err
}

func (r *Reader) next() (File, error) {
	var f File
	r.sum = 0
	m, err := r.ReadByte()
	if err != nil {
		return f, cut(err)
	}
	if m == markEnd {
		n, err := r.uvarint("the count of files")
		if err != nil {
			return f, err
		}
		if n != r.files {
			return f, malformed("it ends after %d files and says %d", r.files, n)
		}
		return f, io.EOF
	}
	if m != mark {
		return f, malformed("byte %d in the place of a mark", m)
	}
	n, err := r.uvarint("the length of a name")
	if err != nil {
		return f, err
	}
	if n < 1 || n > MaxName {
		return f, malformed("a name of %d bytes, expected 1 to %d", n, MaxName)
	}
	name := make([]byte, n)
	if err := r.full(name); err != nil {
		return f, err
	}
	size, err := r.uvarint("a size")
	if err != nil {
		return f, err
	}
	if size > math.MaxInt64 {
		return f, malformed("a size of %d bytes", size)
	}
	fixed := make([]byte, 1+2*sha256.Size)
	if err := r.full(fixed); err != nil {
		return f, err
	}
	f = File{Name: string(name), Size: int64(size), Word: int(fixed[0])}
	copy(f.Base[:], fixed[1:])
	copy(f.Target[:], fixed[1+sha256.Size:])
	if err := f.check(); err != nil {
		return File{}, malformed("file %.100q: %v", f.Name, err)
	}
	return f, nil
}

// Apply copies base to out with the changed words of the file that Next
// returned. base may be the file before or already the one after; out has what
// its target's digest says when Apply returns nil, and nothing of use otherwise.
// Errors of base and out are returned wrapped.
func (r *Reader) Apply(base io.Reader, out io.Writer) error {
	if r.err != nil {
		return r.err
	}
	if !r.open {
		return errors.New("apply delta: no file is to be applied")
	}
	r.open = false
	if err := r.apply(base, out); err != nil {
		r.err = err
		return err
	}
	r.files++
	return nil
}

func (r *Reader) apply(base io.Reader, out io.Writer) error {
	f := r.file
	digest := sha256.New()
	both := io.MultiWriter(out, digest)
	buf := make([]byte, block)
	keep := func(n int64) error { // copies n bytes of base
		for n > 0 {
			part := buf[:min(n, block)]
			if _, err := io.ReadFull(base, part); err != nil {
				return fmt.Errorf("apply delta: read the base of %q: %w", f.Name, err)
			}
			if _, err := both.Write(part); err != nil {
				return fmt.Errorf("apply delta: write %q: %w", f.Name, err)
			}
			n -= int64(len(part))
		}
		return nil
	}
	take := func(n int64) error { // copies n bytes of the delta in the place of base's
		for n > 0 {
			part := buf[:min(n, block)]
			if _, err := io.ReadFull(base, part); err != nil {
				return fmt.Errorf("apply delta: read the base of %q: %w", f.Name, err)
			}
			if err := r.full(part); err != nil {
				return err
			}
			if _, err := both.Write(part); err != nil {
				return fmt.Errorf("apply delta: write %q: %w", f.Name, err)
			}
			n -= int64(len(part))
		}
		return nil
	}
	word := int64(f.Word)
	left := uint64(f.Size / word) // words to come
	for {
		h, err := r.uvarint("a gap")
		if err != nil {
			return err
		}
		if h == 0 {
			break
		}
		gap, n := (h-1)/2, uint64(1)
		if (h-1)%2 == 1 {
			if n, err = r.uvarint("a count"); err != nil {
				return err
			}
			if n > math.MaxInt64-2 {
				return malformed("file %q: a run of more words than the file has", f.Name)
			}
			n += 2
		}
		if gap > left || n > left-gap {
			return malformed("file %q: a run of %d words after %d, but only %d are left", f.Name, n, gap, left)
		}
		left -= gap + n
		if err := keep(int64(gap) * word); err != nil {
			return err
		}
		if err := take(int64(n) * word); err != nil {
			return err
		}
	}
	if err := keep(int64(left) * word); err != nil {
		return err
	}
	if err := take(f.Size % word); err != nil {
		return err
	}
	want := r.sum
	var sum [4]byte
	if err := r.full(sum[:]); err != nil {
		return err
	}
	if binary.LittleEndian.Uint32(sum[:]) != want {
		return malformed("file %q does not match its checksum", f.Name)
	}
	if Digest(digest.Sum(nil)) != f.Target {
		return fmt.Errorf("apply delta of %q: %w", f.Name, ErrResult)
	}
	return nil
}

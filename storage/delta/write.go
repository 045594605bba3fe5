package delta

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
)

const (
	magic   = "trdelta\n"
	version = 1
	markEnd = 0
	mark    = 1
	// MaxName bounds a file's name in bytes.
	MaxName = 512
	// maxRun bounds the bytes of a run, which the writer holds; longer ones are split.
	maxRun = 64 << 10
	block  = 256 << 10 // bytes compared at once; a multiple of every word
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Digest is a SHA-256.
type Digest [32]byte

// File says what a part of a delta is about.
type File struct {
	Name         string
	Size         int64 // before and after
	Word         int   // bytes: 1, 2, 4 or 8
	Base, Target Digest
}

func (f File) check() error {
	switch {
	case len(f.Name) < 1 || len(f.Name) > MaxName:
		return fmt.Errorf("name of %d bytes, expected 1 to %d", len(f.Name), MaxName)
	case f.Size < 0:
		return fmt.Errorf("size %d, expected 0 or more", f.Size)
	case f.Word != 1 && f.Word != 2 && f.Word != 4 && f.Word != 8:
		return fmt.Errorf("word of %d bytes, expected 1, 2, 4 or 8", f.Word)
	}
	return nil
}

// Stats say what a file's part cost.
type Stats struct {
	Words, Changed int64
	Bytes          int64 // of the delta
}

// Writer writes a delta.
type Writer struct {
	out   io.Writer
	buf   []byte // not yet written
	sum   uint32 // of the present file, without buf
	n     int64  // bytes written
	files uint64
	err   error
}

// NewWriter begins a delta. Close ends it.
func NewWriter(w io.Writer) *Writer {
	d := &Writer{out: w, buf: make([]byte, 0, 2*maxRun)}
	d.put([]byte(magic))
	d.put([]byte{version})
	return d
}

func (w *Writer) put(p []byte) {
	if len(w.buf)+len(p) > maxRun {
		w.flush()
	}
	w.buf = append(w.buf, p...)
}

func (w *Writer) uvarint(v uint64) {
	w.buf = binary.AppendUvarint(w.buf, v)
	if len(w.buf) > maxRun {
		w.flush()
	}
}

func (w *Writer) flush() {
	if w.err == nil {
		_, w.err = w.out.Write(w.buf)
	}
	w.sum = crc32.Update(w.sum, castagnoli, w.buf)
	w.n += int64(len(w.buf))
	w.buf = w.buf[:0]
}

// File adds what differs between two readers of f.Size bytes each. Their digests
// are the caller's word; whoever applies the delta checks them.
func (w *Writer) File(f File, base, target io.Reader) (Stats, error) {
	if err := f.check(); err != nil {
		return Stats{}, fmt.Errorf("write delta of %.100q: %w", f.Name, err)
	}
	w.flush()
	from := w.n
	w.sum = 0
	w.put([]byte{mark})
	w.uvarint(uint64(len(f.Name)))
	w.put([]byte(f.Name))
	w.uvarint(uint64(f.Size))
	w.put([]byte{byte(f.Word)})
	w.put(f.Base[:])
	w.put(f.Target[:])
	r := runs{w: w, word: f.Word}
	old, now := make([]byte, block), make([]byte, block)
	tail := int(f.Size % int64(f.Word))
	for left := f.Size - int64(tail); left > 0 && w.err == nil; {
		n := int(min(left, block))
		if err := readBoth(base, target, old[:n], now[:n]); err != nil {
			return Stats{}, fmt.Errorf("write delta of %q: %w", f.Name, err)
		}
		r.compare(old[:n], now[:n])
		left -= int64(n)
	}
	r.flush()
	w.uvarint(0)
	if err := readBoth(base, target, old[:tail], now[:tail]); err != nil {
		return Stats{}, fmt.Errorf("write delta of %q: %w", f.Name, err)
	}
	w.put(now[:tail])
	w.flush()
	w.put(binary.LittleEndian.AppendUint32(nil, w.sum))
	w.flush()
	w.files++
	return Stats{Words: f.Size / int64(f.Word), Changed: r.changed, Bytes: w.n - from}, w.err
}

func readBoth(base, target io.Reader, old, now []byte) error {
	if _, err := io.ReadFull(base, old); err != nil {
		return fmt.Errorf("read the base: %w", err)
	}
	if _, err := io.ReadFull(target, now); err != nil {
		return fmt.Errorf("read the target: %w", err)
	}
	return nil
}

// runs gathers neighbouring words that changed.
type runs struct {
	w       *Writer
	word    int
	gap     uint64 // words since the last run
	run     []byte
	changed int64
}

// compare takes two blocks of whole words. Unchanged stretches pass eight bytes at a time.
func (r *runs) compare(old, now []byte) {
	bits := 8 * r.word
	mask := uint64(1)<<bits - 1 // all ones for a word of 8
	at := 0
	for ; at+8 <= len(now); at += 8 {
		x := binary.LittleEndian.Uint64(old[at:]) ^ binary.LittleEndian.Uint64(now[at:])
		if x == 0 {
			if len(r.run) > 0 {
				r.flush()
			}
			r.gap += uint64(8 / r.word)
			continue
		}
		for k := 0; k < 8; k += r.word {
			r.take(now[at+k:at+k+r.word], x&mask != 0)
			x >>= bits
		}
	}
	for ; at < len(now); at += r.word {
		word := now[at : at+r.word]
		r.take(word, !bytes.Equal(old[at:at+r.word], word))
	}
}

func (r *runs) take(word []byte, changed bool) {
	if !changed {
		if len(r.run) > 0 {
			r.flush()
		}
		r.gap++
		return
	}
	r.run = append(r.run, word...)
	r.changed++
	if len(r.run) >= maxRun {
		r.flush()
	}
}

func (r *runs) flush() {
	n := uint64(len(r.run) / r.word)
	switch n {
	case 0:
		return
	case 1:
		r.w.uvarint(2*r.gap + 1)
	default:
		r.w.uvarint(2*r.gap + 2)
		r.w.uvarint(n - 2)
	}
	r.w.put(r.run)
	r.run, r.gap = r.run[:0], 0
}

// Close ends the delta. The writer under it is the caller's.
func (w *Writer) Close() error {
	w.put([]byte{markEnd})
	w.uvarint(w.files)
	w.flush()
	if w.err != nil {
		return fmt.Errorf("write delta: %w", w.err)
	}
	return nil
}

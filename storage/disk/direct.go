package disk

import (
	"errors"
	"io"
	"os"
	"sync"
	"syscall"
	"unsafe"
)

// Large files are written past the page cache (O_DIRECT). A write into the cache
// costs the processor a page for every 4 KiB, and what the system had to clear
// or take from others for it up to 3.5 s a GB: time that training on the same
// cores does not get. Written directly it is 0.1 s. The bytes are the same, and
// so is the sync after them: a disk has a cache of its own, and a file its size.
//
// The price is that the first reader comes to the disk.

const (
	directBlock = 4096    // offsets, lengths and addresses are multiples of it: of every disk's blocks
	directChunk = 1 << 20 // bytes of a write: few enough to lie in the processor's cache still
)

// writer collects what is written to a file in chunks. A file of one chunk and
// more is written past the page cache where its file system can do that. close
// writes what is left of it.
type writer struct {
	f      *os.File
	direct func(f *os.File, on bool) error
	chunk  []byte // whole: directChunk bytes at a multiple of directBlock
	n      int    // bytes of it that wait
	now    bool   // the file is in direct mode
	no     bool   // its file system has none
}

// chunks are those of files that are done: as many as were ever written at once.
var chunks = sync.Pool{New: func() any {
	raw := make([]byte, directChunk+directBlock)
	skip := -uintptr(unsafe.Pointer(unsafe.SliceData(raw))) & (directBlock - 1)
	return (*[directChunk]byte)(raw[skip:])
}}

// newWriter writes to a file that is empty. direct switches its mode.
func newWriter(f *os.File, direct func(f *os.File, on bool) error) *writer {
	return &writer{f: f, direct: direct, chunk: chunks.Get().(*[directChunk]byte)[:]}
}

// Write implements io.Writer.
func (w *writer) Write(p []byte) (n int, err error) {
	for len(p) > 0 {
		k := copy(w.chunk[w.n:], p)
		w.n, n, p = w.n+k, n+k, p[k:]
		if w.n == len(w.chunk) {
			if err := w.flush(directChunk); err != nil {
				return n, err
			}
		}
	}
	return n, nil
}

// flush writes the first n bytes of the chunk, a multiple of directBlock.
func (w *writer) flush(n int) error {
	if !w.now && !w.no {
		err := w.direct(w.f, true)
		if err != nil && !refused(err) {
			return err
		}
		w.now, w.no = err == nil, err != nil
	}
	done, err := w.f.Write(w.chunk[:n])
	if w.now && refused(err) { // it has the mode, but not for this write
		if err = w.buffered(); err == nil {
			w.no = true
			_, err = w.f.Write(w.chunk[done:n])
		}
	}
	if err != nil {
		return err
	}
	w.n = copy(w.chunk, w.chunk[n:w.n])
	return nil
}

// buffered takes the file out of direct mode.
func (w *writer) buffered() error {
	if !w.now {
		return nil
	}
	w.now = false
	return w.direct(w.f, false)
}

// finish writes what waits; the last bytes of a large file, less than a block,
// go through the page cache. The file is in its ordinary mode then.
func (w *writer) finish() error {
	if whole := w.n &^ (directBlock - 1); w.now && whole > 0 {
		if err := w.flush(whole); err != nil {
			return err
		}
	}
	if err := w.buffered(); err != nil {
		return err
	}
	_, err := w.f.Write(w.chunk[:w.n])
	return err
}

// release gives the chunk to others. The writer is of no use after it; the file is the caller's.
func (w *writer) release() {
	chunks.Put((*[directChunk]byte)(w.chunk))
	w.chunk = nil
}

// refused reports errors of a file system that does not write directly, or not so.
func refused(err error) bool {
	return errors.Is(err, syscall.EINVAL) || errors.Is(err, errors.ErrUnsupported)
}

var _ io.Writer = (*writer)(nil)

package spool

import (
	"hash/crc32"
	"unsafe"

	"trainerd/internal/crashpoint"
)

// frameWriter puts frames at the end of a segment in whole blocks of its file,
// from memory that is aligned to them: so a file can be written past the page
// cache. The last block of a frame is filled up with zeros, and written once more
// with the beginning of the next frame; what is in it of earlier frames is as it was.
//
// Bytes are copied once, and summed while the copy is in the processor's cache.
// Large bodies are not copied: the meta before them is filled up with spaces, which
// Read takes away, so that they begin with a block.
type frameWriter struct {
	f     file
	block int64
	part  []byte // the block that the segment ends in, up to its end
	next  []byte // the same after the frame that was written last

	mem   []byte // whole blocks
	n     int64  // bytes in mem
	at    int64  // of the file where mem begins
	hold  int64  // the blocks with the frame's head go last: so many bytes,
	held  int64  // of which so many are in first
	first []byte
	sum   uint32
}

const (
	directBlock = 4096    // of files past the page cache; no disk has larger ones
	mostStaged  = 1 << 20 // bytes written at once; fewer cost more time of the processor
	leastStaged = 64 << 10
	// leastInPlace is the shortest body that may cost up to a block of spaces.
	leastInPlace = 64 << 10
)

// begin makes the writer that of a segment whose frames end at end.
func (w *frameWriter) begin(f file, end int64) error {
	block := f.Block()
	part := make([]byte, end%block, block)
	if len(part) > 0 {
		if _, err := f.ReadAt(part, end-end%block); err != nil {
			return err
		}
	}
	w.f, w.block, w.part = f, block, part
	return nil
}

// write puts a frame of the records of a group at the end of the segment. Once it
// is synced, done says that the segment ends behind it; else it may be written over.
func (w *frameWriter) write(h *frame, group []*appending, salt uint64, end int64) error {
	size := int64(0)
	for _, a := range group {
		size += int64(recordSize + len(a.record.Kind) + len(a.record.Key) + len(a.record.Meta) + len(a.record.Body))
	}
	head := end % w.block
	w.reserve(head + frameSize + size)
	w.at, w.sum, w.held = end-head, 0, 0
	w.hold = up(head+frameSize, w.block)
	copy(w.mem, w.part)
	w.n = head + frameSize
	for i, a := range group {
		a.record.Seq = h.first + uint64(i)
		spaces := int64(0)
		if w.inPlace(a.record.Body) && len(a.record.Meta) > 0 {
			begin := w.n + int64(recordSize+len(a.record.Kind)+len(a.record.Key)+len(a.record.Meta))
			spaces = up(begin, w.block) - begin
		}
		if err := w.put(encodeHead(&a.record, int(spaces))); err != nil {
			return err
		}
		if err := w.put(a.record.Body); err != nil {
			return err
		}
	}
	after := w.at + w.n - (end - head) // where the frame ends, from the beginning of its first block
	h.length, h.payload = after-head-frameSize, w.sum
	last := after % w.block
	w.next = nil
	if w.n > 0 {
		if after > w.hold {
			w.next = append(w.next, w.mem[w.n-last:w.n]...)
		}
		pad := up(w.n, w.block)
		clear(w.mem[w.n:pad])
		w.n = pad
		if err := w.flush(); err != nil {
			return err
		}
	}
	crashpoint.Reach("spool.payload_written")
	copy(w.first[head:], h.encode(salt))
	if _, err := w.f.WriteAt(w.first[:w.held], end-head); err != nil {
		return err
	}
	if after <= w.hold {
		w.next = append(w.next, w.first[after-last:after]...)
	}
	return nil
}

// done makes the frame that was written last part of the segment.
func (w *frameWriter) done() { w.part = w.next }

// inPlace says whether most of a body can be written from where it is.
func (w *frameWriter) inPlace(b []byte) bool {
	return w.block > 1 && len(b) >= leastInPlace && uintptr(unsafe.Pointer(unsafe.SliceData(b)))%uintptr(w.block) == 0
}

// put adds bytes to the payload.
func (w *frameWriter) put(b []byte) error {
	if w.n > 0 && w.n%w.block == 0 && w.inPlace(b) {
		if err := w.flush(); err != nil {
			return err
		}
		most := int64(len(b)) / w.block * w.block
		w.sum = crc32.Update(w.sum, castagnoli, b[:most])
		if _, err := w.f.WriteAt(b[:most], w.at); err != nil {
			return err
		}
		w.at, b = w.at+most, b[most:]
	}
	for len(b) > 0 {
		k := copy(w.mem[w.n:], b)
		w.sum = crc32.Update(w.sum, castagnoli, w.mem[w.n:w.n+int64(k)])
		w.n += int64(k)
		b = b[k:]
		if w.n == int64(len(w.mem)) {
			if err := w.flush(); err != nil {
				return err
			}
		}
	}
	return nil
}

// flush writes what is in mem, but keeps what is to go last.
func (w *frameWriter) flush() error {
	b := w.mem[:w.n]
	at := w.at
	if w.held == 0 {
		w.held = min(w.hold, w.n)
		copy(w.first, b[:w.held])
		b, at = b[w.held:], at+w.held
	}
	w.at, w.n = w.at+w.n, 0
	if len(b) == 0 {
		return nil
	}
	_, err := w.f.WriteAt(b, at)
	return err
}

// reserve makes room for as much of n bytes as is written at once.
func (w *frameWriter) reserve(n int64) {
	if int64(len(w.first)) < 2*w.block+frameSize {
		w.first = blocks(up(2*w.block+frameSize, directBlock))
	}
	if want := min(max(n, leastStaged), mostStaged); int64(len(w.mem)) < want {
		w.mem = blocks(up(want, directBlock))
	}
}

// blocks is n bytes of memory aligned to directBlock.
func blocks(n int64) []byte {
	b := make([]byte, n+directBlock)
	skip := -uintptr(unsafe.Pointer(unsafe.SliceData(b))) % directBlock
	return b[skip : int64(skip)+n : int64(skip)+n]
}

// up is n rounded up to a multiple of block.
func up(n, block int64) int64 { return (n + block - 1) / block * block }

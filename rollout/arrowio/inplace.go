package arrowio

import (
	"encoding/binary"
	"unsafe"

	"trainerd/rollout"
)

// DecodeInPlace is DecodeBytes, but where that takes little memory the batch's
// completions and log-probs are left where they are in data. kept says so: data
// then belongs to the batch, and nobody may write to it any more.
func DecodeInPlace(data []byte, s rollout.Schema, l rollout.Limits) (b *rollout.Batch, kept bool, err error) {
	in := &stream{data: data, limit: l.MaxBytes}
	d := newDecoder(s, l)
	d.inPlace = littleEndian
	if err := d.decode(in); err != nil {
		return nil, false, err
	}
	// A row that waits for its group holds all of data, of which the queue counts
	// only what is used: the rest must be small beside that.
	if 4*d.shared < 3*int64(cap(data)) {
		d.detach()
		return d.batch, false, nil
	}
	d.batch.Shared = true
	return d.batch, true, nil
}

// littleEndian says whether numbers lie in memory as they do in an Arrow stream.
var littleEndian = binary.NativeEndian.Uint16([]byte{1, 0}) == 1

// shares says whether rows may refer to the values of a column, n of its 32-bit
// values in all. A message that has more else than these is not worth it.
func (d *decoder) shares(a *vec, n int) bool {
	return d.inPlace && a.inBody && a.valid == nil && a.typ.bits == 32 && n > 0 && 16*n >= a.body &&
		uintptr(unsafe.Pointer(unsafe.SliceData(a.data)))%4 == 0
}

// detach gives all rows memory of their own.
func (d *decoder) detach() {
	if d.shared == 0 {
		return
	}
	for i := range d.batch.Rollouts {
		d.batch.Rollouts[i].Detach()
	}
}

// number is what a column of 32 bits holds.
type number interface{ int32 | float32 }

// view is raw as the numbers that it holds. raw is aligned to 4 bytes.
func view[T number](raw []byte) []T {
	n := len(raw) / 4
	return unsafe.Slice((*T)(unsafe.Pointer(unsafe.SliceData(raw))), n)[:n:n]
}

// copyNumbers copies numbers of 32 bits out of a stream, on a little-endian machine.
func copyNumbers[T number](dst []T, raw []byte) {
	copy(unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(dst))), 4*len(dst)), raw)
}

// Two numbers of 32 bits are looked at at once, as the halves of a word. A half
// below 2^31 is at most a bound if its high bit is set in bound + 2^31 - half;
// no half borrows from the other.
const highBits = 1<<63 | 1<<31

func both(v uint32) uint64 { return uint64(v)<<32 | uint64(v) }

// tokensFit says whether all 32-bit values are in [0, vocab), which is in [1, 2^31).
func tokensFit(raw []byte, vocab int) bool {
	most := both(uint32(vocab-1)) | highBits
	var bad uint64
	for len(raw) >= 16 {
		x, y := binary.LittleEndian.Uint64(raw), binary.LittleEndian.Uint64(raw[8:])
		bad |= ^(most - x&^highBits) | x | ^(most - y&^highBits) | y
		raw = raw[16:]
	}
	for ; len(raw) >= 4; raw = raw[4:] {
		x := uint64(binary.LittleEndian.Uint32(raw))
		bad |= ^(most - x&^highBits) | x
	}
	return bad&highBits == 0
}

// logProbsFit says whether all float32 are finite and at most maxLogProb: as
// integers the bits of floats count up from 0 and, with the sign bit, from -0.
func logProbsFit(raw []byte) bool {
	finite, positive := both(maxFiniteBits)|highBits, both(maxLogProbBits)|highBits
	var bad uint64
	for len(raw) >= 16 {
		x, y := binary.LittleEndian.Uint64(raw), binary.LittleEndian.Uint64(raw[8:])
		u, v := x&^highBits, y&^highBits
		bad |= ^(positive - u | x&(finite-u)) | ^(positive - v | y&(finite-v))
		raw = raw[16:]
	}
	for ; len(raw) >= 4; raw = raw[4:] {
		x := uint64(binary.LittleEndian.Uint32(raw))
		u := x &^ highBits
		bad |= ^(positive - u | x&(finite-u))
	}
	return bad&highBits == 0
}

// Bits of float32: of the greatest finite number, of maxLogProb.
const (
	maxFiniteBits  = 0x7F7FFFFF
	maxLogProbBits = 0x3A800000
)

package arrowio

import (
	"encoding/binary"
	"unsafe"

	"trainerd/rollout"
	"trainerd/rollout/words"
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

// tokensFit says whether all 32-bit values are in [0, vocab), which is in [1, 2^31).
func tokensFit(raw []byte, vocab int) bool {
	_, greatest := words.Greatest(raw) // a negative number is greater than any token
	return greatest < uint32(vocab)
}

// logProbsFit says whether all float32 are finite and at most maxLogProb.
func logProbsFit(raw []byte) bool { return words.Finite(raw, maxLogProb) }

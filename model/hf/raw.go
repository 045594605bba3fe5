package hf

import (
	"encoding/binary"
	"unsafe"
)

// stored views values as the bytes that a file holds of them; ok is false on a
// machine whose memory has the other order of bytes.
func stored[T float32 | uint16](x []T) (data []byte, ok bool) {
	if len(x) == 0 || binary.NativeEndian.Uint16([]byte{1, 0}) != 1 {
		return nil, len(x) == 0
	}
	return unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(x))), len(x)*int(unsafe.Sizeof(x[0]))), true
}

// stored is the bytes of a run of tensors in a file of the capture's own type:
// they lie one after the other in the capture as they do in the file.
func (c *Capture) stored(items []item) (data []byte, ok bool) {
	if len(items) == 0 {
		return nil, true
	}
	first, last := c.index[items[0].name], c.index[items[len(items)-1].name]
	from, to := first.from, last.from+last.n
	if c.dtype == "F32" {
		return stored(c.mem.Floats[from:to])
	}
	return stored(c.mem.Halves[from:to])
}

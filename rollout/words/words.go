package words

import (
	"encoding/binary"
	"math"
	"unsafe"
)

// block is how many bytes the assembly looks at in one turn.
const block = 128

// Greatest is the greatest of the 32-bit words of raw, in the machine's byte order,
// once as signed and once as unsigned numbers; math.MinInt32 and 0 when there is
// none. Bytes behind the last whole word do not count.
func Greatest(raw []byte) (signed int32, unsigned uint32) {
	signed = math.MinInt32
	if n := len(raw) / block; fast && n > 0 {
		signed, unsigned = greatest(unsafe.SliceData(raw), n)
		raw = raw[n*block:]
	}
	s, u := portable(raw)
	return max(signed, s), max(unsigned, u)
}

// portable is Greatest without assembly.
func portable(raw []byte) (signed int32, unsigned uint32) {
	a, b := int32(math.MinInt32), int32(math.MinInt32) // two, so that one does not wait for the other
	var c, d uint32
	for ; len(raw) >= 8; raw = raw[8:] {
		x := binary.NativeEndian.Uint64(raw)
		a, c = max(a, int32(x)), max(c, uint32(x))
		b, d = max(b, int32(x>>32)), max(d, uint32(x>>32))
	}
	if len(raw) >= 4 {
		x := binary.NativeEndian.Uint32(raw)
		a, c = max(a, int32(x)), max(c, x)
	}
	return max(a, b), max(c, d)
}

// negInfinity is the bits of the float32 before those of the negative NaNs.
const negInfinity = 0xFF800000

// Finite says whether the words are float32 that are finite and not above most,
// which is finite and not negative. Bits of floats count up from 0, and with the
// sign bit from -0: what is positive and too large or not finite is the greatest
// word with a sign, what is negative and not finite the greatest without.
func Finite(raw []byte, most float32) bool {
	signed, unsigned := Greatest(raw)
	return signed <= int32(math.Float32bits(most)) && unsigned < negInfinity
}

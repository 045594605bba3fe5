package hf

import (
	"encoding/binary"
	"math"
	"slices"
)

// decode fills dst from little-endian bytes of a stored float type.
func decode(dst []float32, src []byte, dtype string) {
	switch dtype {
	case "F32":
		for i := range dst {
			dst[i] = math.Float32frombits(binary.LittleEndian.Uint32(src[4*i:]))
		}
	case "BF16":
		for i := range dst {
			dst[i] = math.Float32frombits(uint32(binary.LittleEndian.Uint16(src[2*i:])) << 16)
		}
	case "F16":
		for i := range dst {
			dst[i] = fromHalf(binary.LittleEndian.Uint16(src[2*i:]))
		}
	}
}

// encode appends values as little-endian bytes of a stored float type, rounded
// to nearest even. It returns the index of the first finite value that rounds
// to infinity, or -1.
func encode(dst []byte, src []float32, dtype string) ([]byte, int) {
	overflow := -1
	check := func(i int) {
		if overflow < 0 && !math.IsInf(float64(src[i]), 0) {
			overflow = i
		}
	}
	at := len(dst)
	dst = slices.Grow(dst, len(src)*int(itemSize[dtype]))[:at+len(src)*int(itemSize[dtype])]
	out := dst[at:]
	switch dtype {
	case "F32":
		if data, ok := stored(src); ok {
			copy(out, data)
			break
		}
		for i, x := range src {
			binary.LittleEndian.PutUint32(out[4*i:], math.Float32bits(x))
		}
	case "BF16":
		for i := 0; i < len(src); {
			i += toBFloats(out[2*i:], src[i:])
			for end := min(i+4, len(src)); i < end; i++ {
				h := toBFloat(src[i])
				if h&0x7fff == 0x7f80 {
					check(i)
				}
				binary.LittleEndian.PutUint16(out[2*i:], h)
			}
		}
	case "F16":
		for i, x := range src {
			h := toHalf(x)
			if h&0x7fff == 0x7c00 {
				check(i)
			}
			binary.LittleEndian.PutUint16(out[2*i:], h)
		}
	}
	return dst, overflow
}

// fromHalf widens an IEEE 754 binary16 number exactly.
func fromHalf(h uint16) float32 {
	sign, exp, frac := uint32(h&0x8000)<<16, uint32(h>>10&0x1f), uint32(h&0x3ff)
	switch exp {
	case 0: // zero or subnormal: frac * 2^-24
		x := float32(frac) * (1.0 / (1 << 24))
		return math.Float32frombits(math.Float32bits(x) | sign)
	case 0x1f:
		return math.Float32frombits(sign | 0x7f800000 | frac<<13)
	}
	return math.Float32frombits(sign | (exp+112)<<23 | frac<<13)
}

// toHalf rounds to the nearest binary16 number, ties to even.
func toHalf(x float32) uint16 {
	bits := math.Float32bits(x)
	sign, bits := uint16(bits>>16&0x8000), bits&0x7fffffff
	switch {
	case bits > 0x7f800000: // NaN keeps its payload's top, and stays one
		return sign | 0x7e00 | uint16(bits>>13&0x1ff)
	case bits >= 0x477ff000: // 65520 and more: infinity
		return sign | 0x7c00
	case bits < 0x38800000: // below 2^-14: subnormal, a multiple of 2^-24
		// Adding 0.5 leaves the rounded multiple in the low bits of the sum.
		y := math.Float32frombits(bits) + 0.5
		return sign | uint16(math.Float32bits(y)-math.Float32bits(0.5))
	}
	bits += 0xfff + bits>>13&1
	return sign | uint16((bits-112<<23)>>13)
}

// toBFloat rounds to the nearest bfloat16 number, ties to even.
func toBFloat(x float32) uint16 {
	bits := math.Float32bits(x)
	if bits&0x7fffffff > 0x7f800000 {
		return uint16(bits>>16) | 0x40
	}
	return uint16((bits + 0x7fff + bits>>16&1) >> 16)
}

// toBFloats is toBFloat of many numbers, four at a time, little-endian. It returns
// how many it did: it stops at four of which one is 2^127 or more, infinite or not
// a number, which want a closer look, and where fewer than four are left.
func toBFloats(dst []byte, src []float32) (n int) {
	const sign = 1 << 31
	for ; len(src) >= 4 && len(dst) >= 8; src, dst = src[4:], dst[8:] {
		a, b, c, d := math.Float32bits(src[0]), math.Float32bits(src[1]), math.Float32bits(src[2]), math.Float32bits(src[3])
		// Exponents of 254 and 255 carry into the sign's place.
		if ((a&^sign+1<<24)|(b&^sign+1<<24)|(c&^sign+1<<24)|(d&^sign+1<<24))&sign != 0 {
			return n
		}
		a += 0x7fff + a>>16&1
		b += 0x7fff + b>>16&1
		c += 0x7fff + c>>16&1
		d += 0x7fff + d>>16&1
		low, high := a>>16|b&0xffff0000, c>>16|d&0xffff0000
		binary.LittleEndian.PutUint64(dst, uint64(low)|uint64(high)<<32)
		n += 4
	}
	return n
}

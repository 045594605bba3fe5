package gguf

import (
	"encoding/binary"
	"fmt"
	"math"
)

// format is one of ggml's tensor types: blocks of `block` elements in `size` bytes.
type format struct {
	name   string
	block  int64
	size   int64
	decode func(dst []float32, src []byte) // whole blocks; len(src) = len(dst)/block*size
}

// formats are the types that this package reads, by ggml's number.
var formats = map[uint32]format{
	0:  {"F32", 1, 4, decodeF32},
	1:  {"F16", 1, 2, decodeF16},
	2:  {"Q4_0", 32, 18, decodeQ4_0},
	3:  {"Q4_1", 32, 20, decodeQ4_1},
	8:  {"Q8_0", 32, 34, decodeQ8_0},
	30: {"BF16", 1, 2, decodeBF16},
}

// typeName names a type that is not read, so that the error says what the file holds.
func typeName(kind uint32) string {
	names := map[uint32]string{6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K",
		16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS",
		24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"}
	if n, ok := names[kind]; ok {
		return n
	}
	if f, ok := formats[kind]; ok {
		return f.name
	}
	return fmt.Sprintf("number %d", kind)
}

func decodeF32(dst []float32, src []byte) {
	for i := range dst {
		dst[i] = math.Float32frombits(binary.LittleEndian.Uint32(src[4*i:]))
	}
}

func decodeF16(dst []float32, src []byte) {
	for i := range dst {
		dst[i] = half(binary.LittleEndian.Uint16(src[2*i:]))
	}
}

func decodeBF16(dst []float32, src []byte) {
	for i := range dst {
		dst[i] = math.Float32frombits(uint32(binary.LittleEndian.Uint16(src[2*i:])) << 16)
	}
}

// decodeQ8_0 reads blocks {d f16, q int8[32]}: x = d*q.
func decodeQ8_0(dst []float32, src []byte) {
	for ; len(dst) > 0; dst, src = dst[32:], src[34:] {
		d := half(binary.LittleEndian.Uint16(src))
		for i, q := range src[2:34] {
			dst[i] = d * float32(int8(q))
		}
	}
}

// decodeQ4_0 reads blocks {d f16, q nibble[32]}: x = d*(q-8). The low nibbles
// of the 16 bytes are elements 0..15, the high ones 16..31.
func decodeQ4_0(dst []float32, src []byte) {
	for ; len(dst) > 0; dst, src = dst[32:], src[18:] {
		d := half(binary.LittleEndian.Uint16(src))
		for i, q := range src[2:18] {
			dst[i] = d * float32(int(q&15)-8)
			dst[i+16] = d * float32(int(q>>4)-8)
		}
	}
}

// decodeQ4_1 reads blocks {d f16, m f16, q nibble[32]}: x = d*q + m, nibbles as in Q4_0.
func decodeQ4_1(dst []float32, src []byte) {
	for ; len(dst) > 0; dst, src = dst[32:], src[20:] {
		d := half(binary.LittleEndian.Uint16(src))
		m := half(binary.LittleEndian.Uint16(src[2:]))
		for i, q := range src[4:20] {
			// The conversions keep the product rounded to float32 before the sum
			// on machines that would fuse the two.
			dst[i] = float32(d*float32(q&15)) + m
			dst[i+16] = float32(d*float32(q>>4)) + m
		}
	}
}

// half converts an IEEE binary16 to float32, exactly.
func half(h uint16) float32 {
	sign := uint32(h>>15) << 31
	exp := uint32(h>>10) & 31
	frac := uint32(h) & 0x3ff
	switch exp {
	case 0: // zero and subnormals: frac * 2^-24
		f := float32(frac) * (1.0 / (1 << 24))
		return math.Float32frombits(math.Float32bits(f) | sign)
	case 31:
		return math.Float32frombits(sign | 0xff<<23 | frac<<13)
	}
	return math.Float32frombits(sign | (exp+112)<<23 | frac<<13)
}

package simd

import "math"

func f32ToBF16Go(dst []uint16, src []float32) {
	for i, x := range src {
		u := math.Float32bits(x)
		if x != x {
			dst[i] = uint16(u>>16) | 0x40
			continue
		}
		dst[i] = uint16((u + 0x7fff + u>>16&1) >> 16)
	}
}

func bf16ToF32Go(dst []float32, src []uint16) {
	for i, h := range src {
		dst[i] = math.Float32frombits(uint32(h) << 16)
	}
}

func f32ToF16Go(dst []uint16, src []float32) {
	for i, x := range src {
		dst[i] = f16(x)
	}
}

// f16 rounds x to binary16.
func f16(x float32) uint16 {
	u := math.Float32bits(x)
	sign := uint16(u >> 16 & 0x8000)
	u &= 0x7fffffff
	switch {
	case u > 0x7f800000: // NaN
		return sign | 0x7e00 | uint16(u>>13&0x3ff)
	case u >= 0x477ff000: // rounds past 65504
		return sign | 0x7c00
	case u < 0x38800000: // below 2^-14: the unit is 2^-24; adding 0.5 rounds to it
		r := math.Float32frombits(u) + 0.5
		return sign | uint16(math.Float32bits(r)-0x3f000000)
	}
	u += 0xfff + u>>13&1
	return sign | uint16((u-0x38000000)>>13)
}

func f16ToF32Go(dst []float32, src []uint16) {
	for i, h := range src {
		dst[i] = f32FromF16(h)
	}
}

func f32FromF16(h uint16) float32 {
	sign := uint32(h&0x8000) << 16
	exp, frac := uint32(h>>10&31), uint32(h&0x3ff)
	switch {
	case exp == 31 && frac != 0:
		return math.Float32frombits(sign | 0x7fc00000 | frac<<13)
	case exp == 31:
		return math.Float32frombits(sign | 0x7f800000)
	case exp == 0: // frac * 2^-24, exact
		f := float32(frac) * 0x1p-24
		return math.Float32frombits(math.Float32bits(f) | sign)
	}
	return math.Float32frombits(sign | (exp+112)<<23 | frac<<13)
}

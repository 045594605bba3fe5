package main

import (
	"github.com/mmcloughlin/avo/attr"
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	. "github.com/mmcloughlin/avo/reg"
)

// Kernels of compact moments and kept gradients round as the Go code in
// portable_compact.go does, bit for bit: they multiply and add in the same order
// and fuse nothing. An element's index grows by one within a call, in 32 bits;
// the caller sees to it that it does not wrap around.

func iota16() Mem {
	if m, ok := constants["iota"]; ok {
		return m
	}
	m := GLOBL("iota16", attr.RODATA|attr.NOPTR)
	for i := range 16 {
		DATA(4*i, U32(i))
	}
	constants["iota"] = m
	return m
}

// randomBits is the state of kernels.Key.Bits for consecutive elements.
type randomBits struct{ index, a, b VecVirtual }

func (s isa) randomBits() *randomBits {
	r := &randomBits{s.arg("index"), s.arg("keyA"), s.arg("keyB")}
	VPADDD(iota16(), r.index, r.index)
	return r
}

// next returns the bits of a vector of elements and moves on to the following.
func (s isa) next(r *randomBits) VecVirtual {
	x, y := s.vec(), s.vec()
	VXORPS(r.a, r.index, x)
	VPADDD(constant("lanes"+s.suffix, U32(s.lanes)), r.index, r.index)
	VPSRLD(Imm(16), x, y)
	VXORPS(y, x, x)
	VPMULLD(constant("mixA", U32(0x7feb352d)), x, x)
	VPSRLD(Imm(15), x, y)
	VXORPS(y, x, x)
	VPADDD(r.b, x, x)
	VPMULLD(constant("mixB", U32(0x846ca68b)), x, x)
	VPSRLD(Imm(16), x, y)
	VXORPS(y, x, x)
	return x
}

// storeLow writes the lower 16 bits of each lane, whose upper ones are zero.
func (s isa) storeLow(v VecVirtual, m Mem, t *tail) {
	switch {
	case !s.z:
		hi := XMM()
		VEXTRACTI128(Imm(1), v, hi)
		VPACKUSDW(hi, v.AsX(), hi)
		VMOVDQU(hi, m)
	case t == nil:
		VPMOVDW(v, m)
	default:
		VPMOVDW(v, t.k, m)
	}
}

// widen reads BF16 as float32.
func (s isa) widen(m Mem, t *tail) VecVirtual {
	v := s.vec()
	if t == nil {
		VPMOVZXWD(m, v)
	} else {
		VPMOVZXWD_Z(m, t.k, v)
	}
	VPSLLD(Imm(16), v, v)
	return v
}

func (s isa) addGrad() {
	n := s.begin("addGrad", "func(n int, dst *uint16, src *float32, index, keyA, keyB uint32)")
	dst, src, random := half(ptr("dst")), f32(ptr("src")), s.randomBits()
	s.convert(n, []span{dst, src}, func(u int, t *tail) {
		bits := s.next(random)
		VPSRLD(Imm(16), bits, bits)
		sum := s.widen(s.at(dst, u), t)
		VADDPS(s.load(s.at(src, u), t), sum, sum)
		VPADDD(sum, bits, bits)
		// Infinity and NaN keep their upper halves: their difference to themselves is
		// NaN. The NaN of an addition has the bit set that keeps its half one.
		odd := s.vec()
		VSUBPS(sum, sum, odd)
		if s.z {
			finite := K()
			VCMPPS(Imm(7), odd, odd, finite)
			VMOVAPS(bits, finite, sum)
		} else {
			VCMPPS(Imm(7), odd, odd, odd)
			VBLENDVPS(odd, bits, sum, sum)
		}
		VPSRLD(Imm(16), sum, sum)
		s.storeLow(sum, s.at(dst, u), t)
	})
	s.end()
}

// compactUpdate is the first half of a block of AdamW on compact moments: n, a
// multiple of 16, new weights and second moments, and for the second half the
// first moments, random bits and the greatest |first moment|.
func (s isa) compactUpdate() {
	n := s.begin("compactUpdate", "func(n int, p, grad *float32, m *int8, v *uint16, fresh *float32, random *uint32, coef *float32, unit float32, index, keyA, keyB uint32) (peak float32, nan uint32)")
	p, g, m, v := f32(ptr("p")), f32(ptr("grad")), span{ptr("m"), 1}, half(ptr("v"))
	fresh, kept, coef := f32(ptr("fresh")), f32(ptr("random")), ptr("coef")
	random, unit, peak := s.randomBits(), s.arg("unit"), s.zero()
	// AVX2 has no registers to keep the coefficients in.
	c := func(i int) VecVirtual {
		x := s.vec()
		VBROADCASTSS(Mem{Base: coef, Disp: 4 * i}, x)
		return x
	}
	if s.z {
		var keep [9]VecVirtual
		for i := range keep {
			keep[i] = c(i)
		}
		c = func(i int) VecVirtual { return keep[i] }
	}
	const grad, decay, beta1, alpha1, beta2, alpha2, step, bias, eps = 0, 1, 2, 3, 4, 5, 6, 7, 8
	var seen Register
	var unordered VecVirtual
	if s.z {
		seen = K()
		KXORW(seen, seen, seen)
	} else {
		unordered = s.zero()
	}
	Label("loop")
	code, sign := s.vec(), s.vec()
	VPMOVSXBD(s.at(m, 0), code)
	VANDPS(constant("signBit", U32(0x80000000)), code, sign)
	VPMULLD(code, code, code)
	first := s.vec()
	VCVTDQ2PS(code, first)
	VMULPS(constant("codeUnit", float(1.0/(127*127))), first, first)
	VMULPS(first, first, first)
	VORPS(sign, first, first)
	VMULPS(unit, first, first)
	VMULPS(c(beta1), first, first)
	gi, x := s.load(s.at(g, 0), nil), s.vec()
	VMULPS(c(grad), gi, gi)
	VMULPS(c(alpha1), gi, x)
	VADDPS(x, first, first)
	s.store(first, s.at(fresh, 0), nil)
	if s.z {
		k := K()
		VCMPPS(Imm(3), first, first, k)
		KORW(k, seen, seen)
	} else {
		VCMPPS(Imm(3), first, first, x)
		VORPS(x, unordered, unordered)
	}
	VANDPS(constant("absBits", U32(0x7fffffff)), first, x)
	VMAXPS(x, peak, peak)

	second := s.widen(s.at(v, 0), nil)
	VMULPS(c(beta2), second, second)
	VMULPS(c(alpha2), gi, x)
	VMULPS(gi, x, x)
	VADDPS(x, second, second)
	bits, low := s.next(random), s.vec()
	s.store(bits, s.at(kept, 0), nil)
	VANDPS(constant("lowHalf", U32(0xffff)), bits, low)
	VPADDD(second, low, low)
	VPSRLD(Imm(16), low, low)
	s.storeLow(low, s.at(v, 0), nil)

	VSQRTPS(second, second)
	VMULPS(c(bias), second, second)
	VADDPS(c(eps), second, second)
	VMULPS(c(step), first, first)
	VDIVPS(second, first, first)
	pi := s.load(s.at(p, 0), nil)
	VMULPS(c(decay), pi, pi)
	VSUBPS(first, pi, pi)
	s.store(pi, s.at(p, 0), nil)
	for _, x := range []span{p, g, m, v, fresh, kept} {
		ADDQ(U32(s.lanes*x.size), x.p)
	}
	SUBQ(U32(s.lanes), n)
	JNZ(LabelRef("loop"))
	nan := GP32()
	if s.z {
		KMOVW(seen, nan)
	} else {
		VMOVMSKPS(unordered, nan)
	}
	Store(nan, Return("nan"))
	s.ret(s.lanewise(peak, func(src Op, dst VecVirtual) { VMAXPS(src, dst, dst) }), "peak")
	s.end()
}

// compactCodes is the second half: the codes of n first moments, a multiple of 16.
func (s isa) compactCodes() {
	n := s.begin("compactCodes", "func(n int, m *int8, fresh *float32, random *uint32, inverse float32)")
	m, fresh, random, inverse := span{ptr("m"), 1}, f32(ptr("fresh")), f32(ptr("random")), s.arg("inverse")
	one, top, two16 := s.reg(constant("oneBit", U32(1))), s.reg(constant("topCode", U32(127))), s.reg(constant("two16", float(65536)))
	Label("loop")
	x := s.load(s.at(fresh, 0), nil)
	t, q := s.vec(), s.vec()
	VMULPS(inverse, x, t)
	VANDPS(constant("absBits", U32(0x7fffffff)), t, t)
	VSQRTPS(t, q)
	VSQRTPS(q, q)
	VCVTTPS2DQ(q, q)
	// Codes below the top one may go one up.
	var kUp Register
	up := s.vec()
	if s.z {
		kUp = K()
		VPCMPGTD(q, top, kUp)
	} else {
		VPCMPGTD(q, top, up)
	}
	VPMINSD(top, q, q)
	square, gap, below := s.vec(), s.vec(), s.vec()
	VPMULLD(q, q, square)
	VCVTDQ2PS(square, below)
	VMULPS(below, below, below)
	VPADDD(q, square, square)
	VPADDD(square, square, square)
	VPADDD(one, square, square) // 2q²+2q+1
	VPADDD(q, q, gap)
	VPADDD(one, gap, gap)
	VPMULLD(square, gap, gap)
	VCVTDQ2PS(gap, gap)
	VSUBPS(below, t, t)
	VDIVPS(gap, t, t)
	VMULPS(two16, t, t)
	share := s.load(s.at(random, 0), nil)
	VPSRLD(Imm(16), share, share)
	VCVTDQ2PS(share, share)
	VADDPS(constant("half", float(0.5)), share, share)
	if s.z {
		k := K()
		VCMPPS(Imm(1), t, share, k)
		KANDW(kUp, k, k)
		VPADDD(one, q, k, q)
	} else {
		VCMPPS(Imm(1), t, share, share)
		VANDPS(share, up, up)
		VPSUBD(up, q, q)
	}
	VPSRAD(Imm(31), x, x)
	VXORPS(x, q, q)
	VPSUBD(x, q, q)
	if s.z {
		VPMOVDB(q, s.at(m, 0))
	} else {
		hi := XMM()
		VANDPS(constant("lowByte", U32(0xff)), q, q)
		VEXTRACTI128(Imm(1), q, hi)
		VPACKUSDW(hi, q.AsX(), hi)
		VPACKUSWB(hi, hi, hi)
		VMOVQ(hi, s.at(m, 0))
	}
	for _, x := range []span{m, fresh, random} {
		ADDQ(U32(s.lanes*x.size), x.p)
	}
	SUBQ(U32(s.lanes), n)
	JNZ(LabelRef("loop"))
	s.end()
}

package main

import (
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	. "github.com/mmcloughlin/avo/reg"
)

// The AVX2 conversions take whole vectors only: n is a multiple of 8 (there are
// no masked 16-bit moves); the caller converts the rest.

func half(p GPVirtual) span { return span{p, 2} }

// whole is loop without tail for AVX2, loop for AVX-512.
func (s isa) convert(n GPVirtual, spans []span, body func(u int, t *tail)) {
	if s.z {
		s.loop(n, 2, spans, body)
		return
	}
	Label("loop")
	CMPQ(n, Imm(8))
	JL(LabelRef("done"))
	body(0, nil)
	for _, x := range spans {
		ADDQ(Imm(uint64(8*x.size)), x.p)
	}
	SUBQ(Imm(8), n)
	JMP(LabelRef("loop"))
	Label("done")
}

func (s isa) f32ToBF16() {
	n := s.begin("f32ToBF16", "func(n int, dst *uint16, src *float32)")
	dst, src := half(ptr("dst")), f32(ptr("src"))
	round, one, quiet := s.reg(constant("bfRound", U32(0x7fff))), s.reg(constant("oneBit", U32(1))), s.reg(constant("bfQuiet", U32(0x400000)))
	s.convert(n, []span{dst, src}, func(u int, t *tail) {
		x := s.load(s.at(src, u), t)
		r, q := s.vec(), s.vec()
		VPSRLD(Imm(16), x, r)
		if s.z {
			VPANDD(one, r, r)
			VPADDD(round, r, r)
			VPADDD(x, r, r)
			VPORD(quiet, x, q)
			k := K()
			VCMPPS(Imm(3), x, x, k)
			VMOVAPS(q, k, r)
			VPSRLD(Imm(16), r, r)
			if t == nil {
				VPMOVDW(r, s.at(dst, u))
			} else {
				VPMOVDW(r, t.k, s.at(dst, u))
			}
			return
		}
		VPAND(one, r, r)
		VPADDD(round, r, r)
		VPADDD(x, r, r)
		VPOR(quiet, x, q)
		nan, hi := YMM(), XMM()
		VCMPPS(Imm(3), x, x, nan)
		VBLENDVPS(nan, q, r, r)
		VPSRLD(Imm(16), r, r)
		VEXTRACTI128(Imm(1), r, hi)
		VPACKUSDW(hi, r.AsX(), hi)
		VMOVDQU(hi, s.at(dst, u))
	})
	s.end()
}

func (s isa) bf16ToF32() {
	n := s.begin("bf16ToF32", "func(n int, dst *float32, src *uint16)")
	dst, src := f32(ptr("dst")), half(ptr("src"))
	s.convert(n, []span{dst, src}, func(u int, t *tail) {
		v := s.vec()
		if t == nil {
			VPMOVZXWD(s.at(src, u), v)
		} else {
			VPMOVZXWD_Z(s.at(src, u), t.k, v)
		}
		VPSLLD(Imm(16), v, v)
		s.store(v, s.at(dst, u), t)
	})
	s.end()
}

func (s isa) f32ToF16() {
	n := s.begin("f32ToF16", "func(n int, dst *uint16, src *float32)")
	dst, src := half(ptr("dst")), f32(ptr("src"))
	s.convert(n, []span{dst, src}, func(u int, t *tail) {
		x := s.load(s.at(src, u), t)
		if t == nil {
			VCVTPS2PH(Imm(0), x, s.at(dst, u))
		} else {
			VCVTPS2PH(Imm(0), x, t.k, s.at(dst, u))
		}
	})
	s.end()
}

func (s isa) f16ToF32() {
	n := s.begin("f16ToF32", "func(n int, dst *float32, src *uint16)")
	dst, src := f32(ptr("dst")), half(ptr("src"))
	s.convert(n, []span{dst, src}, func(u int, t *tail) {
		v := s.vec()
		if t == nil {
			VCVTPH2PS(s.at(src, u), v)
		} else {
			VCVTPH2PS_Z(s.at(src, u), t.k, v)
		}
		s.store(v, s.at(dst, u), t)
	})
	s.end()
}

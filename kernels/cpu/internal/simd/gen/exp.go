package main

import (
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	. "github.com/mmcloughlin/avo/reg"
)

// expConst are the constants of exp that must lie in registers: operands of min
// and max on the side that loses to a NaN.
type expConst struct{ low, high VecVirtual }

func (s isa) expConst() expConst {
	return expConst{s.reg(constant("expLow", float(-104))), s.reg(constant("expHigh", float(89)))}
}

// clampLow raises y to the least argument of exp. NaN passes.
func (s isa) clampLow(c expConst, y VecVirtual) { VMAXPS(y, c.low, y) }

// exp returns exp(y) for y >= -104 or NaN; see portable_exp.go for the method.
func (s isa) exp(c expConst, y VecVirtual) VecVirtual {
	r, n, p := s.vec(), s.vec(), s.vec()
	VMINPS(y, c.high, r)
	VMULPS(constant("log2E", float(1.4426950408889634)), r, n)
	if s.z {
		VRNDSCALEPS(Imm(8), n, n)
	} else {
		VROUNDPS(Imm(8), n, n)
	}
	VFNMADD231PS(constant("ln2Hi", float(0.693359375)), n, r)
	VFNMADD231PS(constant("ln2Lo", float(-2.12194440054690583e-4)), n, r)
	VMOVUPS(constant("expC6", float(expC6)), p)
	VFMADD213PS(constant("expC5", float(expC5)), r, p)
	VFMADD213PS(constant("expC4", float(expC4)), r, p)
	VFMADD213PS(constant("expC3", float(expC3)), r, p)
	VFMADD213PS(constant("expC2", float(expC2)), r, p)
	VFMADD213PS(constant("one", float(1)), r, p)
	VFMADD213PS(constant("one", float(1)), r, p)
	if s.z {
		VSCALEFPS(n, p, p)
		return p
	}
	// 2^n in two factors: n reaches from -150 to 128.
	VCVTPS2DQ(n, n)
	VPSRAD(Imm(1), n, r)
	VPSUBD(r, n, n)
	for _, e := range []VecVirtual{r, n} {
		VPADDD(constant("bias", U32(127)), e, e)
		VPSLLD(Imm(23), e, e)
		VMULPS(e, p, p)
	}
	return p
}

// affine returns scale*x - shift in a register of its own.
func (s isa) affine(x Mem, scale, shift VecVirtual, t *tail) VecVirtual {
	y := s.load(x, t)
	VFMSUB213PS(shift, scale, y)
	return y
}

func (s isa) expScaleShift() {
	n := s.begin("expScaleShift", "func(n int, dst, x *float32, scale, shift float32) (sum float32)")
	c, scale, shift, dst, x := s.expConst(), s.arg("scale"), s.arg("shift"), f32(ptr("dst")), f32(ptr("x"))
	acc := s.zeros(2)
	s.loop(n, 2, []span{dst, x}, func(u int, t *tail) {
		y := s.affine(s.at(x, u), scale, shift, t)
		s.clampLow(c, y)
		e := s.exp(c, y)
		s.store(e, s.at(dst, u), t)
		s.only(e, t)
		VADDPS(e, acc[u], acc[u])
	})
	s.ret(s.sumAll(acc), "sum")
	s.end()
}

func (s isa) logitStats() {
	n := s.begin("logitStats", "func(n int, z *float32, scale, shift float32) (sumExp, sumExpY float32)")
	c, scale, shift, z := s.expConst(), s.arg("scale"), s.arg("shift"), f32(ptr("z"))
	sums, products := s.zeros(2), s.zeros(2)
	s.loop(n, 2, []span{z}, func(u int, t *tail) {
		y := s.affine(s.at(z, u), scale, shift, t)
		s.clampLow(c, y)
		e := s.exp(c, y)
		s.only(e, t)
		s.only(y, t)
		VADDPS(e, sums[u], sums[u])
		VFMADD231PS(e, y, products[u])
	})
	s.ret(s.sumAll(sums), "sumExp")
	s.ret(s.sumAll(products), "sumExpY")
	s.end()
}

func (s isa) dlogits() {
	n := s.begin("dlogits", "func(n int, dst, z *float32, scale, lse, a, b float32)")
	c, scale, lse, a, b := s.expConst(), s.arg("scale"), s.arg("lse"), s.arg("a"), s.arg("b")
	dst, z := f32(ptr("dst")), f32(ptr("z"))
	s.loop(n, 2, []span{dst, z}, func(u int, t *tail) {
		y := s.affine(s.at(z, u), scale, lse, t)
		s.clampLow(c, y)
		e := s.exp(c, y)
		VFMADD213PS(a, b, y)
		VMULPS(y, e, e)
		s.store(e, s.at(dst, u), t)
	})
	s.end()
}

// sigmoid returns 1/(1+exp(-g)).
func (s isa) sigmoid(c expConst, g VecVirtual) VecVirtual {
	y, one := s.zero(), s.reg(constant("one", float(1)))
	VSUBPS(g, y, y)
	s.clampLow(c, y)
	e := s.exp(c, y)
	VADDPS(one, e, e)
	VDIVPS(e, one, e)
	return e
}

func (s isa) siluMul() {
	n := s.begin("siluMul", "func(n int, out, gate, up *float32)")
	c, out, gate, up := s.expConst(), f32(ptr("out")), f32(ptr("gate")), f32(ptr("up"))
	s.loop(n, 2, []span{out, gate, up}, func(u int, t *tail) {
		g := s.load(s.at(gate, u), t)
		h := s.sigmoid(c, g)
		VMULPS(g, h, h)
		VMULPS(s.load(s.at(up, u), t), h, h)
		s.store(h, s.at(out, u), t)
	})
	s.end()
}

// siluMulBackward: silu' = sig + h*(1-sig), h = g*sig.
func (s isa) siluMulBackward() {
	n := s.begin("siluMulBackward", "func(n int, dgate, dup, dout, gate, up *float32)")
	c := s.expConst()
	dgate, dup, dout, gate, up := f32(ptr("dgate")), f32(ptr("dup")), f32(ptr("dout")), f32(ptr("gate")), f32(ptr("up"))
	s.loop(n, 1, []span{dgate, dup, dout, gate, up}, func(u int, t *tail) {
		g := s.load(s.at(gate, u), t)
		sig := s.sigmoid(c, g)
		VMULPS(sig, g, g)
		d, v := s.load(s.at(dout, u), t), s.load(s.at(up, u), t)
		rest := s.reg(constant("one", float(1)))
		VSUBPS(sig, rest, rest)
		VFMADD231PS(rest, g, sig)
		VMULPS(d, g, g)
		VMULPS(d, v, v)
		VMULPS(sig, v, v)
		s.store(v, s.at(dgate, u), t)
		s.store(g, s.at(dup, u), t)
	})
	s.end()
}

// exp(r) = 1 + r + r²·(C2 + C3·r + ... + C6·r⁴) on |r| <= ln2/2, the bracket
// interpolated at Chebyshev nodes: the relative error is 1.04e-8, a sixth of the
// unit roundoff. portable_exp.go has the same numbers.
const (
	expC2 = 0.5
	expC3 = 0.16666576266288757
	expC4 = 0.04166655242443085
	expC5 = 0.00836323294788599
	expC6 = 0.0013926250394433737
)

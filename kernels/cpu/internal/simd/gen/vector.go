package main

import (
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	. "github.com/mmcloughlin/avo/reg"
)

func genVector() {
	for _, s := range isas {
		s.dot()
		s.axpy()
		s.scale()
		s.binary("add", func(x, y VecVirtual) { VADDPS(y, x, x) })
		s.binary("mul", func(x, y VecVirtual) { VMULPS(y, x, x) })
		s.mulAdd()
		s.scaleMul()
		s.lerp()
		s.sums("sum", func(x, acc VecVirtual) { VADDPD(x, acc, acc) })
		s.sums("sumSquares", func(x, acc VecVirtual) { VFMADD231PD(x, x, acc) })
		s.max()
		s.rope()
		s.normBackward()
		s.adamW()
		s.expScaleShift()
		s.logitStats()
		s.dlogits()
		s.siluMul()
		s.siluMulBackward()
		s.f32ToBF16()
		s.bf16ToF32()
		s.f32ToF16()
		s.f16ToF32()
		s.addGrad()
		s.compactUpdate()
		s.compactCodes()
	}
}

func (s isa) dot() {
	n := s.begin("dot", "func(n int, x, y *float32) (sum float32)")
	x, y := f32(ptr("x")), f32(ptr("y"))
	acc := s.zeros(4)
	s.loop(n, 4, []span{x, y}, func(u int, t *tail) {
		a := s.load(s.at(x, u), t)
		if t != nil {
			VFMADD231PS(s.load(s.at(y, u), t), a, acc[u])
			return
		}
		VFMADD231PS(s.at(y, u), a, acc[u])
	})
	sum := s.sumAll(acc)
	s.ret(sum, "sum")
	s.end()
}

func (s isa) axpy() {
	n := s.begin("axpy", "func(n int, a float32, x, y *float32)")
	a, x, y := s.arg("a"), f32(ptr("x")), f32(ptr("y"))
	s.loop(n, 4, []span{x, y}, func(u int, t *tail) {
		v := s.load(s.at(y, u), t)
		VFMADD231PS(s.load(s.at(x, u), t), a, v)
		s.store(v, s.at(y, u), t)
	})
	s.end()
}

func (s isa) scale() {
	n := s.begin("scale", "func(n int, dst, x *float32, a float32)")
	a, dst, x := s.arg("a"), f32(ptr("dst")), f32(ptr("x"))
	s.loop(n, 4, []span{dst, x}, func(u int, t *tail) {
		v := s.load(s.at(x, u), t)
		VMULPS(a, v, v)
		s.store(v, s.at(dst, u), t)
	})
	s.end()
}

func (s isa) binary(name string, op func(x, y VecVirtual)) {
	n := s.begin(name, "func(n int, dst, x, y *float32)")
	dst, x, y := f32(ptr("dst")), f32(ptr("x")), f32(ptr("y"))
	s.loop(n, 4, []span{dst, x, y}, func(u int, t *tail) {
		v := s.load(s.at(x, u), t)
		op(v, s.load(s.at(y, u), t))
		s.store(v, s.at(dst, u), t)
	})
	s.end()
}

func (s isa) mulAdd() {
	n := s.begin("mulAdd", "func(n int, dst, x, y *float32)")
	dst, x, y := f32(ptr("dst")), f32(ptr("x")), f32(ptr("y"))
	s.loop(n, 4, []span{dst, x, y}, func(u int, t *tail) {
		v := s.load(s.at(dst, u), t)
		VFMADD231PS(s.load(s.at(y, u), t), s.load(s.at(x, u), t), v)
		s.store(v, s.at(dst, u), t)
	})
	s.end()
}

func (s isa) scaleMul() {
	n := s.begin("scaleMul", "func(n int, dst, x, y *float32, a float32)")
	a, dst, x, y := s.arg("a"), f32(ptr("dst")), f32(ptr("x")), f32(ptr("y"))
	s.loop(n, 4, []span{dst, x, y}, func(u int, t *tail) {
		v := s.load(s.at(x, u), t)
		VMULPS(a, v, v)
		VMULPS(s.load(s.at(y, u), t), v, v)
		s.store(v, s.at(dst, u), t)
	})
	s.end()
}

func (s isa) lerp() {
	n := s.begin("lerp", "func(n int, dst, src *float32, alpha, beta float32)")
	alpha, beta, dst, src := s.arg("alpha"), s.arg("beta"), f32(ptr("dst")), f32(ptr("src"))
	s.loop(n, 4, []span{dst, src}, func(u int, t *tail) {
		v := s.load(s.at(dst, u), t)
		VMULPS(beta, v, v)
		VFMADD231PS(s.load(s.at(src, u), t), alpha, v)
		s.store(v, s.at(dst, u), t)
	})
	s.end()
}

// sums accumulates in float64: a step takes half a vector of float32.
func (s isa) sums(name string, op func(x, acc VecVirtual)) {
	h := isa{s.suffix, s.lanes / 2, s.z}
	n := s.begin(name, "func(n int, x *float32) (sum float64)")
	x := f32(ptr("x"))
	acc := s.zeros(4)
	h.loop(n, 4, []span{x}, func(u int, t *tail) {
		wide := s.vec()
		switch {
		case t == nil:
			VCVTPS2PD(h.at(x, u), wide)
		case s.z:
			VCVTPS2PD_Z(h.at(x, u), t.k, wide)
		default:
			narrow := XMM()
			VMASKMOVPS(h.at(x, u), t.y.AsX(), narrow)
			VCVTPS2PD(narrow, wide)
		}
		op(wide, acc[u])
	})
	VADDPD(acc[2], acc[0], acc[0])
	VADDPD(acc[3], acc[1], acc[1])
	VADDPD(acc[1], acc[0], acc[0])
	if s.z {
		hi := YMM()
		VEXTRACTF64X4(Imm(1), acc[0], hi)
		VADDPD(hi, acc[0].AsY(), acc[0].AsY())
	}
	hi, lo := XMM(), acc[0].AsX()
	VEXTRACTF128(Imm(1), acc[0].AsY(), hi)
	VADDPD(hi, lo, lo)
	VUNPCKHPD(lo, lo, hi)
	VADDSD(hi, lo, lo)
	VMOVSD(lo, frame(Return("sum")))
	s.end()
}

// max also reports whether there was a NaN, which VMAXPS would lose.
func (s isa) max() {
	n := s.begin("max", "func(n int, x *float32) (top float32, nan uint32)")
	x := f32(ptr("x"))
	acc := []VecVirtual{s.reg(constant("negInf", U32(0xff800000))), nil}
	acc[1] = s.vec()
	VMOVAPS(acc[0], acc[1])
	var seenK Register
	var seen VecVirtual
	if s.z {
		seenK = K()
		KXORW(seenK, seenK, seenK)
	} else {
		seen = s.zero()
	}
	s.loop(n, 2, []span{x}, func(u int, t *tail) {
		v := s.load(s.at(x, u), t)
		if s.z {
			k := K()
			VCMPPS(Imm(3), v, v, k)
			KORW(k, seenK, seenK)
			if t != nil {
				VMAXPS(v, acc[u], t.k, acc[u])
			} else {
				VMAXPS(v, acc[u], acc[u])
			}
			return
		}
		unordered := YMM()
		VCMPPS(Imm(3), v, v, unordered)
		VORPS(unordered, seen, seen)
		if t != nil {
			VBLENDVPS(t.y, v, acc[u], v)
		}
		VMAXPS(v, acc[u], acc[u])
	})
	nan := GP32()
	if s.z {
		KMOVW(seenK, nan)
	} else {
		VMOVMSKPS(seen, nan)
	}
	Store(nan, Return("nan"))
	VMAXPS(acc[1], acc[0], acc[0])
	s.ret(s.lanewise(acc[0], func(src Op, dst VecVirtual) { VMAXPS(src, dst, dst) }), "top")
	s.end()
}

// rope rotates pairs (x, x2) by angles whose sine is multiplied by sign.
func (s isa) rope() {
	n := s.begin("rope", "func(n int, out, out2, x, x2, cos, sin *float32, sign float32)")
	sign := s.arg("sign")
	out, out2, x, x2 := f32(ptr("out")), f32(ptr("out2")), f32(ptr("x")), f32(ptr("x2"))
	cos, sin := f32(ptr("cos")), f32(ptr("sin"))
	s.loop(n, 1, []span{out, out2, x, x2, cos, sin}, func(u int, t *tail) {
		c, d := s.load(s.at(cos, u), t), s.load(s.at(sin, u), t)
		VMULPS(sign, d, d)
		a, b := s.load(s.at(x, u), t), s.load(s.at(x2, u), t)
		r, q := s.vec(), s.vec()
		VMULPS(c, a, r)
		VFNMADD231PS(d, b, r)
		VMULPS(c, b, q)
		VFMADD231PS(d, a, q)
		s.store(r, s.at(out, u), t)
		s.store(q, s.at(out2, u), t)
	})
	s.end()
}

// normBackward emits the two passes of NormBackward: sums of a row, then its
// gradient, written or added.
func (s isa) normBackward() {
	n := s.begin("normBackwardSums", "func(n int, temp, dw, dy, x, w *float32, r float32) (dot float32)")
	r, temp, dw := s.arg("r"), f32(ptr("temp")), f32(ptr("dw"))
	dy, x, w := f32(ptr("dy")), f32(ptr("x")), f32(ptr("w"))
	acc := s.zeros(4)
	s.loop(n, 4, []span{temp, dw, dy, x, w}, func(u int, t *tail) {
		d, xi, y := s.load(s.at(dy, u), t), s.load(s.at(x, u), t), s.vec()
		VMULPS(r, d, y)
		VMULPS(xi, y, y)
		VADDPS(s.load(s.at(dw, u), t), y, y)
		s.store(y, s.at(dw, u), t)
		VMULPS(s.load(s.at(w, u), t), d, d)
		s.store(d, s.at(temp, u), t)
		VFMADD231PS(xi, d, acc[u])
	})
	s.ret(s.sumAll(acc), "dot")
	s.end()
	for _, add := range []bool{false, true} {
		name := "normBackwardSet"
		if add {
			name = "normBackwardAdd"
		}
		n := s.begin(name, "func(n int, dx, temp, x *float32, r, c float32)")
		r, c, dx, temp, x := s.arg("r"), s.arg("c"), f32(ptr("dx")), f32(ptr("temp")), f32(ptr("x"))
		s.loop(n, 4, []span{dx, temp, x}, func(u int, t *tail) {
			v := s.load(s.at(temp, u), t)
			if add {
				VFMADD213PS(s.load(s.at(dx, u), t), r, v)
			} else {
				VMULPS(r, v, v)
			}
			VFMADD231PS(s.load(s.at(x, u), t), c, v)
			s.store(v, s.at(dx, u), t)
		})
		s.end()
	}
}

// adamW reads its nine coefficients in the order of AdamWCoef.
func (s isa) adamW() {
	n := s.begin("adamW", "func(n int, p, grad, m, v, coef *float32)")
	p, g, m, v := f32(ptr("p")), f32(ptr("grad")), f32(ptr("m")), f32(ptr("v"))
	coef := ptr("coef")
	var c [9]VecVirtual
	for i := range c {
		c[i] = s.vec()
		VBROADCASTSS(Mem{Base: coef, Disp: 4 * i}, c[i])
	}
	grad, decay, beta1, alpha1, beta2, alpha2, step, bias, eps := c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7], c[8]
	s.loop(n, 1, []span{p, g, m, v}, func(u int, t *tail) {
		gi := s.load(s.at(g, u), t)
		VMULPS(grad, gi, gi)
		mi := s.load(s.at(m, u), t)
		VMULPS(beta1, mi, mi)
		VFMADD231PS(gi, alpha1, mi)
		s.store(mi, s.at(m, u), t)
		vi := s.load(s.at(v, u), t)
		VMULPS(beta2, vi, vi)
		VMULPS(gi, gi, gi)
		VFMADD231PS(gi, alpha2, vi)
		s.store(vi, s.at(v, u), t)
		VSQRTPS(vi, vi)
		VFMADD213PS(eps, bias, vi)
		VDIVPS(vi, mi, mi)
		pi := s.load(s.at(p, u), t)
		VMULPS(decay, pi, pi)
		VFNMADD231PS(mi, step, pi)
		s.store(pi, s.at(p, u), t)
	})
	s.end()
}

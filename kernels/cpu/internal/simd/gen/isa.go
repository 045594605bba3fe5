package main

import (
	"math"

	"github.com/mmcloughlin/avo/attr"
	. "github.com/mmcloughlin/avo/build"
	"github.com/mmcloughlin/avo/gotypes"
	. "github.com/mmcloughlin/avo/operand"
	. "github.com/mmcloughlin/avo/reg"
)

// isa is an instruction set to generate vector code for.
type isa struct {
	suffix string
	lanes  int
	z      bool // AVX-512: tails by mask registers
}

var isas = []isa{{"2", 8, false}, {"512", 16, true}}

// tail selects the first lanes of the last, partial vector; nil selects all.
type tail struct {
	k Register   // AVX-512
	y VecVirtual // AVX2: all ones in the selected lanes
}

func (s isa) vec() VecVirtual {
	if s.z {
		return ZMM()
	}
	return YMM()
}

func (s isa) zero() VecVirtual {
	v := s.vec()
	if s.z {
		VPXORD(v, v, v)
	} else {
		VXORPS(v, v, v)
	}
	return v
}

// load reads a vector; lanes outside t are zero and not touched.
func (s isa) load(m Mem, t *tail) VecVirtual {
	v := s.vec()
	switch {
	case t == nil:
		VMOVUPS(m, v)
	case s.z:
		VMOVUPS_Z(m, t.k, v)
	default:
		VMASKMOVPS(m, t.y, v)
	}
	return v
}

func (s isa) store(v VecVirtual, m Mem, t *tail) {
	switch {
	case t == nil:
		VMOVUPS(v, m)
	case s.z:
		VMOVUPS(v, t.k, m)
	default:
		VMASKMOVPS(v, t.y, m)
	}
}

// only clears the lanes outside t.
func (s isa) only(v VecVirtual, t *tail) {
	switch {
	case t == nil:
	case s.z:
		VMOVAPS_Z(v, t.k, v)
	default:
		VANDPS(t.y, v, v)
	}
}

// constants are 64-byte data, a value in every lane, emitted once.
var constants = map[string]Mem{}

// float is the bit pattern: the assembler would take 89 for an integer.
func float(v float32) Constant { return U32(math.Float32bits(v)) }

func constant(name string, value Constant) Mem {
	if m, ok := constants[name]; ok {
		return m
	}
	m := GLOBL("const_"+name, attr.RODATA|attr.NOPTR)
	for i := range 16 {
		DATA(4*i, value)
	}
	constants[name] = m
	return m
}

// maskTable holds eight words of ones, then eight of zeros.
func maskTable() Mem {
	if m, ok := constants["mask"]; ok {
		return m
	}
	m := GLOBL("mask_table", attr.RODATA|attr.NOPTR)
	for i := range 16 {
		word := U32(0xffffffff)
		if i >= 8 {
			word = 0
		}
		DATA(4*i, word)
	}
	constants["mask"] = m
	return m
}

func (s isa) reg(m Mem) VecVirtual {
	v := s.vec()
	VMOVUPS(m, v)
	return v
}

// arg returns a float32 parameter in every lane. Like every access to a scalar
// it is VEX-encoded: Load and Store of avo are legacy SSE, which costs about a
// microsecond a call once the upper lanes of a vector register are in use.
func (s isa) arg(name string) VecVirtual {
	v := s.vec()
	VBROADCASTSS(frame(Param(name)), v)
	return v
}

// frame is where a parameter or result lies.
func frame(c gotypes.Component) Mem {
	b, err := c.Resolve()
	if err != nil {
		panic(err)
	}
	return b.Addr
}

func ptr(name string) GPVirtual { return Load(Param(name), GP64()).(GPVirtual) }

// span is a pointer that moves by size bytes per element.
type span struct {
	p    GPVirtual
	size int
}

func f32(p GPVirtual) span { return span{p, 4} }

// at returns the address of vector u.
func (s isa) at(x span, u int) Mem { return Mem{Base: x.p, Disp: u * s.lanes * x.size} }

// begin starts function name+suffix with n, the number of elements, loaded.
func (s isa) begin(name, signature string) GPVirtual {
	TEXT(name+s.suffix, NOSPLIT, signature)
	Pragma("noescape")
	return ptr("n")
}

// loop runs body over n elements: `unroll` vectors at a time, then single ones,
// then the tail. body handles vector u of the group.
func (s isa) loop(n GPVirtual, unroll int, spans []span, body func(u int, t *tail)) {
	advance := func(vectors int) {
		for _, x := range spans {
			ADDQ(U32(vectors*s.lanes*x.size), x.p)
		}
		SUBQ(U32(vectors*s.lanes), n)
	}
	if unroll > 1 {
		Label("group")
		CMPQ(n, U32(unroll*s.lanes))
		JL(LabelRef("single"))
		for u := range unroll {
			body(u, nil)
		}
		advance(unroll)
		JMP(LabelRef("group"))
	}
	Label("single")
	CMPQ(n, U32(s.lanes))
	JL(LabelRef("tail"))
	body(0, nil)
	advance(1)
	JMP(LabelRef("single"))
	Label("tail")
	TESTQ(n, n)
	JZ(LabelRef("done"))
	body(0, s.mask(n))
	Label("done")
}

// mask selects the first n lanes, 0 < n < lanes.
func (s isa) mask(n GPVirtual) *tail {
	if s.z {
		bits := GP32()
		MOVL(U32(0xffffffff), bits)
		BZHIL(n.As32(), bits, bits)
		k := K()
		KMOVW(bits, k)
		return &tail{k: k}
	}
	table, back := GP64(), GP64()
	LEAQ(maskTable(), table)
	MOVQ(U32(8), back)
	SUBQ(n, back)
	y := YMM()
	VMOVUPS(Mem{Base: table, Index: back, Scale: 4}, y)
	return &tail{y: y}
}

// lanewise folds op over the lanes of v, halves first, into the lowest lane.
func (s isa) lanewise(v VecVirtual, op func(src Op, dst VecVirtual)) VecVirtual {
	y := v
	if s.z {
		hi := YMM()
		VEXTRACTF64X4(Imm(1), v, hi)
		op(hi, v.AsY().(VecVirtual))
	}
	hi := XMM()
	VEXTRACTF128(Imm(1), y.AsY(), hi)
	x := y.AsX().(VecVirtual)
	op(hi, x)
	VMOVHLPS(x, x, hi)
	op(hi, x)
	VMOVSHDUP(x, hi)
	op(hi, x)
	return x
}

func (s isa) sum(v VecVirtual) VecVirtual {
	return s.lanewise(v, func(src Op, dst VecVirtual) { VADDPS(src, dst, dst) })
}

// sumAll adds accumulators pairwise and returns the sum in the lowest lane.
func (s isa) sumAll(acc []VecVirtual) VecVirtual {
	for len(acc) > 1 {
		h := len(acc) / 2
		for i := range h {
			VADDPS(acc[i+h], acc[i], acc[i])
		}
		acc = acc[:h]
	}
	return s.sum(acc[0])
}

func (s isa) zeros(n int) []VecVirtual {
	acc := make([]VecVirtual, n)
	for i := range acc {
		acc[i] = s.zero()
	}
	return acc
}

func (s isa) end() {
	VZEROUPPER()
	RET()
}

func (s isa) ret(v VecVirtual, name string) {
	VMOVSS(v.AsX(), frame(Return(name)))
}

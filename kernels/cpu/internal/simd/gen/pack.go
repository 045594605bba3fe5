package main

import (
	"fmt"

	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	. "github.com/mmcloughlin/avo/reg"
)

// genPack emits the copies that lay out panels. Both use 256-bit registers only,
// which is as fast here as 512 (the transposition is bound by shuffles).
func genPack() {
	packTranspose()
	for _, nv := range []int{1, 2, 4} {
		packCopy(nv)
	}
	prefetchRows()
}

// prefetchRows asks for lines cache lines of each of rows rows, ld bytes apart.
func prefetchRows() {
	TEXT("prefetchRows", NOSPLIT, "func(rows, lines int, x *float32, ld int)")
	Pragma("noescape")
	rows, lines := Load(Param("rows"), GP64()), Load(Param("lines"), GP64())
	x, ld := Load(Param("x"), GP64()).(GPVirtual), Load(Param("ld"), GP64())
	at, left := GP64(), GP64()
	Label("row")
	MOVQ(x, at)
	MOVQ(lines, left)
	Label("line")
	PREFETCHT0(Mem{Base: at})
	ADDQ(Imm(64), at)
	DECQ(left)
	JNZ(LabelRef("line"))
	ADDQ(ld, x)
	DECQ(rows)
	JNZ(LabelRef("row"))
	RET()
}

// packTranspose writes dst[p][0..8) = src[0..8)[p] for p < 8*blocks: eight rows
// become eight lanes. Strides are in bytes.
func packTranspose() {
	TEXT("packTranspose8", NOSPLIT, "func(blocks int, dst *float32, dstStride int, src *float32, ld int)")
	Pragma("noescape")
	blocks, dst, ds := Load(Param("blocks"), GP64()), Load(Param("dst"), GP64()).(GPVirtual), Load(Param("dstStride"), GP64()).(GPVirtual)
	src, ld := Load(Param("src"), GP64()).(GPVirtual), Load(Param("ld"), GP64()).(GPVirtual)
	ld3, src4 := GP64(), GP64()
	ds3, dst4 := GP64(), GP64()
	LEAQ(Mem{Base: ld, Index: ld, Scale: 2}, ld3)
	LEAQ(Mem{Base: src, Index: ld, Scale: 4}, src4)
	LEAQ(Mem{Base: ds, Index: ds, Scale: 2}, ds3)
	row := func(base, base4, s, s3 GPVirtual, i int) Mem {
		if i >= 4 {
			base, i = base4, i-4
		}
		switch i {
		case 0:
			return Mem{Base: base}
		case 3:
			return Mem{Base: base, Index: s3, Scale: 1}
		}
		return Mem{Base: base, Index: s, Scale: uint8(i)}
	}
	Label("loop")
	// m[i] holds columns 0-3 of rows i and i+4; m[i+4] columns 4-7 of them.
	var m [8]VecVirtual
	for i := range 4 {
		for h := range 2 {
			at := row(src, src4, ld, ld3, i)
			at.Disp += 16 * h
			hi := row(src, src4, ld, ld3, i+4)
			hi.Disp += 16 * h
			r := YMM()
			VMOVUPS(at, r.AsX())
			VINSERTF128(Imm(1), hi, r, r)
			m[i+4*h] = r
		}
	}
	LEAQ(Mem{Base: dst, Index: ds, Scale: 4}, dst4)
	for h := range 2 {
		r := m[4*h : 4*h+4]
		t := [4]VecVirtual{YMM(), YMM(), YMM(), YMM()}
		VUNPCKLPS(r[1], r[0], t[0]) // 00 10 01 11
		VUNPCKHPS(r[1], r[0], t[1]) // 02 12 03 13
		VUNPCKLPS(r[3], r[2], t[2])
		VUNPCKHPS(r[3], r[2], t[3])
		o := YMM()
		VUNPCKLPD(t[2], t[0], o)
		VMOVUPS(o, row(dst, dst4, ds, ds3, 4*h))
		o = YMM()
		VUNPCKHPD(t[2], t[0], o)
		VMOVUPS(o, row(dst, dst4, ds, ds3, 4*h+1))
		o = YMM()
		VUNPCKLPD(t[3], t[1], o)
		VMOVUPS(o, row(dst, dst4, ds, ds3, 4*h+2))
		o = YMM()
		VUNPCKHPD(t[3], t[1], o)
		VMOVUPS(o, row(dst, dst4, ds, ds3, 4*h+3))
	}
	ADDQ(Imm(32), src)
	ADDQ(Imm(32), src4)
	LEAQ(Mem{Base: dst, Index: ds, Scale: 8}, dst)
	DECQ(blocks)
	JNZ(LabelRef("loop"))
	VZEROUPPER()
	RET()
}

// packCopy writes dst[p][0..8nv) = src[p][0..8nv) for p < k. dst rows are 8nv
// elements apart, src rows ld bytes.
func packCopy(nv int) {
	TEXT(fmt.Sprintf("packCopy%d", 8*nv), NOSPLIT, "func(k int, dst *float32, src *float32, ld int)")
	Pragma("noescape")
	k, dst := Load(Param("k"), GP64()), Load(Param("dst"), GP64()).(GPVirtual)
	src, ld := Load(Param("src"), GP64()).(GPVirtual), Load(Param("ld"), GP64()).(GPVirtual)
	Label("loop")
	v := make([]VecVirtual, nv)
	for j := range v {
		v[j] = YMM()
		VMOVUPS(Mem{Base: src, Disp: 32 * j}, v[j])
	}
	for j := range v {
		VMOVUPS(v[j], Mem{Base: dst, Disp: 32 * j})
	}
	ADDQ(ld, src)
	ADDQ(Imm(uint64(32*nv)), dst)
	DECQ(k)
	JNZ(LabelRef("loop"))
	VZEROUPPER()
	RET()
}

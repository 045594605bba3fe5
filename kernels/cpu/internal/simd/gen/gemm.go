package main

import (
	"fmt"

	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	. "github.com/mmcloughlin/avo/reg"
)

// A micro-kernel computes a tile C[mr, nv vectors] = A·B (+ C) over k steps with
// the tile in registers: one multiply-add per element and step, in order of k.
//
// Packed kernels ("P") read step p of A at a + p*lda, mr adjacent elements; row
// kernels ("R") read it from mr rows lda apart, in place. B is read at b + p*ldb.
// All strides are in bytes. AVX-512 kernels mask the last vector of B and C.
const gemmArgs = "k int, a *float32, lda int, b *float32, ldb int, c *float32, ldc int"

func genGemm() {
	for nv := 1; nv <= 2; nv++ {
		for mr := 1; mr <= 14; mr++ {
			gemm512(mr, nv, false)
			gemm512(mr, nv, true)
		}
		for mr := 1; mr <= 6; mr++ {
			gemm2(mr, nv, false)
			gemm2(mr, nv, true)
		}
	}
}

func kernelName(level string, mr, nv int, rows bool) string {
	mode := "P"
	if rows {
		mode = "R"
	}
	return fmt.Sprintf("gemm%s%s%dx%d", level, mode, mr, nv)
}

// aOperands returns the address of each row's element of A. Row kernels need a
// register for every odd multiple of lda: the addressing modes scale by 1, 2, 4, 8.
func aOperands(mr int, rows bool, a, lda GPVirtual) []Op {
	ops := make([]Op, mr)
	if !rows {
		for i := range ops {
			ops[i] = Mem{Base: a, Disp: 4 * i}
		}
		return ops
	}
	odd := map[int]GPVirtual{1: lda}
	for i := 3; i < mr; i += 2 {
		r := GP64()
		if i == 3 {
			LEAQ(Mem{Base: lda, Index: lda, Scale: 2}, r)
		} else {
			LEAQ(Mem{Base: odd[i-2], Index: lda, Scale: 2}, r)
		}
		odd[i] = r
	}
	ops[0] = Mem{Base: a}
	for i := 1; i < mr; i++ {
		m, scale := i, 1
		for m%2 == 0 {
			m, scale = m/2, scale*2
		}
		ops[i] = Mem{Base: a, Index: odd[m], Scale: uint8(scale)}
	}
	return ops
}

// kLoop emits step for every k, advancing A and B. k is at least 1.
func kLoop(k, a, lda, b, ldb GPVirtual, rows bool, aops []Op, step func()) {
	if !rows {
		Label("loop")
		step()
		ADDQ(lda, a)
		ADDQ(ldb, b)
		DECQ(k)
		JNZ(LabelRef("loop"))
		return
	}
	// Rows in place are as many streams, often two to a page, which is more than
	// hardware prefetchers follow: every 16 steps, a line of each row, the rows'
	// own lines some steps ahead, is asked for.
	group := GP64()
	Label("ahead")
	for _, x := range aops {
		m := x.(Mem)
		m.Disp += prefetchAhead
		PREFETCHT0(m)
	}
	MOVQ(U32(16), group)
	CMPQ(group, k)
	CMOVQGT(k, group)
	SUBQ(group, k)
	Label("loop")
	step()
	ADDQ(Imm(4), a)
	ADDQ(ldb, b)
	DECQ(group)
	JNZ(LabelRef("loop"))
	TESTQ(k, k)
	JNZ(LabelRef("ahead"))
}

// prefetchAhead is in bytes of a row.
const prefetchAhead = 192

func gemm512(mr, nv int, rows bool) {
	name := kernelName("512", mr, nv, rows)
	TEXT(name, NOSPLIT, "func("+gemmArgs+", mask uint32, load uint32)")
	Pragma("noescape")
	acc := make([][]VecVirtual, mr)
	for i := range acc {
		acc[i] = make([]VecVirtual, nv)
		for j := range acc[i] {
			acc[i][j] = ZMM()
			VPXORD(acc[i][j], acc[i][j], acc[i][j])
		}
	}
	mask := K()
	KMOVW(Load(Param("mask"), GP32()), mask)
	c, ldc := Load(Param("c"), GP64()).(GPVirtual), Load(Param("ldc"), GP64()).(GPVirtual)
	for i := range mr {
		PREFETCHT0(Mem{Base: c})
		if nv == 2 {
			PREFETCHT0(Mem{Base: c, Disp: 64})
		}
		if i < mr-1 {
			ADDQ(ldc, c)
		}
	}
	k, a, lda := Load(Param("k"), GP64()).(GPVirtual), Load(Param("a"), GP64()).(GPVirtual), Load(Param("lda"), GP64()).(GPVirtual)
	b, ldb := Load(Param("b"), GP64()).(GPVirtual), Load(Param("ldb"), GP64()).(GPVirtual)
	aops := aOperands(mr, rows, a, lda)
	bv := make([]VecVirtual, nv)
	for j := range bv {
		bv[j] = ZMM()
	}
	kLoop(k, a, lda, b, ldb, rows, aops, func() {
		// The panels together exceed the first-level cache: ask for the lines of
		// eight steps ahead.
		for j := range bv {
			PREFETCHT0(Mem{Base: b, Index: ldb, Scale: 8, Disp: 64 * j})
		}
		if !rows {
			PREFETCHT0(Mem{Base: a, Index: lda, Scale: 8})
		}
		for j := range bv {
			if j == nv-1 {
				VMOVUPS_Z(Mem{Base: b, Disp: 64 * j}, mask, bv[j])
			} else {
				VMOVUPS(Mem{Base: b, Disp: 64 * j}, bv[j])
			}
		}
		for i := range mr {
			if nv == 1 {
				VFMADD231PS_BCST(aops[i], bv[0], acc[i][0])
				continue
			}
			x := ZMM()
			VBROADCASTSS(aops[i], x)
			for j := range bv {
				VFMADD231PS(bv[j], x, acc[i][j])
			}
		}
	})
	c, ldc = Load(Param("c"), GP64()).(GPVirtual), Load(Param("ldc"), GP64()).(GPVirtual)
	load := Load(Param("load"), GP32())
	TESTL(load, load)
	JZ(LabelRef("store"))
	p := GP64()
	MOVQ(c, p)
	for i := range mr {
		for j := range nv {
			at := Mem{Base: p, Disp: 64 * j}
			if j == nv-1 {
				VADDPS_Z(at, acc[i][j], mask, acc[i][j])
			} else {
				VADDPS(at, acc[i][j], acc[i][j])
			}
		}
		ADDQ(ldc, p)
	}
	Label("store")
	for i := range mr {
		for j := range nv {
			at := Mem{Base: c, Disp: 64 * j}
			if j == nv-1 {
				VMOVUPS(acc[i][j], mask, at)
			} else {
				VMOVUPS(acc[i][j], at)
			}
		}
		ADDQ(ldc, c)
	}
	VZEROUPPER()
	RET()
}

func gemm2(mr, nv int, rows bool) {
	name := kernelName("2", mr, nv, rows)
	TEXT(name, NOSPLIT, "func("+gemmArgs+", load uint32)")
	Pragma("noescape")
	acc := make([][]VecVirtual, mr)
	for i := range acc {
		acc[i] = make([]VecVirtual, nv)
		for j := range acc[i] {
			acc[i][j] = YMM()
			VXORPS(acc[i][j], acc[i][j], acc[i][j])
		}
	}
	k, a, lda := Load(Param("k"), GP64()).(GPVirtual), Load(Param("a"), GP64()).(GPVirtual), Load(Param("lda"), GP64()).(GPVirtual)
	b, ldb := Load(Param("b"), GP64()).(GPVirtual), Load(Param("ldb"), GP64()).(GPVirtual)
	aops := aOperands(mr, rows, a, lda)
	bv := make([]VecVirtual, nv)
	for j := range bv {
		bv[j] = YMM()
	}
	kLoop(k, a, lda, b, ldb, rows, aops, func() {
		for j := range bv {
			VMOVUPS(Mem{Base: b, Disp: 32 * j}, bv[j])
		}
		for i := range mr {
			x := YMM()
			VBROADCASTSS(aops[i], x)
			for j := range bv {
				VFMADD231PS(bv[j], x, acc[i][j])
			}
		}
	})
	c, ldc := Load(Param("c"), GP64()).(GPVirtual), Load(Param("ldc"), GP64()).(GPVirtual)
	load := Load(Param("load"), GP32())
	TESTL(load, load)
	JZ(LabelRef("store"))
	p := GP64()
	MOVQ(c, p)
	for i := range mr {
		for j := range nv {
			VADDPS(Mem{Base: p, Disp: 32 * j}, acc[i][j], acc[i][j])
		}
		ADDQ(ldc, p)
	}
	Label("store")
	for i := range mr {
		for j := range nv {
			VMOVUPS(acc[i][j], Mem{Base: c, Disp: 32 * j})
		}
		ADDQ(ldc, c)
	}
	VZEROUPPER()
	RET()
}

#include "textflag.h"

// func greatest(p *byte, n int) (signed int32, unsigned uint32)
// Requires: AVX2. Y0 to Y3 keep the greatest signed words, Y4 to Y7 the greatest
// unsigned ones: four of each, so that no maximum waits for the one before it.
TEXT ·greatest(SB), NOSPLIT, $0-24
	MOVQ     p+0(FP), AX
	MOVQ     n+8(FP), CX
	VPCMPEQD Y0, Y0, Y0
	VPSLLD   $31, Y0, Y0
	VMOVDQA  Y0, Y1
	VMOVDQA  Y0, Y2
	VMOVDQA  Y0, Y3
	VPXOR    Y4, Y4, Y4
	VPXOR    Y5, Y5, Y5
	VPXOR    Y6, Y6, Y6
	VPXOR    Y7, Y7, Y7

block:
	VMOVDQU (AX), Y8
	VMOVDQU 32(AX), Y9
	VMOVDQU 64(AX), Y10
	VMOVDQU 96(AX), Y11
	VPMAXSD Y8, Y0, Y0
	VPMAXUD Y8, Y4, Y4
	VPMAXSD Y9, Y1, Y1
	VPMAXUD Y9, Y5, Y5
	VPMAXSD Y10, Y2, Y2
	VPMAXUD Y10, Y6, Y6
	VPMAXSD Y11, Y3, Y3
	VPMAXUD Y11, Y7, Y7
	ADDQ    $128, AX
	DECQ    CX
	JNZ     block

	VPMAXSD      Y1, Y0, Y0
	VPMAXSD      Y3, Y2, Y2
	VPMAXSD      Y2, Y0, Y0
	VPMAXUD      Y5, Y4, Y4
	VPMAXUD      Y7, Y6, Y6
	VPMAXUD      Y6, Y4, Y4
	VEXTRACTI128 $1, Y0, X1
	VEXTRACTI128 $1, Y4, X5
	VPMAXSD      X1, X0, X0
	VPMAXUD      X5, X4, X4
	VPSHUFD      $0x4E, X0, X1
	VPSHUFD      $0x4E, X4, X5
	VPMAXSD      X1, X0, X0
	VPMAXUD      X5, X4, X4
	VPSHUFD      $0xB1, X0, X1
	VPSHUFD      $0xB1, X4, X5
	VPMAXSD      X1, X0, X0
	VPMAXUD      X5, X4, X4
	VMOVD        X0, AX
	MOVL         AX, signed+16(FP)
	VMOVD        X4, AX
	MOVL         AX, unsigned+20(FP)
	VZEROUPPER
	RET

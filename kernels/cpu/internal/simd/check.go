package simd

import "fmt"

// checkGemm panics on arguments that would read or write outside the slices:
// the assembly does not check.
func checkGemm(transA, transB bool, m, n, k int, a []float32, lda int, b []float32, ldb int, c []float32, ldc int) {
	if m < 0 || n < 0 || k < 0 {
		panic(fmt.Sprintf("simd: sgemm of negative size %dx%dx%d", m, n, k))
	}
	if k > 0 {
		if transA {
			checkMatrix("a", k, m, len(a), lda)
		} else {
			checkMatrix("a", m, k, len(a), lda)
		}
		if transB {
			checkMatrix("b", n, k, len(b), ldb)
		} else {
			checkMatrix("b", k, n, len(b), ldb)
		}
	}
	checkMatrix("c", m, n, len(c), ldc)
}

func checkMatrix(name string, rows, cols, length, ld int) {
	if ld < cols {
		panic(fmt.Sprintf("simd: sgemm: rows of %s are %d wide but only %d apart", name, cols, ld))
	}
	if need := (rows-1)*ld + cols; length < need {
		panic(fmt.Sprintf("simd: sgemm: %s holds %d elements, [%d,%d] with stride %d needs %d", name, length, rows, cols, ld, need))
	}
}

package simd

import "fmt"

// check panics on arguments that would read or write outside the slices: the
// assembly does not check.
func (o *operands) check() {
	if o.m < 0 || o.n < 0 || o.k < 0 {
		panic(fmt.Sprintf("simd: sgemm of negative size %dx%dx%d", o.m, o.n, o.k))
	}
	if o.m == 0 || o.n == 0 {
		return
	}
	if o.k > 0 {
		if o.transA {
			checkMatrix("a", o.k, o.m, len(o.a), o.lda)
		} else {
			checkMatrix("a", o.m, o.k, len(o.a), o.lda)
		}
		if o.transB {
			checkMatrix("b", o.n, o.k, len(o.b), o.ldb)
		} else {
			checkMatrix("b", o.k, o.n, len(o.b), o.ldb)
		}
	}
	checkMatrix("c", o.m, o.n, len(o.c), o.ldc)
}

func checkMatrix(name string, rows, cols, length, ld int) {
	if ld < cols {
		panic(fmt.Sprintf("simd: sgemm: rows of %s are %d wide but only %d apart", name, cols, ld))
	}
	if need := (rows-1)*ld + cols; length < need {
		panic(fmt.Sprintf("simd: sgemm: %s holds %d elements, [%d,%d] with stride %d needs %d", name, length, rows, cols, ld, need))
	}
}

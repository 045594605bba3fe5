package simd

// Scratch holds the packing buffers of SgemmSerial. It grows as needed and may
// be reused for any later call, by one goroutine at a time. The zero value is ready.
type Scratch struct {
	a, b []float32
}

// Sgemm computes C = op(A)·op(B), or C += with accumulate. op(A) is [m,k]: A is
// stored [m,k], or [k,m] with transA; op(B) is [k,n]: B is stored [k,n], or [n,k]
// with transB; C is [m,n]. Rows lie lda, ldb and ldc elements apart, so operands
// may be blocks of wider matrices; C must not overlap A or B. par nil runs on the
// calling goroutine.
//
// The result is bitwise the same for every par. An element of C depends only on
// its row of op(A), its column of op(B), k and the level: not on m, n or strides.
func Sgemm(transA, transB bool, m, n, k int, a []float32, lda int, b []float32, ldb int,
	c []float32, ldc int, accumulate bool, par Parallel) {
	if m == 0 || n == 0 {
		return
	}
	checkGemm(transA, transB, m, n, k, a, lda, b, ldb, c, ldc)
	run(par, m, func(i int) {
		sgemmGo(transA, transB, i, i+1, n, k, a, lda, b, ldb, c, ldc, accumulate)
	})
}

// SgemmSerial is Sgemm on the calling goroutine, for use inside parallel tasks
// and on small blocks. It gives bitwise the same result as Sgemm.
func SgemmSerial(transA, transB bool, m, n, k int, a []float32, lda int, b []float32, ldb int,
	c []float32, ldc int, accumulate bool, s *Scratch) {
	if m == 0 || n == 0 {
		return
	}
	checkGemm(transA, transB, m, n, k, a, lda, b, ldb, c, ldc)
	sgemmGo(transA, transB, 0, m, n, k, a, lda, b, ldb, c, ldc, accumulate)
}

func sgemmGo(transA, transB bool, from, to, n, k int, a []float32, lda int, b []float32, ldb int,
	c []float32, ldc int, accumulate bool) {
	for i := from; i < to; i++ {
		for j := range n {
			var s float32
			if accumulate {
				s = c[i*ldc+j]
			}
			for p := range k {
				x, y := i*lda+p, p*ldb+j
				if transA {
					x = p*lda + i
				}
				if transB {
					y = j*ldb + p
				}
				s += a[x] * b[y]
			}
			c[i*ldc+j] = s
		}
	}
}

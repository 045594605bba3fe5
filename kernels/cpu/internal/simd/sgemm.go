package simd

import "sync"

// operands are the arguments of one matrix product. op(A) is [m,k], op(B) [k,n].
type operands struct {
	transA, transB bool
	m, n, k        int
	a              []float32
	lda            int
	b              []float32
	ldb            int
	c              []float32
	ldc            int
	accumulate     bool
}

// Scratch holds the packing buffers of SgemmSerial. It grows as needed, to 27 MiB
// at most, and may be reused for any later call, by one goroutine at a time. The
// zero value is ready.
type Scratch struct {
	blocked blocked
	narrow  narrow
	direct  direct
}

// spare keeps Scratch between calls of Sgemm, as many as ever ran at once, so
// that they make no garbage.
var spare struct {
	sync.Mutex
	list []*Scratch
}

func takeScratch() *Scratch {
	spare.Lock()
	defer spare.Unlock()
	if n := len(spare.list); n > 0 {
		s := spare.list[n-1]
		spare.list = spare.list[:n-1]
		return s
	}
	s := new(Scratch)
	s.blocked.bufA.mapped, s.blocked.bufB.mapped = true, true
	return s
}

func giveScratch(s *Scratch) {
	spare.Lock()
	defer spare.Unlock()
	spare.list = append(spare.list, s)
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
	s := takeScratch()
	sgemm(operands{transA, transB, m, n, k, a, lda, b, ldb, c, ldc, accumulate}, s, par)
	giveScratch(s)
}

// SgemmSerial is Sgemm on the calling goroutine, for use inside parallel tasks
// and on small blocks. It gives bitwise the same result as Sgemm.
func SgemmSerial(transA, transB bool, m, n, k int, a []float32, lda int, b []float32, ldb int,
	c []float32, ldc int, accumulate bool, s *Scratch) {
	sgemm(operands{transA, transB, m, n, k, a, lda, b, ldb, c, ldc, accumulate}, s, nil)
}

func sgemm(o operands, s *Scratch, par Parallel) {
	o.check()
	switch {
	case o.m == 0 || o.n == 0:
	case o.k == 0:
		o.clear()
	case narrowFits(&o):
		s.narrow.run(o, par)
	case directFits(&o):
		s.direct.run(o)
	default:
		s.blocked.run(o, par)
	}
}

// clear writes the empty sum.
func (o *operands) clear() {
	if o.accumulate {
		return
	}
	for i := range o.m {
		clear(o.c[i*o.ldc : i*o.ldc+o.n])
	}
}

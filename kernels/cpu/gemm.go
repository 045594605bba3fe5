package cpu

import (
	"trainerd/kernels"
	"trainerd/kernels/cpu/internal/simd"
)

func (d *device) Gemm(g kernels.Gemm) {
	const op = "gemm"
	m, n, k := g.M, g.N, g.K
	must(m >= 0 && n >= 0 && k >= 0, op, "M %d N %d K %d", m, n, k)
	a, b := floats(op, "A", g.A, m*k), floats(op, "B", g.B, k*n)
	c, bias := floats(op, "C", g.C, m*n), optional(op, "Bias", g.Bias, n)
	d.gemm(g.TransA, g.TransB, m, n, k, a, b, c, g.Accumulate)
	if bias != nil {
		d.blocks(m, rowBlock(n), func(from, to int) {
			for i := from; i < to; i++ {
				simd.Add(c[i*n:][:n], c[i*n:], bias)
			}
		})
	}
}

// gemm is Gemm on contiguous matrices.
func (d *device) gemm(transA, transB bool, m, n, k int, a, b, c []float32, accumulate bool) {
	lda, ldb := k, n
	if transA {
		lda = m
	}
	if transB {
		ldb = k
	}
	simd.Sgemm(transA, transB, m, n, k, a, lda, b, ldb, c, n, accumulate, d.pool)
}

func (d *device) BiasBackward(db, dy kernels.Buffer, m, n int, accumulate bool) {
	const op = "bias backward"
	out, y := floats(op, "db", db, n), floats(op, "dy", dy, m*n)
	d.reduceRows(out, m, accumulate, func(_ *worker, sum []float32, from, to int) {
		for i := from; i < to; i++ {
			simd.Add(sum, sum, y[i*n:])
		}
	})
}

package cuda

import "trainerd/kernels"

// Gemm implements kernels.Device.
func (d *Device) Gemm(g kernels.Gemm) {
	const op = "gemm"
	must(g.M >= 0 && g.N >= 0 && g.K >= 0, op, "M %d N %d K %d", g.M, g.N, g.K)
	out := span(op, "C", g.C, kernels.BF16, kernels.F32)
	m := matrices{
		a: place(op, "A", g.A, g.M*g.K, kernels.BF16), b: place(op, "B", g.B, g.K*g.N, kernels.BF16), c: place(op, "C", g.C, g.M*g.N, out.t),
		m: g.M, n: g.N, k: g.K, transA: g.TransA, transB: g.TransB, float32C: out.t == kernels.F32, accumulate: g.Accumulate,
		bias: placeOr0(op, "Bias", g.Bias, g.N, kernels.BF16),
	}
	m.contiguous()
	must(m.bias == 0 || !m.float32C, op, "a bias on a float32 C")
	if g.M == 0 || g.N == 0 {
		return
	}
	d.enqueue(of(op, "M %d N %d K %d", g.M, g.N, g.K), func(c driver) error { return d.gemm(c, m) })
}

// matrices is a row-major product C[m,n] = op(A)[m,k]·op(B)[k,n] (+ C) (+ bias),
// with the elements between the rows of each stored matrix.
type matrices struct {
	a, b, c              address
	m, n, k              int
	lda, ldb, ldc        int
	transA, transB       bool
	float32C, accumulate bool
	bias                 address
}

// contiguous sets the row strides of matrices without gaps.
func (x *matrices) contiguous() {
	x.lda, x.ldb, x.ldc = x.k, x.n, x.n
	if x.transA {
		x.lda = x.m
	}
	if x.transB {
		x.ldb = x.k
	}
}

// columnMajor gives the same product to a library that counts in columns: a
// row-major matrix is its own transpose there, so Cᵀ = op(B)ᵀ·op(A)ᵀ, with the operands
// swapped and the flags as they are.
func (x matrices) columnMajor() product {
	return product{
		a: x.b, b: x.a, c: x.c, m: x.n, n: x.m, k: x.k, lda: x.ldb, ldb: x.lda, ldc: x.ldc,
		transA: x.transB, transB: x.transA, float32C: x.float32C, accumulate: x.accumulate, bias: x.bias,
	}
}

// SwiGLU implements kernels.Device.
func (d *Device) SwiGLU(out, gu kernels.Buffer, t, f int) {
	const op = "swiglu"
	to, from := place(op, "out", out, t*f, kernels.BF16), place(op, "gu", gu, 2*t*f, kernels.BF16)
	if t == 0 || f == 0 {
		return
	}
	d.enqueue(of(op, "T %d F %d", t, f), func(c driver) error {
		return c.launch("swiglu_bf16", size2{t, ceil(f, 1024)}, size2{128, 1}, 0, to, from, int32(t), int32(f))
	})
}

// SwiGLUBackward implements kernels.Device.
func (d *Device) SwiGLUBackward(dgu, dout, gu kernels.Buffer, t, f int) {
	const op = "swiglu backward"
	to, dy, x := place(op, "dgu", dgu, 2*t*f, kernels.BF16), place(op, "dout", dout, t*f, kernels.BF16), place(op, "gu", gu, 2*t*f, kernels.BF16)
	if t == 0 || f == 0 {
		return
	}
	d.enqueue(of(op, "T %d F %d", t, f), func(c driver) error {
		return c.launch("swiglu_backward_bf16", size2{t, ceil(f, 1024)}, size2{128, 1}, 0, to, dy, x, int32(t), int32(f))
	})
}

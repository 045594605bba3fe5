package cpu

import "trainerd/kernels"

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
				axpy(1, bias, c[i*n:][:n])
			}
		})
	}
}

func (d *device) gemm(ta, tb bool, m, n, k int, a, b, c []float32, accumulate bool) {
	d.blocks(m, 8, func(from, to int) {
		for i := from; i < to; i++ {
			row := c[i*n:][:n]
			if !accumulate {
				clear(row)
			}
			if tb && !ta {
				for j := range row {
					row[j] += dot(a[i*k:][:k], b[j*k:][:k])
				}
				continue
			}
			for p := range k {
				av := a[i*k : (i+1)*k : (i+1)*k][p:][0]
				if ta {
					av = a[p*m+i]
				}
				if tb {
					for j := range row {
						row[j] += av * b[j*k+p]
					}
				} else {
					axpy(av, b[p*n:][:n], row)
				}
			}
		}
	})
}

// reductionBlocks is the most partial sums that a reduction over rows keeps.
const reductionBlocks = 32

// reduceRows computes out[width] (+)= the sum over rows of what add puts into a
// partial sum for rows [from,to). The rows are cut by their number alone, and
// the partial sums are added in order.
func (d *device) reduceRows(out []float32, rows int, accumulate bool, add func(sum []float32, from, to int)) {
	width := len(out)
	size := max(16, (rows+reductionBlocks-1)/reductionBlocks)
	n := (rows + size - 1) / size
	if len(d.partial) < n*width {
		d.partial = make([]float32, n*width)
	}
	sums := d.partial[:n*width]
	d.blocks(rows, size, func(from, to int) {
		sum := sums[from/size*width:][:width]
		clear(sum)
		add(sum, from, to)
	})
	if !accumulate {
		clear(out)
	}
	for b := range n {
		axpy(1, sums[b*width:][:width], out)
	}
}

func (d *device) BiasBackward(db, dy kernels.Buffer, m, n int, accumulate bool) {
	const op = "bias backward"
	out, y := floats(op, "db", db, n), floats(op, "dy", dy, m*n)
	d.reduceRows(out, m, accumulate, func(sum []float32, from, to int) {
		for i := from; i < to; i++ {
			axpy(1, y[i*n:][:n], sum)
		}
	})
}

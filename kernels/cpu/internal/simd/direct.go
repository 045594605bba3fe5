package simd

// direct is the product of small matrices: A is read in place, and B too where
// its rows are the vectors. Columns of a stored [n,k] B are packed as they are
// needed. An attention block of 64x64x64 is the model case.
type direct struct {
	buf []float32
}

// directMax is the most elements of A: past it, packing pays.
const directMax = 1 << 15

// directFits reports whether o is small. Portable code has no kernel for
// operands in place.
func directFits(o *operands) bool {
	return active != Portable && o.m*o.k <= directMax && o.n*o.k <= 4*directMax
}

func (w *direct) run(o operands) {
	level := active
	g := &geometries[level]
	blocks := kBlocks(o.k)
	panels := ceilDiv(o.m, g.mr)
	for kb := range blocks {
		from, to := kRange(o.k, blocks, kb)
		load := o.accumulate || kb > 0
		for col := 0; col < o.n; col += g.nr {
			count := min(g.nr, o.n-col)
			b := strip{step: o.ldb}
			if o.transB || level == AVX2 && count%g.lanes != 0 {
				w.buf = grow(w.buf, (to-from)*g.nr)
				o.packB(level, w.buf, g.nr, col, count, from, to)
				b = strip{x: w.buf, step: g.nr}
			} else {
				b.x = o.b[from*o.ldb+col:]
			}
			for i := range panels {
				r0, r1 := i*o.m/panels, (i+1)*o.m/panels
				a := strip{step: o.lda}
				if o.transA {
					a.x = o.a[from*o.lda+r0:]
				} else {
					a.x, a.rows = o.a[r0*o.lda+from:], true
				}
				tile(level, r1-r0, count, to-from, a, b, o.c[r0*o.ldc+col:], o.ldc, load)
			}
		}
	}
}

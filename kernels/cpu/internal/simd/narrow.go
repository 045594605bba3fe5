package simd

// narrow is the product of few rows with a weight stored [n,k]: decoding. It
// computes Cᵀ = B·Aᵀ, so that the large B is read once, in place, and the rows of
// A lie in the lanes. Sums run as everywhere: in order of k, block by block.
type narrow struct {
	operands
	level   Level
	kBlocks int
	buf     []float32 // Aᵀ, one panel per block of k
	task    func(i int)
}

// narrowFits reports whether A's rows fit into a tile's lanes.
func narrowFits(o *operands) bool {
	return active != Portable && o.transB && !o.transA && o.m <= geometries[active].nr && o.n >= 64
}

// narrowCols is how many columns of C a task computes.
const narrowCols = 14 * 6 * 4

func (w *narrow) run(o operands, par Parallel) {
	w.operands, w.level, w.kBlocks = o, active, kBlocks(o.k)
	if w.task == nil {
		w.task = w.columns
	}
	lanes := w.lanes()
	w.buf = grow(w.buf, o.k*lanes)
	for kb := range w.kBlocks {
		from, to := kRange(o.k, w.kBlocks, kb)
		packRows(w.level, w.buf[from*lanes:to*lanes], lanes, o.a, o.lda, 0, o.m, from, to)
	}
	run(par, ceilDiv(o.n, narrowCols), w.task)
	w.operands = operands{}
}

// lanes is one vector where A's rows fit into it, two otherwise.
func (w *narrow) lanes() int {
	g := &geometries[w.level]
	if w.m <= g.lanes {
		return g.lanes
	}
	return g.nr
}

// columns is a task: narrowCols columns of C.
func (w *narrow) columns(task int) {
	g, lanes := &geometries[w.level], w.lanes()
	var t [maxTile]float32 // a tile of Cᵀ, a row per column of C
	end := min(w.n, (task+1)*narrowCols)
	for j0 := task * narrowCols; j0 < end; {
		rows := min(g.mr, end-j0)
		if w.accumulate {
			for l := range w.m {
				for i := range rows {
					t[i*lanes+l] = w.c[l*w.ldc+j0+i]
				}
			}
		}
		for kb := range w.kBlocks {
			from, to := kRange(w.k, w.kBlocks, kb)
			a := strip{x: w.b[j0*w.ldb+from:], step: w.ldb, rows: true}
			b := strip{x: w.buf[from*lanes:], step: lanes}
			tile(w.level, rows, lanes, to-from, a, b, t[:], lanes, w.accumulate || kb > 0)
		}
		w.put(&t, lanes, j0, rows)
		j0 += rows
	}
}

// put writes a tile of Cᵀ to columns [j0, j0+rows) of C.
func (w *narrow) put(t *[maxTile]float32, lanes, j0, rows int) {
	done := 0 // rows of C
	if rows >= 8 && w.m >= 8 {
		// Eight columns at a time; the last eight may overlap those before.
		blocks := w.m / 8
		packTranspose8(blocks, &w.c[j0], 4*w.ldc, &t[0], 4*lanes)
		if rows > 8 {
			packTranspose8(blocks, &w.c[j0+rows-8], 4*w.ldc, &t[(rows-8)*lanes], 4*lanes)
		}
		done = 8 * blocks
	}
	for l := done; l < w.m; l++ {
		c, x := w.c[l*w.ldc+j0:][:rows], t[l:]
		for i := range c {
			c[i] = x[i*lanes]
		}
	}
}

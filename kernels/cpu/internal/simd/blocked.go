package simd

// blocked is the product of large matrices after Goto & van de Geijn (2008) and
// BLIS (Van Zee & van de Geijn 2015): both operands are packed into panels, block
// by block, and tiles of C are computed from panels in cache.
//
// Blocks of C are cut into tasks on both sides, so that any number of workers
// has something to do; each task runs through all steps of its tile of C.
type blocked struct {
	operands
	level Level
	geometry
	kBlocks int

	bufA, bufB packed

	// The block in work. Panels of A divide its rows evenly.
	row0, rows, aPanels int
	col0, cols, bPanels int
	kb0, kb1            int // blocks of k
	step0, steps        int // the same in steps
	packs               packPlan
	tilesM, tilesN      int

	// Kept, so that calls make no closures.
	packTask, tileTask func(i int)
}

// packPlan says which panels the pack tasks cover: first A's, then B's.
type packPlan struct{ aTasks, bTasks int }

const (
	blockRows  = 1008 // rows of a packed block of A
	blockCols  = 2048 // columns of a packed block of B
	blockSteps = 2048 // steps of both
	tileRows   = 224  // rows and columns of C in a task: A's and B's share of a
	tileCols   = 256  // block of k, 0.8 MiB, stay in a second-level cache
	minTasks   = 16   // what tasks are made smaller for
	packPanels = 4    // panels in a pack task
)

func ceilDiv(a, b int) int { return (a + b - 1) / b }

func (w *blocked) run(o operands, par Parallel) {
	w.operands, w.level, w.geometry = o, active, geometries[active]
	if w.packTask == nil {
		w.packTask, w.tileTask = w.pack, w.tiles
	}
	w.kBlocks = kBlocks(w.k)
	stepBlocks := ceilDiv(w.kBlocks, max(1, blockSteps/kBlock))
	rowBlocks, colBlocks := ceilDiv(w.m, blockRows), ceilDiv(w.n, blockCols)
	// Columns are cut at whole panels.
	colPanels := ceilDiv(w.n, w.nr)
	packedA, packedB := -1, -1
	for jb := range colBlocks {
		w.col0 = jb * colPanels / colBlocks * w.nr
		w.cols = min(w.n, (jb+1)*colPanels/colBlocks*w.nr) - w.col0
		w.bPanels = ceilDiv(w.cols, w.nr)
		for sb := range stepBlocks {
			w.kb0, w.kb1 = sb*w.kBlocks/stepBlocks, (sb+1)*w.kBlocks/stepBlocks
			w.step0, _ = kRange(w.k, w.kBlocks, w.kb0)
			_, end := kRange(w.k, w.kBlocks, w.kb1-1)
			w.steps = end - w.step0
			for ib := range rowBlocks {
				w.row0 = ib * w.m / rowBlocks
				w.rows = (ib+1)*w.m/rowBlocks - w.row0
				w.aPanels = ceilDiv(w.rows, w.mr)
				w.packs = packPlan{}
				if a := sb*rowBlocks + ib; a != packedA {
					packedA = a
					w.packs.aTasks = ceilDiv(w.aPanels, packPanels)
					w.bufA.grow(w.aPanels * w.aStride * w.steps)
				}
				if b := jb*stepBlocks + sb; b != packedB {
					packedB = b
					w.packs.bTasks = ceilDiv(w.bPanels, packPanels)
					w.bufB.grow(w.bPanels * w.nr * w.steps)
				}
				if n := w.packs.aTasks + w.packs.bTasks; n > 0 {
					run(par, n, w.packTask)
				}
				w.cutTiles()
				run(par, w.tilesM*w.tilesN, w.tileTask)
			}
		}
	}
	w.operands = operands{}
}

// cutTiles chooses the grid of tasks for the block of C.
func (w *blocked) cutTiles() {
	w.tilesM, w.tilesN = ceilDiv(w.rows, tileRows), ceilDiv(w.cols, tileCols)
	for w.tilesM*w.tilesN < minTasks {
		switch {
		case w.tilesN*2 <= w.bPanels:
			w.tilesN *= 2
		case w.tilesM*2 <= w.aPanels:
			w.tilesM *= 2
		default:
			return
		}
	}
}

// panelRows returns panel i's rows within the block.
func (w *blocked) panelRows(i int) (from, to int) {
	return i * w.rows / w.aPanels, (i + 1) * w.rows / w.aPanels
}

// panelA returns the packed panel i of A for block kb of k; panelB the same of B.
func (w *blocked) panelA(i, from, to int) []float32 {
	at := (from-w.step0)*w.aPanels*w.aStride + i*(to-from)*w.aStride
	return w.bufA.x[at : at+(to-from)*w.aStride]
}

func (w *blocked) panelB(j, from, to int) []float32 {
	at := (from-w.step0)*w.bPanels*w.nr + j*(to-from)*w.nr
	return w.bufB.x[at : at+(to-from)*w.nr]
}

// pack is a task: it packs a few panels over all steps of the block.
func (w *blocked) pack(task int) {
	if task < w.packs.aTasks {
		for i := task * packPanels; i < min((task+1)*packPanels, w.aPanels); i++ {
			r0, r1 := w.panelRows(i)
			for kb := w.kb0; kb < w.kb1; kb++ {
				from, to := kRange(w.k, w.kBlocks, kb)
				w.packA(w.level, w.panelA(i, from, to), w.aStride, w.row0+r0, r1-r0, from, to)
			}
		}
		return
	}
	task -= w.packs.aTasks
	for j := task * packPanels; j < min((task+1)*packPanels, w.bPanels); j++ {
		count := min(w.nr, w.cols-j*w.nr)
		for kb := w.kb0; kb < w.kb1; kb++ {
			from, to := kRange(w.k, w.kBlocks, kb)
			w.packB(w.level, w.panelB(j, from, to), w.nr, w.col0+j*w.nr, count, from, to)
		}
	}
}

// tiles is a task: one part of the block of C, over all its steps.
func (w *blocked) tiles(task int) {
	tm, tn := task/w.tilesN, task%w.tilesN
	i0, i1 := tm*w.aPanels/w.tilesM, (tm+1)*w.aPanels/w.tilesM
	j0, j1 := tn*w.bPanels/w.tilesN, (tn+1)*w.bPanels/w.tilesN
	for kb := w.kb0; kb < w.kb1; kb++ {
		from, to := kRange(w.k, w.kBlocks, kb)
		load := w.accumulate || kb > 0
		for j := j0; j < j1; j++ {
			b := strip{x: w.panelB(j, from, to), step: w.nr}
			count := min(w.nr, w.cols-j*w.nr)
			for i := i0; i < i1; i++ {
				r0, r1 := w.panelRows(i)
				a := strip{x: w.panelA(i, from, to), step: w.aStride}
				at := (w.row0+r0)*w.ldc + w.col0 + j*w.nr
				tile(w.level, r1-r0, count, to-from, a, b, w.c[at:], w.ldc, load)
			}
		}
	}
}

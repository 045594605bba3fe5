package cpu

import (
	"sync/atomic"

	"trainerd/kernels/cpu/internal/simd"
)

// worker is the private memory of one of a device's workers. It is small: what
// grows with a micro-batch comes from the caller's arena.
type worker struct {
	gemm simd.Scratch
	temp []float32
	mass []float64 // of a nucleus search
	ids  []int32
}

// floats returns n floats of uninitialised memory, valid until the next call.
func (w *worker) floats(n int) []float32 {
	if len(w.temp) < n {
		w.temp = make([]float32, n)
	}
	return w.temp[:n]
}

// each runs f for every task in [0,tasks), on all workers. Tasks are taken in
// order by whichever worker is free, so what a task computes must not depend
// on which one runs it: w in [0,len(d.workers)) only picks scratch memory.
func (d *device) each(tasks int, f func(w, task int)) {
	if len(d.workers) == 1 {
		for t := range tasks {
			f(0, t)
		}
		return
	}
	var next atomic.Int64
	d.pool.For(min(len(d.workers), tasks), func(w int) {
		for t := int(next.Add(1)) - 1; t < tasks; t = int(next.Add(1)) - 1 {
			f(w, t)
		}
	})
}

// blocks cuts n elements into blocks of at most size, and runs f on each.
func (d *device) blocks(n, size int, f func(from, to int)) {
	d.workerBlocks(n, size, func(_ *worker, from, to int) { f(from, to) })
}

// workerBlocks is blocks for a function that needs a worker's memory.
func (d *device) workerBlocks(n, size int, f func(w *worker, from, to int)) {
	d.each((n+size-1)/size, func(w, b int) { f(&d.workers[w], b*size, min((b+1)*size, n)) })
}

// grain is the number of elements of an elementwise operation that one task takes.
const grain = 1 << 16

// rowBlock returns how many rows of a width make one task.
func rowBlock(width int) int { return max(1, grain/4/max(width, 1)) }

// reductionBlocks is the most partial sums that a reduction over rows keeps.
const reductionBlocks = 32

// reduceRows computes out[width] (+)= the sum over rows of what add puts into a
// partial sum for rows [from,to). The rows are cut by their number alone, and
// the partial sums are added in order.
func (d *device) reduceRows(out []float32, rows int, accumulate bool, add func(w *worker, sum []float32, from, to int)) {
	width := len(out)
	size := max(16, (rows+reductionBlocks-1)/reductionBlocks)
	n := (rows + size - 1) / size
	if len(d.partial) < n*width {
		d.partial = make([]float32, n*width)
	}
	sums := d.partial[:n*width]
	d.workerBlocks(rows, size, func(w *worker, from, to int) {
		sum := sums[from/size*width:][:width]
		clear(sum)
		add(w, sum, from, to)
	})
	if !accumulate {
		clear(out)
	}
	for b := range n {
		simd.Add(out, out, sums[b*width:])
	}
}

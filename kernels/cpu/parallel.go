package cpu

import (
	"sync"
	"sync/atomic"
)

// each runs f for every task in [0,tasks), on all workers. Tasks are taken in
// order by whichever worker is free, so what a task computes must not depend
// on which worker runs it; worker in [0,d.workers) only picks scratch memory.
func (d *device) each(tasks int, f func(worker, task int)) {
	n := min(d.workers, tasks)
	if n <= 1 {
		for t := range tasks {
			f(0, t)
		}
		return
	}
	var next atomic.Int64
	run := func(w int) {
		for {
			t := int(next.Add(1)) - 1
			if t >= tasks {
				return
			}
			f(w, t)
		}
	}
	var wg sync.WaitGroup
	for w := 1; w < n; w++ {
		wg.Go(func() { run(w) })
	}
	run(0)
	wg.Wait()
}

// blocks cuts n elements into blocks of at most size, and runs f on each.
func (d *device) blocks(n, size int, f func(from, to int)) {
	d.each((n+size-1)/size, func(_, b int) { f(b*size, min((b+1)*size, n)) })
}

package simd

import (
	"fmt"
	"sync"
	"sync/atomic"
)

// Parallel runs independent tasks, on as many goroutines as it likes and in any
// order. For returns when f has returned for every i of [0,n). No result in this
// package depends on which Parallel is used.
type Parallel interface {
	For(n int, f func(i int))
}

// Pool is a Parallel over a fixed set of goroutines that wait between calls.
// The caller of For works too. A For inside a task, or beside another For, runs
// on its own goroutine, so nesting cannot deadlock.
type Pool struct {
	workers int
	busy    atomic.Bool
	wake    chan struct{}
	done    chan struct{}
	closed  sync.Once

	// The job in progress; written by For before wake, read by the workers after.
	f      func(i int)
	n      int64
	next   atomic.Int64
	failed atomic.Pointer[taskPanic]
}

// taskPanic carries a panic from a worker to the caller of For.
type taskPanic struct{ value any }

// NewPool starts a pool that runs tasks on up to workers goroutines at once,
// the caller's included. It must be closed by its owner.
func NewPool(workers int) *Pool {
	if workers < 1 {
		panic(fmt.Sprintf("simd: a pool needs at least 1 worker, not %d", workers))
	}
	p := &Pool{workers: workers, wake: make(chan struct{}, workers), done: make(chan struct{}, workers)}
	for range workers - 1 {
		go func() {
			for range p.wake {
				p.drain()
				p.done <- struct{}{}
			}
		}()
	}
	return p
}

// Workers returns the number of goroutines that For uses at most.
func (p *Pool) Workers() int { return p.workers }

// Close ends the pool's goroutines. For must not be running; it may be called
// afterwards and then uses the calling goroutine only.
func (p *Pool) Close() {
	p.closed.Do(func() {
		p.busy.Store(true)
		close(p.wake)
	})
}

// For calls f for every i of [0,n). Tasks are handed out in ascending order. A
// panic in a task stops the handing out and is raised again here.
func (p *Pool) For(n int, f func(i int)) {
	if n <= 1 || p.workers == 1 || !p.busy.CompareAndSwap(false, true) {
		for i := range n {
			f(i)
		}
		return
	}
	helpers := min(p.workers, n) - 1
	p.f, p.n = f, int64(n)
	p.next.Store(0)
	for range helpers {
		p.wake <- struct{}{}
	}
	p.drain()
	for range helpers {
		<-p.done
	}
	failed := p.failed.Swap(nil)
	p.f = nil
	p.busy.Store(false)
	if failed != nil {
		panic(failed.value)
	}
}

// drain takes tasks until none is left.
func (p *Pool) drain() {
	defer func() {
		if v := recover(); v != nil {
			p.next.Store(p.n)
			p.failed.CompareAndSwap(nil, &taskPanic{v})
		}
	}()
	for {
		i := p.next.Add(1) - 1
		if i >= p.n {
			return
		}
		p.f(int(i))
	}
}

// run is p.For, or a plain loop when p is nil.
func run(p Parallel, n int, f func(i int)) {
	if p == nil || n == 1 {
		for i := range n {
			f(i)
		}
		return
	}
	p.For(n, f)
}

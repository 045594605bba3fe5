package trainer

import (
	"context"
	"fmt"
	"runtime"
	"runtime/debug"
	"sync"

	"trainerd/internal/fault"
)

// errClosed is returned for work that arrives after the executor was closed.
var errClosed = fault.New(fault.Unavailable, "shutting_down", "the server is shutting down")

// lane names a FIFO of device work. A job has one for training and one for requests.
type lane struct {
	job   JobID
	class laneClass
}

type laneClass uint8

const (
	laneTrain laneClass = iota
	laneRequest
)

// work is one piece of device work. done receives its error once.
type work struct {
	run  func() error
	done chan error
}

// executor runs device work on one OS thread, one piece at a time, taking one
// piece from each lane in turn.
type executor struct {
	mu     sync.Mutex
	ready  *sync.Cond
	lanes  map[lane][]*work
	turn   []lane // lanes that hold work, the next one first
	closed bool
	ended  chan struct{}
}

func newExecutor() *executor {
	e := &executor{lanes: map[lane][]*work{}, ended: make(chan struct{})}
	e.ready = sync.NewCond(&e.mu)
	go e.loop()
	return e
}

// Do queues run on a lane and waits for its result. When ctx ends before the
// work began, it is taken out of the queue and never runs; work that has begun
// is waited for, since it holds the device (it should watch ctx itself).
func (e *executor) Do(ctx context.Context, l lane, run func() error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	w := &work{run: run, done: make(chan error, 1)}
	e.mu.Lock()
	if e.closed {
		e.mu.Unlock()
		return errClosed
	}
	if len(e.lanes[l]) == 0 {
		e.turn = append(e.turn, l)
	}
	e.lanes[l] = append(e.lanes[l], w)
	e.ready.Signal()
	e.mu.Unlock()

	select {
	case err := <-w.done:
		return err
	case <-ctx.Done():
	}
	if e.withdraw(l, w) {
		return ctx.Err()
	}
	return <-w.done
}

// withdraw removes work that has not begun; false when it is running or done.
func (e *executor) withdraw(l lane, w *work) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	q := e.lanes[l]
	for i := range q {
		if q[i] != w {
			continue
		}
		q = append(q[:i:i], q[i+1:]...)
		if len(q) > 0 {
			e.lanes[l] = q
			return true
		}
		delete(e.lanes, l)
		for k := range e.turn {
			if e.turn[k] == l {
				e.turn = append(e.turn[:k:k], e.turn[k+1:]...)
				break
			}
		}
		return true
	}
	return false
}

// Depth returns how many pieces of work wait.
func (e *executor) Depth() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	n := 0
	for _, q := range e.lanes {
		n += len(q)
	}
	return n
}

// Close refuses new work, runs what is queued and waits for the goroutine to end.
func (e *executor) Close() {
	e.mu.Lock()
	e.closed = true
	e.ready.Signal()
	e.mu.Unlock()
	<-e.ended
}

func (e *executor) loop() {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	defer close(e.ended)
	for {
		w := e.next()
		if w == nil {
			return
		}
		w.done <- guard(w.run)
	}
}

// next waits for work and takes the first piece of the lane whose turn it is.
func (e *executor) next() *work {
	e.mu.Lock()
	defer e.mu.Unlock()
	for len(e.turn) == 0 {
		if e.closed {
			return nil
		}
		e.ready.Wait()
	}
	l := e.turn[0]
	e.turn = e.turn[1:]
	q := e.lanes[l]
	w := q[0]
	if len(q) > 1 {
		e.lanes[l] = q[1:]
		e.turn = append(e.turn, l)
	} else {
		delete(e.lanes, l)
	}
	return w
}

// guard turns a panic of device work into an error, so that one job's defect
// fails that job and leaves the device to the others.
func guard(run func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fault.New(fault.Internal, "panic", "device work panicked: %v\n%s", p, debug.Stack())
		}
	}()
	return run()
}

// String names a lane in logs.
func (l lane) String() string { return fmt.Sprintf("%s/%d", l.job, l.class) }

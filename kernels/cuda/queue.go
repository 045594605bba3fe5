package cuda

import (
	"fmt"
	"runtime"
	"sync"

	"trainerd/internal/fault"
)

// label names an operation and its shapes for errors; it is formatted only then.
type label struct {
	op, format string
	dims       [6]int
	used       int
}

// of makes a label; dims fill the format's verbs.
func of(op, format string, dims ...int) label {
	l := label{op: op, format: format}
	l.used = copy(l.dims[:], dims)
	return l
}

func (l label) String() string {
	if l.format == "" {
		return l.op
	}
	v := make([]any, l.used)
	for i := range v {
		v[i] = l.dims[i]
	}
	return l.op + " (" + fmt.Sprintf(l.format, v...) + ")"
}

// command is one step of the queue.
type command struct {
	label label
	run   func(driver) error
	done  chan struct{} // closed after the step; nil when nobody waits
	// always runs the step after a failure too, for releasing and closing.
	always bool
}

// queueDepth bounds how far the callers run ahead of the owner.
const queueDepth = 2048

// queue hands steps in order to the goroutine that owns the context. Callers
// append to a slice that the owner takes whole, so that a step costs a lock
// and no switch of goroutines while the owner is busy.
type queue struct {
	mu      sync.Mutex
	filled  sync.Cond // the owner waits here for steps
	drained sync.Cond // callers wait here for room
	steps   []command
	ended   bool
	err     error    // the first since the last take
	lost    error    // set once the context is unusable
	since   int      // steps run since the last take, the failed one included
	profile *profile // the owner's alone; nil unless operations are timed
	stopped chan struct{}
}

// newQueue starts the owner, which calls open on its own thread, then runs steps until stop.
func newQueue(open func() (driver, error)) (*queue, error) {
	q := &queue{stopped: make(chan struct{})}
	q.filled.L, q.drained.L = &q.mu, &q.mu
	opened := make(chan error)
	go q.own(open, opened)
	if err := <-opened; err != nil {
		return nil, err
	}
	return q, nil
}

// own never unlocks its thread: the thread, whose state CUDA has changed, ends with the goroutine.
func (q *queue) own(open func() (driver, error), opened chan<- error) {
	runtime.LockOSThread()
	defer close(q.stopped)
	d, err := open()
	opened <- err
	if err != nil {
		return
	}
	var batch []command
	for {
		q.mu.Lock()
		for len(q.steps) == 0 && !q.ended {
			q.filled.Wait()
		}
		if len(q.steps) == 0 {
			q.mu.Unlock()
			return
		}
		batch, q.steps = q.steps, batch[:0]
		q.drained.Broadcast()
		failed := q.err != nil || q.lost != nil
		q.mu.Unlock()
		for i := range batch {
			failed = q.step(d, &batch[i], failed)
			batch[i] = command{}
		}
	}
}

// step runs one command and returns whether the queue is failed now.
func (q *queue) step(d driver, c *command, failed bool) bool {
	if c.done != nil {
		defer close(c.done)
	}
	if failed && !c.always {
		// A taken error lets the steps behind it run again.
		q.mu.Lock()
		failed = q.err != nil || q.lost != nil
		q.mu.Unlock()
		if failed {
			return true
		}
	}
	var err error
	if q.profile == nil {
		err = c.run(d)
	} else {
		err = q.profile.run(d, c)
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	q.since++
	if err == nil {
		return failed
	}
	code := "cuda_error"
	if d.lost(err) {
		code = "device_lost"
	}
	wrapped := fault.New(fault.Internal, code, "cuda: %v: %w (seen after %d operations since the last sync; an asynchronous one may be the cause)", c.label, err, q.since)
	if q.err == nil {
		q.err = wrapped
	}
	if code == "device_lost" && q.lost == nil {
		q.lost = wrapped
	}
	return true
}

// put appends a step without waiting for it.
func (q *queue) put(c command) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.steps) >= queueDepth && !q.ended {
		q.drained.Wait()
	}
	if q.ended {
		panic("cuda: " + c.label.String() + " after Close")
	}
	q.steps = append(q.steps, c)
	if len(q.steps) == 1 {
		q.filled.Signal()
	}
}

// call appends a step, waits until it has run or been dropped, and returns the
// first error since the last take.
func (q *queue) call(c command) error {
	c.done = make(chan struct{})
	q.put(c)
	<-c.done
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.pending()
}

// pending is the error that steps fail with now. The lock is held.
func (q *queue) pending() error {
	if q.err != nil {
		return q.err
	}
	return q.lost
}

// take returns the first error since the last take and lets steps run again,
// unless the context is lost.
func (q *queue) take() error {
	q.mu.Lock()
	defer q.mu.Unlock()
	err := q.pending()
	q.err, q.since = nil, 0
	return err
}

// stop runs the last step, whatever failed before, and ends the owner. A second stop does nothing.
func (q *queue) stop(last command) error {
	q.mu.Lock()
	ended := q.ended
	q.mu.Unlock()
	if ended {
		return nil
	}
	var err error
	run := last.run
	last.always, last.done = true, make(chan struct{})
	last.run = func(d driver) error { err = run(d); return nil }
	q.put(last)
	<-last.done
	q.mu.Lock()
	q.ended = true
	q.filled.Broadcast()
	q.drained.Broadcast()
	q.mu.Unlock()
	<-q.stopped
	return err
}

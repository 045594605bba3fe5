package trainer

import (
	"context"
	"fmt"
	"runtime"
	"runtime/debug"
	"sync"
	"time"

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
	laneClasses
)

// work is one piece of device work. done receives its error once.
type work struct {
	run   func() error
	model bool // it needs the job's model on the device
	done  chan error
}

const (
	// comeback is how long the device stays idle for a job that has just done a
	// piece of training and, by its account, is next: its goroutine needs a moment
	// to hand in the next piece, and without the wait two busy jobs would take
	// turns whatever their weights.
	comeback = 20 * time.Millisecond
	// courtesyShare is the part of device time that goes to requests ahead of
	// their turn and off their job's account, divided among the jobs.
	courtesyShare = 0.1
	// courtesyMost is how much of it a job can save up.
	courtesyMost = time.Second
)

// account is what the executor keeps of a job.
type account struct {
	weight   float64
	pass     float64 // device seconds used in turn, over weight
	courtesy time.Duration
	lanes    [laneClasses][]*work
	last     laneClass // of the newest piece in turn
	// expected: the job did a piece of training and has not said that it rests.
	expected bool
	since    time.Time // when it became expected
	running  bool
	arrived  uint64 // breaks ties between equal passes
}

// active says that the job competes for the device.
func (a *account) active() bool { return a.running || a.expected || a.waits() }

func (a *account) waits() bool { return len(a.lanes[laneTrain])+len(a.lanes[laneRequest]) > 0 }

// head is the piece that the job would run next in turn: lanes alternate.
func (a *account) head() (laneClass, *work) {
	first := laneRequest
	if a.last == laneRequest {
		first = laneTrain
	}
	for _, c := range [...]laneClass{first, laneRequest - first} {
		if q := a.lanes[c]; len(q) > 0 {
			return c, q[0]
		}
	}
	return first, nil
}

// executor runs device work on one OS thread, one piece at a time.
//
// Which job is next is start-time fair queueing over device time (Goyal, Vin &
// Cheng 1996): every job has an account of the seconds it used, divided by its
// weight, and the least account goes first; a job that comes back from idling
// starts at the least account of those that compete, so that nobody saves up.
// Over any time in which two jobs both have work, their seconds divided by their
// weights differ by at most one longest piece of each, divided by its weight.
//
// A request need not wait for its job's turn: it goes next when its job has
// courtesy left, but never twice in a row while anything else waits.
type executor struct {
	now      func() time.Time
	comeback time.Duration
	// barred says that a piece which needs its job's model must not run now,
	// because it would push out a job that has just come in and has work; nil:
	// never. competes reports whether a job has work or is expected with some.
	barred func(job JobID, competes func(JobID) bool) bool

	mu       sync.Mutex
	ready    *sync.Cond
	accounts map[JobID]*account
	arrivals uint64
	served   float64 // greatest account so far
	polite   bool    // the newest piece was a courtesy
	closed   bool
	ended    chan struct{}
}

func newExecutor() *executor {
	e := &executor{now: time.Now, comeback: comeback, accounts: map[JobID]*account{}, ended: make(chan struct{})}
	e.ready = sync.NewCond(&e.mu)
	return e
}

// start begins to run work.
func (e *executor) start() *executor {
	go e.loop()
	return e
}

// Do queues run on a lane and waits for its result. When ctx ends before the
// work began, it is taken out of the queue and never runs; work that has begun
// is waited for, since it holds the device (it should watch ctx itself).
func (e *executor) Do(ctx context.Context, l lane, run func() error) error {
	return e.do(ctx, l, &work{run: run})
}

func (e *executor) do(ctx context.Context, l lane, w *work) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	w.done = make(chan error, 1)
	e.mu.Lock()
	if e.closed {
		e.mu.Unlock()
		return errClosed
	}
	e.join(l.job)
	a := e.accounts[l.job]
	a.lanes[l.class] = append(a.lanes[l.class], w)
	e.ready.Broadcast()
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

// Weigh sets a job's weight.
func (e *executor) Weigh(job JobID, weight int64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	a := e.accounts[job]
	if a == nil {
		a = e.open(job)
	}
	a.weight = float64(weight)
}

func (e *executor) open(job JobID) *account {
	a := &account{weight: defaultPriority, courtesy: courtesyMost}
	e.accounts[job] = a
	return a
}

// join makes a job that comes from idling compete from where the others are.
// Called with mu held.
func (e *executor) join(job JobID) {
	a := e.accounts[job]
	if a == nil {
		a = e.open(job)
	}
	if a.active() {
		return
	}
	least, others := e.served, false
	for _, o := range e.accounts {
		if o != a && o.active() && (!others || o.pass < least) {
			least, others = o.pass, true
		}
	}
	a.pass = max(a.pass, least)
	e.arrivals++
	a.arrived = e.arrivals
}

// withdraw removes work that has not begun; false when it is running or done.
func (e *executor) withdraw(l lane, w *work) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	a := e.accounts[l.job]
	if a == nil {
		return false
	}
	q := a.lanes[l.class]
	for i := range q {
		if q[i] == w {
			a.lanes[l.class] = append(q[:i:i], q[i+1:]...)
			return true
		}
	}
	return false
}

// Rest says that a job will not hand in training for a while, so that the
// device need not wait for it.
func (e *executor) Rest(job JobID) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if a := e.accounts[job]; a != nil && a.expected {
		a.expected = false
		e.ready.Broadcast()
	}
}

// Forget drops the account of a job that has ended and has no work queued.
func (e *executor) Forget(job JobID) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if a := e.accounts[job]; a != nil && !a.waits() && !a.running {
		delete(e.accounts, job)
		e.ready.Broadcast()
	}
}

// Depth returns how many pieces of work wait.
func (e *executor) Depth() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	n := 0
	for _, a := range e.accounts {
		n += len(a.lanes[laneTrain]) + len(a.lanes[laneRequest])
	}
	return n
}

// Close refuses new work, runs what is queued and waits for the goroutine to end.
func (e *executor) Close() {
	e.mu.Lock()
	e.closed = true
	e.ready.Broadcast()
	e.mu.Unlock()
	<-e.ended
}

func (e *executor) loop() {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	defer close(e.ended)
	for {
		p := e.next()
		if p.work == nil {
			return
		}
		began := e.now()
		err := guard(p.work.run)
		e.charge(p, e.now().Sub(began))
		p.work.done <- err
	}
}

// pick is a piece of work that was taken from its lane to be run now.
type pick struct {
	work     *work
	account  *account
	class    laneClass
	courtesy bool
}

// next waits for work and takes the piece that is to run now; none after Close.
func (e *executor) next() pick {
	e.mu.Lock()
	defer e.mu.Unlock()
	for {
		p, wait := e.choose()
		switch {
		case p.account != nil:
			a := p.account
			q := a.lanes[p.class]
			p.work = q[0]
			a.lanes[p.class] = q[1:]
			a.running = true
			if p.class == laneTrain {
				a.expected = false
			}
			if !p.courtesy {
				a.last = p.class
			}
			e.polite = p.courtesy
			return p
		case wait > 0:
			t := time.AfterFunc(wait, func() { e.mu.Lock(); e.ready.Broadcast(); e.mu.Unlock() })
			e.ready.Wait()
			t.Stop()
		case e.closed:
			return pick{}
		default:
			e.ready.Wait()
		}
	}
}

// choose finds the next piece. Without one, wait is how long the device stays
// idle for a job that is expected; 0: nothing waits. Called with mu held.
func (e *executor) choose() (p pick, wait time.Duration) {
	now := time.Now() // not e.now: this is about the goroutines of this process
	anything := false
	for _, a := range e.accounts {
		anything = anything || a.waits()
		if a.expected && now.Sub(a.since) >= e.comeback {
			a.expected = false
		}
	}
	if !anything {
		return pick{}, 0
	}
	before := func(a, b *account) bool {
		return b == nil || a.pass < b.pass || a.pass == b.pass && a.arrived < b.arrived
	}
	var turn, ask *account
	for id, a := range e.accounts {
		_, w := a.head()
		if (w == nil && a.expected || w != nil && !e.bars(id, w)) && before(a, turn) {
			turn = a
		}
		q := a.lanes[laneRequest]
		if len(q) > 0 && a.courtesy > 0 && !e.polite && !e.bars(id, q[0]) && before(a, ask) {
			ask = a
		}
	}
	switch {
	case ask != nil:
		return pick{account: ask, class: laneRequest, courtesy: true}, 0
	case turn == nil:
		return pick{}, time.Millisecond // barred by a job that is about to be gone
	case !turn.waits():
		return pick{}, max(time.Microsecond, e.comeback-now.Sub(turn.since))
	}
	class, _ := turn.head()
	return pick{account: turn, class: class}, 0
}

// bars reports whether a piece must wait for a job whose model it would push
// out. Called with mu held.
func (e *executor) bars(job JobID, w *work) bool {
	return w.model && e.barred != nil && e.barred(job, func(other JobID) bool {
		a := e.accounts[other]
		return a != nil && (a.expected || a.waits())
	})
}

// charge books the time of a piece that has run.
func (e *executor) charge(p pick, took time.Duration) {
	e.mu.Lock()
	defer e.mu.Unlock()
	a := p.account
	a.running = false
	if p.class == laneTrain {
		a.expected, a.since = true, time.Now()
	}
	for _, o := range e.accounts {
		o.courtesy = min(courtesyMost, o.courtesy+time.Duration(courtesyShare*float64(took)/float64(len(e.accounts))))
	}
	if p.courtesy {
		a.courtesy -= took
		return
	}
	a.pass += took.Seconds() / a.weight
	e.served = max(e.served, a.pass)
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

package trainer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"go.opentelemetry.io/otel/attribute"

	"trainerd/internal/crashpoint"
	"trainerd/internal/fault"
	"trainerd/model/hf"
	"trainerd/storage"
)

// flight is one publication, from the moment it has the job's only place for
// one until it has landed. Training goes on meanwhile unless it is synchronous.
type flight struct {
	ctx    context.Context // of its work: ends with cancel, not with the call that began it
	cancel context.CancelFunc
	retry  bool         // until the store takes it; otherwise one try is all
	began  time.Time    // of the capture
	end    func(*error) // of its span

	step    int64 // captured, -1 before; guarded by Job.mu
	bytes   int64 // of host memory; guarded by Job.mu
	content *content
	held    bool // the job's capture memory, until it lands

	failed chan struct{} // closed after the first try that failed, when cause is set
	cause  error
	landed chan struct{} // closed at the end, when man and err are set
	man    storage.Manifest
	err    error
}

// wait returns what a flight came to, or how it fails at present, or ctx's error.
func (f *flight) wait(ctx context.Context) (storage.Manifest, error) {
	select {
	case <-f.landed:
		return f.man, f.err
	case <-f.failed:
		return storage.Manifest{}, f.cause
	case <-ctx.Done():
		return storage.Manifest{}, ctx.Err()
	}
}

// errOvertaken says that another publication landed while one waited for its
// place: whether there is anything left to publish has to be asked again.
var errOvertaken = errors.New("another publication has landed")

// board takes the job's place for a publication. Where a flight has it, that one
// is waited for (one that cannot reach the store by the job's goroutine only) and errOvertaken returned.
func (j *Job) board(ctx context.Context, retry, own bool) (*flight, error) {
	j.mu.Lock()
	other := j.flight
	if other == nil {
		f := &flight{retry: retry, step: -1, failed: make(chan struct{}), landed: make(chan struct{})}
		f.ctx, f.cancel = context.WithCancel(context.WithoutCancel(ctx))
		j.flight = f
		j.mu.Unlock()
		return f, nil
	}
	j.mu.Unlock()
	failed := other.failed
	if own {
		failed = nil
	}
	select {
	case <-other.landed:
		return nil, errOvertaken
	case <-failed:
		return nil, other.cause
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// land ends a flight: what it held is given back, and whoever waits is told.
func (j *Job) land(f *flight, man storage.Manifest, err error) {
	f.cancel()
	f.content = nil
	if f.held {
		j.m.captures.give(j.ID)
		if j.State().Final() {
			j.m.captures.drop(j.ID)
		}
	}
	f.man, f.err = man, err
	f.end(&f.err)
	j.mu.Lock()
	j.flight = nil
	j.mu.Unlock()
	close(f.landed)
	j.poke()
}

// launch captures the policy between two steps and sends it on its way, on a
// goroutine that the manager waits for. When the capture has no room in host
// memory the checkpoint is written here and now, while the device stands still.
// own says that the job's goroutine asks; others are told of a store in trouble instead of waiting.
// Its error is errOvertaken when it had to wait for another publication.
func (j *Job) launch(ctx context.Context, snapshot func() bool, retry, own bool) (f *flight, err error) {
	ctx, end := j.span(ctx, "publish")
	if f, err = j.board(ctx, retry, own); err != nil {
		said := err
		if errors.Is(err, errOvertaken) {
			said = nil
		}
		end(&said)
		return nil, err
	}
	f.end = end
	stop := context.AfterFunc(ctx, f.cancel) // until it flies, it ends with the call
	flies := false
	defer func() {
		stop()
		if !flies {
			j.land(f, f.man, err)
		}
	}()
	err = j.withModel(ctx, laneTrain, func() error {
		if j.model == nil {
			return fault.New(fault.Unavailable, "not_loaded", "publish: the job's model is not on the device")
		}
		f.began = time.Now()
		j.mu.Lock()
		between := j.training == nil || j.training.run == nil
		f.step = j.weights
		recorded := j.rec.Step == j.weights
		j.mu.Unlock()
		if !recorded { // it could not be: a crash now would take the step back, and readers would have seen it
			return &fault.Error{Kind: fault.Unavailable, Code: "step_not_recorded", Msg: fmt.Sprintf("publish step %d: its record could not be written yet", f.step), RetryAfter: diskRetry}
		}
		var err error
		with := snapshot() && between
		if flies, err = j.takeOff(f, with); err != nil || flies {
			return err
		}
		f.content = j.onDevice(with)
		s := &sending{}
		if f.man, err = j.try(f, s); err != nil {
			s.abort(f.ctx)
		}
		return err
	})
	if err == nil && flies {
		flies = j.m.spawn(own, func() { j.fly(f) })
		if !flies {
			err = errClosed
		}
	}
	if err == nil && !flies {
		j.delivered(f, f.man)
	}
	return f, err
}

// takeOff captures the policy if host memory has room for it. Called on the device's goroutine.
func (j *Job) takeOff(f *flight, snapshot bool) (ok bool, err error) {
	n := j.captureBytes(snapshot)
	raw, why := j.m.captures.take(j.ID, n, j.m.hostFree)
	ok = why == ""
	f.held = ok
	j.mu.Lock()
	if why != j.grounded && why != "" {
		j.m.log.Warn("training waits while the checkpoint is written", "job", j.ID, "step", f.step, "why", why)
	}
	j.grounded = why
	if !ok {
		j.counts.PublishedSync++
	}
	j.mu.Unlock()
	if !ok {
		return false, nil
	}
	if err := j.m.captures.pin(j.ID, j.m.Device()); err != nil {
		j.m.pinFailures.Add(1)
		j.m.log.Warn("captures of the job pass through the device's own memory, which takes longer", "job", j.ID, "err", err)
	}
	defer crashpoint.Enter(crashpoint.Publish)()
	c, err := j.capture(f.ctx, snapshot, raw)
	if err != nil {
		return false, publishFault(f.step, err)
	}
	f.content = c
	crashpoint.Reach("checkpoint.captured")
	took := time.Since(f.began)
	j.mu.Lock()
	f.bytes = n
	j.counts.CaptureSeconds += took.Seconds()
	j.mu.Unlock()
	return true, nil
}

// spawn runs work that Close waits for. It is refused once Close has begun,
// unless it is a job's goroutine that asks, which Close waits for as well.
func (m *Manager) spawn(own bool, work func()) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closing && !own {
		return false
	}
	m.running.Add(1)
	go func() {
		defer m.running.Done()
		work()
	}()
	return true
}

// fly brings a captured policy to the store. Its goroutine ends with it.
func (j *Job) fly(f *flight) {
	var man storage.Manifest
	s := &sending{}
	pause := retryFirst
	for {
		var err error
		if man, err = j.try(f, s); err == nil {
			break
		}
		if f.ctx.Err() != nil {
			err = f.ctx.Err()
		} else if f.retry {
			err = j.again(f, err, &pause)
		}
		if err != nil {
			s.abort(f.ctx)
			j.land(f, man, err)
			return
		}
	}
	j.delivered(f, man)
	j.land(f, man, nil)
}

// again says that a try failed and waits before the next one. Its error is why there is none.
func (j *Job) again(f *flight, cause error, pause *time.Duration) error {
	j.note(cause)
	j.mu.Lock()
	j.counts.PublishRetries++
	j.mu.Unlock()
	if f.cause == nil {
		f.cause = cause
		close(f.failed)
		j.poke()
	}
	select {
	case <-time.After(*pause):
		*pause = min(2**pause, retryMost)
		return nil
	case <-f.ctx.Done():
		return f.ctx.Err()
	case <-j.m.closed:
		return errClosed
	}
}

// delivered tells the world of a checkpoint that is in the store.
func (j *Job) delivered(f *flight, man storage.Manifest) {
	j.announce(man, time.Since(f.began))
	f.content.queue.release(j)
	annotate(f.ctx, attribute.Int64("trainerd.step", man.Step), attribute.Int64("trainerd.bytes", man.Bytes("")))
	j.m.log.InfoContext(f.ctx, "checkpoint published", "job", j.ID, "step", man.Step, "prefix", man.Prefix, "snapshot", man.Snapshot)
	j.retain(f.ctx)
}

// try writes the flight's content to the store, going on where the try before failed.
func (j *Job) try(f *flight, s *sending) (storage.Manifest, error) {
	defer crashpoint.Enter(crashpoint.Publish)()
	j.mu.Lock()
	parent := j.latest
	j.mu.Unlock()
	man, err := s.send(f.ctx, j, f.content, parent)
	if err != nil {
		err = publishFault(f.content.step, err)
	}
	return man, err
}

// sending is a checkpoint on its way: what the store has of it already.
type sending struct {
	w    *storage.Writer
	sent map[string]bool
}

// send streams content into a prefix of its own and commits it. After an error
// it may be called again and writes what is missing.
func (s *sending) send(ctx context.Context, j *Job, c *content, parent *storage.Manifest) (man storage.Manifest, err error) {
	if s.w == nil {
		if s.w, err = j.m.ckpts.Create(ctx, string(j.ID), c.step); err != nil {
			return man, err
		}
		s.sent = map[string]bool{}
	}
	if err = hf.Write(ctx, s.file, prefixHF, c.weights, hf.WriteOptions{DType: c.base.dtype, Carried: c.base.carried, ConfigJSON: c.base.configJSON}); err != nil {
		return man, err
	}
	crashpoint.Reach("checkpoint.weights_written")
	if c.state != nil {
		if err := s.file(ctx, fileOptimizer, c.state); err != nil {
			return man, err
		}
		if c.queue != nil {
			if err := s.file(ctx, fileQueue, c.queue.encode); err != nil {
				return man, err
			}
			crashpoint.Reach("checkpoint.queue_written")
		}
		if c.base.dtype != "F32" {
			if err := hf.Write(ctx, s.file, prefixWeights, c.weights, hf.WriteOptions{DType: "F32", ConfigJSON: c.base.configJSON}); err != nil {
				return man, err
			}
		}
	}
	m := storage.Manifest{Engine: j.m.engine(), Created: time.Now().UTC(), Snapshot: c.state != nil}
	if c.print != nil {
		m.Extra = c.print.extra()
	}
	if parent != nil {
		step := parent.Step
		m.Parent = &step
	}
	man, err = s.w.Commit(ctx, m)
	if fault.KindOf(err) == fault.Conflict { // somebody took the prefix away: a new one is needed
		s.w = nil
	}
	return man, err
}

// file writes a file unless the store has it.
func (s *sending) file(ctx context.Context, name string, write func(io.Writer) error) error {
	if s.sent[name] {
		return nil
	}
	err := s.w.File(ctx, name, write)
	s.sent[name] = err == nil
	return err
}

// abortWait bounds how long the remains of a publication are cleared away.
const abortWait = 10 * time.Second

// abort removes what was sent, unless a commit was tried: then it may be in the
// store, or come to be, and what is left is swept at a later start.
func (s *sending) abort(ctx context.Context) {
	if s.w == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), abortWait)
	defer cancel()
	_ = s.w.Abort(ctx) // a failure leaves what a kill would have left
	s.w = nil
}

// publishFault makes every failure of a publication one that passes: the weights
// are well, and what keeps them from being stored may be mended.
func publishFault(step int64, err error) error {
	return &fault.Error{Kind: fault.Unavailable, Code: codePublishFailed, Msg: fmt.Sprintf("publish step %d", step), RetryAfter: 5 * time.Second, Err: err}
}

const codePublishFailed = "publish_failed"

// abortFlight cuts the publication under way short.
func (j *Job) abortFlight() {
	j.mu.Lock()
	f := j.flight
	j.mu.Unlock()
	if f != nil {
		f.cancel()
	}
}

// awaitFlight waits until no publication is under way.
func (j *Job) awaitFlight(ctx context.Context) error {
	for {
		j.mu.Lock()
		f := j.flight
		j.mu.Unlock()
		if f == nil {
			return nil
		}
		select {
		case <-f.landed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Publication is how checkpoints of a job get to the store.
type Publication struct {
	Step        *int64  `json:"step"`            // under way, null when none is
	HostBytes   int64   `json:"host_bytes"`      // of the capture under way
	Holds       string  `json:"holds,omitempty"` // why training waited while the newest was written, if it did
	Synchronous int64   `json:"synchronous"`     // written while training waited
	Waits       int64   `json:"waits"`           // times that a step waited for the publication before
	WaitSeconds float64 `json:"wait_seconds"`    // in all
	Capture     float64 `json:"capture_seconds"` // in all
	Retries     int64   `json:"retries"`         // after the store failed
}

// publication is called with mu held.
func (j *Job) publication() Publication {
	p := Publication{Holds: j.grounded, Synchronous: j.counts.PublishedSync, Waits: j.counts.PublishWaits,
		WaitSeconds: j.counts.PublishWaitSeconds, Capture: j.counts.CaptureSeconds, Retries: j.counts.PublishRetries}
	if f := j.flight; f != nil && f.step >= 0 {
		step := f.step
		p.Step, p.HostBytes = &step, f.bytes
	}
	return p
}

package trainer

import (
	"context"
	"errors"
	"io"
	"math"
	"strconv"
	"time"

	"trainerd/internal/crashpoint"
	"trainerd/internal/fault"
	"trainerd/storage"
)

// Files of a checkpoint. hf/ is a Hugging Face directory and nothing else;
// state/ is what a replay starts from besides.
const (
	prefixHF      = "hf/"
	prefixWeights = "state/weights/" // the exact float32 weights, when hf/ is rounded
	fileOptimizer = "state/optimizer.bin"
)

// publishDue sends the policy on its way because publish_every_steps says so,
// with a snapshot when one is due and the optimizer is between consumptions.
func (j *Job) publishDue(ctx context.Context) error {
	_, err := j.launch(ctx, j.snapshotDue, true, true)
	if errors.Is(err, errOvertaken) {
		return nil // the caller looks whether one is due still
	}
	return err
}

// publishFinal makes sure that the last step is published.
func (j *Job) publishFinal(ctx context.Context) error {
	for {
		if err := j.awaitFlight(ctx); err != nil {
			return err
		}
		select {
		case <-j.m.closed: // which may be what ended the flight
			return errClosed
		default:
		}
		j.mu.Lock()
		done := j.latest != nil && j.latest.Step == j.rec.Step
		j.mu.Unlock()
		if done {
			return nil
		}
		if err := j.publishDue(ctx); err != nil {
			return err
		}
	}
}

// newestFlown is the newest step that is published or on its way because it was
// due, -1 for none. Called with mu held.
func (j *Job) newestFlown() int64 {
	n := j.policyStep()
	if j.flight != nil && j.flight.retry {
		n = max(n, j.flight.step)
	}
	return n
}

// snapshotDue is called on the device's goroutine.
func (j *Job) snapshotDue() bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	every := j.spec.Checkpoint.SnapshotEverySteps
	return every > 0 && j.rec.Step-j.snapshot >= every
}

// preserve writes a snapshot at a graceful end, so that the next start has
// nothing to replay. Steps in the middle of a consumption are replayed instead.
func (j *Job) preserve(ctx context.Context) error {
	err := errOvertaken
	for errors.Is(err, errOvertaken) {
		if err := j.awaitFlight(ctx); err != nil {
			return err
		}
		j.mu.Lock()
		due := !j.state.Final() && j.training == nil && j.rec.Step > j.snapshot
		j.mu.Unlock()
		if !due {
			return nil
		}
		var f *flight
		if f, err = j.launch(ctx, func() bool { return true }, false, true); err == nil {
			_, err = f.wait(ctx)
		}
	}
	if err != nil && ctx.Err() == nil {
		j.m.log.Error("write the snapshot of a stop", "job", j.ID, "err", err)
		return nil // the spool and the older snapshot suffice
	}
	return err
}

// Publish writes a checkpoint of the current policy now, with optimizer state if
// asked. When the newest checkpoint is that already, it is returned and created
// is false. It goes on when ctx ends before it is done.
func (j *Job) Publish(ctx context.Context, snapshot bool) (man storage.Manifest, created bool, err error) {
	err = errOvertaken
	for errors.Is(err, errOvertaken) {
		j.mu.Lock()
		switch {
		case j.state == Loading, j.state.Final() && !j.loaded.Load():
			err = j.wrongState("publish a checkpoint")
			j.mu.Unlock()
			return man, false, err
		case j.latest != nil && j.latest.Step == j.rec.Step && (j.latest.Snapshot || !snapshot):
			man = *j.latest
			j.mu.Unlock()
			return man, false, nil
		}
		j.mu.Unlock()
		var f *flight
		if f, err = j.launch(ctx, func() bool { return snapshot }, false, false); err == nil {
			man, err = f.wait(ctx)
		}
	}
	if err == nil && snapshot && !man.Snapshot {
		err = &fault.Error{Kind: fault.Unavailable, Code: "step_under_way", RetryAfter: time.Second,
			Msg: "the weights were published without optimizer state: the iterations on one set of groups are not done"}
	}
	return man, err == nil, err
}

// announce makes a committed checkpoint the job's newest.
func (j *Job) announce(man storage.Manifest, took time.Duration) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.latest = &man
	if man.Snapshot {
		j.snapshot = man.Step
	}
	if e := j.rec.LastError; e != nil && e.Code == codePublishFailed {
		j.rec.LastError = nil // the store is back
		j.events.publish("state", j.stateEvent())
	}
	j.counts.Published++
	j.counts.PublishSeconds += took.Seconds()
	j.counts.PublishedBytes += man.Bytes("")
	close(j.published)
	j.published = make(chan struct{})
	j.nodes.publish(man)
	j.events.publish("checkpoint", man)
}

// retain deletes checkpoints that the policy does not keep: all but the newest
// keep_last, steps divisible by keep_every, the newest snapshot and what is leased. A failure
// is logged and tried again after the next publication.
func (j *Job) retain(ctx context.Context) {
	defer crashpoint.Enter(crashpoint.Retain)()
	c := j.spec.Checkpoint
	if c.KeepLast == 0 {
		return
	}
	all, err := j.m.ckpts.List(ctx, string(j.ID))
	if err != nil {
		if ctx.Err() == nil { // else the server stops, and retains after its next publication
			j.m.log.Warn("list checkpoints to keep", "job", j.ID, "err", err)
		}
		return
	}
	snapshot := int64(-1)
	for _, man := range all {
		if man.Snapshot {
			snapshot = max(snapshot, man.Step)
		}
	}
	for i, man := range all {
		newest := int64(len(all)-i) <= c.KeepLast
		kth := c.KeepEvery > 0 && man.Step%c.KeepEvery == 0
		if newest || kth || man.Snapshot && man.Step == snapshot {
			continue
		}
		deleted, ok := j.m.leases.remove(j.ID, man.Step)
		if !ok {
			continue // a reader holds it
		}
		err := j.m.ckpts.Delete(ctx, man)
		deleted(err)
		if err != nil {
			j.m.log.Warn("delete an old checkpoint", "job", j.ID, "prefix", man.Prefix, "err", err)
			if fault.KindOf(err) == fault.Unavailable {
				return // of a store that is in trouble each deletion takes its time-outs
			}
		}
	}
}

// Checkpoints lists the job's whole checkpoints by step.
func (j *Job) Checkpoints(ctx context.Context) ([]storage.Manifest, error) {
	all, err := j.m.ckpts.List(ctx, string(j.ID))
	return all, storeFault("list checkpoints", err)
}

// Checkpoint returns the newest whole checkpoint of a step.
func (j *Job) Checkpoint(ctx context.Context, step int64) (storage.Manifest, error) {
	man, err := j.m.ckpts.At(ctx, string(j.ID), step)
	if errors.Is(err, storage.ErrNotFound) {
		return man, noCheckpoint(strconv.FormatInt(step, 10))
	}
	return man, storeFault("read checkpoint", err)
}

func noCheckpoint(got string) error {
	return &fault.Error{Kind: fault.NotFound, Code: "checkpoint_not_found", Msg: "no such checkpoint",
		Fields: []fault.Field{{Name: "step", Row: -1, Got: got, Expected: "a step with a whole checkpoint"}}}
}

// OpenFile reads n bytes of a checkpoint's file from off (n < 0: to the end).
func (j *Job) OpenFile(ctx context.Context, man storage.Manifest, name string, off, n int64) (io.ReadCloser, error) {
	r, err := j.m.ckpts.Open(ctx, man, name, off, n)
	return r, storeFault("read checkpoint file", err)
}

// presigner is a store that can let others read an object without credentials.
type presigner interface {
	Presign(ctx context.Context, key string, ttl time.Duration) (string, error)
}

// presignTTL is how long a presigned URL opens: long enough to begin a large file late.
const presignTTL = 15 * time.Minute

// FileURL returns a URL of the store itself for a checkpoint's file; ok is false
// when the store has none.
func (j *Job) FileURL(ctx context.Context, man storage.Manifest, name string) (url string, ok bool, err error) {
	p, ok := j.m.ckpts.Blob.(presigner)
	if !ok {
		return "", false, nil
	}
	url, err = p.Presign(ctx, man.Prefix+"/"+name, presignTTL)
	return url, err == nil, storeFault("presign a checkpoint file", err)
}

// Latest returns the newest checkpoint if it is of a step after the given one,
// waiting for one until ctx ends; ok is false when none came.
func (j *Job) Latest(ctx context.Context, after int64) (man storage.Manifest, ok bool, err error) {
	for {
		j.mu.Lock()
		latest, moved, final := j.latest, j.published, j.state.Final()
		j.mu.Unlock()
		if latest == nil && final { // its model is not loaded: only the store knows
			man, err := j.m.ckpts.Latest(ctx, string(j.ID))
			if errors.Is(err, storage.ErrNotFound) {
				return man, false, nil
			}
			return man, err == nil && man.Step > after, storeFault("read the latest checkpoint", err)
		}
		if latest != nil && latest.Step > after {
			return *latest, true, nil
		}
		if final {
			return man, false, nil
		}
		select {
		case <-moved:
		case <-j.ended:
		case <-j.m.closed:
			return man, false, nil
		case <-ctx.Done():
			return man, false, nil
		}
	}
}

// AnyStep, given to Latest, accepts every checkpoint.
const AnyStep = int64(math.MinInt64)

package trainer

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"go.opentelemetry.io/otel/attribute"

	"trainerd/internal/crashpoint"
	"trainerd/internal/fault"
	"trainerd/rollout"
	"trainerd/sagrpo"
	"trainerd/storage"
)

// Backoff of work that failed because something outside did not answer.
const (
	retryFirst = 500 * time.Millisecond
	retryMost  = 30 * time.Second
)

// run is the job's goroutine: it loads the model, then trains until the job is
// final, the manager closes, or ctx ends.
func (j *Job) run(ctx context.Context, base *baseModel, restored bool) {
	defer j.retire()
	defer close(j.ended)
	if j.State().Final() {
		return
	}
	err := j.live(ctx, base, restored)
	for errors.Is(err, errReload) && ctx.Err() == nil && !j.State().Final() {
		if err = j.unsettle(ctx); err == nil {
			err = j.live(ctx, nil, true)
		}
	}
	switch {
	case err == nil, ctx.Err() != nil, errors.Is(err, errClosed):
	default:
		j.fail(err)
	}
	if s := j.State(); s == Failed || s == Cancelled {
		j.unload(ctx) // and give the reservation back
	}
	j.m.exec.Rest(j.ID)
	j.awaitFlight(context.WithoutCancel(ctx)) // it ends when the store takes it, by kill or by Close
	j.m.captures.drop(j.ID)
}

// live is the job's life on one opening of the device.
func (j *Job) live(ctx context.Context, base *baseModel, restored bool) error {
	defer j.settling.Wait()
	var snap *storage.Manifest
	var queue *queueState
	err := j.patiently(ctx, func() (err error) {
		if snap, queue, err = j.load(ctx, base, restored); err != nil && restored && ctx.Err() == nil {
			// It could be loaded once: what is missing now may come back.
			err = &fault.Error{Kind: fault.Unavailable, Code: "restore_failed", Msg: "load the job again", Err: err}
		}
		return err
	})
	if err == nil && restored {
		err = j.rebuild(ctx, snap, queue)
	}
	if err == nil {
		j.begin()
	}
	for more := true; more && err == nil && !j.State().Final(); {
		more, err = j.advance(ctx)
	}
	return err
}

// patiently repeats what fails because a dependency is unavailable, with growing
// pauses, and shows the error in the job's status meanwhile.
func (j *Job) patiently(ctx context.Context, do func() error) error {
	var code string
	for pause := retryFirst; ; pause = min(2*pause, retryMost) {
		err := do()
		if err == nil && code != "" {
			j.mu.Lock()
			j.mended(code)
			j.mu.Unlock()
		}
		if err == nil || ctx.Err() != nil || errors.Is(err, errClosed) || fault.KindOf(err) != fault.Unavailable {
			return err
		}
		if j.isLost() { // trying again would not help
			return errReload
		}
		j.note(err)
		code = lastError(err).Code
		j.m.exec.Rest(j.ID)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return ctx.Err()
		case <-j.m.closed:
			return errClosed
		}
	}
}

// action is what a job's goroutine does next.
type action uint8

const (
	actWait  action = iota
	actHold         // there is work to do, and it has to wait for the publication under way
	actDelay        // there are groups to take, and open ones that the step would make too stale
	actStop
	actPublish
	actFinish
	actExpire // settle groups that did not fill in time, beside training
	actTake
	actStep
)

// advance does the job's next piece of work, or waits for a reason to do one.
// more is false when the manager closes.
func (j *Job) advance(ctx context.Context) (more bool, err error) {
	if j.isLost() {
		return false, errReload
	}
	act, alarm := j.decide()
	j.hold(act, time.Now())
	switch act {
	case actStop:
		return false, j.preserve(ctx)
	case actPublish:
		return true, j.patiently(ctx, func() error { return j.publishDue(ctx) })
	case actFinish:
		return false, j.finish(ctx)
	case actExpire:
		return true, j.settleBeside(ctx)
	case actTake:
		j.take()
		return true, nil
	case actStep:
		return true, j.step(ctx)
	}
	var timer <-chan time.Time
	if !alarm.IsZero() {
		t := time.NewTimer(time.Until(alarm))
		defer t.Stop()
		timer = t.C
	}
	j.m.exec.Rest(j.ID)
	select {
	case <-j.wake:
	case <-timer:
	case <-j.m.closed:
	case <-ctx.Done():
		return false, ctx.Err()
	}
	return true, nil
}

// decide picks the next action; with actWait, alarm is when to look again.
func (j *Job) decide() (act action, alarm time.Time) {
	select {
	case <-j.m.closed:
		return actStop, alarm
	default:
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	busy := j.training != nil
	switch {
	case j.state.Final():
		return actStop, alarm
	case j.lastStepDone():
		return actFinish, alarm
	}
	full := j.newestFlown() < 0 || j.rec.Step-j.newestFlown() >= j.spec.Checkpoint.PublishEverySteps
	if full && j.flight == nil {
		return actPublish, alarm
	}
	if at, ok := j.asm.NextExpiry(); ok && !j.settling.underWay() {
		if !time.Now().Before(at) {
			return actExpire, alarm
		}
		alarm = at
	}
	held := j.flight != nil && (full || j.ahead())
	switch {
	case j.rec.Paused:
		j.setState(Paused)
		return actWait, alarm
	case busy && held:
		return actHold, alarm
	case busy:
		j.setState(Training)
		return actStep, alarm
	case int64(j.asm.Ready()) >= j.spec.Batch.GroupsPerStep, j.flush && j.asm.Ready() > 0:
		if held {
			return actHold, alarm
		}
		if ids := j.asm.Awaited(j.rec.Step); len(ids) > 0 {
			j.stalled.await(ids)
			j.setState(Waiting)
			return actDelay, alarm
		}
		return actTake, alarm
	}
	j.flush = false
	j.setState(Waiting)
	return actWait, alarm
}

// ahead says that another step would be taken with rollouts of the newest
// published policy already refused as stale. Called with mu held.
func (j *Job) ahead() bool {
	lag := j.spec.Batch.MaxPolicyLag
	return lag >= 0 && j.spec.Batch.Stale != rollout.StaleAdmit && j.rec.Step-max(j.policyStep(), 0) > lag
}

// lastStepDone says that nothing is left to do but to publish. Called with mu held.
func (j *Job) lastStepDone() bool { return j.spec.MaxSteps > 0 && j.rec.Step >= j.spec.MaxSteps }

// take hands the oldest complete groups to the next step.
func (j *Job) take() {
	j.mu.Lock()
	defer j.mu.Unlock()
	n := min(int(j.spec.Batch.GroupsPerStep), j.asm.Ready())
	groups, stale := j.asm.Take(n, j.rec.Step)
	if len(stale) > 0 {
		j.m.log.Warn("stale groups refused", "job", j.ID, "groups", len(stale), "step", j.rec.Step)
	}
	if len(groups) > 0 {
		j.training = newConsumption(groups, j.rec.Step, j.entered)
		j.training.delayed = j.stalled.settle()
		j.asm.Delayed(j.training.delayed)
		j.drain.took(time.Now(), j.training.load())
	}
}

func newConsumption(groups []rollout.Group, done int64, logSeq uint64) *consumption {
	c := &consumption{groups: groups, first: done + 1, logSeq: logSeq}
	for i := range groups {
		c.ids = append(c.ids, groups[i].ID)
		if b := groups[i].Position.Batch; !slices.Contains(c.batches, b) {
			c.batches = append(c.batches, b)
		}
	}
	slices.Sort(c.batches)
	return c
}

// step runs the next optimizer step on the groups in training and records it.
func (j *Job) step(ctx context.Context) (err error) {
	j.mu.Lock()
	c := j.training
	j.mu.Unlock()
	if c == nil {
		return nil // taken back
	}
	ctx, end := j.span(ctx, "step", attribute.Int64("trainerd.step", c.first), attribute.Int("trainerd.groups", len(c.ids)))
	defer end(&err)
	var rec StepRecord
	var unrecorded error
	taken := true
	err = j.withModel(ctx, laneTrain, func() error {
		j.mu.Lock()
		taken = j.training == c
		j.mu.Unlock()
		if !taken { // back by a snapshot: they are taken again
			return nil
		}
		var err error
		if rec, err = j.compute(ctx, c); err != nil {
			return err
		}
		unrecorded = j.record(rec)
		return nil
	})
	if err == nil && unrecorded != nil { // the device is a step ahead of the records: nothing goes on before they have it
		err = j.patiently(ctx, func() (err error) {
			if err = unrecorded; err == nil {
				err = j.record(rec)
			}
			unrecorded = nil
			return err
		})
	}
	if err != nil || !taken {
		return err
	}
	annotate(ctx, attribute.Int64("trainerd.step", rec.Step))
	j.events.publish("step", rec)
	j.m.log.Debug("step", "job", j.ID, "step", rec.Step, "groups", len(rec.Groups), "loss", rec.Metrics["loss"], "seconds", rec.WallClock)
	return nil
}

// compute does one optimizer step on the device.
func (j *Job) compute(ctx context.Context, c *consumption) (StepRecord, error) {
	defer crashpoint.Enter(crashpoint.Step)()
	j.mu.Lock()
	flying := j.flight != nil
	j.mu.Unlock()
	if flying {
		crashpoint.Reach("step.publishing")
	}
	began := time.Now()
	if c.run == nil {
		run, err := j.engine.Consume(ctx, c.groups, j.weights)
		if err != nil {
			return StepRecord{}, err
		}
		c.run = run
	}
	metrics, done := sagrpo.Metrics{}, true
	if !j.m.opts.Dry {
		var err error
		if metrics, done, err = c.run.Next(ctx); err != nil {
			return StepRecord{}, err
		}
	}
	if done {
		c.run.Release()
	}
	j.weights++
	last := done || j.spec.MaxSteps > 0 && j.weights >= j.spec.MaxSteps
	return StepRecord{Step: j.weights, Time: time.Now().UTC(), First: c.first, Last: last, Groups: c.ids, Batches: c.batches,
		LogSeq: c.logSeq, Delayed: c.delayed, WallClock: time.Since(began).Seconds(), Metrics: Metrics(metrics)}, nil
}

// record makes a step that is done durable, and then visible.
func (j *Job) record(rec StepRecord) error {
	defer crashpoint.Enter(crashpoint.Record)()
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.state.Final() { // cancelled meanwhile; its groups are refused already
		return context.Canceled
	}
	job := j.rec
	job.Step, job.Fingerprint = rec.Step, j.refresh(job.Fingerprint)
	crashpoint.Reach("step.before_record")
	if err := j.m.db.putJob(job, &rec); err != nil {
		return j.m.disk.fault("records_unavailable", fmt.Sprintf("record step %d", rec.Step), err)
	}
	crashpoint.Reach("step.recorded")
	j.rec = job
	j.stepTime = time.Duration(rec.WallClock * float64(time.Second))
	j.counts.Steps++
	j.counts.StepSeconds += rec.WallClock
	j.counts.TrainedTokens += int64(rec.Metrics["tokens"])
	return j.settle(rec)
}

// settle closes the groups of a consumption that is done. Called with mu held.
func (j *Job) settle(rec StepRecord) error {
	if !rec.Last {
		return nil
	}
	j.training = nil
	j.drain.done(time.Now())
	return j.asm.Mark(rec.Groups, rollout.State{Status: rollout.Trained, Step: rec.Step})
}

// finish ends a job that has done all its steps, with a checkpoint of the last.
func (j *Job) finish(ctx context.Context) error {
	if err := j.patiently(ctx, func() error { return j.publishFinal(ctx) }); err != nil {
		return err
	}
	return j.patiently(ctx, func() error {
		j.intake.Lock()
		defer j.intake.Unlock()
		j.mu.Lock()
		defer j.mu.Unlock()
		if j.state.Final() {
			return nil
		}
		return j.end(Finished, nil)
	})
}

package trainer

import (
	"fmt"
	"strings"
	"time"

	"trainerd/internal/fault"
	"trainerd/rollout"
)

// Bounds of a Retry-After. Less would be a busy loop; whoever waits longer than
// the most does better to look at the job.
const (
	retrySoonest = time.Second
	retryLatest  = 10 * time.Minute
	retryPaused  = time.Minute     // nobody knows when a paused job is resumed
	retryUnknown = 5 * time.Second // nothing was measured yet
)

// bound is one limit of a queue.
type bound struct {
	name      string // of the setting
	unit      string
	have, add int64
	most      int64
}

// bounds are the limits of the job's queue: the server's, or the job's own where
// they are less. Called with mu held.
func (j *Job) bounds(b *rollout.Batch, ahead load) []bound {
	d, most := j.asm.Depth(), j.spec.Limits.queueLimits(j.m.limits)
	return []bound{
		{"limits.max_queued_rollouts", "rollouts", int64(d.Rollouts) + ahead.rows, int64(len(b.Rollouts)), int64(most.MaxQueuedRollouts)},
		{"limits.max_queued_tokens", "tokens", d.Tokens + ahead.tokens, b.Tokens(), most.MaxQueuedTokens},
		{"limits.max_queued_bytes", "bytes", d.Bytes + ahead.bytes, b.Bytes(), most.MaxQueuedBytes},
	}
}

// room refuses a batch that the queue has no room for now, with others on their
// way into it, and says when there will be. Called with mu held.
func (j *Job) room(b *rollout.Batch, now time.Time, ahead load) error {
	var never, full []fault.Field
	var say []string
	var depth, most load
	for i, x := range j.bounds(b, ahead) {
		*[]*int64{&depth.rows, &depth.tokens, &depth.bytes}[i] = x.have + x.add
		*[]*int64{&most.rows, &most.tokens, &most.bytes}[i] = x.most
		switch {
		case x.add > x.most:
			never = append(never, fault.Field{Name: x.name, Row: -1, Got: fmt.Sprintf("%d %s", x.add, x.unit), Expected: fmt.Sprintf("a batch of at most %d, which is all that the queue may hold", x.most)})
		case x.have+x.add > x.most:
			full = append(full, fault.Field{Name: x.name, Row: -1, Got: fmt.Sprintf("%d more %s", x.add, x.unit), Expected: fmt.Sprintf("at most %d with the %d that are queued", x.most, x.have)})
			say = append(say, fmt.Sprintf("%d %s of at most %d", x.have, x.unit, x.most))
		}
	}
	if len(never) > 0 {
		return &fault.Error{Kind: fault.TooLarge, Code: "batch_too_large", Msg: "the batch alone is over the queue's limit", Fields: never}
	}
	if len(full) == 0 {
		return nil
	}
	wait, why := j.retryAfter(now, depth.beyond(most))
	return &fault.Error{Kind: fault.Busy, Code: "queue_full", RetryAfter: min(max(wait, retrySoonest), retryLatest), Fields: full,
		Msg: "the queue holds " + strings.Join(say, ", ") + "; " + why}
}

// retryAfter is when need will have left the queue, and what it waits for.
// Called with mu held.
func (j *Job) retryAfter(now time.Time, need load) (time.Duration, string) {
	if j.rec.Paused {
		return retryPaused, "the job is paused and takes nothing until it is resumed"
	}
	d := j.asm.Depth()
	if j.training == nil && int64(d.GroupsComplete) < j.spec.Batch.GroupsPerStep {
		why := fmt.Sprintf("it waits for rows of %d open groups", d.GroupsOpen)
		if at, ok := j.asm.NextExpiry(); ok {
			return at.Sub(now), why + ", the oldest of which is settled then"
		}
		return retryUnknown, why
	}
	wait, takes, ok := j.drain.wait(now, need, j.stalled.act != actWait)
	why := fmt.Sprintf("at the pace of its latest steps there is room after %d more", takes)
	if !ok {
		wait, why = retryUnknown, "no step was measured yet"
	}
	switch j.stalled.act {
	case actHold:
		why += ", and training waits for a checkpoint to be stored"
	case actDelay:
		why += ", and training waits for open groups that it would make too stale"
	}
	return wait, why
}

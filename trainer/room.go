package trainer

import (
	"fmt"
	"strings"
	"time"

	"trainerd/internal/fault"
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

// Announced is what a producer says of a batch before it sends it. 0: nothing.
type Announced struct {
	Rows   int64
	Tokens int64 // prompts counted per row, as rollout.Batch.Tokens does
}

// least is what a batch takes of the queue at least: each row has a token of
// prompt and one of completion, and each token its four bytes.
func (a Announced) least() load {
	rows := max(a.Rows, 1)
	tokens := max(a.Tokens, 2*rows)
	return load{rows: rows, tokens: tokens, bytes: 4 * tokens}
}

// Admit refuses a batch that Submit would refuse whatever is in its body, for the
// job's state or its full queue, so that the body need not be read. It says nil
// for a key that was used before: what is answered then depends on the body.
// Submit looks again, with all that it knows.
func (j *Job) Admit(key string, a Announced) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if _, known := j.keys.get(key); known && key != "" {
		return nil
	}
	if !j.takes() {
		return j.wrongState("accept rollouts")
	}
	return j.room(a.least(), time.Now(), load{})
}

// takes says whether the job's state lets rollouts in. Called with mu held.
func (j *Job) takes() bool { return !j.state.Final() && j.rec.Model.Vocab != 0 && j.fed }

// bounds are the limits of the job's queue: the server's, or the job's own where
// they are less. Called with mu held.
func (j *Job) bounds(add, ahead load) []bound {
	d, most := j.asm.Depth(), j.spec.Limits.queueLimits(j.m.limits)
	return []bound{
		{"limits.max_queued_rollouts", "rollouts", int64(d.Rollouts) + ahead.rows, add.rows, int64(most.MaxQueuedRollouts)},
		{"limits.max_queued_tokens", "tokens", d.Tokens + ahead.tokens, add.tokens, most.MaxQueuedTokens},
		{"limits.max_queued_bytes", "bytes", d.Bytes + ahead.bytes, add.bytes, most.MaxQueuedBytes},
	}
}

// room refuses a batch that the queue has no room for now, with others on their
// way into it, and says when there will be. Called with mu held.
func (j *Job) room(add load, now time.Time, ahead load) error {
	var never, full []fault.Field
	var say []string
	var depth, most load
	for i, x := range j.bounds(add, ahead) {
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

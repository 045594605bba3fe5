package trainer

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"trainerd/internal/fault"
	"trainerd/model"
	"trainerd/rollout"
	"trainerd/rollout/spool"
	"trainerd/sagrpo"
	"trainerd/storage"
)

// Job is one policy in training. Its lock order is intake, then mu.
type Job struct {
	ID      JobID
	created time.Time
	spec    Spec
	m       *Manager
	spool   *spool.Log // nil until it is opened, while the job is loaded; of an ended job nil or closed
	events  *eventRing
	wake    chan struct{}      // one token: something changed for the job's goroutine
	kill    context.CancelFunc // cuts running work short
	ended   chan struct{}      // closed when the job's goroutine has ended

	// intake serialises what is written to the spool, so that the spool's order
	// is the assembler's order.
	intake   sync.Mutex
	arrivals arrivals // of batches; has its own lock
	settling settling // of groups that did not fill; has its own locks

	mu        sync.Mutex // guards what follows
	rec       jobRecord
	state     State
	asm       *rollout.Assembler
	keys      keyring           // by Idempotency-Key
	entered   uint64            // newest record of the spool that the assembler has
	fed       bool              // it has all of them
	ends      bool              // its end is in the database
	returning bool              // it was when the server started, and its queue is not known again yet
	training  *consumption      // nil between steps on different groups
	flush     bool              // train what is complete although it is less than a step wants
	latest    *storage.Manifest // newest published checkpoint
	snapshot  int64             // step of the newest snapshot, 0 for the base model
	published chan struct{}     // closed and replaced when latest moves
	flight    *flight           // publication under way, at most one
	grounded  string            // why the newest publication held the device; "" when it did not
	plan      *MemoryPlan
	stepTime  time.Duration // of the newest step
	samples   uint64        // sampling requests so far, for their default seeds
	counts    jobCounts

	nodes nodes // inference nodes that report; has its own lock

	stalled stall // what keeps a step from starting although there is work; guarded by mu
	drain   drain

	loaded atomic.Bool // model is not nil
	lost   bool        // so was the device that had the model: the job has to load again; guarded by mu

	// device state: touched by device work only
	model   *model.Model
	engine  *sagrpo.Engine
	weights int64      // steps that the weights on the device have seen
	base    *baseModel // for what published checkpoints carry along
}

// consumption is a set of groups in training.
type consumption struct {
	groups  []rollout.Group
	ids     []string
	batches []uint64            // that completed them
	first   int64               // number of its first step
	logSeq  uint64              // newest spool record when they were taken
	delayed int64               // open groups that they waited for
	run     *sagrpo.Consumption // nil until its first step; device state
}

// newJob makes a job that does not run yet, with an empty queue.
func (m *Manager) newJob(rec jobRecord) *Job {
	j := &Job{
		ID: rec.ID, created: rec.Created, spec: rec.Spec, m: m, rec: rec, state: rec.State, ends: rec.State.Final(), returning: rec.State.Final(),
		events: newEventRing(m.limits.EventRing), wake: make(chan struct{}, 1), ended: make(chan struct{}),
		published: make(chan struct{}),
	}
	if !rec.State.Final() {
		j.state = Loading
		j.rec.LastError = nil // what is still wrong will say so again
	}
	m.exec.Weigh(rec.ID, rec.Spec.weight())
	j.asm = rollout.NewAssembler(rec.Spec.assembler())
	return j
}

// poke tells the job's goroutine to look again.
func (j *Job) poke() {
	select {
	case j.wake <- struct{}{}:
	default:
	}
}

// State returns where the job is in its life.
func (j *Job) State() State {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.state
}

// setState moves the job to a state, tells readers of events, and writes the
// record when the state outlives a restart. Called with mu held.
func (j *Job) setState(s State) {
	if j.state == s {
		return
	}
	j.state = s
	j.rec.State = s
	j.events.publish("state", j.stateEvent())
}

type stateEvent struct {
	State      State      `json:"state"`
	Step       int64      `json:"step"`
	PolicyStep int64      `json:"policy_step"`
	LastError  *LastError `json:"last_error"`
}

func (j *Job) stateEvent() stateEvent {
	return stateEvent{State: j.state, Step: j.rec.Step, PolicyStep: j.policyStep(), LastError: j.rec.LastError}
}

// policyStep is the newest published step, -1 before the first. Called with mu held.
func (j *Job) policyStep() int64 {
	if j.latest == nil {
		return -1
	}
	return j.latest.Step
}

// wrongState is the refusal of a call that the job's state does not allow.
// A state that will pass is Unavailable, a final one Conflict.
func (j *Job) wrongState(doing string) error {
	if j.returning {
		return &fault.Error{Kind: fault.Unavailable, Code: "job_loading", Msg: doing + ": what the ended job left is being read", RetryAfter: time.Second}
	}
	if j.state.Final() {
		return &fault.Error{Kind: fault.Conflict, Code: "job_" + string(j.state), Msg: fmt.Sprintf("%s: the job is %s", doing, j.state),
			Fields: []fault.Field{{Name: "job", Row: -1, Got: string(j.state), Expected: "a job that is not finished, failed or cancelled"}}}
	}
	return &fault.Error{Kind: fault.Unavailable, Code: "job_" + string(j.state), Msg: fmt.Sprintf("%s: the job is %s", doing, j.state), RetryAfter: time.Second}
}

// Pause stops the job from starting another step; one under way is finished.
func (j *Job) Pause() error { return j.pause(true) }

// Resume lets a paused job go on.
func (j *Job) Resume() error { return j.pause(false) }

func (j *Job) pause(on bool) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.state.Final() {
		return j.wrongState("pause or resume")
	}
	if j.rec.Paused == on {
		return nil
	}
	rec := j.rec
	rec.Paused = on
	if err := j.m.db.putJob(rec, nil); err != nil {
		return j.m.disk.fault("records_unavailable", "record the pause", err)
	}
	j.rec = rec
	switch {
	case on && j.state != Loading:
		j.setState(Paused)
	case !on && j.state == Paused:
		j.setState(Waiting)
	}
	j.poke()
	return nil
}

// Flush asks for a step on the complete groups although they are fewer than
// groups_per_step, and returns how many there are.
func (j *Job) Flush() (groups int, err error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.state.Final() {
		return 0, j.wrongState("flush")
	}
	n := j.asm.Ready()
	if n > 0 {
		j.flush = true
		j.poke()
	}
	return n, nil
}

// Cancel ends an active job: a step under way is cut short, what is queued is
// refused under a named reason, and the device memory is freed. On a final job
// it frees the memory that the job still holds and changes nothing else.
func (j *Job) Cancel(ctx context.Context) error {
	j.intake.Lock() // no batch is accepted into a job that is being cancelled
	j.mu.Lock()
	if !j.state.Final() {
		if err := j.end(Cancelled, nil); err != nil {
			j.mu.Unlock()
			j.intake.Unlock()
			return err
		}
	}
	j.mu.Unlock()
	j.intake.Unlock()
	j.kill()
	select {
	case <-j.ended:
	case <-ctx.Done():
		return ctx.Err()
	}
	j.unload(ctx)
	return nil
}

// end moves the job to a final state and refuses what is queued under a reason
// named after it. Called with intake and mu held.
func (j *Job) end(s State, cause error) error {
	rec := j.rec
	rec.State = s
	if cause != nil {
		rec.LastError = lastError(cause)
	}
	err := j.m.db.putJob(rec, nil)
	if err != nil && s != Failed {
		return j.m.disk.fault("records_unavailable", "record the end", err)
	}
	j.ends = err == nil
	j.rec = rec
	j.dropQueue("job_" + string(s))
	j.setState(s)
	return nil
}

// dropQueue refuses every live group under a reason. Called with mu held.
func (j *Job) dropQueue(reason string) {
	if err := j.asm.Mark(j.asm.Live(), rollout.State{Status: rollout.Dropped, Reason: reason}); err != nil {
		j.m.log.Error("refuse the queue of an ended job", "job", j.ID, "err", err)
	}
}

// fail ends the job because of an error of its own.
func (j *Job) fail(cause error) {
	j.intake.Lock()
	defer j.intake.Unlock()
	j.mu.Lock()
	defer j.mu.Unlock()
	if !j.state.Final() {
		j.m.log.Error("job failed", "job", j.ID, "err", cause)
		j.end(Failed, cause)
	}
}

// note records an error that the job survives.
func (j *Job) note(err error) {
	j.m.log.Warn("job goes on after an error", "job", j.ID, "err", err)
	j.mu.Lock()
	defer j.mu.Unlock()
	j.rec.LastError = lastError(err)
	j.events.publish("state", j.stateEvent())
}

// mended takes the job's last error back if it is one of codes: what failed works
// again. Called with mu held.
func (j *Job) mended(codes ...string) {
	if e := j.rec.LastError; e != nil && slices.Contains(codes, e.Code) {
		j.rec.LastError = nil
		j.events.publish("state", j.stateEvent())
	}
}

// refused notes an error that a batch was refused by, once for many.
func (j *Job) refused(err error) error {
	j.mu.Lock()
	last := j.rec.LastError
	j.mu.Unlock()
	if next := lastError(err); last == nil || last.Code != next.Code || next.Time.Sub(last.Time) > retryMost {
		j.note(err)
	}
	return err
}

// failing is what goes wrong with the job's work at present, nil for nothing.
func (j *Job) failing() *LastError {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.state.Final() {
		return nil
	}
	return j.rec.LastError
}

// unload frees the job's device memory. It may be called again.
func (j *Job) unload(ctx context.Context) {
	err := j.m.exec.Do(context.WithoutCancel(ctx), lane{j.ID, laneTrain}, func() error {
		defer j.m.home.drop(j.ID)
		defer j.loaded.Store(false)
		j.engine = nil
		if j.model == nil {
			return nil
		}
		mod := j.model
		j.model = nil
		return mod.Close()
	})
	j.m.captures.drop(j.ID)
	if err != nil && !errors.Is(err, errClosed) {
		j.m.log.Error("free a model", "job", j.ID, "err", err)
	}
	j.m.exec.Forget(j.ID)
}

// Queue is what waits in a job.
type Queue struct {
	Rollouts       int   `json:"rollouts"`
	Tokens         int64 `json:"tokens"` // each prompt once
	Bytes          int64 `json:"bytes"`  // of the rows' payload in memory
	GroupsComplete int   `json:"groups_complete"`
	GroupsOpen     int   `json:"groups_open"`
}

// Counts are a job's totals.
type Counts struct {
	Batches           int64            `json:"batches"`
	Rollouts          int64            `json:"rollouts"`
	Duplicates        int64            `json:"duplicates"`
	MissingPolicyStep int64            `json:"missing_policy_step"`
	GroupsTrained     int64            `json:"groups_trained"`
	GroupsIncomplete  int64            `json:"groups_incomplete"`
	GroupsRefused     map[string]int64 `json:"groups_refused"` // by reason
	Stale             StaleCounts      `json:"stale"`
}

// StaleCounts are the groups that lagged too far, or would have, by what was done.
type StaleCounts struct {
	Admitted int64 `json:"admitted"` // trained all the same
	Delayed  int64 `json:"delayed"`  // open groups that a step was put off for
	Rejected int64 `json:"rejected"` // refused as policy_lag
}

// jobCounts are totals since the start of the process, for /metrics.
type jobCounts struct {
	Steps, Published, SampledTokens, ScoredTokens, TrainedTokens int64
	StepSeconds, PublishSeconds                                  float64
	PublishedBytes                                               int64
	PublishedSync, PublishRetries, PublishWaits                  int64
	CaptureSeconds, PublishWaitSeconds, DelaySeconds             float64
	SwapsIn, SwapsOut                                            int64
	SwapSeconds                                                  float64
}

// Architecture is what a worker must know of a job's model.
type Architecture struct {
	Type         string  `json:"type"`
	Vocab        int     `json:"vocab"`
	MaxPositions int     `json:"max_positions"`
	MaxSequence  int     `json:"max_sequence"` // longest prompt + completion that a rollout may have
	BOS          int32   `json:"bos"`          // -1: none
	EOS          []int32 `json:"eos"`
	DType        string  `json:"dtype"` // of published weights
}

// Status is a job as the API shows it.
type Status struct {
	ID JobID `json:"id"`
	Spec
	Created      time.Time     `json:"created"`
	Source       string        `json:"resolved_source"`
	State        State         `json:"state"`
	Step         int64         `json:"step"`
	PolicyStep   int64         `json:"policy_step"` // -1 before the first checkpoint
	Queue        Queue         `json:"queue"`
	Counts       Counts        `json:"counts"`
	Architecture *Architecture `json:"architecture"` // null until the source was read
	MemoryPlan   *MemoryPlan   `json:"memory_plan"`  // null until the model is loaded
	Resident     bool          `json:"resident"`     // the model is on the device now
	Publication  Publication   `json:"publication"`
	LastError    *LastError    `json:"last_error"`

	Fingerprint        *Fingerprint        `json:"fingerprint"`         // null until the model is loaded
	FingerprintChanges []FingerprintChange `json:"fingerprint_changes"` // the newest last
}

// Status returns a consistent picture of the job.
func (j *Job) Status() Status {
	j.mu.Lock()
	defer j.mu.Unlock()
	d, c := j.asm.Depth(), j.asm.Counters()
	s := Status{
		ID: j.ID, Spec: j.spec, Created: j.created, Source: j.rec.Source, State: j.state, Step: j.rec.Step, PolicyStep: j.policyStep(),
		Queue: Queue{Rollouts: d.Rollouts, Tokens: d.Tokens, Bytes: d.Bytes, GroupsComplete: d.GroupsComplete, GroupsOpen: d.GroupsOpen},
		Counts: Counts{Batches: c.Batches, Rollouts: c.Rollouts, Duplicates: c.Duplicates, MissingPolicyStep: c.MissingPolicyStep,
			GroupsTrained: c.GroupsTrained, GroupsIncomplete: c.GroupsIncomplete, GroupsRefused: c.GroupsDropped,
			Stale: StaleCounts{Admitted: c.StaleAdmitted, Delayed: c.StaleDelayed, Rejected: c.GroupsDropped[rollout.ReasonPolicyLag]}},
		MemoryPlan: j.plan, Publication: j.publication(), LastError: j.rec.LastError,
		Fingerprint: j.rec.Fingerprint.shown(), FingerprintChanges: append([]FingerprintChange{}, j.rec.FingerprintChanges...),
	}
	if j.returning {
		s.State = Loading // its counts are not known again yet
	}
	_, s.Resident = j.m.home.resident(j.ID)
	if cfg := j.rec.Model; cfg.Vocab > 0 {
		s.Architecture = &Architecture{Type: cfg.Type, Vocab: cfg.Vocab, MaxPositions: cfg.MaxPositions, MaxSequence: j.maxSequence(),
			BOS: cfg.BOS, EOS: cfg.EOS, DType: j.rec.DType}
	}
	return s
}

// maxSequence is the longest prompt + completion that the model and the
// micro-batch have room for. Called with mu held.
func (j *Job) maxSequence() int {
	return min(j.rec.Model.MaxPositions, int(j.spec.Batch.MaxTokens))
}

// Steps returns up to limit step records after the given step, oldest first.
func (j *Job) Steps(after int64, limit int) ([]StepRecord, error) {
	return j.m.db.steps(j.ID, after, limit)
}

// Events calls f for the job's events after an id until ctx ends or the server
// stops; after 0 means from now on. See eventRing.read.
func (j *Job) Events(ctx context.Context, after uint64, f func(Event) error) error {
	return j.events.read(ctx, after, f)
}

// LastEvent returns the id of the newest event, for a reader that wants those after it.
func (j *Job) LastEvent() uint64 {
	j.events.mu.Lock()
	defer j.events.mu.Unlock()
	return j.events.next - 1
}

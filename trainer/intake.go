package trainer

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/attribute"

	"trainerd/internal/crashpoint"
	"trainerd/internal/fault"
	"trainerd/rollout"
	"trainerd/rollout/arrowio"
	"trainerd/rollout/spool"
)

// Kinds of spool records.
const (
	recordRollouts = "rollouts" // Body is the Arrow stream as received, Meta a rolloutMeta
	recordExpire   = "expire"   // Meta is an expireMeta
)

// rolloutMeta is what a spool record says besides the body.
type rolloutMeta struct {
	Digest     string    `json:"digest,omitempty"` // mark of the body, when it came with a key
	Received   time.Time `json:"received"`
	PolicyStep int64     `json:"policy_step"` // as answered
	Step       int64     `json:"step"`
}

// expireMeta is a settling of groups that did not fill in time.
type expireMeta struct {
	Now time.Time `json:"now"`
}

// Receipt is the answer to an accepted batch.
type Receipt struct {
	Job             JobID  `json:"job"`
	Batch           uint64 `json:"id"`
	Rows            int    `json:"rows"`       // that entered the queue
	Duplicates      int    `json:"duplicates"` // rows that were there before
	GroupsCompleted int    `json:"groups_completed"`
	GroupsOpen      int    `json:"groups_open"` // groups of the batch that wait for rows
	PolicyStep      int64  `json:"policy_step"`
	Step            int64  `json:"step"`
}

// accepted remembers what an idempotency key was used for.
type accepted struct {
	digest  string // mark of the body
	receipt Receipt
}

// Submit accepts a batch: once it returns, the body is on disk. The same key and
// body again answers the same receipt. A refused batch is refused whole.
//
// The body is the job's until free, which may be nil, is called with it: before
// Submit returns, or from another goroutine when rows that lie in it are trained,
// or never. free must not wait for anything.
func (j *Job) Submit(ctx context.Context, body []byte, key string, free func([]byte)) (r Receipt, err error) {
	ctx, end := j.span(ctx, "accept", attribute.Int("trainerd.bytes", len(body)))
	defer end(&err)
	if free == nil {
		free = func([]byte) {}
	}
	kept := false
	defer func() {
		if !kept {
			free(body)
		}
	}()
	if r, known, err := j.acceptedBefore(key, body); known || err != nil {
		return r, err
	}
	schema, limits, err := j.admission("accept rollouts")
	if err != nil {
		return Receipt{}, err
	}
	var batch *rollout.Batch
	if batch, kept, err = j.decodeBatch(ctx, body, schema, limits); err != nil {
		return Receipt{}, err
	}
	batch.Received = time.Now().UTC()
	if kept {
		batch.Free = func() { free(body) }
	}

	a := &arrival{ctx: ctx, batch: batch, body: body, key: key}
	if key != "" {
		a.digest = markOf(body)
	}
	return j.arrive(a)
}

// appendBatch writes a batch to the spool.
func (j *Job) appendBatch(ctx context.Context, r spool.Record) (seq uint64, err error) {
	ctx, end := j.span(ctx, "spool.append")
	defer end(&err)
	seq, err = j.spool.Append(r)
	annotate(ctx, attribute.Int64("trainerd.batch", int64(seq)))
	return seq, err
}

// acceptedBefore looks an idempotency key up, and whether it came with this body.
func (j *Job) acceptedBefore(key string, body []byte) (Receipt, bool, error) {
	if key == "" {
		return Receipt{}, false, nil
	}
	j.mu.Lock()
	a, ok := j.keys.get(key)
	j.mu.Unlock()
	if !ok {
		return Receipt{}, false, nil
	}
	if !marks(a.digest, body) {
		return Receipt{}, true, keyReused(key)
	}
	return a.receipt, true, nil
}

// admission says what a batch of this job looks like, or why none is taken now.
func (j *Job) admission(doing string) (rollout.Schema, rollout.Limits, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if !j.takes() {
		return rollout.Schema{}, rollout.Limits{}, j.wrongState(doing)
	}
	return j.schema(), j.limits(), nil
}

func (j *Job) schema() rollout.Schema {
	o := j.spec.Objective
	return rollout.Schema{Objective: o.Name, RewardWeights: o.RewardWeights, SamplerLogProbs: o.NeedsSamplerLogProbs()}
}

// limits are those of one body. Called with mu held.
func (j *Job) limits() rollout.Limits {
	l, longest := j.m.limits, j.maxSequence()
	return rollout.Limits{
		MaxBytes: l.MaxBatchBytes, MaxRows: l.MaxBatchRows, MaxTokens: l.MaxBatchTokens,
		MaxPromptTokens: longest, MaxCompletionTokens: longest, MaxSequence: longest, Vocab: j.rec.Model.Vocab,
	}
}

// decodeBatch decodes a body, waiting for one of the decoders. kept: the batch lies in it.
func (j *Job) decodeBatch(ctx context.Context, body []byte, s rollout.Schema, l rollout.Limits) (b *rollout.Batch, kept bool, err error) {
	ctx, end := j.span(ctx, "accept.decode")
	defer end(&err)
	select {
	case j.m.decode <- struct{}{}:
	case <-ctx.Done():
		return nil, false, ctx.Err()
	}
	defer func() { <-j.m.decode }()
	if b, kept, err = arrowio.DecodeInPlace(body, s, l); err == nil {
		b.Fingerprint() // here, and not under the lock that a step's start needs
	}
	return b, kept, err
}

// check says whether a decoded batch may enter the queue now, after others that
// take the room ahead. Called with intake held.
func (j *Job) check(ctx context.Context, b *rollout.Batch, digest string, ahead load) (meta rolloutMeta, err error) {
	_, end := j.span(ctx, "accept.check", attribute.Int("trainerd.rows", len(b.Rollouts)))
	defer end(&err)
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.state.Final() || !j.fed {
		return rolloutMeta{}, j.wrongState("accept rollouts")
	}
	if err := b.CheckPolicySteps(j.rec.Step); err != nil {
		return rolloutMeta{}, err
	}
	if err := b.CheckRewards(); err != nil {
		return rolloutMeta{}, err
	}
	if err := j.asm.Check(b); err != nil {
		return rolloutMeta{}, err
	}
	if err := j.room(batchLoad(b), time.Now(), ahead); err != nil {
		return rolloutMeta{}, err
	}
	return rolloutMeta{Digest: digest, Received: b.Received, PolicyStep: j.policyStep(), Step: j.rec.Step}, nil
}

// enter adds a batch that is in the spool. Called with mu held.
func (j *Job) enter(seq uint64, b *rollout.Batch, key string, meta rolloutMeta) (Receipt, error) {
	res, err := j.asm.Add(seq, b)
	if err != nil {
		return Receipt{}, err
	}
	j.entered = seq
	r := Receipt{Job: j.ID, Batch: seq, Rows: res.Rows, Duplicates: res.Duplicates, GroupsCompleted: res.GroupsCompleted,
		GroupsOpen: res.GroupsOpen, PolicyStep: meta.PolicyStep, Step: meta.Step}
	if key != "" {
		j.keys.add(key, accepted{digest: meta.Digest, receipt: r})
	}
	return r, nil
}

// apply enters a spool record again after a restart. Called with mu held.
func (j *Job) apply(r spool.Record) error {
	crashpoint.Reach("replay.record")
	switch r.Kind {
	case recordRollouts:
		var meta rolloutMeta
		if err := json.Unmarshal(r.Meta, &meta); err != nil {
			return fmt.Errorf("read meta of spool record %d: %w", r.Seq, err)
		}
		// It was accepted under the limits of its day.
		l := rollout.Limits{MaxBytes: math.MaxInt32, MaxRows: math.MaxInt32, MaxTokens: math.MaxInt32, MaxPromptTokens: math.MaxInt32,
			MaxCompletionTokens: math.MaxInt32, Vocab: j.rec.Model.Vocab}
		b, err := arrowio.DecodeBytes(r.Body, j.schema(), l)
		if err != nil {
			return fmt.Errorf("read spool record %d: %w", r.Seq, err)
		}
		b.Received = meta.Received
		_, err = j.enter(r.Seq, b, r.Key, meta)
		return err
	case recordExpire:
		var meta expireMeta
		if err := json.Unmarshal(r.Meta, &meta); err != nil {
			return fmt.Errorf("read meta of spool record %d: %w", r.Seq, err)
		}
		j.asm.Expire(meta.Now)
		j.entered = r.Seq
		return nil
	}
	return fault.New(fault.Invalid, "spool_kind", "read spool record %d: kind %q, expected %s or %s", r.Seq, r.Kind, recordRollouts, recordExpire)
}

// expire settles groups that did not fill in time: first in the spool, so that
// a replay settles the same ones, then in memory.
func (j *Job) expire() error {
	j.intake.Lock()
	defer j.intake.Unlock()
	now := time.Now().UTC()
	raw, err := json.Marshal(expireMeta{Now: now})
	if err != nil {
		return err
	}
	seq, err := j.spool.Append(spool.Record{Kind: recordExpire, Meta: raw})
	if err != nil {
		return j.m.disk.fault("spool_unavailable", "record expired groups", err)
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.asm.Expire(now)
	j.entered = seq
	return nil
}

// settling is the settling of groups that runs beside training, at most one of a job.
type settling struct {
	sync.WaitGroup
	now    atomic.Bool
	failed atomic.Bool // the latest did
}

func (s *settling) underWay() bool { return s.now.Load() }

// settleBeside settles groups that did not fill in time without holding up
// training: the log may be busy with uploads, or its disk slow. If that fails,
// the next try is the job's goroutine's own, which repeats it until the disk is
// well. Called by the job's goroutine.
func (j *Job) settleBeside(ctx context.Context) error {
	if j.settling.failed.Swap(false) {
		return j.patiently(ctx, j.expire)
	}
	j.settling.now.Store(true)
	j.settling.Go(func() {
		err := j.expire()
		j.settling.failed.Store(err != nil)
		j.settling.now.Store(false)
		j.poke()
	})
	return nil
}

// GroupStatus says where one group of a batch is.
type GroupStatus struct {
	ID     string `json:"id"`
	Rows   int    `json:"rows"`
	Status string `json:"status"`           // open, queued, training, trained or refused
	Step   *int64 `json:"step,omitempty"`   // of trained: the optimizer step that finished with it
	Reason string `json:"reason,omitempty"` // of refused, and of groups that were settled incomplete
}

// BatchStatus says where the groups of a batch are.
type BatchStatus struct {
	Job    JobID         `json:"job"`
	Batch  uint64        `json:"id"`
	Groups []GroupStatus `json:"groups"` // in the order of the batch's rows
}

// Batch says where each group of an accepted batch is.
func (j *Job) Batch(seq uint64) (BatchStatus, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if !j.fed && (j.state == Loading || j.returning) {
		return BatchStatus{}, j.wrongState("read a batch")
	}
	groups, ok := j.asm.Batch(seq)
	if !ok {
		return BatchStatus{}, &fault.Error{Kind: fault.NotFound, Code: "batch_not_found", Msg: "no such batch",
			Fields: []fault.Field{{Name: "batch", Row: -1, Got: strconv.FormatUint(seq, 10), Expected: "the id of an accepted batch of this job"}}}
	}
	b := BatchStatus{Job: j.ID, Batch: seq, Groups: make([]GroupStatus, 0, len(groups))}
	for _, g := range groups {
		s := GroupStatus{ID: g.ID, Rows: g.Rows, Status: g.State.Status.String(), Reason: g.State.Reason}
		switch g.State.Status {
		case rollout.Trained:
			s.Step = &g.State.Step
		case rollout.Dropped:
			s.Status = "refused"
		}
		b.Groups = append(b.Groups, s)
	}
	return b, nil
}

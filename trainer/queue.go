package trainer

import (
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"slices"

	"trainerd/internal/checked"
	"trainerd/internal/crashpoint"
	"trainerd/internal/fault"
	"trainerd/rollout"
	"trainerd/storage"
)

// fileQueue is a snapshot's queue: what a start would otherwise read from the
// whole log. Snapshots of before it was introduced have none.
const fileQueue = "state/queue.bin"

// queueState is a job's queue at one moment between two steps: all that the log
// said up to a record, with the outcome of the steps done by then. It is a
// function of log and step records, so that the log is not needed up to there.
type queueState struct {
	job     JobID
	step    int64  // steps done
	entered uint64 // newest record of the log that is in it
	keys    []keyed
	queue   *rollout.Snapshot
}

// keyring remembers what idempotency keys were used for. Keys are only added, so
// that a copy of the list as it is now costs nothing.
type keyring struct {
	list []keyed
	at   map[string]int // place in list
}

type keyed struct {
	key string
	accepted
}

func (k *keyring) add(key string, a accepted) {
	if k.at == nil {
		k.at = map[string]int{}
	}
	k.at[key] = len(k.list)
	k.list = append(k.list, keyed{key, a})
}

func (k *keyring) get(key string) (accepted, bool) {
	at, ok := k.at[key]
	if !ok {
		return accepted{}, false
	}
	return k.list[at].accepted, true
}

// queueState copies the queue in time that grows with its live groups only.
// Called with mu held.
func (j *Job) queueState() *queueState {
	return &queueState{job: j.ID, step: j.rec.Step, entered: j.entered, keys: j.keys.list, queue: j.asm.Snapshot()}
}

// captureQueue is the queue that belongs to the weights on the device, nil when
// they are of a step that could not be recorded. Called on the device's
// goroutine between consumptions.
func (j *Job) captureQueue() *queueState {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.rec.Step != j.weights {
		return nil
	}
	if c := j.training; c != nil {
		// Its step has not begun. It is taken again, from all that is in the queue
		// by then: a start from here would do the same.
		j.asm.Requeue(c.groups)
		j.training = nil
	}
	q := j.queueState()
	if crashpoint.Off("queue.committed") {
		q.release(j)
	}
	return q
}

// The queue on disk, in the terms of package checked. It is an ended job's file as well.
//
//	magic version
//	job string  step i64  entered u64
//	keys: list of key string  digest[32]  batch u64  rows i64  duplicates i64  groups completed i64  groups open i64  policy step i64  step i64
//	queue: see rollout.Snapshot
const (
	queueMagic   = "trdqueue"
	queueVersion = 1
)

// encode writes the state. It may be called while the job goes on.
func (q *queueState) encode(w io.Writer) error {
	e := checked.NewWriter(w, queueMagic, queueVersion)
	e.String(string(q.job))
	e.Int64(q.step)
	e.Uint64(q.entered)
	e.Len(len(q.keys))
	for i := range q.keys {
		k := &q.keys[i]
		e.String(k.key)
		digest, err := hex.DecodeString(k.digest)
		if err != nil || len(digest) != 32 {
			return fault.New(fault.Internal, "queue_state", "write the queue: key %q has digest %q", k.key, k.digest)
		}
		e.Raw(digest)
		e.Uint64(k.receipt.Batch)
		for _, n := range []int{k.receipt.Rows, k.receipt.Duplicates, k.receipt.GroupsCompleted, k.receipt.GroupsOpen} {
			e.Int64(int64(n))
		}
		e.Int64(k.receipt.PolicyStep)
		e.Int64(k.receipt.Step)
	}
	q.queue.Put(e)
	return e.Close()
}

// decodeQueue reads what encode wrote and nothing after it.
func decodeQueue(r io.Reader) (*queueState, error) {
	d, _, err := checked.NewReader(r, queueMagic, queueVersion)
	if err != nil {
		return nil, fmt.Errorf("read the queue: %w", err)
	}
	q := &queueState{job: JobID(d.String()), step: d.Int64(), entered: d.Uint64()}
	q.keys = checked.List(d, d.Len(), func() (k keyed) {
		k.key = d.String()
		var digest [32]byte
		d.Raw(digest[:])
		k.digest = hex.EncodeToString(digest[:])
		k.receipt.Job, k.receipt.Batch = q.job, d.Uint64()
		for _, n := range []*int{&k.receipt.Rows, &k.receipt.Duplicates, &k.receipt.GroupsCompleted, &k.receipt.GroupsOpen} {
			*n = int(d.Int64())
		}
		k.receipt.PolicyStep, k.receipt.Step = d.Int64(), d.Int64()
		return k
	})
	q.queue = rollout.TakeSnapshot(d)
	if q.step < 0 {
		d.Fail("step %d", q.step)
	}
	if err := d.Close(); err != nil {
		return nil, fmt.Errorf("read the queue: %w", err)
	}
	return q, nil
}

// readQueue reads a snapshot's queue; nil when it was written without one.
func (j *Job) readQueue(ctx context.Context, snap *storage.Manifest) (*queueState, error) {
	if snap == nil || !slices.ContainsFunc(snap.Files, func(f storage.File) bool { return f.Name == fileQueue }) {
		return nil, nil
	}
	r, err := j.m.ckpts.Open(ctx, *snap, fileQueue, 0, -1)
	if err != nil {
		return nil, storeFault("open the queue of a snapshot", err)
	}
	defer r.Close()
	q, err := decodeQueue(r)
	if err != nil {
		return nil, fault.New(fault.Internal, "queue_state", "read %s/%s: %w", snap.Prefix, fileQueue, err)
	}
	if q.job != j.ID || q.step != snap.Step {
		return nil, fault.New(fault.Internal, "queue_state", "read %s/%s: it is of job %s, step %d", snap.Prefix, fileQueue, q.job, q.step)
	}
	return q, nil
}

// enterQueue makes the job's queue that of a state; nil is the empty queue before
// the first record. What the job's queue held is forgotten.
func (j *Job) enterQueue(q *queueState) error {
	asm, entered, keys := rollout.NewAssembler(j.spec.assembler()), uint64(0), keyring{}
	if q != nil {
		var err error
		if asm, err = rollout.RestoreAssembler(j.spec.assembler(), q.queue); err != nil {
			return err
		}
		entered = q.entered
		for _, k := range q.keys {
			keys.add(k.key, k.accepted)
		}
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.asm, j.entered, j.keys, j.training = asm, entered, keys, nil
	return nil
}

// assembler says how rows become groups in this job.
func (s *Spec) assembler() rollout.AssemblerOptions {
	return rollout.AssemblerOptions{
		GroupSize: s.Objective.GroupSize, Objective: s.Objective.Name, MaxPolicyLag: s.Batch.MaxPolicyLag, Stale: s.Batch.Stale, Steps: int64(s.Objective.Iterations),
		RequirePolicyStep: s.Batch.MissingStep == "refuse", Incomplete: s.Batch.IncompleteWhat, GroupTimeout: s.Batch.Timeout(),
	}
}

// resume opens the log and puts the queue where the snapshot left it. The log
// has to go on from there.
func (j *Job) resume(ctx context.Context, snap *storage.Manifest) (*queueState, error) {
	if err := j.openLog(); err != nil {
		return nil, err
	}
	q, err := j.readQueue(ctx, snap)
	if err != nil {
		return nil, err
	}
	covered := uint64(0)
	if q != nil {
		covered = q.entered
	}
	if err := j.covers(snap, covered); err != nil {
		return nil, err
	}
	if err := j.enterQueue(q); err != nil {
		return nil, err
	}
	if q != nil {
		q.release(j) // a crash may have come between the checkpoint and this
	}
	return q, nil
}

// covers says whether the log has every record after those that the newest
// snapshot stands for.
func (j *Job) covers(snap *storage.Manifest, covered uint64) error {
	found := "no snapshot was found"
	if snap != nil {
		found = fmt.Sprintf("the newest snapshot found, of step %d, stands for the records up to %d", snap.Step, covered)
	}
	first, last := j.spool.First(), j.spool.Last()
	switch {
	case first > covered+1:
		return fault.New(fault.Internal, "log_gap", "resume job %s: %s, and its log begins at record %d: record %d is missing", j.ID, found, first, covered+1)
	case last < covered:
		return fault.New(fault.Internal, "log_gap", "resume job %s: %s, and its log ends at record %d: record %d is missing", j.ID, found, last, last+1)
	}
	return nil
}

// release gives up the part of the log that a committed snapshot stands for.
func (q *queueState) release(j *Job) {
	if q == nil {
		return
	}
	defer crashpoint.Enter(crashpoint.Retain)()
	upTo := q.entered
	if crashpoint.Off("queue.bound") {
		upTo = j.spool.Last()
	}
	crashpoint.Reach("trim.before")
	if err := j.spool.Trim(upTo); err != nil {
		j.m.log.Warn("trim the spool", "job", j.ID, "up_to", upTo, "err", err)
		return
	}
	crashpoint.Reach("trim.done")
}

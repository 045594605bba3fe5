package trainer

import (
	"cmp"
	"context"
	"encoding/json"
	"slices"
	"sync"

	"trainerd/internal/crashpoint"
	"trainerd/internal/fault"
	"trainerd/rollout"
	"trainerd/rollout/spool"
)

// Batches that arrive together are accepted together: their bodies go to the
// disk at once and share its syncs. One sync for each, one after the other, would
// hold as many producers as there are for as many syncs.
//
// A round is what one holder of Job.intake accepts. Its batches must not depend
// on one another, so that each may be checked against the queue as it was before
// the round, whatever order they get in the log.

// maxRound bounds the bodies of a round in bytes.
const maxRound = 64 << 20

// errRound is for batches whose round ended by a panic of somebody else's.
var errRound = fault.New(fault.Internal, "accept_broken", "accept rollouts: the round ended before the batch was written")

// arrival is a decoded batch on its way into the queue.
type arrival struct {
	ctx    context.Context // of its request, for spans
	batch  *rollout.Batch
	body   []byte
	key    string
	digest string // mark of the body, "" without a key

	meta rolloutMeta
	seq  uint64

	done    bool // guarded by Job.intake
	receipt Receipt
	err     error
}

// arrivals are the batches that wait for the next round, in order.
type arrivals struct {
	mu      sync.Mutex
	waiting []*arrival
}

// arrive accepts a batch in the round of whoever is first to hold intake.
func (j *Job) arrive(a *arrival) (Receipt, error) {
	j.arrivals.mu.Lock()
	j.arrivals.waiting = append(j.arrivals.waiting, a)
	j.arrivals.mu.Unlock()

	j.intake.Lock()
	defer j.intake.Unlock()
	for !a.done {
		j.round(j.arrivals.take())
	}
	return a.receipt, a.err
}

// take removes the next round: the first batch that waits and those after it that
// share no group, row or key with it or with each other.
func (w *arrivals) take() []*arrival {
	w.mu.Lock()
	defer w.mu.Unlock()
	taken := map[string]bool{}
	size := 0
	var round, left []*arrival
	for _, a := range w.waiting {
		if len(round) > 0 && (size+len(a.body) > maxRound || a.clashes(taken)) {
			// Those that follow may not overtake it if they share something with it.
			a.names(func(name string) { taken[name] = true })
			left = append(left, a)
			continue
		}
		a.names(func(name string) { taken[name] = true })
		size += len(a.body)
		round = append(round, a)
	}
	w.waiting = left
	return round
}

// names calls f for everything that the acceptance of another batch may depend on.
func (a *arrival) names(f func(string)) {
	if a.key != "" {
		f("key " + a.key)
	}
	group := ""
	for i := range a.batch.Rollouts {
		r := &a.batch.Rollouts[i]
		if r.GroupID != group || i == 0 { // rows of a group mostly come together
			group = r.GroupID
			f("group " + group)
		}
		if r.ID != "" {
			f("row " + r.ID)
		}
	}
}

func (a *arrival) clashes(taken map[string]bool) (clash bool) {
	a.names(func(name string) { clash = clash || taken[name] })
	return clash
}

// round accepts or refuses batches that do not depend on one another. Called with intake held.
func (j *Job) round(batches []*arrival) {
	defer crashpoint.Enter(crashpoint.Append)()
	var passed []*arrival
	var ahead load // of the batches that passed
	for _, a := range batches {
		a.done, a.err = true, errRound
	}
	for _, a := range batches {
		var known bool
		if a.receipt, known, a.err = j.acceptedBefore(a.key, a.body); known || a.err != nil {
			continue
		}
		if a.meta, a.err = j.check(a.ctx, a.batch, a.digest, ahead); a.err != nil {
			continue
		}
		ahead = ahead.plus(batchLoad(a.batch))
		passed = append(passed, a)
	}
	var writing sync.WaitGroup
	for _, a := range passed {
		writing.Go(func() { a.seq, a.err = j.writeArrival(a) })
	}
	writing.Wait()
	crashpoint.Reach("accept.before_answer")
	slices.SortFunc(passed, func(a, b *arrival) int { return cmp.Compare(a.seq, b.seq) })

	j.mu.Lock()
	defer j.mu.Unlock()
	entered := false
	for _, a := range passed {
		if a.err != nil {
			continue
		}
		if a.receipt, a.err = j.enter(a.seq, a.batch, a.key, a.meta); a.err != nil { // check said yes and intake is held: a defect, and the log is ahead of memory
			a.err = fault.New(fault.Internal, "assembler", "enter accepted batch %d: %w", a.seq, a.err)
		}
		entered = true
	}
	if entered {
		j.mended(codeDiskFull, "spool_unavailable")
		j.poke()
	}
}

// writeArrival writes a batch to the spool.
func (j *Job) writeArrival(a *arrival) (uint64, error) {
	raw, err := json.Marshal(a.meta)
	if err != nil {
		return 0, err
	}
	seq, err := j.appendBatch(a.ctx, spool.Record{Kind: recordRollouts, Key: a.key, Meta: raw, Body: a.body})
	if err != nil {
		return 0, j.refused(j.m.disk.fault("spool_unavailable", "write the batch to disk", err))
	}
	return seq, nil
}

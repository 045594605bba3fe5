package rollout

import (
	"cmp"
	"crypto/sha256"
	"fmt"
	"maps"
	"slices"
	"time"

	"trainerd/internal/fault"
)

// What happens to a group that does not fill in time.
const (
	IncompleteDrop  = "drop"
	IncompleteTrain = "train" // its G is the actual count
)

// What happens to a group whose oldest row lags by more than MaxPolicyLag.
const (
	StaleReject = "reject" // it is dropped when a step would take it
	StaleDelay  = "delay"  // so it is, but steps wait for open groups that would come to it; see Awaited
	StaleAdmit  = "admit"  // it is trained and counted
)

// AssemblerOptions are the settings of a job that decide how rows become groups.
type AssemblerOptions struct {
	GroupSize         int           // rows of a complete group; 1 with cross_entropy whatever is said here
	Objective         string        //
	MaxPolicyLag      int64         // in steps; 0 admits only the newest policy, negative is no limit
	Stale             string        // StaleReject (default), StaleDelay or StaleAdmit
	Steps             int64         // optimizer steps on what one Take hands out; default 1
	RequirePolicyStep bool          // refuse rows without policy_step
	Incomplete        string        // IncompleteDrop (default) or IncompleteTrain
	GroupTimeout      time.Duration // from the group's first row; 0: never
}

// Assembler turns accepted batches into groups and remembers what became of
// each. It is a pure state machine: it has no clock and no goroutine, and the
// same calls in the same order give the same state, so a log of them replays it.
// It is not safe for concurrent use.
//
// The slices of a batch belong to the assembler once Add returned.
type Assembler struct {
	opts     AssemblerOptions
	live     map[string]*entry // open, ready and taken groups
	opened   []*entry          // open groups by first row; closed ones are swept lazily
	ready    []*entry          // by order
	closed   ledger[closed]    // for the life of the job
	seen     ledger[digest]    // rollout_id -> content, for the life of the job
	batches  []batchGroups     // ascending, for the life of the job
	reasons  []string          // that closed groups name by their place
	last     uint64            // newest sequence number
	order    uint64            // next place in ready
	version  uint64            // of the state, for the plan's cache
	planned  *plan
	depth    Depth
	counters Counters
}

// usualGroup bounds the memory that a group's first row takes for the rows to come.
const usualGroup = 16

// digest names a thing in 16 bytes; equal by accident is out of reach.
type digest [16]byte

// entry is a live group.
type entry struct {
	group  Group
	names  [][]string // component names of each rollout's batch
	state  State
	order  uint64
	first  Position
	opened time.Time
	tokens int64
	bytes  int64

	admitted bool // counted as stale when it was taken

	body *body // in which its rows lie; nil: that need not be known
}

// closed is what stays of a group.
type closed struct {
	step   int64
	rows   int32
	reason uint16 // place in Assembler.reasons
	status Status
}

// batchGroups names the groups of a batch in the order of its rows.
type batchGroups struct {
	seq    uint64
	groups names
}

// AddResult says what a batch did.
type AddResult struct {
	Rows            int // that entered the queue
	Duplicates      int // rows that were there before
	GroupsCompleted int
	GroupsOpen      int // groups of this batch that still wait for rows
}

// NewAssembler returns an empty assembler. A GroupSize below 1 is taken as 1.
func NewAssembler(o AssemblerOptions) *Assembler {
	if o.Objective == CrossEntropy || o.GroupSize < 1 {
		o.GroupSize = 1
	}
	o.Steps = max(o.Steps, 1)
	return &Assembler{
		opts: o, live: map[string]*entry{},
		counters: Counters{GroupsDropped: map[string]int64{}, RolloutsDropped: map[string]int64{}},
	}
}

// Check says whether Add would accept the batch, and changes nothing. Its faults
// name the first row that is wrong: Invalid for a prompt unlike its group's or a
// missing policy_step, Conflict "group_closed" or "rollout_id_reused".
func (a *Assembler) Check(b *Batch) error {
	_, err := a.plan(b)
	return err
}

// Add enters a batch that Check accepts. Sequence numbers grow from call to
// call. After an error nothing has changed.
func (a *Assembler) Add(seq uint64, b *Batch) (AddResult, error) {
	if seq <= a.last {
		return AddResult{}, fault.New(fault.Internal, "sequence", "add batch %d after batch %d: sequence numbers grow", seq, a.last)
	}
	p, err := a.plan(b)
	if err != nil {
		return AddResult{}, err
	}
	a.changed()
	a.last = seq
	for _, r := range p.seen {
		a.seen.add(r.name, r.value)
	}
	a.sweep()
	var res AddResult
	before := map[string]int{} // rows of the groups that the batch touches
	var groups []string
	for i := range b.Rollouts {
		r := &b.Rollouts[i]
		if _, ok := before[r.GroupID]; !ok {
			before[r.GroupID] = 0
			if e := a.live[r.GroupID]; e != nil {
				before[r.GroupID] = len(e.group.Rollouts)
			}
			groups = append(groups, r.GroupID)
		}
		if p.duplicate[i] {
			res.Duplicates++
			continue
		}
		res.Rows++
		at := Position{Batch: seq, Row: i}
		e := a.live[r.GroupID]
		if e == nil {
			e = &entry{group: Group{ID: r.GroupID, Prompt: r.Prompt}, state: State{Status: Open}, first: at, opened: b.Received}
			room := min(a.opts.GroupSize, len(b.Rollouts)-i, usualGroup)
			e.group.Rollouts, e.names = make([]Rollout, 0, room), make([][]string, 0, room)
			a.live[r.GroupID] = e
			a.opened = append(a.opened, e)
			a.depth.GroupsOpen++
			a.grow(e, int64(len(r.Prompt)), 4*int64(len(r.Prompt)))
		}
		row := *r
		row.GroupID, row.Prompt = e.group.ID, e.group.Prompt
		e.group.Rollouts = append(e.group.Rollouts, row)
		e.group.Position = at
		e.names = append(e.names, b.Components)
		a.depth.Rollouts++
		a.grow(e, int64(len(row.Completion)), row.payload())
		if row.PolicyStep == NoPolicyStep {
			a.counters.MissingPolicyStep++
		}
		if len(e.group.Rollouts) == a.opts.GroupSize {
			a.complete(e)
			res.GroupsCompleted++
		}
	}
	for id := range before {
		if e := a.live[id]; e != nil && e.state.Status == Open {
			res.GroupsOpen++
		}
	}
	// Groups that came whole leave soon and together. Rows that wait, or that are
	// all that is new in a body, would keep a body each that nobody counts.
	if b.Shared && (res.GroupsOpen > 0 || res.Duplicates > 0) {
		for id, n := range before {
			if e := a.live[id]; e != nil {
				for k := n; k < len(e.group.Rollouts); k++ {
					e.group.Rollouts[k].Detach()
				}
			}
		}
		if b.Free != nil {
			b.Free()
		}
	} else if b.Shared && b.Free != nil {
		m := &body{groups: len(before), free: b.Free}
		for id := range before {
			a.live[id].body = m
		}
	}
	a.batches = append(a.batches, batchGroups{seq, makeNames(groups)})
	a.counters.Batches++
	a.counters.Rollouts += int64(res.Rows)
	a.counters.Duplicates += int64(res.Duplicates)
	a.counters.GroupsCompleted += int64(res.GroupsCompleted)
	return res, nil
}

func (a *Assembler) grow(e *entry, tokens, bytes int64) {
	e.tokens += tokens
	e.bytes += bytes
	a.depth.Tokens += tokens
	a.depth.Bytes += bytes
}

// payload is the size of a row's own data in bytes, its prompt excluded.
func (r *Rollout) payload() int64 {
	return 4*int64(len(r.Completion)+len(r.SamplerLogProbs)+len(r.LossWeights)) + 8*int64(len(r.Components)) +
		int64(len(r.LossMask)+len(r.ID))
}

// Detach gives the row memory of its own; see Batch.Shared.
func (r *Rollout) Detach() {
	r.Completion = append([]int32(nil), r.Completion...) // slices.Clone of nothing would keep it
	if r.SamplerLogProbs != nil {
		r.SamplerLogProbs = append([]float32{}, r.SamplerLogProbs...)
	}
}

func payloads(rows []Rollout) (n int64) {
	for i := range rows {
		n += rows[i].payload()
	}
	return n
}

// complete moves an open group to the end of the ready queue.
func (a *Assembler) complete(e *entry) {
	e.state.Status = Ready
	e.order = a.order
	a.order++
	a.grow(e, 0, -payloads(e.group.Rollouts))
	e.group.Components, e.group.Rollouts = unite(e.names, e.group.Rollouts)
	a.grow(e, 0, payloads(e.group.Rollouts)) // components that a row did not have take room too
	e.names = nil
	a.ready = append(a.ready, e)
	a.depth.GroupsOpen--
	a.depth.GroupsComplete++
}

// unite brings the components of rows from several batches under one list of
// names; a component that a row's batch did not have is 0, like a null.
func unite(names [][]string, rows []Rollout) ([]string, []Rollout) {
	var all []string
	same := true
	for i := range rows {
		all = append(all, names[i]...)
		same = same && slices.Equal(names[i], names[0])
	}
	if same {
		return names[0], rows
	}
	slices.Sort(all)
	all = slices.Compact(all)
	rows = slices.Clone(rows) // a Snapshot may hold them as they were
	for i := range rows {
		if rows[i].Components == nil {
			continue
		}
		values := make([]float64, len(all))
		for k, name := range names[i] {
			at, _ := slices.BinarySearch(all, name)
			values[at] = rows[i].Components[k]
		}
		rows[i].Components = values
	}
	return all, rows
}

// Ready is the number of complete groups that wait for a step.
func (a *Assembler) Ready() int { return len(a.ready) }

// Take hands out the n oldest ready groups that are fresh enough at step, the
// number of optimizer steps done. Groups that it meets on the way and whose
// oldest row lags by more than MaxPolicyLag are dropped under ReasonPolicyLag
// and returned as stale, unless StaleAdmit lets them in. With StaleDelay it looks
// at all ready groups, and those that would be too stale for the take after it go
// before older ones that would not. When fewer than n fresh groups are ready,
// none is taken. A taken group waits for Mark or Requeue.
func (a *Assembler) Take(n int, step int64) (taken []Group, stale []GroupState) {
	if n < 1 {
		return nil, nil
	}
	a.changed()
	fresh := make([]*entry, 0, len(a.ready))
	for i, e := range a.ready {
		if len(fresh) == n && a.opts.Stale != StaleDelay {
			fresh = append(fresh, a.ready[i:]...)
			break
		}
		if a.opts.Stale != StaleAdmit && a.lag(e, step) {
			stale = append(stale, a.close(e, State{Status: Dropped, Reason: ReasonPolicyLag}))
		} else {
			fresh = append(fresh, e)
		}
	}
	a.ready = fresh
	if len(fresh) < n {
		return nil, stale
	}
	urgent := 0 // groups for which this is the last chance
	if a.opts.Stale == StaleDelay {
		for _, e := range fresh {
			if a.lag(e, step+a.opts.Steps) {
				urgent++
			}
		}
	}
	urgent = min(urgent, n)
	others := n - urgent
	rest := make([]*entry, 0, len(fresh)-n)
	for _, e := range fresh {
		quota := &others
		if urgent > 0 && a.lag(e, step+a.opts.Steps) {
			quota = &urgent
		}
		if *quota == 0 {
			rest = append(rest, e)
			continue
		}
		*quota--
		if e.admitted = a.lag(e, step); e.admitted {
			a.counters.StaleAdmitted++
		}
		e.state.Status = Taken
		a.leave(e)
		taken = append(taken, e.group)
	}
	a.ready = rest
	return taken, stale
}

// lag says whether the group's oldest row is too old. Rows that do not say are not counted.
func (a *Assembler) lag(e *entry, step int64) bool {
	if a.opts.MaxPolicyLag < 0 {
		return false
	}
	for i := range e.group.Rollouts {
		if s := e.group.Rollouts[i].PolicyStep; s != NoPolicyStep && step-s > a.opts.MaxPolicyLag {
			return true
		}
	}
	return false
}

// Awaited are the open groups that a step taken now, at step, would make too
// stale, in the order of their first rows: with StaleDelay it is put off until
// they are complete or settled by Expire. A group that is too stale already is
// not waited for.
func (a *Assembler) Awaited(step int64) []string {
	if a.opts.Stale != StaleDelay {
		return nil
	}
	var ids []string
	for _, e := range a.opened {
		if e.state.Status == Open && a.lag(e, step+a.opts.Steps) && !a.lag(e, step) {
			ids = append(ids, e.group.ID)
		}
	}
	return ids
}

// Delayed counts groups that a step was put off for.
func (a *Assembler) Delayed(groups int64) { a.counters.StaleDelayed += groups }

// leave takes a group's rows out of the queue depth.
func (a *Assembler) leave(e *entry) { a.move(e, -1) }

func (a *Assembler) move(e *entry, sign int) {
	a.depth.Rollouts += sign * len(e.group.Rollouts)
	a.depth.GroupsComplete += sign
	a.depth.Tokens += int64(sign) * e.tokens
	a.depth.Bytes += int64(sign) * e.bytes
}

// Requeue puts taken groups back at their old places. Groups that are not taken are left alone.
func (a *Assembler) Requeue(groups []Group) {
	a.changed()
	for i := range groups {
		e := a.live[groups[i].ID]
		if e == nil || e.state.Status != Taken {
			continue
		}
		e.state.Status = Ready
		if e.admitted {
			e.admitted = false
			a.counters.StaleAdmitted--
		}
		at, _ := slices.BinarySearchFunc(a.ready, e.order, func(x *entry, order uint64) int { return cmp.Compare(x.order, order) })
		a.ready = slices.Insert(a.ready, at, e)
		a.move(e, 1)
	}
}

// Mark records the end of groups: Trained in a step, or Dropped under a reason.
// Taken, ready and open groups may be marked; an unknown or closed one, or
// another status, is an error and then no group has been marked.
func (a *Assembler) Mark(ids []string, s State) error {
	if s.Status != Trained && s.Status != Dropped {
		return fault.New(fault.Internal, "mark", "mark groups %v: a group ends trained or dropped", s.Status)
	}
	if s.Status == Dropped && s.Reason == "" {
		return fault.New(fault.Internal, "mark", "drop groups: a reason is required")
	}
	seen := make(map[string]bool, len(ids))
	for _, id := range ids {
		if a.live[id] == nil || seen[id] {
			return fault.New(fault.Internal, "mark", "mark group %q %v: it is %v", id, s.Status, a.Group(id).State.Status)
		}
		seen[id] = true
	}
	a.changed()
	wasReady := false
	for _, id := range ids {
		e := a.live[id]
		wasReady = wasReady || e.state.Status == Ready
		end := s
		if end.Status == Trained && end.Reason == "" {
			end.Reason = e.state.Reason // stays visible: settled incomplete
		}
		a.close(e, end)
	}
	if wasReady {
		a.ready = slices.DeleteFunc(a.ready, func(e *entry) bool { return seen[e.group.ID] })
	}
	return nil
}

// close ends a live group; the caller takes it out of ready.
func (a *Assembler) close(e *entry, s State) GroupState {
	rows := len(e.group.Rollouts)
	switch e.state.Status {
	case Open:
		a.depth.GroupsOpen--
		a.depth.GroupsComplete++ // leave counts it out again
		a.leave(e)
	case Ready:
		a.leave(e)
	}
	e.state = s
	if s.Status == Trained && e.body != nil {
		e.body.trained()
	}
	delete(a.live, e.group.ID)
	a.closed.add(name(e.group.ID), closed{step: s.Step, rows: int32(rows), reason: a.reason(s.Reason), status: s.Status})
	if s.Status == Trained {
		a.counters.GroupsTrained++
		a.counters.RolloutsTrained += int64(rows)
	} else {
		a.counters.GroupsDropped[s.Reason]++
		a.counters.RolloutsDropped[s.Reason] += int64(rows)
	}
	return GroupState{ID: e.group.ID, Rows: rows, State: s}
}

// Expire settles the open groups whose first row came GroupTimeout or longer
// before now: dropped, or made ready as they are, under ReasonGroupTimeout and in
// the order of their first rows. It returns what it settled.
func (a *Assembler) Expire(now time.Time) []GroupState {
	a.changed()
	var settled []GroupState
	kept := a.opened[:0]
	for _, e := range a.opened {
		if e.state.Status != Open {
			continue
		}
		if e.opened.IsZero() {
			e.opened = now
		}
		if a.opts.GroupTimeout <= 0 || now.Sub(e.opened) < a.opts.GroupTimeout {
			kept = append(kept, e)
			continue
		}
		if a.opts.Incomplete == IncompleteTrain {
			e.state.Reason = ReasonGroupTimeout
			a.complete(e)
			a.counters.GroupsIncomplete++
			settled = append(settled, GroupState{ID: e.group.ID, Rows: len(e.group.Rollouts), State: e.state})
		} else {
			settled = append(settled, a.close(e, State{Status: Dropped, Reason: ReasonGroupTimeout}))
		}
	}
	clear(a.opened[len(kept):])
	a.opened = kept
	return settled
}

// sweep forgets groups that are no longer open once they are the greater part of the list.
func (a *Assembler) sweep() {
	if len(a.opened) > 2*a.depth.GroupsOpen+64 {
		a.opened = slices.DeleteFunc(a.opened, func(e *entry) bool { return e.state.Status != Open })
	}
}

// NextExpiry is the earliest time at which Expire would settle a group; ok is
// false when no open group has a clock that runs.
func (a *Assembler) NextExpiry() (at time.Time, ok bool) {
	if a.opts.GroupTimeout <= 0 {
		return time.Time{}, false
	}
	for _, e := range a.opened {
		if e.state.Status != Open || e.opened.IsZero() {
			continue
		}
		if t := e.opened.Add(a.opts.GroupTimeout); !ok || t.Before(at) {
			at, ok = t, true
		}
	}
	return at, ok
}

// Group says where a group is.
func (a *Assembler) Group(id string) GroupState {
	if e := a.live[id]; e != nil {
		return GroupState{ID: id, Rows: len(e.group.Rollouts), State: e.state}
	}
	c, ok := a.closed.get(name(id))
	if !ok {
		return GroupState{ID: id}
	}
	return GroupState{ID: id, Rows: int(c.rows), State: State{Status: c.status, Step: c.step, Reason: a.reasons[c.reason]}}
}

// reason is the place of a reason. There are as many as the code names.
func (a *Assembler) reason(s string) uint16 {
	at := slices.Index(a.reasons, s)
	if at < 0 {
		at = len(a.reasons)
		a.reasons = append(a.reasons, s)
	}
	return uint16(at)
}

// Batch says where each group of a batch is, in the order of the batch's rows;
// ok is false for a batch that was never added.
func (a *Assembler) Batch(seq uint64) (groups []GroupState, ok bool) {
	at, ok := slices.BinarySearchFunc(a.batches, seq, func(b batchGroups, seq uint64) int { return cmp.Compare(b.seq, seq) })
	if !ok {
		return nil, false
	}
	for id := range a.batches[at].groups.all {
		groups = append(groups, a.Group(id))
	}
	return groups, true
}

// Live returns the groups that are not closed: open ones by their first rows,
// then complete and taken ones in the order in which they were completed.
func (a *Assembler) Live() []string {
	var ids []string
	for _, e := range a.inOrder() {
		ids = append(ids, e.group.ID)
	}
	return ids
}

// inOrder is the live groups as Live names them.
func (a *Assembler) inOrder() []*entry {
	out := make([]*entry, 0, len(a.live))
	for _, e := range a.opened {
		if e.state.Status == Open {
			out = append(out, e)
		}
	}
	open := len(out)
	for _, e := range a.live {
		if e.state.Status != Open {
			out = append(out, e)
		}
	}
	slices.SortFunc(out[open:], func(x, y *entry) int { return cmp.Compare(x.order, y.order) })
	return out
}

// Depth is what waits in the queue now.
func (a *Assembler) Depth() Depth { return a.depth }

// Counters returns a copy of the counters.
func (a *Assembler) Counters() Counters {
	c := a.counters
	c.GroupsDropped, c.RolloutsDropped = maps.Clone(c.GroupsDropped), maps.Clone(c.RolloutsDropped)
	return c
}

func (a *Assembler) changed() {
	a.version++
	a.planned = nil
}

func name(s string) digest {
	sum := sha256.Sum256([]byte(s))
	return digest(sum[:16])
}

// closedRow is the refusal of a row for a group that takes no more.
func closedRow(row int, id, why string) error {
	return &fault.Error{Kind: fault.Conflict, Code: "group_closed", Fields: []fault.Field{{
		Name: "group_id", Row: row, Got: fmt.Sprintf("%q, which is %s", id, why), Expected: "an open or a new group"}}}
}

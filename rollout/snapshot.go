package rollout

import (
	"fmt"
	"maps"
	"slices"

	"trainerd/internal/checked"
	"trainerd/internal/fault"
)

// Snapshot is an assembler's state at one moment. Groups that are taken count
// as ready in it: the owner's own log says which steps were done with them.
type Snapshot struct {
	live     []entry // open ones by their first rows, then ready ones by order
	closed   records[closed]
	seen     records[digest]
	batches  []batchGroups
	reasons  []string
	last     uint64
	order    uint64
	counters Counters
}

// Snapshot copies the state in time that grows with the live groups only. What
// it returns may be encoded while the assembler goes on.
func (a *Assembler) Snapshot() *Snapshot {
	s := &Snapshot{closed: a.closed.records, seen: a.seen.records, batches: a.batches, reasons: a.reasons, last: a.last, order: a.order, counters: a.Counters()}
	for _, e := range a.inOrder() {
		if e.body != nil {
			e.body.read = true
		}
		c := *e
		c.names = slices.Clone(e.names)
		if c.state.Status == Taken {
			c.state.Status = Ready
			if c.admitted {
				s.counters.StaleAdmitted--
			}
		}
		s.live = append(s.live, c)
	}
	return s
}

// A snapshot on disk, in the terms of package checked:
//
//	version u32
//	last u64  order u64
//	counters: 10 i64 in the order of their fields; groups dropped, rollouts dropped: list of reason string, count i64
//	reasons: list of string
//	closed groups: list of name[16] step i64 rows u32 reason u32 status u8
//	rollout ids: list of name[16] content[16]
//	batches: list of seq u64, list of string
//	live groups: list of
//	  id string  prompt i32s  status u8  reason string  order u64  first batch u64, row u64  last batch u64, row u64  opened time
//	  names of components: one list of string, of an open group one for each row
//	  rows: list of id string  completion i32s  reward f64  components bool f64s  sampler_logprobs f32s
//	        loss_mask: length, a byte each  loss_weights f32s  policy_step i64  truncated bool
const snapshotVersion = 1

// Put writes the snapshot as a part of a file.
func (s *Snapshot) Put(e *checked.Writer) {
	e.Uint32(snapshotVersion)
	e.Uint64(s.last)
	e.Uint64(s.order)
	for _, n := range s.counters.totals() {
		e.Int64(*n)
	}
	for _, m := range []map[string]int64{s.counters.GroupsDropped, s.counters.RolloutsDropped} {
		e.Len(len(m))
		for _, reason := range slices.Sorted(maps.Keys(m)) {
			e.String(reason)
			e.Int64(m[reason])
		}
	}
	texts(e, s.reasons)
	e.Len(s.closed.n)
	for i := range s.closed.n {
		c := s.closed.at(i)
		e.Raw(c.name[:])
		e.Int64(c.value.step)
		e.Uint32(uint32(c.value.rows))
		e.Uint32(uint32(c.value.reason))
		e.Uint8(uint8(c.value.status))
	}
	e.Len(s.seen.n)
	for i := range s.seen.n {
		r := s.seen.at(i)
		e.Raw(r.name[:])
		e.Raw(r.value[:])
	}
	e.Len(len(s.batches))
	for i := range s.batches {
		e.Uint64(s.batches[i].seq)
		g := s.batches[i].groups
		e.Len(g.len())
		for id := range g.all {
			e.String(id)
		}
	}
	e.Len(len(s.live))
	for i := range s.live {
		s.live[i].encode(e)
	}
}

// totals are the counters that are one number, in the order in which they are stored.
func (c *Counters) totals() []*int64 {
	return []*int64{&c.Batches, &c.Rollouts, &c.Duplicates, &c.MissingPolicyStep, &c.GroupsCompleted, &c.GroupsIncomplete, &c.GroupsTrained, &c.RolloutsTrained,
		&c.StaleAdmitted, &c.StaleDelayed}
}

func texts(e *checked.Writer, list []string) {
	e.Len(len(list))
	for _, s := range list {
		e.String(s)
	}
}

func readTexts(d *checked.Reader) []string { return checked.List(d, d.Len(), d.String) }

func (x *entry) encode(e *checked.Writer) {
	e.String(x.group.ID)
	e.Int32s(x.group.Prompt)
	e.Uint8(uint8(x.state.Status))
	e.String(x.state.Reason)
	e.Uint64(x.order)
	for _, p := range []Position{x.first, x.group.Position} {
		e.Uint64(p.Batch)
		e.Uint64(uint64(p.Row))
	}
	e.Time(x.opened)
	if x.state.Status == Open {
		e.Len(len(x.names))
		for _, names := range x.names {
			texts(e, names)
		}
	} else {
		texts(e, x.group.Components)
	}
	e.Len(len(x.group.Rollouts))
	for i := range x.group.Rollouts {
		r := &x.group.Rollouts[i]
		e.String(r.ID)
		e.Int32s(r.Completion)
		e.Float64(r.Reward)
		e.Bool(r.Components != nil)
		e.Float64s(r.Components)
		e.Float32s(r.SamplerLogProbs)
		e.Len(len(r.LossMask))
		for _, m := range r.LossMask {
			e.Bool(m)
		}
		e.Float32s(r.LossWeights)
		e.Int64(r.PolicyStep)
		e.Bool(r.Truncated)
	}
}

// TakeSnapshot reads what Put wrote. It is worth nothing unless the reader's Close says so.
func TakeSnapshot(d *checked.Reader) *Snapshot {
	if v := d.Uint32(); v != snapshotVersion {
		d.Fail("a queue of version %d, expected %d", v, snapshotVersion)
	}
	s := &Snapshot{last: d.Uint64(), order: d.Uint64()}
	for _, n := range s.counters.totals() {
		*n = d.Int64()
	}
	for _, m := range []*map[string]int64{&s.counters.GroupsDropped, &s.counters.RolloutsDropped} {
		*m = map[string]int64{}
		for range d.Len() {
			reason := d.String()
			n := d.Int64()
			if d.Err() != nil {
				break
			}
			(*m)[reason] = n
		}
	}
	s.reasons = readTexts(d)
	checked.Each(d, d.Len(), func() {
		var c record[closed]
		d.Raw(c.name[:])
		c.value.step = d.Int64()
		c.value.rows = int32(d.Uint32())
		reason := d.Uint32()
		c.value.status = Status(d.Uint8())
		if int64(reason) >= int64(len(s.reasons)) || reason > 1<<16-1 || c.value.status != Trained && c.value.status != Dropped || c.value.rows < 0 {
			d.Fail("a closed group of status %d, reason %d, %d rows", c.value.status, reason, c.value.rows)
		}
		c.value.reason = uint16(reason)
		s.closed.add(c)
	})
	checked.Each(d, d.Len(), func() {
		var r record[digest]
		d.Raw(r.name[:])
		d.Raw(r.value[:])
		s.seen.add(r)
	})
	s.batches = checked.List(d, d.Len(), func() batchGroups { return batchGroups{seq: d.Uint64(), groups: makeNames(readTexts(d))} })
	s.live = checked.List(d, d.Len(), func() entry { return decodeEntry(d) })
	return s
}

func decodeEntry(d *checked.Reader) (x entry) {
	x.group.ID, x.group.Prompt = d.String(), d.Int32s()
	x.state.Status, x.state.Reason = Status(d.Uint8()), d.String()
	x.order = d.Uint64()
	for _, p := range []*Position{&x.first, &x.group.Position} {
		p.Batch, p.Row = d.Uint64(), int(int64(d.Uint64()))
	}
	x.opened = d.Time()
	switch x.state.Status {
	case Open:
		x.names = checked.List(d, d.Len(), func() []string { return readTexts(d) })
	case Ready:
		x.group.Components = readTexts(d)
	default:
		d.Fail("a live group of status %d", x.state.Status)
	}
	rows := d.Len()
	at := 0
	x.group.Rollouts = checked.List(d, rows, func() Rollout {
		r := Rollout{GroupID: x.group.ID, Prompt: x.group.Prompt, ID: d.String(), Completion: d.Int32s(), Reward: d.Float64()}
		composed := d.Bool()
		r.Components = d.Float64s()
		if composed && r.Components == nil {
			r.Components = []float64{}
		}
		r.SamplerLogProbs = d.Float32s()
		r.LossMask = checked.List(d, d.Len(), d.Bool)
		r.LossWeights = d.Float32s()
		r.PolicyStep, r.Truncated = d.Int64(), d.Bool()
		names := x.group.Components
		if x.state.Status == Open && at < len(x.names) {
			names = x.names[at]
		}
		at++
		n := len(r.Completion)
		fits := func(k int) bool { return k == 0 || k == n }
		if n == 0 || !fits(len(r.SamplerLogProbs)) || !fits(len(r.LossMask)) || !fits(len(r.LossWeights)) || composed && len(r.Components) != len(names) || !composed && len(r.Components) > 0 {
			d.Fail("row %d of group %q has lists of other lengths than its completion", at-1, x.group.ID)
		}
		return r
	})
	if len(x.group.Rollouts) == 0 || x.state.Status == Open && len(x.names) != len(x.group.Rollouts) {
		d.Fail("group %q with %d rows and %d lists of names", x.group.ID, len(x.group.Rollouts), len(x.names))
	}
	return x
}

// RestoreAssembler returns an assembler in the state of a snapshot, which must
// be of one with the same options.
func RestoreAssembler(o AssemblerOptions, s *Snapshot) (*Assembler, error) {
	a := NewAssembler(o)
	bad := func(format string, args ...any) (*Assembler, error) {
		return nil, fault.New(fault.Internal, "queue_state", "restore the queue: %w", fmt.Errorf(format, args...))
	}
	a.last, a.order, a.counters, a.reasons, a.batches = s.last, s.order, s.counters, s.reasons, s.batches
	for i := range s.batches {
		if seq := s.batches[i].seq; seq > s.last || i > 0 && seq <= s.batches[i-1].seq {
			return bad("batch %d at place %d of %d", seq, i, len(s.batches))
		}
	}
	for i := range s.closed.n {
		if c := s.closed.at(i); !a.closed.add(c.name, c.value) {
			return bad("a closed group is named twice")
		}
	}
	for i := range s.seen.n {
		if r := s.seen.at(i); !a.seen.add(r.name, r.value) {
			return bad("a rollout id is named twice")
		}
	}
	for i := range s.live {
		e := &entry{}
		*e = s.live[i] // on its own, so that it goes when it is closed
		rows := len(e.group.Rollouts)
		if _, ended := a.closed.get(name(e.group.ID)); ended || a.live[e.group.ID] != nil {
			return bad("group %q is named twice", e.group.ID)
		}
		if rows > a.opts.GroupSize || rows == a.opts.GroupSize && e.state.Status == Open || e.group.Position.Batch > s.last || e.first.Batch > s.last {
			return bad("group %q is %v with %d rows of %d, its last of batch %d of %d", e.group.ID, e.state.Status, rows, a.opts.GroupSize, e.group.Position.Batch, s.last)
		}
		a.live[e.group.ID] = e
		a.depth.Rollouts += rows
		a.grow(e, int64(len(e.group.Prompt)), 4*int64(len(e.group.Prompt)))
		for k := range e.group.Rollouts {
			a.grow(e, int64(len(e.group.Rollouts[k].Completion)), e.group.Rollouts[k].payload())
		}
		if e.state.Status == Open {
			a.opened = append(a.opened, e)
			a.depth.GroupsOpen++
			continue
		}
		if n := len(a.ready); e.order >= s.order || n > 0 && a.ready[n-1].order >= e.order {
			return bad("group %q has place %d of %d in the queue", e.group.ID, e.order, s.order)
		}
		a.ready = append(a.ready, e)
		a.depth.GroupsComplete++
	}
	return a, nil
}

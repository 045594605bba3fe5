package rollout

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// pair is a group of two rows of one policy step; half is its first row only.
func pair(id string, step int64) []Rollout {
	return []Rollout{at(row(id, 1), step), at(row(id, 2), step)}
}
func half(id string, step int64) Rollout { return at(row(id, 1), step) }

func TestAdmittedStaleGroupsAreCounted(t *testing.T) {
	a := NewAssembler(AssemblerOptions{GroupSize: 2, MaxPolicyLag: 2, Stale: StaleAdmit})
	a.Add(1, batch(append(pair("old", 0), pair("new", 5)...)...))
	taken, stale := a.Take(2, 6)
	if d := cmp.Diff([]string{"old", "new"}, ids(taken)); d != "" || stale != nil {
		t.Fatalf("%s; stale %v", d, stale)
	}
	if c := a.Counters(); c.StaleAdmitted != 1 || len(c.GroupsDropped) != 0 {
		t.Errorf("%+v", c)
	}
}

// TestDelay walks a group through the time in which steps wait for it.
func TestDelay(t *testing.T) {
	a := NewAssembler(AssemblerOptions{GroupSize: 2, MaxPolicyLag: 2, Stale: StaleDelay, GroupTimeout: time.Minute})
	late := batch(half("late", 3), half("gone", 1), half("fresh", 5))
	late.Received = time.Unix(1000, 0)
	a.Add(1, late)
	a.Add(2, batch(append(pair("a", 5), pair("b", 5)...)...))
	for step, want := range map[int64][]string{
		3: {"gone"}, // at 4 it would lag by 3
		4: nil,      // it is too late for gone, and late may still wait
		5: {"late"},
		6: nil, // nobody waited
		7: {"fresh"},
	} {
		if d := cmp.Diff(want, a.Awaited(step)); d != "" {
			t.Errorf("awaited at step %d:\n%s", step, d)
		}
	}
	// Complete, it goes before older groups that can wait, in the order of the queue.
	a.Add(3, batch(at(row("late", 2), 3)))
	if got := a.Awaited(5); got != nil {
		t.Errorf("awaited when complete: %v", got)
	}
	taken, stale := a.Take(2, 5)
	if d := cmp.Diff([]string{"a", "late"}, ids(taken)); d != "" || stale != nil {
		t.Errorf("taken:\n%s; stale %v", d, stale)
	}
	// The clock ends the wait for the others.
	if settled := a.Expire(time.Unix(1060, 0)); len(settled) != 2 || a.Awaited(7) != nil {
		t.Errorf("settled %v, then awaited %v", settled, a.Awaited(7))
	}
	// All that is urgent and does not fit is rejected by the next take.
	a.Add(4, batch(append(append(pair("c", 3), pair("d", 3)...), pair("e", 6)...)...))
	taken, _ = a.Take(1, 5)
	if d := cmp.Diff([]string{"c"}, ids(taken)); d != "" {
		t.Error(d)
	}
	taken, stale = a.Take(2, 6)
	if d := cmp.Diff([]string{"b", "e"}, ids(taken)); d != "" || len(stale) != 1 || stale[0].ID != "d" {
		t.Errorf("%s; stale %v", d, stale)
	}
}

// TestIterationsCountForTheLag: groups of three steps are late for the take after them.
func TestIterationsCountForTheLag(t *testing.T) {
	a := NewAssembler(AssemblerOptions{GroupSize: 2, MaxPolicyLag: 3, Stale: StaleDelay, Steps: 3, GroupTimeout: time.Minute})
	a.Add(1, batch(half("x", 5)))
	if d := cmp.Diff([]string{"x"}, a.Awaited(6)); d != "" {
		t.Error(d)
	}
	if got := a.Awaited(5); got != nil {
		t.Errorf("awaited %v with room for three steps", got)
	}
}

// TestStaleIsReplayed holds, for random arrivals, that the takes that succeeded
// give the same groups when only they are repeated, at the same places of the
// log: what a restart does. Takes that failed leave no record.
func TestStaleIsReplayed(t *testing.T) {
	for seed := range uint64(300) {
		r := rand.New(rand.NewPCG(seed, 23))
		o := AssemblerOptions{GroupSize: 2, MaxPolicyLag: int64(r.IntN(3)), Stale: []string{StaleReject, StaleDelay, StaleAdmit}[r.IntN(3)],
			Steps: 1 + r.Int64N(2), GroupTimeout: 20, Incomplete: IncompleteTrain}
		live, again := NewAssembler(o), NewAssembler(o)
		type event struct {
			batch *Batch
			seq   uint64
			now   time.Time // of an expiry
			taken []string  // of a take, at step
			step  int64
			n     int
		}
		var log []event
		step := int64(0)
		for i := range 60 {
			switch r.IntN(4) {
			case 0, 1:
				b := batch()
				for k := range 1 + r.IntN(4) {
					b.Rollouts = append(b.Rollouts, at(row(fmt.Sprint("g", i/3+r.IntN(3)), int32(10*i+k)), max(0, step-r.Int64N(4))))
				}
				b.Received = time.Unix(0, int64(i))
				if live.Check(b) != nil {
					continue
				}
				if _, err := live.Add(uint64(i+1), clone(b)); err != nil {
					t.Fatal(err)
				}
				log = append(log, event{batch: b, seq: uint64(i + 1)})
			case 2:
				now := time.Unix(0, int64(i))
				live.Expire(now)
				log = append(log, event{now: now})
			case 3:
				n := 1 + r.IntN(3)
				if live.Awaited(step) != nil && r.IntN(2) == 0 { // whether a step is put off is not in the log
					continue
				}
				taken, _ := live.Take(n, step)
				if taken == nil {
					continue
				}
				log = append(log, event{taken: ids(taken), step: step, n: n})
				step += o.Steps
				if err := live.Mark(ids(taken), State{Status: Trained, Step: step}); err != nil {
					t.Fatal(err)
				}
			}
		}
		for _, e := range log {
			switch {
			case e.batch != nil:
				if _, err := again.Add(e.seq, e.batch); err != nil {
					t.Fatalf("seed %d: %v", seed, err)
				}
			case e.taken != nil:
				taken, _ := again.Take(e.n, e.step)
				if d := cmp.Diff(e.taken, ids(taken)); d != "" {
					t.Fatalf("seed %d, %s, step %d (-live +again):\n%s", seed, o.Stale, e.step, d)
				}
				if err := again.Mark(ids(taken), State{Status: Trained, Step: e.step + o.Steps}); err != nil {
					t.Fatal(err)
				}
			default:
				again.Expire(e.now)
			}
		}
		// One more take settles what a failed one had dropped.
		live.Take(1<<20, step)
		again.Take(1<<20, step)
		if d := cmp.Diff(live.Counters(), again.Counters()); d != "" {
			t.Fatalf("seed %d, %s (-live +again):\n%s", seed, o.Stale, d)
		}
		if d := cmp.Diff(live.Depth(), again.Depth()); d != "" {
			t.Fatalf("seed %d, %s (-live +again):\n%s", seed, o.Stale, d)
		}
	}
}

func clone(b *Batch) *Batch {
	c := *b
	c.Rollouts = append([]Rollout(nil), b.Rollouts...)
	return &c
}

package rollout

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
)

// lent is a batch's body as its owner sees it.
type lent struct {
	tokens []int32
	freed  int
}

// lendBatch is a batch of groups of two rows whose completions lie in one body,
// each a number of its own. When the body is freed it is overwritten at once.
func lendBatch(first int32, ids ...string) (*Batch, *lent) {
	l := &lent{}
	for i := range 2 * len(ids) {
		l.tokens = append(l.tokens, first+int32(i))
	}
	b := &Batch{Shared: true, HasReward: true}
	for i := range l.tokens {
		b.Rollouts = append(b.Rollouts, Rollout{GroupID: ids[i/2], Prompt: []int32{1}, Completion: l.tokens[i : i+1 : i+1], Reward: float64(l.tokens[i]), PolicyStep: NoPolicyStep})
	}
	b.Free = func() {
		l.freed++
		for i := range l.tokens {
			l.tokens[i] = -1
		}
	}
	return b, l
}

// What becomes of a body on each way of its groups.
func TestBodiesAreFreed(t *testing.T) {
	trained := State{Status: Trained, Step: 1}
	for _, c := range []struct {
		name string
		ids  []string
		then func(a *Assembler)
		want int
	}{
		{"queued", []string{"a", "b"}, func(a *Assembler) {}, 0},
		{"taken", []string{"a", "b"}, func(a *Assembler) { a.Take(2, 0) }, 0},
		{"one trained", []string{"a", "b"}, func(a *Assembler) { a.Take(2, 0); a.Mark([]string{"a"}, trained) }, 0},
		{"trained", []string{"a", "b"}, func(a *Assembler) { a.Take(2, 0); a.Mark([]string{"a", "b"}, trained) }, 1},
		{"trained one by one", []string{"a", "b"}, func(a *Assembler) {
			for range 2 {
				groups, _ := a.Take(1, 0)
				a.Mark([]string{groups[0].ID}, trained)
			}
		}, 1},
		{"trained when they came back", []string{"a", "b"}, func(a *Assembler) {
			groups, _ := a.Take(2, 0)
			a.Requeue(groups)
			a.Take(2, 0)
			a.Mark([]string{"a", "b"}, trained)
		}, 1},
		{"one dropped", []string{"a", "b"}, func(a *Assembler) {
			a.Take(2, 0)
			a.Mark([]string{"a"}, trained)
			a.Mark([]string{"b"}, State{Status: Dropped, Reason: "cancelled"})
		}, 0},
		{"in a snapshot", []string{"a", "b"}, func(a *Assembler) { a.Snapshot(); a.Take(2, 0); a.Mark([]string{"a", "b"}, trained) }, 0},
		{"half in a snapshot", []string{"a", "b"}, func(a *Assembler) {
			a.Take(1, 0)
			a.Mark([]string{"a"}, trained)
			a.Snapshot()
			a.Take(1, 0)
			a.Mark([]string{"b"}, trained)
		}, 0},
		{"no rows left in it", []string{"a", "open"}, func(a *Assembler) {}, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			a := NewAssembler(AssemblerOptions{GroupSize: 2, MaxPolicyLag: -1})
			b, l := lendBatch(10, c.ids...)
			if slices.Contains(c.ids, "open") {
				b.Rollouts = b.Rollouts[:3]
			}
			if _, err := a.Add(1, b); err != nil {
				t.Fatal(err)
			}
			c.then(a)
			if l.freed != c.want {
				t.Fatalf("freed %d times, expected %d", l.freed, c.want)
			}
		})
	}
}

// TestFreedBodiesAreNotRead: whatever the order of calls, a body is overwritten
// only when no queued row, no row of a group that is handed out and no row of a
// snapshot lies in it.
func TestFreedBodiesAreNotRead(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	freed := 0
	for range 50 {
		a := NewAssembler(AssemblerOptions{GroupSize: 2, MaxPolicyLag: -1, Incomplete: IncompleteTrain})
		var bodies []*lent
		var snapshots []*Snapshot
		taken := map[string]Group{}
		open := ""
		whole := func(where string, rows []Rollout) {
			for _, r := range rows {
				if float64(r.Completion[0]) != r.Reward {
					t.Fatalf("%s: a row of group %s reads %d, expected %g", where, r.GroupID, r.Completion[0], r.Reward)
				}
			}
		}
		for i := range 60 {
			switch rng.IntN(7) {
			case 0, 1:
				ids := []string{fmt.Sprintf("a%d", i), fmt.Sprintf("b%d", i), fmt.Sprintf("c%d", i)}[:1+rng.IntN(3)]
				b, l := lendBatch(int32(100*i), ids...)
				switch {
				case open != "" && rng.IntN(2) == 0: // a row that a group waits for
					b.Rollouts = append(b.Rollouts, Rollout{GroupID: open, Prompt: []int32{1}, Completion: []int32{7}, Reward: 7, PolicyStep: NoPolicyStep})
					open = ""
				case open == "" && rng.IntN(3) == 0:
					b.Rollouts = b.Rollouts[:len(b.Rollouts)-1]
					open = ids[len(ids)-1]
				}
				if _, err := a.Add(uint64(i+1), b); err != nil {
					t.Fatal(err)
				}
				bodies = append(bodies, l)
			case 2, 3:
				if n := a.Ready(); n > 0 {
					groups, _ := a.Take(1+rng.IntN(n), 0)
					for _, g := range groups {
						taken[g.ID] = g
					}
				}
			case 4, 5:
				state := State{Status: Trained, Step: int64(i)}
				if rng.IntN(8) == 0 {
					state = State{Status: Dropped, Reason: "test"}
				}
				for id, g := range taken {
					delete(taken, id)
					if rng.IntN(4) == 0 {
						a.Requeue([]Group{g})
					} else if err := a.Mark([]string{id}, state); err != nil {
						t.Fatal(err)
					}
				}
			case 6:
				if rng.IntN(3) == 0 {
					snapshots = append(snapshots, a.Snapshot())
				}
			}
			for id, e := range a.live {
				whole("queued "+id, e.group.Rollouts)
			}
			for id, g := range taken {
				whole("taken "+id, g.Rollouts)
			}
			for _, s := range snapshots {
				for _, e := range s.live {
					whole("in a snapshot", e.group.Rollouts)
				}
			}
		}
		for _, l := range bodies {
			if l.freed > 1 {
				t.Fatalf("a body was freed %d times", l.freed)
			}
			freed += l.freed
		}
	}
	if freed == 0 {
		t.Fatal("no body was freed")
	}
}

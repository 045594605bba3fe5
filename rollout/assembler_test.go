package rollout

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"trainerd/internal/fault"
)

var prompts = map[string][]int32{"a": {1, 2}, "b": {3}, "c": {4, 5, 6}}

// row is a rollout of group g with its usual prompt.
func row(g string, completion ...int32) Rollout {
	return Rollout{GroupID: g, Prompt: slices.Clone(prompts[g[:1]]), Completion: completion, PolicyStep: NoPolicyStep}
}

func named(r Rollout, id string) Rollout { r.ID = id; return r }
func at(r Rollout, step int64) Rollout   { r.PolicyStep = step; return r }

func batch(rows ...Rollout) *Batch { return &Batch{Rollouts: rows, HasReward: true} }

func mustAdd(t *testing.T, a *Assembler, seq uint64, rows ...Rollout) AddResult {
	t.Helper()
	res, err := a.Add(seq, batch(rows...))
	if err != nil {
		t.Fatal(err)
	}
	return res
}

func ids(groups []Group) []string {
	out := []string{}
	for _, g := range groups {
		out = append(out, g.ID)
	}
	return out
}

func TestGroupsCompleteAcrossBatchesInLogOrder(t *testing.T) {
	a := NewAssembler(AssemblerOptions{GroupSize: 2, MaxPolicyLag: -1})
	if got := mustAdd(t, a, 1, row("a", 1), row("b", 2), row("c", 3)); got != (AddResult{Rows: 3, GroupsOpen: 3}) {
		t.Fatal(got)
	}
	if got := mustAdd(t, a, 4, row("c", 4), row("a", 5)); got != (AddResult{Rows: 2, GroupsCompleted: 2}) {
		t.Fatal(got)
	}
	mustAdd(t, a, 5, row("b", 6))
	if diff := cmp.Diff(Depth{Rollouts: 6, Tokens: 6 + 6, Bytes: 4 * 12, GroupsComplete: 3}, a.Depth()); diff != "" {
		t.Fatal(diff)
	}
	got, _ := a.Take(3, 0)
	if diff := cmp.Diff([]string{"c", "a", "b"}, ids(got)); diff != "" {
		t.Fatal(diff)
	}
	want := Group{ID: "c", Prompt: []int32{4, 5, 6}, Rollouts: []Rollout{row("c", 3), row("c", 4)}, Position: Position{4, 0}}
	if diff := cmp.Diff(want, got[0], cmpopts.EquateEmpty()); diff != "" {
		t.Fatal(diff)
	}
	if &got[0].Rollouts[0].Prompt[0] != &got[0].Prompt[0] || &got[0].Rollouts[1].Prompt[0] != &got[0].Prompt[0] {
		t.Fatal("rows of a group hold several copies of the prompt")
	}
	if a.Depth() != (Depth{}) {
		t.Fatal("taken groups are still queued", a.Depth())
	}
}

// Rows that wait for their group, and those that are all that is new in a body,
// do not keep the body that they came in.
func TestWaitingRowsKeepNoBody(t *testing.T) {
	for _, c := range []struct {
		name   string
		shared bool
		rows   []Rollout
		inBody bool
	}{
		{"whole groups", true, []Rollout{row("a", 1, 2), row("a", 3), row("b", 4), row("b", 5)}, true},
		{"a row that waits", true, []Rollout{row("a", 1, 2), row("a", 3), row("b", 4)}, false},
		{"a row that came before", true, []Rollout{named(row("c", 7), "r"), row("a", 1, 2), row("a", 3)}, false},
		{"the same, in memory of its own", false, []Rollout{row("a", 1, 2), row("b", 4)}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			a := NewAssembler(AssemblerOptions{GroupSize: 2, MaxPolicyLag: -1})
			mustAdd(t, a, 1, named(row("c", 7), "r"))
			for i := range c.rows {
				if c.rows[i].ID == "" {
					c.rows[i].SamplerLogProbs = make([]float32, len(c.rows[i].Completion))
				}
			}
			b := batch(c.rows...)
			b.Shared = c.shared
			if _, err := a.Add(3, b); err != nil {
				t.Fatal(err)
			}
			seen := 0
			for i := range b.Rollouts {
				r := &b.Rollouts[i]
				e := a.live[r.GroupID]
				for k := range e.group.Rollouts {
					got := &e.group.Rollouts[k]
					if !slices.Equal(got.Completion, r.Completion) {
						continue
					}
					same := &got.Completion[0] == &r.Completion[0]
					if len(r.SamplerLogProbs) > 0 && len(got.SamplerLogProbs) > 0 {
						same = same && &got.SamplerLogProbs[0] == &r.SamplerLogProbs[0]
					}
					if r.ID == "" && same != c.inBody {
						t.Errorf("row %d lies in the body: %v, expected %v", i, same, c.inBody)
					}
					seen++
				}
			}
			if seen != len(c.rows) {
				t.Errorf("%d of %d rows found", seen, len(c.rows))
			}
		})
	}
}

func TestCheckRefuses(t *testing.T) {
	long := Rollout{GroupID: "a", Prompt: []int32{1, 2, 3}, Completion: []int32{1}}
	for _, c := range []struct {
		name    string
		options AssemblerOptions
		batch   *Batch
		kind    fault.Kind
		code    string
		column  string
		row     int
		text    string
	}{
		{"unequal prompts in the batch", AssemblerOptions{}, batch(row("b", 1), row("c", 1), long, row("a", 2)), fault.Invalid, "unequal_prompts", "prompt_tokens", 3, "row 2"},
		{"unequal prompts with an earlier batch", AssemblerOptions{}, batch(row("b", 1), Rollout{GroupID: "open", Prompt: []int32{9, 9}, Completion: []int32{1}}), fault.Invalid, "unequal_prompts", "prompt_tokens", 1, "differ at 1 (9, not 8)"},
		{"row for a ready group", AssemblerOptions{}, batch(row("b", 1), row("a-ready", 1)), fault.Conflict, "group_closed", "group_id", 1, "complete"},
		{"row for a trained group", AssemblerOptions{}, batch(row("a-trained", 1)), fault.Conflict, "group_closed", "group_id", 0, "trained"},
		{"row for a dropped group", AssemblerOptions{}, batch(row("a-dropped", 1)), fault.Conflict, "group_closed", "group_id", 0, "dropped"},
		{"one row too many in the batch", AssemblerOptions{}, batch(row("b", 1), row("b", 2), row("b", 3)), fault.Conflict, "group_closed", "group_id", 2, "complete with 2 rows"},
		{"one row too many over batches", AssemblerOptions{}, batch(Rollout{GroupID: "open", Prompt: []int32{9, 8}, Completion: []int32{1}}, Rollout{GroupID: "open", Prompt: []int32{9, 8}, Completion: []int32{2}}), fault.Conflict, "group_closed", "group_id", 1, "complete"},
		{"id with another completion", AssemblerOptions{}, batch(named(row("b", 7), "known")), fault.Conflict, "rollout_id_reused", "rollout_id", 0, "known"},
		{"id with another group", AssemblerOptions{}, batch(row("b", 7), named(row("b", 1), "known")), fault.Conflict, "rollout_id_reused", "rollout_id", 1, "known"},
		{"id twice in the batch, other content", AssemblerOptions{}, batch(named(row("b", 1), "x"), named(row("b", 2), "x")), fault.Conflict, "rollout_id_reused", "rollout_id", 1, "x"},
		{"policy step required", AssemblerOptions{RequirePolicyStep: true}, batch(at(row("b", 1), 0), row("b", 2)), fault.Invalid, "invalid_row", "policy_step", 1, "none"},
		{"cross entropy has groups of one", AssemblerOptions{Objective: CrossEntropy}, batch(row("b", 1), row("b", 2)), fault.Conflict, "group_closed", "group_id", 1, "complete with 1 rows"},
		{"empty", AssemblerOptions{}, batch(), fault.Invalid, "empty_batch", "", -1, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.options.GroupSize, c.options.MaxPolicyLag = 2, -1
			a := NewAssembler(c.options)
			if c.options == (AssemblerOptions{GroupSize: 2, MaxPolicyLag: -1}) {
				mustAdd(t, a, 1, row("a-trained", 1), row("a-trained", 2), row("a-dropped", 1), named(row("c", 1), "known"),
					Rollout{GroupID: "open", Prompt: []int32{9, 8}, Completion: []int32{1}})
				taken, _ := a.Take(1, 0)
				if err := errors.Join(a.Mark(ids(taken), State{Status: Trained}), a.Mark([]string{"a-dropped"}, State{Status: Dropped, Reason: "test"})); err != nil {
					t.Fatal(err)
				}
				mustAdd(t, a, 2, row("a-ready", 1), row("a-ready", 2))
			}
			before := fmt.Sprintf("%+v", dump(a))
			err := a.Check(c.batch)
			_, addErr := a.Add(9, c.batch)
			f, ok := fault.As(err)
			if !ok || f.Kind != c.kind || f.Code != c.code || !strings.Contains(err.Error(), c.text) || fmt.Sprint(addErr) != fmt.Sprint(err) {
				t.Fatalf("check: %v\nadd:   %v", err, addErr)
			}
			if c.column != "" && (f.Fields[0].Name != c.column || f.Fields[0].Row != c.row) {
				t.Fatalf("names %+v, want column %s of row %d", f.Fields[0], c.column, c.row)
			}
			if after := fmt.Sprintf("%+v", dump(a)); after != before {
				t.Fatalf("state changed:\n%s\n%s", before, after)
			}
		})
	}
}

// listed are a ledger's records, each of which has to be found by its name.
func listed[T comparable](l *ledger[T]) []record[T] {
	var out []record[T]
	for i := range l.records.n {
		r := *l.records.at(i)
		if v, ok := l.get(r.name); !ok || v != r.value {
			panic(fmt.Sprintf("record %d is found as %v, %v", i, v, ok))
		}
		out = append(out, r)
	}
	return out
}

// dump is everything that two assemblers in the same state share.
func dump(a *Assembler) any {
	groups := map[string]string{}
	for id, e := range a.live {
		groups[id] = fmt.Sprintf("%+v %v %v %v", e.group, e.state, e.order, e.names)
	}
	var ready []string
	for _, e := range a.ready {
		ready = append(ready, e.group.ID)
	}
	return []any{groups, ready, listed(&a.closed), a.reasons, listed(&a.seen), a.batches, a.last, a.order, a.depth, a.counters}
}

func TestDuplicatesAreIgnoredForLife(t *testing.T) {
	a := NewAssembler(AssemblerOptions{GroupSize: 2, MaxPolicyLag: -1})
	first, second := named(row("a", 1), "r1"), named(row("a", 2), "r2")
	if got := mustAdd(t, a, 1, first, first); got != (AddResult{Rows: 1, Duplicates: 1, GroupsOpen: 1}) {
		t.Fatal(got)
	}
	if got := mustAdd(t, a, 2, first, second, second); got != (AddResult{Rows: 1, Duplicates: 2, GroupsCompleted: 1}) {
		t.Fatal(got)
	}
	taken, _ := a.Take(1, 0)
	if err := a.Mark(ids(taken), State{Status: Trained, Step: 1}); err != nil {
		t.Fatal(err)
	}
	if got := mustAdd(t, a, 3, first, second); got != (AddResult{Duplicates: 2}) {
		t.Fatal("a late retry of a trained group", got)
	}
	if got := a.Counters(); got.Duplicates != 5 || got.Rollouts != 2 {
		t.Fatal(got)
	}
	// Values at masked positions are undefined, so they do not make another content.
	masked := named(row("b", 1, 2), "m")
	masked.LossMask, masked.SamplerLogProbs = []bool{true, false}, []float32{-1, 0}
	again := masked
	again.SamplerLogProbs = []float32{-1, -7}
	if got := mustAdd(t, a, 4, masked, again); got.Duplicates != 1 {
		t.Fatal(got)
	}
	again.SamplerLogProbs = []float32{-2, -7}
	if err := a.Check(batch(again)); fault.KindOf(err) != fault.Conflict {
		t.Fatal("another log-prob passed as the same content", err)
	}
}

func TestTakeDropsStaleGroupsAndTakesAllOrNothing(t *testing.T) {
	a := NewAssembler(AssemblerOptions{GroupSize: 2, MaxPolicyLag: 2})
	mustAdd(t, a, 1, at(row("a", 1), 5), at(row("a", 2), 3)) // its oldest row counts
	mustAdd(t, a, 2, at(row("b", 1), 4), row("b", 2))
	mustAdd(t, a, 3, row("c", 1), row("c", 2))
	taken, stale := a.Take(3, 6)
	want := []GroupState{{ID: "a", Rows: 2, State: State{Status: Dropped, Reason: ReasonPolicyLag}}}
	if diff := cmp.Diff(want, stale); diff != "" || taken != nil || a.Ready() != 2 {
		t.Fatal(diff, taken, a.Ready())
	}
	taken, stale = a.Take(2, 6)
	if diff := cmp.Diff([]string{"b", "c"}, ids(taken)); diff != "" || stale != nil {
		t.Fatal(diff, stale)
	}
	if got := a.Counters(); got.GroupsDropped[ReasonPolicyLag] != 1 || got.RolloutsDropped[ReasonPolicyLag] != 2 || got.MissingPolicyStep != 3 {
		t.Fatal(got)
	}
}

func TestRequeueAndMark(t *testing.T) {
	a := NewAssembler(AssemblerOptions{GroupSize: 1, MaxPolicyLag: -1})
	mustAdd(t, a, 1, row("a", 1), row("b", 1), row("c", 1))
	mustAdd(t, a, 2, row("a2", 1))
	depth := a.Depth()
	taken, _ := a.Take(3, 0)
	slices.Reverse(taken)
	a.Requeue(taken)
	a.Requeue(taken) // they are not taken any more
	if a.Depth() != depth {
		t.Fatal(a.Depth(), depth)
	}
	taken, _ = a.Take(2, 0)
	if diff := cmp.Diff([]string{"a", "b"}, ids(taken)); diff != "" {
		t.Fatal(diff)
	}
	if err := a.Mark([]string{"a", "b", "nobody"}, State{Status: Trained, Step: 7}); err == nil || a.Group("a").State.Status != Taken {
		t.Fatal("an unknown group was marked", err)
	}
	if err := errors.Join(a.Mark([]string{"a", "b"}, State{Status: Trained, Step: 7}), a.Mark([]string{"c"}, State{Status: Dropped, Reason: "cancelled"})); err != nil {
		t.Fatal(err)
	}
	got, ok := a.Batch(1)
	want := []GroupState{
		{ID: "a", Rows: 1, State: State{Status: Trained, Step: 7}}, {ID: "b", Rows: 1, State: State{Status: Trained, Step: 7}},
		{ID: "c", Rows: 1, State: State{Status: Dropped, Reason: "cancelled"}}}
	if diff := cmp.Diff(want, got); diff != "" || !ok {
		t.Fatal(diff, ok)
	}
	if got, _ := a.Batch(2); got[0].State.Status != Ready || a.Ready() != 1 {
		t.Fatal(got, a.Ready())
	}
	if err := a.Mark([]string{"a"}, State{Status: Trained}); err == nil {
		t.Fatal("a closed group was marked again")
	}
	if got := a.Depth(); got.GroupsComplete != 1 || got.Rollouts != 1 {
		t.Fatal(got)
	}
}

func TestExpire(t *testing.T) {
	start := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for _, c := range []struct {
		incomplete string
		want       State
		ready      int
	}{
		{IncompleteDrop, State{Status: Dropped, Reason: ReasonGroupTimeout}, 1},
		{"", State{Status: Dropped, Reason: ReasonGroupTimeout}, 1},
		{IncompleteTrain, State{Status: Ready, Reason: ReasonGroupTimeout}, 2},
	} {
		t.Run(c.incomplete, func(t *testing.T) {
			a := NewAssembler(AssemblerOptions{GroupSize: 2, MaxPolicyLag: -1, Incomplete: c.incomplete, GroupTimeout: time.Minute})
			b := batch(row("a", 1), row("b", 1), row("b", 2))
			b.Received = start
			if _, err := a.Add(1, b); err != nil {
				t.Fatal(err)
			}
			mustAdd(t, a, 2, row("c", 1)) // its clock starts at the next Expire
			if next, ok := a.NextExpiry(); !ok || !next.Equal(start.Add(time.Minute)) {
				t.Fatal(next, ok)
			}
			if got := a.Expire(start.Add(59 * time.Second)); got != nil {
				t.Fatal("settled early", got)
			}
			got := a.Expire(start.Add(60 * time.Second))
			if diff := cmp.Diff([]GroupState{{ID: "a", Rows: 1, State: c.want}}, got); diff != "" || a.Ready() != c.ready {
				t.Fatal(diff, a.Ready())
			}
			if a.Depth().GroupsOpen != 1 {
				t.Fatal(a.Depth())
			}
			if err := a.Check(batch(row("a", 2))); fault.KindOf(err) != fault.Conflict {
				t.Fatal("a settled group took a row", err)
			}
			if c.incomplete != IncompleteTrain {
				return
			}
			taken, _ := a.Take(2, 0)
			if diff := cmp.Diff([]string{"b", "a"}, ids(taken)); diff != "" {
				t.Fatal(diff)
			}
			if err := a.Mark(ids(taken), State{Status: Trained, Step: 3}); err != nil {
				t.Fatal(err)
			}
			if got := a.Group("a").State; got != (State{Status: Trained, Step: 3, Reason: ReasonGroupTimeout}) {
				t.Fatal(got)
			}
		})
	}
}

func TestComponentsOfSeveralBatchesAreUnited(t *testing.T) {
	a := NewAssembler(AssemblerOptions{GroupSize: 3, MaxPolicyLag: -1})
	with := func(values ...float64) Rollout { r := row("a", 1); r.Components = values; return r }
	for i, b := range []*Batch{
		{Rollouts: []Rollout{with(1, 2)}, Components: []string{"format", "penalty"}},
		{Rollouts: []Rollout{with(3)}, Components: []string{"execution"}},
		{Rollouts: []Rollout{row("a", 1)}, HasReward: true},
	} {
		if _, err := a.Add(uint64(i+1), b); err != nil {
			t.Fatal(err)
		}
	}
	g, _ := a.Take(1, 0)
	if diff := cmp.Diff([]string{"execution", "format", "penalty"}, g[0].Components); diff != "" {
		t.Fatal(diff)
	}
	if diff := cmp.Diff([][]float64{{0, 1, 2}, {3, 0, 0}, nil}, [][]float64{g[0].Rollouts[0].Components, g[0].Rollouts[1].Components, g[0].Rollouts[2].Components}); diff != "" {
		t.Fatal(diff)
	}
}

func TestComposeReward(t *testing.T) {
	w := map[string]float64{"format": 1, "penalty": -1, "unused": 9}
	if got := ComposeReward(w, []string{"format", "penalty"}, []float64{1, 0.25}); got != 0.75 {
		t.Fatal(got)
	}
}

func TestCheckPolicySteps(t *testing.T) {
	b := batch(row("a", 1), at(row("a", 1), 3))
	if err := b.CheckPolicySteps(3); err != nil {
		t.Fatal(err)
	}
	if err := b.CheckPolicySteps(2); err == nil || !strings.Contains(err.Error(), "policy_step (row 1)") {
		t.Fatal(err)
	}
}

// A random life, replayed from its record of calls, ends in the same state, and
// at every moment the depth is what the groups say.
func TestReplayGivesTheSameState(t *testing.T) {
	r := seeded(t)
	for range 40 {
		opts := AssemblerOptions{GroupSize: 1 + r.IntN(4), MaxPolicyLag: int64(r.IntN(4)) - 1, GroupTimeout: time.Duration(r.IntN(20)),
			Incomplete: []string{IncompleteDrop, IncompleteTrain}[r.IntN(2)]}
		var calls []func(*Assembler)
		a := NewAssembler(opts)
		do := func(f func(*Assembler)) { f(a); calls = append(calls, f) }
		var taken []Group
		step, seq, now := int64(0), uint64(0), time.Unix(100, 0)
		for range 120 {
			now = now.Add(time.Duration(r.IntN(3)))
			when := now
			switch r.IntN(6) {
			case 0, 1, 2:
				var rows []Rollout
				for range 1 + r.IntN(4) {
					x := at(row(fmt.Sprint([]string{"a", "b", "c"}[r.IntN(3)], r.IntN(30)), r.Int32N(3)), step-int64(r.IntN(3)))
					x.PolicyStep = max(x.PolicyStep, NoPolicyStep)
					if r.IntN(2) == 0 {
						x.ID = fmt.Sprint("id", r.IntN(60))
					}
					rows = append(rows, x)
				}
				seq++
				n, b := seq, Batch{Rollouts: rows, Received: when}
				do(func(a *Assembler) {
					mine := b
					mine.Rollouts = slices.Clone(b.Rollouts)
					checked := a.Check(&mine)
					if _, err := a.Add(n, &mine); (err == nil) != (checked == nil) {
						t.Fatalf("check says %v, add says %v", checked, err)
					}
				})
			case 3:
				do(func(a *Assembler) { a.Expire(when) })
			case 4:
				n, s := 1+r.IntN(3), step
				do(func(a *Assembler) {
					got, _ := a.Take(n, s)
					if a.Ready() > 0 || got != nil {
						taken = append(taken, got...)
					}
				})
			case 5:
				g := taken
				taken = nil
				if r.IntN(3) == 0 {
					do(func(a *Assembler) { a.Requeue(g) })
				} else {
					step++
					s := step
					do(func(a *Assembler) {
						if err := a.Mark(ids(g), State{Status: Trained, Step: s}); err != nil {
							t.Fatal(err)
						}
					})
				}
			}
			var want Depth
			for _, e := range a.live {
				if e.state.Status == Taken {
					continue
				}
				if e.state.Status == Open {
					want.GroupsOpen++
				} else {
					want.GroupsComplete++
				}
				want.Rollouts += len(e.group.Rollouts)
				want.Tokens += int64(len(e.group.Prompt))
				want.Bytes += 4 * int64(len(e.group.Prompt))
				for i := range e.group.Rollouts {
					want.Tokens += int64(len(e.group.Rollouts[i].Completion))
					want.Bytes += e.group.Rollouts[i].payload()
				}
			}
			if a.Depth() != want || a.Ready() != want.GroupsComplete {
				t.Fatalf("depth %+v, groups say %+v", a.Depth(), want)
			}
			c := a.Counters()
			done := c.RolloutsTrained + int64(want.Rollouts)
			for _, n := range c.RolloutsDropped {
				done += n
			}
			for _, g := range a.live {
				if g.state.Status == Taken {
					done += int64(len(g.group.Rollouts))
				}
			}
			if done != c.Rollouts {
				t.Fatalf("%d of %d accepted rollouts are accounted for", done, c.Rollouts)
			}
		}
		b := NewAssembler(opts)
		for _, f := range calls {
			f(b)
		}
		if diff := cmp.Diff(fmt.Sprintf("%+v", dump(a)), fmt.Sprintf("%+v", dump(b))); diff != "" {
			t.Fatal(diff)
		}
	}
}

func TestClosedGroupsDoNotPileUp(t *testing.T) {
	a := NewAssembler(AssemblerOptions{GroupSize: 1, MaxPolicyLag: -1})
	for i := range 2000 {
		mustAdd(t, a, uint64(i+1), row(fmt.Sprint("a", i), 1))
		taken, _ := a.Take(1, 0)
		if err := a.Mark(ids(taken), State{Status: Trained}); err != nil {
			t.Fatal(err)
		}
	}
	if len(a.live) != 0 || len(a.opened) > 100 || a.closed.records.n != 2000 {
		t.Fatal(len(a.live), len(a.opened), a.closed.records.n)
	}
	if _, err := a.Add(2000, batch(row("b", 1))); err == nil {
		t.Fatal("a sequence number was used twice")
	}
}

// TestFingerprintsAreTheSame: a batch whose rows were read beforehand is the same
// to the assembler as one whose rows were not: duplicates are found and another
// content under a known id is refused.
func TestFingerprintsAreTheSame(t *testing.T) {
	row := func(id string, token int32) Rollout {
		return Rollout{GroupID: "g", ID: id, Prompt: []int32{1}, Completion: []int32{token, 3}, SamplerLogProbs: []float32{-1, -2}, LossMask: []bool{true, false}, Reward: 1}
	}
	for _, first := range []bool{false, true} {
		for _, second := range []bool{false, true} {
			a := NewAssembler(AssemblerOptions{GroupSize: 4, MaxPolicyLag: -1})
			b := &Batch{Rollouts: []Rollout{row("x", 2), row("", 2), row("y", 2)}, HasReward: true}
			again := &Batch{Rollouts: []Rollout{row("y", 2), row("z", 2)}, HasReward: true}
			other := &Batch{Rollouts: []Rollout{row("x", 7)}, HasReward: true}
			if first {
				b.Fingerprint()
			}
			if second {
				again.Fingerprint()
				other.Fingerprint()
			}
			if _, err := a.Add(1, b); err != nil {
				t.Fatal(err)
			}
			if f, _ := fault.As(a.Check(other)); f == nil || f.Code != "rollout_id_reused" {
				t.Errorf("another content: %v", f)
			}
			if r, err := a.Add(2, again); err != nil || r.Rows != 1 || r.Duplicates != 1 || r.GroupsCompleted != 1 {
				t.Errorf("%+v, %v", r, err)
			}
		}
	}
}

// TestRowsAfterADuplicate: the row after one that is ignored counts in its own group.
func TestRowsAfterADuplicate(t *testing.T) {
	row := func(group, id string) Rollout {
		return Rollout{GroupID: group, ID: id, Prompt: []int32{int32(len(group))}, Completion: []int32{1}}
	}
	a := NewAssembler(AssemblerOptions{GroupSize: 3, MaxPolicyLag: -1})
	if _, err := a.Add(1, &Batch{Rollouts: []Rollout{row("gg", "x")}}); err != nil {
		t.Fatal(err)
	}
	r, err := a.Add(2, &Batch{Rollouts: []Rollout{row("g", "a"), row("gg", "x"), row("gg", "y"), row("g", "b"), row("gg", "z"), row("gg", "x"), row("g", "c")}})
	if err != nil || r.Rows != 5 || r.Duplicates != 2 || r.GroupsCompleted != 2 {
		t.Errorf("%+v, %v", r, err)
	}
}

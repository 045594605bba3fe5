package rollout

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"trainerd/internal/fault"
)

// seeded returns a generator whose seed a failing test prints.
func seeded(t *testing.T) *rand.Rand {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

func randomTokens(r *rand.Rand, n int) []int32 {
	out := make([]int32, n)
	for i := range out {
		out[i] = r.Int32N(1000)
	}
	return out
}

func randomGroups(r *rand.Rand, maxPrompt, maxCompletion int) []Group {
	groups := make([]Group, r.IntN(12))
	for g := range groups {
		groups[g] = Group{ID: fmt.Sprint("g", g), Prompt: randomTokens(r, 1+r.IntN(maxPrompt))}
		for range 1 + r.IntN(9) {
			groups[g].Rollouts = append(groups[g].Rollouts, Rollout{Completion: randomTokens(r, 1+r.IntN(maxCompletion))})
		}
	}
	return groups
}

// context walks back from a predicting token: what the model has seen, in order.
func context(p *Packed, row int) []int32 {
	for _, s := range p.Segments {
		if row < s.Start || row >= s.Start+s.Len {
			continue
		}
		var out []int32
		if s.Prefix >= 0 {
			q := p.Segments[s.Prefix]
			out = append(out, p.Tokens[q.Start:q.Start+q.Len]...)
		}
		return append(out, p.Tokens[s.Start:row+1]...)
	}
	return nil
}

type prediction struct{ group, rollout, t int }

// predictions checks one packing and returns what each prediction sees and wants.
func predictions(t *testing.T, groups []Group, packed []Packed, maxTokens int) map[prediction]string {
	t.Helper()
	got := map[prediction]string{}
	for m := range packed {
		p := &packed[m]
		if len(p.Tokens) > maxTokens || len(p.Tokens) == 0 || len(p.Positions) != len(p.Tokens) {
			t.Fatalf("micro-batch %d: %d tokens, %d positions, budget %d", m, len(p.Tokens), len(p.Positions), maxTokens)
		}
		next := 0
		prompts := map[int]bool{}
		for i, s := range p.Segments {
			if s.Start != next || s.Len < 1 || s.Prefix >= i {
				t.Fatalf("segment %d is %+v, expected it at %d", i, s, next)
			}
			next += s.Len
			base := 0
			if s.Prefix >= 0 {
				base = p.Segments[s.Prefix].Len
				if p.Segments[s.Prefix].Prefix != -1 {
					t.Fatalf("segment %d has a prefix that is no prompt", i)
				}
			}
			for k := range s.Len {
				if int(p.Positions[s.Start+k]) != base+k {
					t.Fatalf("position %d in segment %+v is %d", k, s, p.Positions[s.Start+k])
				}
			}
		}
		if next != len(p.Tokens) {
			t.Fatalf("segments cover %d of %d tokens", next, len(p.Tokens))
		}
		n := 0
		for _, s := range p.Spans {
			if s.Start != n || s.Len != len(groups[s.Group].Rollouts[s.Rollout].Completion) {
				t.Fatalf("span %+v, expected start %d", s, n)
			}
			n += s.Len
			prompts[s.Group] = true
			for k := range s.Len {
				key := prediction{s.Group, s.Rollout, k}
				if _, twice := got[key]; twice {
					t.Fatalf("%+v predicted twice", key)
				}
				got[key] = fmt.Sprint(context(p, int(p.Rows[s.Start+k])), p.Targets[s.Start+k])
			}
		}
		if n != len(p.Rows) || n != len(p.Targets) {
			t.Fatalf("spans cover %d predictions of %d rows, %d targets", n, len(p.Rows), len(p.Targets))
		}
		stand := 0
		for _, s := range p.Segments {
			if s.Prefix == -1 {
				stand++
			}
		}
		if stand != len(prompts) {
			t.Fatalf("micro-batch %d holds %d prompts for %d groups", m, stand, len(prompts))
		}
	}
	return got
}

// Every token of every completion is predicted once, from its own prompt and its
// own earlier tokens only, for any budget.
func TestPackPredictsEachTokenOnceFromItsContext(t *testing.T) {
	r := seeded(t)
	for range 150 {
		groups := randomGroups(r, 20, 15)
		maxTokens := 34 + r.IntN(150) // 20 + 15 - 1 always fits
		packed, err := Pack(groups, maxTokens)
		if err != nil {
			t.Fatal(err)
		}
		want := map[prediction]string{}
		for g := range groups {
			for i := range groups[g].Rollouts {
				c := groups[g].Rollouts[i].Completion
				for k := range c {
					want[prediction{g, i, k}] = fmt.Sprint(slices.Concat(groups[g].Prompt, c[:k]), c[k])
				}
			}
		}
		if diff := cmp.Diff(want, predictions(t, groups, packed, maxTokens)); diff != "" {
			t.Fatal(diff)
		}
		again, err := Pack(groups, maxTokens)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(packed, again); diff != "" {
			t.Fatalf("packed differently the second time: %s", diff)
		}
	}
}

// What is computed does not depend on the order of groups and rollouts.
func TestPackContentIsIndependentOfOrder(t *testing.T) {
	r := seeded(t)
	content := func(groups []Group, maxTokens int) []string {
		packed, err := Pack(groups, maxTokens)
		if err != nil {
			t.Fatal(err)
		}
		var all []string
		for key, what := range predictions(t, groups, packed, maxTokens) {
			all = append(all, groups[key.group].ID+" "+what)
		}
		slices.Sort(all)
		return all
	}
	for range 100 {
		groups := randomGroups(r, 10, 10)
		maxTokens := 19 + r.IntN(60)
		want := content(groups, maxTokens)
		r.Shuffle(len(groups), func(i, j int) { groups[i], groups[j] = groups[j], groups[i] })
		for _, g := range groups {
			r.Shuffle(len(g.Rollouts), func(i, j int) { g.Rollouts[i], g.Rollouts[j] = g.Rollouts[j], g.Rollouts[i] })
		}
		if diff := cmp.Diff(want, content(groups, maxTokens)); diff != "" {
			t.Fatal(diff)
		}
	}
}

func TestPackLayout(t *testing.T) {
	groups := []Group{{ID: "a", Prompt: []int32{1, 2, 3}, Rollouts: []Rollout{
		{Completion: []int32{4, 5, 6}}, {Completion: []int32{7}}, {Completion: []int32{8, 9}}}}}
	got, err := Pack(groups, 100)
	if err != nil {
		t.Fatal(err)
	}
	want := []Packed{{
		Tokens:    []int32{1, 2, 3, 4, 5, 8},
		Positions: []int32{0, 1, 2, 3, 4, 3},
		Segments:  []Segment{{0, 3, -1}, {3, 2, 0}, {5, 1, 0}},
		Rows:      []int32{2, 3, 4, 2, 2, 5},
		Targets:   []int32{4, 5, 6, 7, 8, 9},
		Spans:     []Span{{0, 0, 0, 3}, {0, 1, 3, 1}, {0, 2, 4, 2}},
	}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Fatal(diff)
	}
}

func uniform(n, prompt, completion, rows int) []Group {
	groups := make([]Group, n)
	for g := range groups {
		groups[g] = Group{ID: fmt.Sprint(g), Prompt: make([]int32, prompt)}
		for range rows {
			groups[g].Rollouts = append(groups[g].Rollouts, Rollout{Completion: make([]int32, completion)})
		}
	}
	return groups
}

func TestPackCountsAndBalance(t *testing.T) {
	for _, c := range []struct {
		name   string
		groups []Group
		max    int
		want   []int // tokens of each micro-batch
	}{
		{"two groups fill one", uniform(2, 10, 11, 4), 100, []int{100}},
		{"four groups, two each", uniform(4, 10, 11, 4), 110, []int{100, 100}},
		{"three groups: whole ones only", uniform(3, 10, 11, 4), 110, []int{100, 50}},
		{"a large group is split evenly", uniform(1, 10, 11, 4), 40, []int{30, 30}},
		{"one completion a part", uniform(1, 10, 11, 3), 20, []int{20, 20, 20}},
		{"completions of one token cost nothing", uniform(1, 10, 1, 9), 10, []int{10}},
		// 60, 50, 50 and 40 tokens: longest with shortest.
		{"even work", slices.Concat(uniform(1, 50, 11, 1), uniform(2, 40, 11, 1), uniform(1, 30, 11, 1)), 110, []int{100, 100}},
		{"nothing", nil, 10, []int{}},
	} {
		t.Run(c.name, func(t *testing.T) {
			packed, err := Pack(c.groups, c.max)
			if err != nil {
				t.Fatal(err)
			}
			got := []int{}
			for _, p := range packed {
				got = append(got, len(p.Tokens))
			}
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Fatal(diff)
			}
		})
	}
}

func TestPackRefuses(t *testing.T) {
	for _, c := range []struct {
		name  string
		group Group
		max   int
		want  string
	}{
		{"too long", Group{ID: "big", Prompt: make([]int32, 5), Rollouts: []Rollout{{Completion: make([]int32, 3)}, {Completion: make([]int32, 7)}}}, 10, `group "big"`},
		{"empty prompt", Group{ID: "none", Rollouts: []Rollout{{Completion: []int32{1}}}}, 10, `group "none"`},
		{"empty completion", Group{ID: "mute", Prompt: []int32{1}, Rollouts: []Rollout{{}}}, 10, `group "mute"`},
		{"no rollouts", Group{ID: "alone", Prompt: []int32{1}}, 10, `group "alone"`},
		{"no budget", Group{ID: "g", Prompt: []int32{1}, Rollouts: []Rollout{{Completion: []int32{1}}}}, 0, "max_tokens_per_micro_batch"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := Pack([]Group{c.group}, c.max)
			if fault.KindOf(err) != fault.Invalid || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("got %v, want an invalid fault that names %s", err, c.want)
			}
		})
	}
}

// TestPackInUsedMemory packs into memory of earlier packings: the same comes out
// as in fresh memory, and two micro-batches never share a place.
func TestPackInUsedMemory(t *testing.T) {
	r := seeded(t)
	var mem []int32
	reused := 0
	for range 200 {
		groups, maxTokens := randomGroups(r, 20, 20), 40+r.IntN(200)
		want, err := Pack(groups, maxTokens)
		if err != nil {
			t.Fatal(err)
		}
		for i := range mem {
			mem[i] = -7 // what an earlier packing left
		}
		had := cap(mem)
		got, used, err := PackIn(mem, groups, maxTokens)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Fatal(diff)
		}
		ints := 0
		for i := range got {
			ints += 2*len(got[i].Tokens) + 2*len(got[i].Rows)
		}
		if ints != len(used) {
			t.Fatalf("%d numbers in a memory of %d", ints, len(used))
		}
		if had >= ints {
			reused++
			if ints > 0 && &used[0] != &mem[:1][0] {
				t.Fatalf("memory for %d was left, and %d needed", had, ints)
			}
		}
		if cap(used) > cap(mem) {
			mem = used
		}
	}
	if reused < 100 {
		t.Errorf("memory was used again %d times of 200", reused)
	}
}

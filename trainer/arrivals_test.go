package trainer

import (
	"fmt"
	"strings"
	"testing"

	"trainerd/rollout"
)

func arriving(key string, rows ...string) *arrival {
	a := &arrival{key: key, batch: &rollout.Batch{}, body: make([]byte, 1000)}
	for _, r := range rows {
		group, id, _ := strings.Cut(r, "/")
		a.batch.Rollouts = append(a.batch.Rollouts, rollout.Rollout{GroupID: group, ID: id})
	}
	return a
}

// TestRoundsDoNotDependOnThemselves takes rounds until nobody waits: batches of
// one share nothing, and of two that share something the earlier one goes first.
func TestRoundsDoNotDependOnThemselves(t *testing.T) {
	for _, test := range []struct {
		name  string
		waits []*arrival
		want  string
	}{
		{"apart", []*arrival{arriving("a", "g1"), arriving("b", "g2"), arriving("", "g3")}, "0 1 2"},
		{"one group", []*arrival{arriving("a", "g1"), arriving("b", "g1"), arriving("c", "g2")}, "0 2 | 1"},
		{"rows of a group that do not lie together", []*arrival{arriving("a", "g1", "g2"), arriving("b", "g3", "g1", "g3")}, "0 | 1"},
		{"one key", []*arrival{arriving("a", "g1"), arriving("a", "g2")}, "0 | 1"},
		{"no keys are not one key", []*arrival{arriving("", "g1"), arriving("", "g2")}, "0 1"},
		{"one row id", []*arrival{arriving("a", "g1/x"), arriving("b", "g2/x"), arriving("c", "g3/y")}, "0 2 | 1"},
		{"nobody overtakes whom it shares with", []*arrival{arriving("a", "g1"), arriving("b", "g1", "g2"), arriving("c", "g2")}, "0 | 1 | 2"},
	} {
		w := arrivals{waiting: test.waits}
		var got []string
		for len(w.waiting) > 0 {
			var round []string
			for _, a := range w.take() {
				for i, x := range test.waits {
					if x == a {
						round = append(round, fmt.Sprint(i))
					}
				}
			}
			if len(round) == 0 {
				t.Fatalf("%s: an empty round while %d wait", test.name, len(w.waiting))
			}
			got = append(got, strings.Join(round, " "))
		}
		if rounds := strings.Join(got, " | "); rounds != test.want {
			t.Errorf("%s: rounds %s, expected %s", test.name, rounds, test.want)
		}
	}
}

func TestRoundsAreBounded(t *testing.T) {
	var w arrivals
	for i := range 5 {
		a := arriving(fmt.Sprint(i), fmt.Sprint("g", i))
		a.body = make([]byte, maxRound/2)
		w.waiting = append(w.waiting, a)
	}
	for _, want := range []int{2, 2, 1} {
		if got := len(w.take()); got != want {
			t.Errorf("a round of %d batches, expected %d", got, want)
		}
	}
}

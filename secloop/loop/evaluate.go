package loop

import (
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"text/tabwriter"

	"trainerd/secloop/scenario"
)

// Share counts correct strategies.
type Share struct {
	N       int `json:"n"`
	Correct int `json:"correct"`
}

// Of returns the share of correct ones, 0 of none.
func (s Share) Of() float64 {
	if s.N == 0 {
		return 0
	}
	return float64(s.Correct) / float64(s.N)
}

// Tally summarises episodes. Accuracy is the share of strategies that execute,
// defend the attack and disrupt nothing.
type Tally struct {
	Share
	Accuracy   float64          `json:"accuracy"`
	Reward     float64          `json:"reward"` // mean, with the paper's weights
	Format     float64          `json:"format"` // means of the modules
	Execution  float64          `json:"execution"`
	Evaluation float64          `json:"evaluation"`
	Penalty    float64          `json:"penalty"`
	Void       int              `json:"void,omitempty"` // episodes without a reward, in none of the other numbers
	ByScenario map[string]Share `json:"by_scenario,omitempty"`
	ByTactic   map[string]Share `json:"by_tactic,omitempty"`
}

// Count summarises a round.
func Count(groups [][]Episode) Tally {
	t := Tally{ByScenario: map[string]Share{}, ByTactic: map[string]Share{}}
	for _, g := range groups {
		for _, e := range g {
			if e.Void != "" {
				t.Void++
				continue
			}
			r := e.Reward
			t.Reward += r.Total()
			t.Format += r.Format
			t.Execution += r.Execution
			t.Evaluation += r.Evaluation
			t.Penalty += r.Penalty
			sc, _ := scenario.ByName(e.Truth.Attack)
			one := Share{N: 1}
			if r.Correct {
				one.Correct = 1
			}
			t.Share = t.add(one)
			t.ByScenario[sc.Name] = t.ByScenario[sc.Name].add(one)
			t.ByTactic[sc.Tactic] = t.ByTactic[sc.Tactic].add(one)
		}
	}
	if t.N > 0 {
		n := float64(t.N)
		t.Reward, t.Format, t.Execution, t.Evaluation, t.Penalty = t.Reward/n, t.Format/n, t.Execution/n, t.Evaluation/n, t.Penalty/n
	}
	t.Accuracy = t.Of()
	return t
}

func (s Share) add(o Share) Share { return Share{s.N + o.N, s.Correct + o.Correct} }

// Point is one measurement on one set that was kept from training.
type Point struct {
	Step int64 `json:"step"`
	Set  Set   `json:"set"`
	Tally
}

// Exam is what is measured on: the incidents of each held-out set, sensed once.
type Exam map[Set][]Incident

// NewExam draws the incidents of an exam; the same seed gives the same exam.
func NewExam(ctx context.Context, s Source, seed uint64, sizes map[Set]int) (Exam, error) {
	e := Exam{}
	for _, set := range Sets {
		if sizes[set] == 0 {
			continue
		}
		in, err := s.Draw(ctx, seeded(seed, "exam/"+string(set), 0), set, sizes[set])
		if err != nil {
			return nil, err
		}
		e[set] = in
	}
	return e, nil
}

// Sit measures the sampler's policy: one strategy for each incident.
func (e Exam) Sit(ctx context.Context, a *Agent, seed uint64) ([]Point, map[Set]Round, error) {
	var points []Point
	rounds := map[Set]Round{}
	for i, set := range Sets {
		if len(e[set]) == 0 {
			continue
		}
		r, err := a.Play(ctx, e[set], 1, seed+uint64(i))
		if err != nil {
			return nil, nil, fmt.Errorf("measure on %s: %w", set, err)
		}
		rounds[set] = r
		points = append(points, Point{r.PolicyStep, set, Count(r.Episodes)})
	}
	return points, rounds, nil
}

// Table prints accuracies per scenario and tactic, a column for each measurement.
func Table(w io.Writer, columns []string, points []Point) {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	row := func(name string, cell func(Tally) string) {
		fmt.Fprint(tw, name)
		for _, p := range points {
			fmt.Fprintf(tw, "\t%s", cell(p.Tally))
		}
		fmt.Fprintln(tw)
	}
	fmt.Fprint(tw, "accuracy")
	for _, c := range columns {
		fmt.Fprintf(tw, "\t%s", c)
	}
	fmt.Fprintln(tw)
	share := func(s Share) string {
		if s.N == 0 {
			return "-"
		}
		return fmt.Sprintf("%5.1f %% of %d", 100*s.Of(), s.N)
	}
	names := func(of func(Tally) map[string]Share) []string {
		all := map[string]bool{}
		for _, p := range points {
			for k := range of(p.Tally) {
				all[k] = true
			}
		}
		return slices.Sorted(maps.Keys(all))
	}
	row("all", func(t Tally) string { return share(t.Share) })
	row("reward", func(t Tally) string { return fmt.Sprintf("%.3f", t.Reward) })
	row("format", func(t Tally) string { return fmt.Sprintf("%5.1f %%", 100*t.Format) })
	for _, n := range names(func(t Tally) map[string]Share { return t.ByTactic }) {
		row("tactic "+n, func(t Tally) string { return share(t.ByTactic[n]) })
	}
	for _, n := range names(func(t Tally) map[string]Share { return t.ByScenario }) {
		row(n, func(t Tally) string { return share(t.ByScenario[n]) })
	}
	tw.Flush()
}

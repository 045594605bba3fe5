package loop

import (
	"bytes"
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"trainerd/secloop"
	"trainerd/secloop/scenario"
	"trainerd/secloop/sim"
)

func simField() Field { return sim.Field{} }

func TestLinesSurviveATornWrite(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.jsonl")
	read := func() []int {
		var got []int
		if err := readLines(path, func(n int) error { got = append(got, n); return nil }); err != nil {
			t.Fatal(err)
		}
		return got
	}
	if got := read(); got != nil {
		t.Errorf("no file: %v", got)
	}
	if err := appendLines(path, 1, 2); err != nil {
		t.Fatal(err)
	}
	for _, torn := range []string{"3", strings.Repeat("3", 10_000)} {
		f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		f.WriteString(torn)
		f.Close()
		if got := read(); !reflect.DeepEqual(got, []int{1, 2}) {
			t.Errorf("with a torn line: %v", got)
		}
	}
	if err := appendLines(path, 4); err != nil {
		t.Fatal(err)
	}
	if got := read(); !reflect.DeepEqual(got, []int{1, 2, 4}) {
		t.Errorf("after the torn line: %v", got)
	}
	os.WriteFile(path, []byte("1\nx\n"), 0o644)
	if err := readLines(path, func(int) error { return nil }); err == nil || !strings.Contains(err.Error(), "line 2") {
		t.Errorf("a line that is no JSON: %v", err)
	}
}

// TestReplay records a round and plays one of its episodes again; a changed
// record is noticed.
func TestReplay(t *testing.T) {
	a, _ := agent(sim.Field{}, right, breaks, "no strategy")
	a.Timeout = 20 * time.Second
	in := []Incident{incident("sql_injection", "web1"), incident("xss", "web1")}
	round, err := a.Play(t.Context(), in, 3, 1)
	if err != nil {
		t.Fatal(err)
	}
	r := &Run{Agent: a, Dir: t.TempDir(), name: "n"}
	for range 2 { // a step that was played again after a crash
		if err := r.record(round, 4); err != nil {
			t.Fatal(err)
		}
	}
	for i := range in {
		for k := range 3 {
			rec, err := Recorded(r.Dir, Pick{Step: 5, Group: i, Index: k})
			if err != nil || rec.Truth != in[i].Truth || rec.Completion != []string{right, breaks, "no strategy"}[k] || rec.Policy != 7 || !strings.HasPrefix(rec.Prompt, "SO 0.20 web1") {
				t.Fatalf("record %d %d: %+v, %v", i, k, rec, err)
			}
			var out bytes.Buffer
			rec.Show(&out)
			for _, part := range []string{"prompt ", "strategy ", "reward ", "hidden from the policy"} {
				if !strings.Contains(out.String(), part) {
					t.Errorf("no %q in\n%s", part, out.String())
				}
			}
			if diff, err := Replay(t.Context(), a, rec); err != nil || len(diff) > 0 {
				t.Errorf("episode %d %d came out otherwise: %v, %v", i, k, diff, err)
			}
			rec.Reward.Penalty += 0.25
			rec.Down = append(rec.Down, "db1")
			if diff, err := Replay(t.Context(), a, rec); err != nil || len(diff) != 2 {
				t.Errorf("a changed record: %v, %v", diff, err)
			}
		}
	}
	if _, err := Recorded(r.Dir, Pick{Step: 6}); err == nil {
		t.Error("an episode of no step was found")
	}
}

func TestPrintable(t *testing.T) {
	for in, want := range map[string]string{right: right, "\x1b[2J": `"\x1b[2J"`, "a\nb": `"a\nb"`, "\xff": `"\xff"`, "\u202e": `"\u202e"`} {
		if got := printable(in); got != want {
			t.Errorf("%q is shown as %s, expected %s", in, got, want)
		}
	}
}

func wellFormed(t *testing.T, name string, picture []byte) {
	t.Helper()
	dec := xml.NewDecoder(bytes.NewReader(picture))
	for {
		_, err := dec.Token()
		if err == io.EOF {
			return
		}
		if err != nil {
			t.Fatalf("%s: %v\n%s", name, err, picture)
		}
	}
}

func TestCountAndTable(t *testing.T) {
	a, _ := agent(sim.Field{}, right, breaks, "no strategy")
	a.Timeout = 20 * time.Second
	r, err := a.Play(t.Context(), []Incident{incident("sql_injection", "web1")}, 3, 1)
	if err != nil {
		t.Fatal(err)
	}
	r.Episodes = append(r.Episodes, []Episode{{Void: "the field failed"}})
	got := Count(r.Episodes)
	if got.N != 3 || got.Correct != 1 || got.Void != 1 || got.ByTactic["discovery"] != (Share{3, 1}) || got.ByScenario["sql_injection"] != (Share{3, 1}) ||
		fmt.Sprintf("%.3f %.3f %.3f", got.Accuracy, got.Reward, got.Format) != "0.333 1.333 0.667" {
		t.Errorf("%+v", got)
	}
	var out strings.Builder
	Table(&out, []string{"now"}, []Point{{Tally: got}})
	if !strings.Contains(out.String(), "33.3 % of 3") || !strings.Contains(out.String(), "tactic discovery") {
		t.Error(out.String())
	}
}

// TestSweepGoesOn ends a sweep in the middle: what was finished is not run
// again, and the table has means and spreads.
func TestSweepGoesOn(t *testing.T) {
	base := Settings{Steps: 1, Groups: 1, Size: 7, Objective: "sa_grpo", Weights: DefaultWeights(), Warm: Warm{Steps: 1}}
	var ran []string
	stop := 0
	s := &Sweep{Dir: t.TempDir(), Base: base, Seeds: []uint64{1, 2}, Variants: Variants()[:2]}
	s.Run = func(_ context.Context, set Settings, source, dir string) (Result, error) {
		if len(ran) == stop {
			return Result{}, errors.New("killed")
		}
		ran = append(ran, fmt.Sprintf("%s %d %s", set.Objective, set.Seed, filepath.Base(dir)))
		if (source == "") != (set.Steps == 0) || set.Steps > 0 && set.Warm.Steps > 0 {
			t.Errorf("source %q with %+v", source, set)
		}
		acc := 0.5
		if set.Objective == "grpo" {
			acc = 0.2 * float64(set.Seed)
		}
		r := Result{Settings: set, Points: []Point{{0, Incidents, Tally{Accuracy: 0.1}}, {1, Incidents, Tally{Accuracy: acc}}}}
		return r, errors.Join(os.MkdirAll(dir, 0o755), writeJSON(filepath.Join(dir, fileResult), r))
	}
	stop = 2
	if lines, err := s.Do(t.Context()); err == nil || len(lines) != 1 {
		t.Fatalf("%d lines, %v", len(lines), err)
	}
	stop = 100
	lines, err := s.Do(t.Context())
	if err != nil || len(lines) != 4 {
		t.Fatalf("%d lines, %v", len(lines), err)
	}
	want := []string{"sa_grpo 1 warm-1", "sa_grpo 1 sa_grpo-1", "grpo 1 grpo-1", "sa_grpo 2 warm-2", "sa_grpo 2 sa_grpo-2", "grpo 2 grpo-2"}
	if !reflect.DeepEqual(ran, want) {
		t.Errorf("ran %q, expected %q", ran, want)
	}
	if lines, err := s.Do(t.Context()); err != nil || len(lines) != 4 || len(ran) != 6 {
		t.Errorf("once more: %d lines, %d runs, %v", len(lines), len(ran), err)
	}
	var out strings.Builder
	if err := SweepTable(&out, s.Variants, lines); err != nil {
		t.Fatal(err)
	}
	// grpo reached 20 and 40 %: mean 30, sample deviation 10*sqrt(2).
	if !strings.Contains(out.String(), "30.0 ± 14.1 (20.0 to 40.0)") || !strings.Contains(out.String(), "50.0 ± 0.0") {
		t.Error(out.String())
	}
	s.Base.LR = 1 // other settings: everything is run again
	if _, err := s.Do(t.Context()); err != nil || len(ran) != 12 {
		t.Errorf("with other settings %d runs, %v", len(ran), err)
	}
	if err := SweepPlots(s.Dir, lines); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"objectives.svg", "modules.svg", "sizes.svg"} {
		b, err := os.ReadFile(filepath.Join(s.Dir, name))
		if err != nil {
			t.Fatal(err)
		}
		wellFormed(t, name, b)
	}
}

func TestBestConstant(t *testing.T) {
	always := fakeField{func(_ context.Context, a secloop.Alert, s secloop.Strategy) (out scenario.Outcome, _ error) {
		out.Feedback = secloop.Feedback{Executed: 1, Attacked: 1, Service: true}
		if s[0].Tool == "waf_rule" && s[0].Params["host"] == a.Target && s[0].Params["rule"] == "sqli" {
			out.Feedback.Attacked = 0
		}
		return out, nil
	}}
	in := []Incident{incident("sql_injection", "web1"), incident("sql_injection", "web1"), incident("sql_injection", "web2"), incident("xss", "app1")}
	c, err := BestConstant(t.Context(), always, rules, 2, in)
	if err != nil || c.Accuracy != 0.5 || c.Strategy != right || c.Copied != 1 || c.Tool != "waf_rule" {
		t.Errorf("%+v, %v", c, err)
	}
}

func TestTimeRounds(t *testing.T) {
	f := fakeField{func(context.Context, secloop.Alert, secloop.Strategy) (scenario.Outcome, error) {
		time.Sleep(2 * time.Millisecond)
		return scenario.Outcome{}, nil
	}}
	single, out, err := TimeRounds(t.Context(), f, 1, []int{2}, []int{3}, []int{1, 4}, 2)
	if err != nil || len(out) != 2 || single < 2*time.Millisecond {
		t.Fatalf("%v, %+v, %v", single, out, err)
	}
	if out[0].Model != 6*single || out[1].Model != 2*single || out[0].Measured < 12*time.Millisecond || out[1].Measured < 4*time.Millisecond {
		t.Errorf("single %v, %+v", single, out)
	}
}

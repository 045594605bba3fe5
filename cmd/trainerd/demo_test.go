package main

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"trainerd/secloop"
)

// shortDemo are the flags of a demo that learns nothing in no time.
func shortDemo(more ...string) []string {
	return append([]string{"demo", "--warm-steps", "2", "--warm-rows", "2", "--steps", "2", "--groups", "2", "--group-size", "3",
		"--eval-prompts", "3", "--eval-every", "1"}, more...)
}

// numbers runs a demo and returns the lines that a seed decides. So few steps
// show nothing, so it must fail.
func numbers(t *testing.T, args ...string) []string {
	t.Helper()
	out, log, err := command(t, shortDemo(args...)...)
	var exit exitError
	if !errors.As(err, &exit) || exit.code != 1 || !strings.Contains(log, "FAILED: a gain of") {
		t.Fatalf("%v, expected exit status 1; it said %q", err, log)
	}
	var lines []string
	for _, l := range strings.Split(out, "\n") {
		if strings.HasPrefix(l, "trainerd demo: server") || strings.HasSuffix(l, " s in all") {
			continue
		}
		lines = append(lines, l)
	}
	return lines
}

func TestDemoIsAFunctionOfItsSeed(t *testing.T) {
	first := numbers(t, "--seed", "3")
	for _, part := range []string{"warm start    2/2  loss ", "step   2  reward ", "held-out at step 2: ", "3 held-out alerts", "accuracy on held-out alerts"} {
		if !strings.Contains(strings.Join(first, "\n"), part) {
			t.Errorf("no %q in\n%s", part, strings.Join(first, "\n"))
		}
	}
	if again := numbers(t, "--seed", "3"); strings.Join(first, "\n") != strings.Join(again, "\n") {
		t.Errorf("the same seed gave\n%s\nand then\n%s", strings.Join(first, "\n"), strings.Join(again, "\n"))
	}
	if other := numbers(t, "--seed", "4"); strings.Join(first, "\n") == strings.Join(other, "\n") {
		t.Error("another seed gave the same numbers")
	}
}

// TestDemoVerdict holds the exit status to what the run showed.
func TestDemoVerdict(t *testing.T) {
	for _, tc := range []struct {
		control, summary bool
		after            float64 // accuracy; it was 0.3 before
		ok               bool
	}{
		{false, false, 0.5001, true}, {false, false, 0.499, false}, {false, true, 0.499, false}, {false, true, 0.6, true},
		{true, false, 0.3499, true}, {true, false, 0.351, false}, {true, true, 0.351, false}, {true, false, 0.1, true},
	} {
		var out, log strings.Builder
		d := demo{con: console{out: &out, err: &log}, control: tc.control, summary: tc.summary,
			points: []point{{0, secloop.Tally{Accuracy: 0.3}}, {1, secloop.Tally{Accuracy: tc.after}}}}
		err := d.report(0)
		if (err == nil) != tc.ok || strings.Contains(log.String(), "FAILED") == tc.ok {
			t.Errorf("%+v: %v, %q", tc, err, log.String())
		}
		var sum struct{ Before, After float64 }
		if tc.summary && (json.Unmarshal([]byte(out.String()), &sum) != nil || sum.After != tc.after) {
			t.Errorf("%+v: %q", tc, out.String())
		}
	}
}

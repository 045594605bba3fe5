package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"trainerd/secloop/loop"
)

// shortLoop are the flags of a run that learns nothing in no time.
func shortLoop(more ...string) []string {
	return append([]string{"--warm-steps", "2", "--warm-rows", "2", "--warm-pool", "4", "--groups", "2", "--group-size", "3", "--max-tokens", "16",
		"--eval-incidents", "3", "--eval-scenarios", "2", "--eval-every", "1"}, more...)
}

func lines(t *testing.T, path string) int {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	n := 0
	for s := bufio.NewScanner(f); s.Scan(); n++ {
	}
	return n
}

// TestSecloopEndToEnd trains for two turns on the simulated field, goes on with
// the finished run, replays an episode, and measures and serves the policy that
// the run left behind.
func TestSecloopEndToEnd(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run")
	run := append([]string{"secloop", "run", "--out", dir, "--steps", "2", "--story"}, shortLoop()...)
	out, log, err := command(t, run...)
	if err != nil {
		t.Fatalf("%v: %s", err, log)
	}
	for _, part := range []string{"observe ", "summary ", "strategy", "posted as Arrow", "step   2 ", "held-out incidents", "held-out scenarios", "tactic "} {
		if !strings.Contains(out, part) {
			t.Errorf("no %q in\n%s", part, out)
		}
	}
	if n := lines(t, filepath.Join(dir, "episodes.jsonl")); n != 2*2*3 {
		t.Errorf("%d episodes recorded, expected 12", n)
	}
	for _, name := range []string{"curve.svg", "scenarios.svg", "tactics.svg", "result.json", "policy/config.json", "policy/tokenizer.json"} {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			t.Error(err)
		}
	}
	again, log, err := command(t, run...)
	if err != nil || strings.Contains(again, "warm start    2/2") || strings.Contains(again, "step   1 ") || lines(t, filepath.Join(dir, "points.jsonl")) != 6 {
		t.Errorf("a finished run went on: %v %s\n%s", err, log, again)
	}
	if _, _, err := command(t, append(run, "--lr", "1")...); err == nil || !strings.Contains(err.Error(), "other settings") {
		t.Errorf("another learning rate in the same directory: %v", err)
	}
	if out, log, err := command(t, "secloop", "replay", dir, "--step", "2", "--incident", "1", "--strategy", "2"); err != nil || !strings.Contains(out, "replay     the same") {
		t.Errorf("replay: %v %s\n%s", err, log, out)
	}
	results := t.TempDir()
	out, log, err = command(t, "secloop", "eval", "--model", filepath.Join(dir, "policy"), "--incidents", "3", "--scenarios", "2", "--max-tokens", "16", "--out", results)
	if err != nil || !strings.Contains(out, "tactic ") {
		t.Errorf("eval: %v %s\n%s", err, log, out)
	}
	var got struct{ Points []loop.Point }
	b, err := os.ReadFile(filepath.Join(results, "eval.json"))
	if err != nil || json.Unmarshal(b, &got) != nil || len(got.Points) != 2 || got.Points[0].N != 3 || got.Points[1].N != 2 {
		t.Errorf("eval.json: %v %s", err, b)
	}
	serveOnce(t, filepath.Join(dir, "policy"))
}

// TestSecloopGoesOn ends a run after its first turn; the same command finishes
// it, and no step of the job is done twice.
func TestSecloopGoesOn(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run")
	args := append([]string{"secloop", "run", "--out", dir, "--steps", "6"}, shortLoop()...)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	root := newRoot()
	root.SetArgs(args)
	root.SetOut(discard{})
	root.SetErr(discard{})
	done := make(chan error, 1)
	go func() { done <- root.ExecuteContext(ctx) }()
	for {
		if _, err := os.Stat(filepath.Join(dir, "steps.jsonl")); err == nil {
			break
		}
		select {
		case err := <-done:
			t.Fatalf("the run ended by itself: %v", err)
		case <-time.After(time.Millisecond):
		}
	}
	stop()
	if err := <-done; err == nil {
		t.Fatal("the run did 5 more turns before it could be ended")
	}
	out, log, err := command(t, args...)
	if err != nil || !strings.Contains(out, "step   6 ") || strings.Contains(out, "step   1 ") {
		t.Fatalf("%v %s\n%s", err, log, out)
	}
	b, err := os.ReadFile(filepath.Join(dir, "result.json"))
	var r loop.Result
	if err != nil || json.Unmarshal(b, &r) != nil || len(r.Points) != 14 {
		t.Errorf("%d points, expected those of 7 measurements on 2 sets: %v", len(r.Points), err)
	}
}

// TestSecloopWithAServer trains on a server outside the process.
func TestSecloopWithAServer(t *testing.T) {
	p, c := boot(t, nil)
	dir := t.TempDir()
	if _, log, err := command(t, "init", "dir:"+filepath.Join(dir, "model"), "--preset", "bytes"); err != nil {
		t.Fatalf("%v %s", err, log)
	}
	out, log, err := command(t, append([]string{"secloop", "run", "--server", p.URL(), "--model", "dir:" + filepath.Join(dir, "model"),
		"--tokenizer", filepath.Join(dir, "model"), "--out", filepath.Join(dir, "run"), "--steps", "1", "--objective", "grpo", "--without", "penalty", "--control"}, shortLoop()...)...)
	if err != nil || !strings.Contains(out, "step   1 ") {
		t.Fatalf("%v %s\n%s", err, log, out)
	}
	jobs, err := c.Jobs(t.Context())
	if err != nil || len(jobs) != 2 || jobs[1].Step != 1 || jobs[1].Counts.Rollouts != 6 || jobs[1].Counts.MissingPolicyStep != 0 {
		t.Errorf("jobs %+v, %v", jobs, err)
	}
	var doc struct {
		Objective struct {
			Name    string             `json:"name"`
			Weights map[string]float64 `json:"reward_weights"`
		} `json:"objective"`
	}
	if err := json.Unmarshal(jobs[1].Document, &doc); err != nil || doc.Objective.Name != "grpo" || doc.Objective.Weights["penalty"] != 0 || doc.Objective.Weights["format"] != 1 {
		t.Errorf("job %s, %v", jobs[1].Document, err)
	}
	if out, log, err := command(t, "secloop", "eval", "--server", p.URL(), "--job", jobs[1].ID, "--tokenizer", filepath.Join(dir, "model"),
		"--incidents", "2", "--scenarios", "0", "--max-tokens", "16"); err != nil || !strings.Contains(out, "policy step 1") {
		t.Errorf("%v %s\n%s", err, log, out)
	}
}

// serveOnce starts the webhook, posts one alert and stops it.
func serveOnce(t *testing.T, policy string) {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	root := newRoot()
	root.SetOut(w)
	root.SetErr(os.Stderr)
	root.SetArgs([]string{"secloop", "serve", "--model", policy, "--listen", "127.0.0.1:0", "--max-tokens", "16"})
	done := make(chan error, 1)
	go func() { done <- root.ExecuteContext(ctx); w.Close() }()
	var hello struct{ Addr, Mode string }
	line, err := bufio.NewReader(r).ReadBytes('\n')
	if err != nil || json.Unmarshal(line, &hello) != nil || hello.Mode != "dry run" {
		t.Fatalf("%v %s %v", err, line, <-done)
	}
	res, err := http.Post("http://"+hello.Addr+"/v1/alerts", "application/json",
		strings.NewReader(`{"alerts":[{"at":1,"name":"SQL syntax in query","source":"198.18.0.20","target":"198.18.2.11","host":"web1","severity":2}]}`))
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	var d loop.Decision
	if err := json.NewDecoder(res.Body).Decode(&d); err != nil || res.StatusCode != 200 || d.Completion == "" || d.Status == "applied" {
		t.Errorf("status %d, %+v, %v", res.StatusCode, d, err)
	}
	stop()
	if err := <-done; err != nil {
		t.Errorf("stopped with %v", err)
	}
}

// TestSecloopSweep runs two variants of one seed and then nothing more.
func TestSecloopSweep(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "sweep")
	args := append([]string{"secloop", "sweep", "--out", dir, "--seeds", "1", "--only", "gspo,without_penalty", "--steps", "1"}, shortLoop()...)
	out, log, err := command(t, args...)
	if err != nil || !strings.Contains(out, "[2/2] without_penalty, seed 1") || !strings.Contains(out, "| gspo") {
		t.Fatalf("%v %s\n%s", err, log, out)
	}
	if _, err := os.Stat(filepath.Join(dir, "gspo-1", "server")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a finished run's server data are kept: %v", err)
	}
	out, log, err = command(t, args...)
	if err != nil || !strings.Contains(out, "2 runs, 2 of them done before") || lines(t, filepath.Join(dir, "sweep.jsonl")) != 2 {
		t.Errorf("%v %s\n%s", err, log, out)
	}
	if out, log, err := command(t, append(args, "--table")...); err != nil || !strings.Contains(out, "| without_penalty | 1") {
		t.Errorf("%v %s\n%s", err, log, out)
	}
}

func TestSecloopRefuses(t *testing.T) {
	for _, c := range []struct {
		want string
		args []string
	}{
		{"field", []string{"run", "--field", "moon"}},
		{"weights", []string{"run", "--weights", "style=1"}},
		{"weights", []string{"run", "--weights", "format=NaN"}},
		{"without", []string{"run", "--without", "all"}},
		{"steps", []string{"run", "--steps", "-1"}},
		{"prompt", []string{"run", "--prompt", "verse"}},
		{"prompt", []string{"eval", "--model", "bytes", "--prompt", "verse"}},
		{"model", []string{"eval"}},
		{"judge-url", []string{"run", "--judge-model", "m"}},
		{"judge-url", []string{"run", "--judge-model", "m", "--judge-url", "http://u:p@h/v1"}},
		{"judge-key-env", []string{"run", "--judge-model", "m", "--judge-url", "http://h/v1", "--judge-key-env", "NO_SUCH_VARIABLE"}},
		{"endpoint", []string{"run", "--endpoint-model", "m"}},
		{"endpoint-model", []string{"run", "--endpoint", "http://h/v1"}},
		{"tokenizer", []string{"run", "--server", "http://127.0.0.1:1", "--model", "s3://b/m"}},
		{"callers-token-file", []string{"serve", "--model", "bytes", "--listen", "0.0.0.0:0"}},
		{"apply", []string{"serve", "--model", "bytes", "--apply", "x", "--target", "y=http://127.0.0.1:1/"}},
		{"target", []string{"serve", "--model", "bytes", "--target", "http://127.0.0.1:1/"}},
		{"out", []string{"sweep"}},
		{"only", []string{"sweep", "--out", t.TempDir(), "--only", "ppo"}},
		{"no_episode", []string{"replay", t.TempDir()}},
		{"env", []string{"rounds", "--env", "0"}},
		{"pace", []string{"rounds", "--pace", "1s"}},
	} {
		_, _, err := command(t, append([]string{"secloop"}, c.args...)...)
		if err == nil || !strings.Contains(err.Error(), c.want) && c.want != "no_episode" {
			t.Errorf("%q: %v, expected something about %s", c.args, err, c.want)
		}
	}
}

// TestVerdictOfALoop holds the exit status to what a run gained.
func TestVerdictOfALoop(t *testing.T) {
	for _, c := range []struct {
		control bool
		after   float64
		ok      bool
	}{{false, 0.501, true}, {false, 0.499, false}, {true, 0.2499, true}, {true, 0.251, false}, {true, 0, true}} {
		var log strings.Builder
		r := loop.Result{Settings: loop.Settings{Shuffle: c.control}, Points: []loop.Point{
			{Step: 0, Set: loop.Incidents, Tally: loop.Tally{Accuracy: 0.2}}, {Step: 0, Set: loop.Scenarios, Tally: loop.Tally{Accuracy: 0.9}},
			{Step: 9, Set: loop.Incidents, Tally: loop.Tally{Accuracy: c.after}}, {Step: 9, Set: loop.Scenarios}}}
		if err := verdict(&log, r); (err == nil) != c.ok || strings.Contains(log.String(), "FAILED") == c.ok {
			t.Errorf("%+v: %v %s", c, err, log.String())
		}
	}
}

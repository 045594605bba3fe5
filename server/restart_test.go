package server_test

import (
	"context"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"

	"trainerd/client"
	"trainerd/sagrpo"
	"trainerd/server/servertest"
)

// deterministic drops the metrics that depend on time or memory.
func deterministic(s client.Step) map[string]float64 {
	out := map[string]float64{}
	for name, v := range s.Metrics {
		if !sagrpo.IsTiming(name) {
			out[name] = v
		}
	}
	return out
}

// TestCrashLosesNothing starts a second server on what a crash would leave and
// holds it against the first, which went on: weights published as bfloat16, a
// snapshot in the middle of the log, groups of two iterations, open groups.
func TestCrashLosesNothing(t *testing.T) {
	const n = 3
	first := servertest.Start(t, servertest.Options{Wrap: described(t)})
	c, ctx := connect(t, first)
	j := create(t, c, ctx, first.JobDocument(n, map[string]any{
		"objective":  map[string]any{"name": "sa_grpo", "group_size": n, "iterations": 2, "beta": 0.05},
		"batch":      map[string]any{"groups_per_step": 2, "max_tokens_per_micro_batch": 64, "max_policy_lag": -1, "group_timeout": "1h"},
		"checkpoint": map[string]any{"snapshot_every_steps": 3, "dtype": "BF16", "keep_last": 0},
	}))
	for i := range uint64(3) {
		if _, err := c.Submit(ctx, j.ID, servertest.Batch("g"+string(rune('a'+i)), 2, n, 0, i), "key"+string(rune('a'+i))); err != nil {
			t.Fatal(err)
		}
	}
	open := servertest.Batch("open", 2, n, 0, 5)
	rest := *open
	rest.Rollouts = open.Rollouts[n+1:]
	open.Rollouts = open.Rollouts[:n+1] // one group whole, one row of another
	if _, err := c.Submit(ctx, j.ID, open, ""); err != nil {
		t.Fatal(err)
	}
	// Steps 1 to 6 are three consumptions; the snapshot is of step 4.
	j = await(t, c, ctx, j.ID, "rest", func(j client.Job) bool { return j.PolicyStep == 6 && j.State == "waiting" })

	second := first.Crash(t)
	c2, ctx2 := connect(t, second)
	j2 := await(t, c2, ctx2, j.ID, "the restored job", func(j client.Job) bool { return j.State == "waiting" })
	if j2.Step != 6 || j2.PolicyStep != 6 {
		t.Errorf("restored at step %d, policy step %d", j2.Step, j2.PolicyStep)
	}
	if d := cmp.Diff([]any{j.Queue, j.Counts}, []any{j2.Queue, j2.Counts}); d != "" {
		t.Errorf("restored queue and counts (-before +after):\n%s", d)
	}
	for seq := range uint64(4) {
		a, err := c.Batch(ctx, j.ID, seq+1)
		if err != nil {
			t.Fatal(err)
		}
		b, err := c2.Batch(ctx2, j.ID, seq+1)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(a, b); d != "" {
			t.Errorf("batch %d (-before +after):\n%s", seq+1, d)
		}
	}
	snapshots := 0
	all, err := c2.Checkpoints(ctx2, j.ID)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range all {
		if m.Snapshot && m.Step == 4 {
			snapshots++
		}
	}
	if snapshots != 1 {
		t.Fatalf("no snapshot of step 4: the test replays nothing: %+v", all)
	}

	// An accepted key is still accepted; the same further work gives the same bits.
	goOn := func(c *client.Client, ctx context.Context) client.Step {
		t.Helper()
		if r, err := c.Submit(ctx, j.ID, servertest.Batch("gb", 2, n, 0, 1), "keyb"); err != nil || r.Batch != 2 {
			t.Errorf("repeated key: %+v, %v", r, err)
		}
		if r, err := c.Submit(ctx, j.ID, &rest, ""); err != nil || r.GroupsCompleted != 1 {
			t.Errorf("the rest of the open group: %+v, %v", r, err)
		}
		await(t, c, ctx, j.ID, "step 8", func(j client.Job) bool { return j.Step == 8 })
		steps, err := c.Steps(ctx, j.ID, 7)
		if err != nil || len(steps) != 1 {
			t.Fatalf("%d steps, %v", len(steps), err)
		}
		return steps[0]
	}
	a, b := goOn(c, ctx), goOn(c2, ctx2)
	if d := cmp.Diff(deterministic(a), deterministic(b)); d != "" {
		t.Errorf("step 8 (-never crashed +restored):\n%s", d)
	}
	if d := cmp.Diff(a.Groups, b.Groups); d != "" {
		t.Errorf("groups of step 8:\n%s", d)
	}
}

// TestGracefulRestart stops and starts a server: active jobs go on, ended ones
// keep their records, a paused one stays paused.
func TestGracefulRestart(t *testing.T) {
	const n = 2
	e := servertest.Start(t, servertest.Options{Wrap: described(t)})
	c, ctx := connect(t, e)
	done := create(t, c, ctx, e.JobDocument(n, map[string]any{"max_steps": 1}))
	paused := create(t, c, ctx, e.JobDocument(n, nil))
	for _, id := range []string{done.ID, paused.ID} {
		if _, err := c.Submit(ctx, id, servertest.Batch("a", 3, n, 0, 1), ""); err != nil {
			t.Fatal(err)
		}
	}
	await(t, c, ctx, done.ID, "the end", func(j client.Job) bool { return j.State == "finished" })
	await(t, c, ctx, paused.ID, "step 1", func(j client.Job) bool { return j.Step == 1 })
	if _, err := c.Pause(ctx, paused.ID); err != nil {
		t.Fatal(err)
	}
	e.Stop()
	e.Boot(t)
	c, ctx = connect(t, e)
	j := await(t, c, ctx, paused.ID, "paused again", func(j client.Job) bool { return j.State == "paused" })
	if j.Step != 1 || j.Queue.GroupsComplete != 1 {
		t.Errorf("paused job at step %d, %+v", j.Step, j.Queue)
	}
	m, err := c.Checkpoint(ctx, paused.ID, client.Latest)
	if err != nil || m.Step != 1 || !m.Snapshot {
		t.Errorf("a stop leaves a snapshot: %+v, %v", m, err)
	}
	if _, err := c.Resume(ctx, paused.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Flush(ctx, paused.ID); err != nil {
		t.Fatal(err)
	}
	await(t, c, ctx, paused.ID, "step 2", func(j client.Job) bool { return j.Step == 2 })

	j, err = c.Wait(ctx, done.ID, 0, func(j client.Job) bool { return j.Counts.GroupsTrained > 0 && j.PolicyStep >= 0 })
	if err != nil || j.State != "finished" || j.Step != 1 || j.PolicyStep != 1 || j.Counts.GroupsRefused["job_finished"] != 1 {
		t.Errorf("finished job: %s at %d/%d, %+v, %v", j.State, j.Step, j.PolicyStep, j.Counts, err)
	}
	if _, err := c.Sample(ctx, done.ID, client.SampleRequest{Prompts: [][]int32{{1}}}); client.Code(err) != "not_loaded" {
		t.Errorf("sample of an ended job after a restart: %v", err)
	}
}

// TestRestartWithoutTheModel starts a server whose job's base model is not there:
// the job says so, keeps what it has, and goes on once the model is back.
func TestRestartWithoutTheModel(t *testing.T) {
	const n = 2
	e := servertest.Start(t, servertest.Options{Wrap: described(t)})
	c, ctx := connect(t, e)
	j := create(t, c, ctx, e.JobDocument(n, nil))
	if _, err := c.Submit(ctx, j.ID, servertest.Batch("a", 3, n, 0, 1), ""); err != nil {
		t.Fatal(err)
	}
	await(t, c, ctx, j.ID, "step 1", func(j client.Job) bool { return j.PolicyStep == 1 })
	e.Stop()
	if err := os.Rename(e.ModelDir, e.ModelDir+".away"); err != nil {
		t.Fatal(err)
	}
	e.Boot(t)
	c, ctx = connect(t, e)
	j = await(t, c, ctx, j.ID, "an error", func(j client.Job) bool { return j.LastError != nil })
	if j.State != "loading" || j.LastError.Code != "restore_failed" || j.Step != 1 {
		t.Errorf("job %s at step %d: %+v", j.State, j.Step, j.LastError)
	}
	if err := os.Rename(e.ModelDir+".away", e.ModelDir); err != nil {
		t.Fatal(err)
	}
	await(t, c, ctx, j.ID, "the model", func(j client.Job) bool { return j.State == "waiting" })
	if _, err := c.Flush(ctx, j.ID); err != nil {
		t.Fatal(err)
	}
	await(t, c, ctx, j.ID, "step 2", func(j client.Job) bool { return j.Step == 2 })
}

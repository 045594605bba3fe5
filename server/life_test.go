package server_test

import (
	"context"
	"path/filepath"
	"testing"
	"time"

	"trainerd/client"
	"trainerd/model/hf"
	"trainerd/rollout/arrowio"
	"trainerd/server/servertest"
)

// connect returns a client of a test server and a context that ends with patience.
func connect(t *testing.T, e *servertest.Env) (*client.Client, context.Context) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	c, err := client.New(e.URL, client.Options{Retries: 3})
	if err != nil {
		t.Fatal(err)
	}
	return c, ctx
}

// create makes a job and waits until it is loaded and published its step 0.
func create(t *testing.T, c *client.Client, ctx context.Context, doc any) client.Job {
	t.Helper()
	j, err := c.CreateJob(ctx, doc, "")
	if err != nil {
		t.Fatal(err)
	}
	return await(t, c, ctx, j.ID, "step 0 published", func(j client.Job) bool { return j.PolicyStep >= 0 })
}

func await(t *testing.T, c *client.Client, ctx context.Context, id, what string, cond func(client.Job) bool) client.Job {
	t.Helper()
	j, err := c.Wait(ctx, id, 5*time.Millisecond, func(j client.Job) bool { return cond(j) || j.Final() })
	if err != nil {
		t.Fatalf("wait for %s: %v", what, err)
	}
	if !cond(j) {
		t.Fatalf("wait for %s: job is %s: %+v", what, j.State, j.LastError)
	}
	return j
}

func TestJobLife(t *testing.T) {
	e := servertest.Start(t, servertest.Options{Wrap: described(t)})
	c, ctx := connect(t, e)
	const n = 3
	j := create(t, c, ctx, e.JobDocument(n, map[string]any{"max_steps": 3}))

	// Two complete groups are one step.
	r, err := c.Submit(ctx, j.ID, servertest.Batch("a", 2, n, 0, 1), "")
	if err != nil {
		t.Fatal(err)
	}
	if r.Batch != 1 || r.Rows != 2*n || r.GroupsCompleted != 2 || r.PolicyStep != 0 {
		t.Errorf("receipt %+v", r)
	}
	j = await(t, c, ctx, j.ID, "step 1 published", func(j client.Job) bool { return j.PolicyStep == 1 })
	b, err := c.Batch(ctx, j.ID, r.Batch)
	if err != nil {
		t.Fatal(err)
	}
	for _, g := range b.Groups {
		if g.Status != "trained" || g.Step == nil || *g.Step != 1 {
			t.Errorf("group %+v, expected trained in step 1", g)
		}
	}

	// Pause: a full step's worth waits. Resume: it is trained.
	if j, err = c.Pause(ctx, j.ID); err != nil || j.State != "paused" {
		t.Fatalf("pause: %v, state %s", err, j.State)
	}
	if _, err := c.Submit(ctx, j.ID, servertest.Batch("b", 2, n, 1, 2), ""); err != nil {
		t.Fatal(err)
	}
	if j, err = c.Job(ctx, j.ID); err != nil || j.Step != 1 || j.Queue.GroupsComplete != 2 {
		t.Fatalf("paused job: %v, step %d, queue %+v", err, j.Step, j.Queue)
	}
	if _, err = c.Resume(ctx, j.ID); err != nil {
		t.Fatal(err)
	}
	await(t, c, ctx, j.ID, "step 2", func(j client.Job) bool { return j.Step == 2 })

	// Flush: one group is less than a step wants.
	if _, err := c.Submit(ctx, j.ID, servertest.Batch("c", 1, n, 1, 3), ""); err != nil {
		t.Fatal(err)
	}
	if groups, err := c.Flush(ctx, j.ID); err != nil || groups != 1 {
		t.Fatalf("flush: %d groups, %v", groups, err)
	}
	j = await(t, c, ctx, j.ID, "the end", func(j client.Job) bool { return j.State == "finished" })
	if j.Step != 3 || j.PolicyStep != 3 || j.Counts.GroupsTrained != 5 {
		t.Errorf("finished job: step %d, policy step %d, %+v", j.Step, j.PolicyStep, j.Counts)
	}
	if _, err := c.Submit(ctx, j.ID, servertest.Batch("d", 1, n, 1, 3), ""); client.Code(err) != "job_finished" {
		t.Errorf("rollouts to a finished job: %v, expected job_finished", err)
	}
	if _, err := c.Pause(ctx, j.ID); client.Code(err) != "job_finished" {
		t.Errorf("pause of a finished job: %v, expected job_finished", err)
	}

	steps, err := c.Steps(ctx, j.ID, 0)
	if err != nil || len(steps) != 3 {
		t.Fatalf("%d steps, %v", len(steps), err)
	}
	for i, s := range steps {
		for _, name := range []string{"loss", "reward/mean", "grad_norm", "lr", "entropy"} {
			if _, ok := s.Metrics[name]; !ok || s.Step != int64(i+1) {
				t.Errorf("step %d (record %d) has no finite %q", s.Step, i, name)
			}
		}
	}

	// A finished job still samples, and scores its own samples alike.
	seed := uint64(5)
	one := 1.0
	req := client.SampleRequest{Prompts: [][]int32{{0, 5, 9}, {0, 7}}, N: 2, MaxTokens: 6, Temperature: &one, Seed: &seed}
	got, err := c.Sample(ctx, j.ID, req)
	if err != nil {
		t.Fatal(err)
	}
	again, err := c.Sample(ctx, j.ID, req)
	if err != nil {
		t.Fatal(err)
	}
	if got.PolicyStep != 3 || len(got.Completions) != 4 {
		t.Fatalf("sampled %d completions at step %d", len(got.Completions), got.PolicyStep)
	}
	var rows []arrowio.ScoreRow
	for i, s := range got.Completions {
		if len(s.Tokens) == 0 || len(s.Tokens) != len(s.LogProbs) || !equal(s.Tokens, again.Completions[i].Tokens) {
			t.Errorf("completion %d: %v, again %v", i, s.Tokens, again.Completions[i].Tokens)
		}
		rows = append(rows, arrowio.ScoreRow{Prompt: req.Prompts[s.Prompt], Completion: s.Tokens})
	}
	scored, step, err := c.LogProbs(ctx, j.ID, rows)
	if err != nil || step != 3 {
		t.Fatalf("logprobs at step %d: %v", step, err)
	}
	for i, s := range scored {
		for k := range s.LogProbs {
			// Both are float32 forward passes of two layers; the order of sums differs.
			if d := float64(s.LogProbs[k] - got.Completions[i].LogProbs[k]); d > 1e-4 || d < -1e-4 {
				t.Errorf("row %d token %d: scored %v, sampled %v", i, k, s.LogProbs[k], got.Completions[i].LogProbs[k])
			}
		}
	}

	// The newest checkpoint is a Hugging Face directory.
	dir := filepath.Join(t.TempDir(), "policy")
	m, err := c.Pull(ctx, j.ID, client.Latest, dir)
	if err != nil || m.Step != 3 {
		t.Fatalf("pull step %d: %v", m.Step, err)
	}
	pulled, err := hf.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer pulled.Close()
	if pulled.Config().Vocab != servertest.TinyConfig().Vocab {
		t.Errorf("pulled config %+v", pulled.Config())
	}
	// Cancelling what has finished frees its memory and leaves its state.
	if j, err := c.Cancel(ctx, j.ID); err != nil || j.State != "finished" {
		t.Errorf("cancel a finished job: %v, state %s", err, j.State)
	}
	if _, err := c.Sample(ctx, j.ID, req); client.Code(err) != "not_loaded" {
		t.Errorf("sample without a model: %v, expected not_loaded", err)
	}
	// What its batches became is kept, their rows are not.
	keeps(t, e, j.ID)
	if b, err := c.Batch(ctx, j.ID, 1); err != nil || b.Groups[0].Status != "trained" {
		t.Errorf("batch 1 of a finished job: %+v, %v", b, err)
	}
}

func equal(a, b []int32) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i] != b[i] {
			return false
		}
	}
	return true
}

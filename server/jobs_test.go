package server_test

import (
	"slices"
	"strings"
	"testing"

	"trainerd/client"
	"trainerd/server/servertest"
)

func TestTwoJobsShareTheDevice(t *testing.T) {
	const n = 2
	e := servertest.Start(t, servertest.Options{Wrap: described(t)})
	c, ctx := connect(t, e)
	a := create(t, c, ctx, e.JobDocument(n, map[string]any{"name": "a"}))
	b := create(t, c, ctx, e.JobDocument(n, map[string]any{"name": "b", "optimizer": map[string]any{"lr": 5e-3}}))
	for i := range uint64(3) {
		for _, id := range []string{a.ID, b.ID} {
			if _, err := c.Submit(ctx, id, servertest.Batch("g"+string(rune('a'+i)), 2, n, -1, i), ""); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, id := range []string{a.ID, b.ID} {
		j := await(t, c, ctx, id, "step 3", func(j client.Job) bool { return j.PolicyStep == 3 })
		if j.Counts.GroupsTrained != 6 || j.Counts.MissingPolicyStep != 6*n {
			t.Errorf("job %s: %+v", j.Name, j.Counts)
		}
	}
	jobs, err := c.Jobs(ctx)
	if err != nil || len(jobs) != 2 || jobs[0].ID != a.ID {
		t.Errorf("jobs: %v, %v", jobs, err)
	}

	// One is cancelled with work in its queue; the other goes on.
	if _, err := c.Submit(ctx, a.ID, servertest.Batch("z", 1, n, 3, 9), ""); err != nil {
		t.Fatal(err)
	}
	a, err = c.Cancel(ctx, a.ID)
	if err != nil || a.State != "cancelled" || a.Queue != (client.Queue{}) || a.Counts.GroupsRefused["job_cancelled"] != 1 {
		t.Errorf("cancel: %v, %s, %+v, %+v", err, a.State, a.Queue, a.Counts)
	}
	if s, err := c.Batch(ctx, a.ID, 4); err != nil || s.Groups[0].Status != "refused" || s.Groups[0].Reason != "job_cancelled" {
		t.Errorf("batch of a cancelled job: %+v, %v", s, err)
	}
	if _, err := c.Submit(ctx, b.ID, servertest.Batch("z", 2, n, 3, 9), ""); err != nil {
		t.Fatal(err)
	}
	await(t, c, ctx, b.ID, "step 4 published", func(j client.Job) bool { return j.PolicyStep == 4 })
	if _, err := c.Submit(ctx, a.ID, servertest.Batch("y", 2, n, 3, 9), ""); client.Code(err) != "job_cancelled" {
		t.Errorf("rollouts to a cancelled job: %v", err)
	}

	// A third starts from the second's newest checkpoint.
	d := create(t, c, ctx, e.JobDocument(n, map[string]any{"model": map[string]any{"source": "job:" + b.ID + "@latest"}}))
	if !strings.Contains(string(d.Document), `"resolved_source":"job:`+b.ID+`@4"`) {
		t.Errorf("document %s", d.Document)
	}
}

// TestSourceOfFinishingJob creates a job from the newest checkpoint of another
// the moment that one has done its last step.
func TestSourceOfFinishingJob(t *testing.T) {
	const n = 2
	e := servertest.Start(t, servertest.Options{Wrap: described(t)})
	c, ctx := connect(t, e)
	a := create(t, c, ctx, e.JobDocument(n, map[string]any{"max_steps": 2, "checkpoint": map[string]any{"publish_every_steps": 2}}))
	if _, err := c.Submit(ctx, a.ID, servertest.Batch("a", 4, n, 0, 1), ""); err != nil {
		t.Fatal(err)
	}
	await(t, c, ctx, a.ID, "the last step", func(j client.Job) bool { return j.Step == 2 })
	b, err := c.CreateJob(ctx, e.JobDocument(n, map[string]any{"model": map[string]any{"source": "job:" + a.ID + "@latest"}}), "")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(b.Document), `"resolved_source":"job:`+a.ID+`@2"`) {
		t.Errorf("document %s", b.Document)
	}
	all, err := c.Checkpoints(ctx, a.ID)
	if err != nil || len(all) != 2 {
		t.Errorf("%d checkpoints, %v; expected steps 0 and 2, once each", len(all), err)
	}
}

func TestStaleGroupsAreRefused(t *testing.T) {
	const n = 2
	e := servertest.Start(t, servertest.Options{Wrap: described(t)})
	c, ctx := connect(t, e)
	j := create(t, c, ctx, e.JobDocument(n, map[string]any{"batch": map[string]any{"groups_per_step": 1, "max_tokens_per_micro_batch": 64, "max_policy_lag": 1}}))
	// Three steps' worth of step 0: the third would lag by two.
	if _, err := c.Submit(ctx, j.ID, servertest.Batch("a", 3, n, 0, 1), ""); err != nil {
		t.Fatal(err)
	}
	j = await(t, c, ctx, j.ID, "refusal", func(j client.Job) bool { return j.Counts.GroupsRefused["policy_lag"] == 1 })
	if j.Step != 2 || j.Counts.GroupsTrained != 2 {
		t.Errorf("step %d, %+v", j.Step, j.Counts)
	}
	s, err := c.Batch(ctx, j.ID, 1)
	if err != nil || len(s.Groups) != 3 || s.Groups[2].Status != "refused" || s.Groups[2].Reason != "policy_lag" || *s.Groups[1].Step != 2 {
		t.Errorf("batch %+v, %v", s, err)
	}
}

func TestIncompleteGroupsAreSettled(t *testing.T) {
	const n = 3
	e := servertest.Start(t, servertest.Options{Wrap: described(t)})
	c, ctx := connect(t, e)
	for _, what := range []string{"drop", "train"} {
		j := create(t, c, ctx, e.JobDocument(n, map[string]any{"batch": map[string]any{
			"groups_per_step": 1, "max_tokens_per_micro_batch": 64, "group_timeout": "50ms", "incomplete": what}}))
		b := servertest.Batch("a", 1, n, 0, 1)
		b.Rollouts = b.Rollouts[:2]
		r, err := c.Submit(ctx, j.ID, b, "")
		if err != nil || r.GroupsOpen != 1 || r.GroupsCompleted != 0 {
			t.Fatalf("submit: %+v, %v", r, err)
		}
		if what == "drop" {
			j = await(t, c, ctx, j.ID, "drop", func(j client.Job) bool { return j.Counts.GroupsRefused["group_timeout"] == 1 })
			if j.Step != 0 || j.Queue.Rollouts != 0 {
				t.Errorf("dropped: step %d, %+v", j.Step, j.Queue)
			}
		} else {
			await(t, c, ctx, j.ID, "step 1", func(j client.Job) bool { return j.Step == 1 && j.Counts.GroupsIncomplete == 1 })
		}
	}
}

func TestFailedStepFailsItsJobOnly(t *testing.T) {
	const n = 2
	e := servertest.Start(t, servertest.Options{Wrap: described(t)})
	c, ctx := connect(t, e)
	good := create(t, c, ctx, e.JobDocument(n, nil))
	bad := create(t, c, ctx, e.JobDocument(n, nil))
	b := servertest.Batch("a", 2, n, 0, 1)
	for i := range b.Rollouts {
		b.Rollouts[i].Reward = float64(i % 2)
		b.Rollouts[i].SamplerLogProbs = slices.Repeat([]float32{-200}, len(b.Rollouts[i].Completion)) // no float32 has the ratio to that
	}
	if _, err := c.Submit(ctx, bad.ID, b, ""); err != nil {
		t.Fatal(err)
	}
	j, err := c.Wait(ctx, bad.ID, 0, client.Job.Final)
	if err != nil || j.State != "failed" || j.LastError == nil || j.Step != 0 {
		t.Fatalf("job %s at step %d: %+v, %v", j.State, j.Step, j.LastError, err)
	}
	if j.Counts.GroupsRefused["job_failed"] != 2 {
		t.Errorf("counts %+v", j.Counts)
	}
	if _, err := c.Submit(ctx, good.ID, servertest.Batch("a", 2, n, 0, 1), ""); err != nil {
		t.Fatal(err)
	}
	await(t, c, ctx, good.ID, "step 1", func(j client.Job) bool { return j.Step == 1 })
}

func TestRetention(t *testing.T) {
	const n = 2
	e := servertest.Start(t, servertest.Options{Wrap: described(t)})
	c, ctx := connect(t, e)
	j := create(t, c, ctx, e.JobDocument(n, map[string]any{
		"batch":      map[string]any{"groups_per_step": 1, "max_tokens_per_micro_batch": 64, "max_policy_lag": 100},
		"checkpoint": map[string]any{"keep_last": 2, "keep_every": 4, "snapshot_every_steps": 5, "dtype": "BF16"},
	}))
	if _, err := c.Submit(ctx, j.ID, servertest.Batch("a", 8, n, 0, 1), ""); err != nil {
		t.Fatal(err)
	}
	await(t, c, ctx, j.ID, "step 8", func(j client.Job) bool { return j.PolicyStep == 8 })
	// Deletion follows publication, so the last of it may still be under way.
	var steps []int64
	for range 200 {
		all, err := c.Checkpoints(ctx, j.ID)
		if err != nil {
			t.Fatal(err)
		}
		steps = steps[:0]
		for _, m := range all {
			steps = append(steps, m.Step)
			if m.Snapshot != (m.Step == 5) {
				t.Errorf("step %d: snapshot %v", m.Step, m.Snapshot)
			}
		}
		if len(steps) == 5 {
			break
		}
	}
	// 0, 4 and 8 by keep_every, 7 and 8 by keep_last, 5 as the newest snapshot.
	want := []int64{0, 4, 5, 7, 8}
	if len(steps) != len(want) {
		t.Fatalf("steps %v, expected %v", steps, want)
	}
	for i := range want {
		if steps[i] != want[i] {
			t.Errorf("steps %v, expected %v", steps, want)
		}
	}
}

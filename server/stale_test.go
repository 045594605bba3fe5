package server_test

import (
	"context"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"trainerd/client"
	"trainerd/rollout"
	"trainerd/server/servertest"
)

// lagging is a job of one group a step that lets groups lag by one step.
func lagging(e *servertest.Env, stale, timeout string) map[string]any {
	return e.JobDocument(2, map[string]any{
		"batch": map[string]any{"groups_per_step": 1, "max_tokens_per_micro_batch": 64, "max_policy_lag": 1, "stale": stale, "group_timeout": timeout},
	})
}

// post submits a group, or some rows of it, sampled at a step.
func post(t *testing.T, c *client.Client, ctx context.Context, id, group string, step int64, from, to int) {
	t.Helper()
	b := servertest.Batch(group, 1, 2, step, 1)
	b.Rollouts = b.Rollouts[from:to]
	if _, err := c.Submit(ctx, id, b, ""); err != nil {
		t.Fatal(err)
	}
}

// groups says where each group of the first n batches is.
func groups(t *testing.T, c *client.Client, ctx context.Context, id string, n uint64) map[string]string {
	t.Helper()
	out := map[string]string{}
	for seq := range n {
		b, err := c.Batch(ctx, id, seq+1)
		if err != nil {
			t.Fatal(err)
		}
		for _, g := range b.Groups {
			out[g.ID] = g.Status
			if g.Reason != "" {
				out[g.ID] += " " + g.Reason
			}
		}
	}
	return out
}

// TestAStepWaitsForAnOpenGroup holds a step back until the group that it would
// have made too stale is complete, and finds the same counts after a restart.
func TestAStepWaitsForAnOpenGroup(t *testing.T) {
	e := servertest.Start(t, servertest.Options{})
	c, ctx := connect(t, e)
	j := create(t, c, ctx, lagging(e, rollout.StaleDelay, "1h"))
	post(t, c, ctx, j.ID, "late", 0, 0, 1)
	post(t, c, ctx, j.ID, "a", 0, 0, 2)
	await(t, c, ctx, j.ID, "step 1", func(j client.Job) bool { return j.PolicyStep == 1 })
	post(t, c, ctx, j.ID, "b", 1, 0, 2) // a second step would make late lag by 2
	time.Sleep(100 * time.Millisecond)
	if j, err := c.Job(ctx, j.ID); err != nil || j.Step != 1 || j.Queue.GroupsComplete != 1 || j.State != "waiting" {
		t.Errorf("%s at step %d with %+v, expected it to wait; %v", j.State, j.Step, j.Queue, err)
	}
	post(t, c, ctx, j.ID, "late", 0, 1, 2)
	j = await(t, c, ctx, j.ID, "step 3", func(j client.Job) bool { return j.PolicyStep == 3 && j.State == "waiting" })
	if d := cmp.Diff(client.StaleCounts{Delayed: 1}, j.Counts.Stale); d != "" {
		t.Error(d)
	}
	steps, err := c.Steps(ctx, j.ID, 0)
	if err != nil || len(steps) != 3 || steps[1].Groups[0] != "late-0" || steps[2].Groups[0] != "b-0" {
		t.Errorf("steps %+v, %v; expected the group that was waited for to go first", steps, err)
	}
	families := scrape(t, e.URL)["trainerd_stale_groups_total"]
	for _, m := range families.GetMetric() {
		want := 0.0
		if m.Label[0].GetValue() == "delayed" || m.Label[1].GetValue() == "delayed" {
			want = 1
		}
		if m.Counter.GetValue() != want {
			t.Errorf("metric %v", m)
		}
	}
	after := e.Crash(t)
	c, ctx = connect(t, after)
	if again := await(t, c, ctx, j.ID, "the restored job", func(j client.Job) bool { return j.State == "waiting" }); cmp.Diff(j.Counts, again.Counts) != "" {
		t.Errorf("counts after a restart (-before +after):\n%s", cmp.Diff(j.Counts, again.Counts))
	}
}

// TestAWaitEndsWithTheGroup gives up on an open group when its time is over.
func TestAWaitEndsWithTheGroup(t *testing.T) {
	e := servertest.Start(t, servertest.Options{})
	c, ctx := connect(t, e)
	j := create(t, c, ctx, lagging(e, rollout.StaleDelay, "1500ms"))
	post(t, c, ctx, j.ID, "late", 0, 0, 1)
	began := time.Now()
	post(t, c, ctx, j.ID, "a", 0, 0, 2)
	post(t, c, ctx, j.ID, "b", 0, 0, 2)
	await(t, c, ctx, j.ID, "step 2", func(j client.Job) bool { return j.Step == 2 })
	// The clock began when the row was received, which was before began was taken.
	if took := time.Since(began); took < time.Second {
		t.Errorf("the second step was done after %v, before the group's time was over", took)
	}
	want := map[string]string{"a-0": "trained", "b-0": "trained", "late-0": "refused group_timeout"}
	if d := cmp.Diff(want, groups(t, c, ctx, j.ID, 3)); d != "" {
		t.Error(d)
	}
}

func TestStaleGroupsAreRejectedOrAdmitted(t *testing.T) {
	for stale, tc := range map[string]struct {
		counts client.StaleCounts
		old    string
	}{
		rollout.StaleReject: {client.StaleCounts{Rejected: 1}, "refused policy_lag"},
		rollout.StaleAdmit:  {client.StaleCounts{Admitted: 1}, "trained"},
	} {
		t.Run(stale, func(t *testing.T) {
			e := servertest.Start(t, servertest.Options{})
			c, ctx := connect(t, e)
			j := create(t, c, ctx, lagging(e, stale, "0s"))
			post(t, c, ctx, j.ID, "a", 0, 0, 2)
			post(t, c, ctx, j.ID, "b", 0, 0, 2)
			await(t, c, ctx, j.ID, "step 2", func(j client.Job) bool { return j.Step == 2 })
			post(t, c, ctx, j.ID, "old", 0, 0, 2)
			post(t, c, ctx, j.ID, "new", 2, 0, 2)
			// The old group alone is no step when it is rejected.
			j = await(t, c, ctx, j.ID, "the new group", func(j client.Job) bool {
				return j.State == "waiting" && j.Queue.Rollouts == 0 && j.Counts.Rollouts == 8
			})
			if d := cmp.Diff(tc.counts, j.Counts.Stale); d != "" {
				t.Error(d)
			}
			want := map[string]string{"a-0": "trained", "b-0": "trained", "old-0": tc.old, "new-0": "trained"}
			if d := cmp.Diff(want, groups(t, c, ctx, j.ID, 4)); d != "" {
				t.Error(d)
			}
		})
	}
}

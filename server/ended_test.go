package server_test

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"trainerd/client"
	"trainerd/server/servertest"
)

// keeps waits until an ended job's directory has one file.
func keeps(t *testing.T, e *servertest.Env, id string) {
	t.Helper()
	for end := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		entries, err := os.ReadDir(filepath.Join(e.DataDir, "jobs", id))
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, e := range entries {
			names = append(names, e.Name())
		}
		if slices.Equal(names, []string{"ended.bin"}) {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("an ended job keeps %q, expected ended.bin", names)
		}
	}
}

// TestEndedJobsAnswerFromOneFile: what a finished and a cancelled job took can
// be asked for after their logs are gone, and after a restart.
func TestEndedJobsAnswerFromOneFile(t *testing.T) {
	const n = 2
	e := servertest.Start(t, servertest.Options{Wrap: described(t)})
	c, ctx := connect(t, e)
	finished := create(t, c, ctx, e.JobDocument(n, map[string]any{"max_steps": 1}))
	cancelled := create(t, c, ctx, e.JobDocument(n, nil))
	for _, id := range []string{finished.ID, cancelled.ID} {
		if _, err := c.Submit(ctx, id, servertest.Batch("a", 3, n, -1, 1), "key"); err != nil {
			t.Fatal(err)
		}
	}
	await(t, c, ctx, finished.ID, "the end", func(j client.Job) bool { return j.State == "finished" })
	await(t, c, ctx, cancelled.ID, "step 1", func(j client.Job) bool { return j.Step == 1 && j.PolicyStep == 1 })

	if _, err := c.Cancel(ctx, cancelled.ID); err != nil {
		t.Fatal(err)
	}
	keeps(t, e, finished.ID)
	keeps(t, e, cancelled.ID)
	look := func(e *servertest.Env) {
		t.Helper()
		c2, ctx2 := connect(t, e)
		for id, want := range map[string]struct{ state, status, reason string }{
			finished.ID: {"finished", "trained", "job_finished"}, cancelled.ID: {"cancelled", "trained", "job_cancelled"},
		} {
			j, err := c2.Wait(ctx2, id, 5*time.Millisecond, func(j client.Job) bool { return j.Final() })
			if err != nil || j.State != want.state || j.Step != 1 || j.PolicyStep != 1 || j.Counts.Batches != 1 || j.Counts.GroupsRefused[want.reason] != 1 {
				t.Fatalf("%+v, %v", j, err)
			}
			b, err := c2.Batch(ctx2, id, 1)
			if err != nil || len(b.Groups) != 3 || b.Groups[0].Status != want.status || b.Groups[2].Reason != want.reason {
				t.Errorf("batch of the %s job: %+v, %v", want.state, b, err)
			}
			if r, err := c2.Submit(ctx2, id, servertest.Batch("a", 3, n, -1, 1), "key"); err != nil || r.Batch != 1 {
				t.Errorf("the same key again in the %s job: %+v, %v", want.state, r, err)
			}
			if _, err := c2.Submit(ctx2, id, servertest.Batch("b", 1, n, -1, 2), "new"); client.Code(err) != "job_"+want.state {
				t.Errorf("a new batch for the %s job: %v", want.state, err)
			}
			keeps(t, e, id)
		}
	}
	look(e)
	e.Stop()
	e.Boot(t)
	look(e)

	// Damage is said in the log and harms nobody else.
	path := filepath.Join(e.DataDir, "jobs", cancelled.ID, "ended.bin")
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	raw[len(raw)/2] ^= 1
	if err := os.WriteFile(path, raw, 0o644); err != nil {
		t.Fatal(err)
	}
	again := e.Crash(t)
	c3, ctx3 := connect(t, again)
	for id, state := range map[string]string{finished.ID: "finished", cancelled.ID: "cancelled"} {
		if j, err := c3.Wait(ctx3, id, 5*time.Millisecond, func(j client.Job) bool { return j.Final() }); err != nil || j.State != state {
			t.Errorf("%+v, %v", j, err)
		}
	}
	if b, err := c3.Batch(ctx3, finished.ID, 1); err != nil || len(b.Groups) != 3 {
		t.Errorf("%+v, %v", b, err)
	}
}

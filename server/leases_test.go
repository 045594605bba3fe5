package server_test

import (
	"net/http"
	"strings"
	"testing"
	"time"

	"trainerd/client"
	"trainerd/server/servertest"
)

// step trains one step of a job whose groups have n rollouts.
func step(t *testing.T, c *client.Client, e *servertest.Env, id string, n int, to int64) {
	t.Helper()
	_, ctx := connect(t, e)
	if _, err := c.Submit(ctx, id, servertest.Batch("s"+time.Now().Format("150405.000000000"), 2, n, to-1, uint64(to)), ""); err != nil {
		t.Fatal(err)
	}
	await(t, c, ctx, id, "the step", func(j client.Job) bool { return j.PolicyStep == to })
}

func has(t *testing.T, c *client.Client, e *servertest.Env, id string, step int64) bool {
	t.Helper()
	_, ctx := connect(t, e)
	_, err := c.Checkpoint(ctx, id, step)
	if err != nil && client.Code(err) != "checkpoint_not_found" {
		t.Fatal(err)
	}
	return err == nil
}

// TestLeases keeps one checkpoint beyond what the policy keeps, over a restart
// and a renewal, until the lease ends; another one until its lease expires.
func TestLeases(t *testing.T) {
	const n = 2
	e := servertest.Start(t, servertest.Options{Wrap: described(t)})
	c, ctx := connect(t, e)
	j := create(t, c, ctx, e.JobDocument(n, map[string]any{"checkpoint": map[string]any{"keep_last": 1, "keep_every": 0, "snapshot_every_steps": 0}}))
	step(t, c, e, j.ID, n, 1)
	long, err := c.Lease(ctx, j.ID, 1, "node-a", time.Hour)
	if err != nil || long.Step != 1 || long.Holder != "node-a" || time.Until(long.Expires) < 50*time.Minute {
		t.Fatalf("%+v, %v", long, err)
	}
	if _, err := c.Lease(ctx, j.ID, 7, "node-a", time.Hour); client.Code(err) != "checkpoint_not_found" {
		t.Errorf("lease of what is not there: %v", err)
	}
	step(t, c, e, j.ID, n, 2)
	short, err := c.Lease(ctx, j.ID, 2, "node-b", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	step(t, c, e, j.ID, n, 3)
	step(t, c, e, j.ID, n, 4)
	gone := func(step int64) {
		t.Helper()
		await(t, c, ctx, j.ID, "retention", func(client.Job) bool { return !has(t, c, e, j.ID, step) })
	}
	gone(3)
	if !has(t, c, e, j.ID, 1) || !has(t, c, e, j.ID, 2) {
		t.Fatal("a leased checkpoint was deleted")
	}
	if _, err := c.Lease(ctx, j.ID, 3, "late", time.Hour); client.Code(err) != "checkpoint_not_found" && client.Code(err) != "checkpoint_going" {
		t.Errorf("lease of what is gone: %v", err)
	}

	e.Stop()
	e.Boot(t)
	c, ctx = connect(t, e)
	await(t, c, ctx, j.ID, "the job", func(j client.Job) bool { return j.State == "waiting" })
	all, err := c.Leases(ctx, j.ID, 1)
	if err != nil || len(all) != 1 || all[0] != long {
		t.Errorf("leases after a restart: %+v, %v; expected %+v", all, err, long)
	}
	again, err := c.Renew(ctx, j.ID, long, 2*time.Hour)
	if err != nil || again.ID != long.ID || !again.Expires.After(long.Expires) || !again.Created.Equal(long.Created) {
		t.Errorf("renewed: %+v, %v", again, err)
	}
	// What a lease spared goes when it ends, without another publication.
	if short, err = c.Renew(ctx, j.ID, short, time.Second); err != nil {
		t.Fatal(err)
	}
	gone(2)
	if left := time.Until(short.Expires); left > 0 {
		t.Errorf("deleted %v before the lease expired", left)
	}
	if !has(t, c, e, j.ID, 1) {
		t.Error("the other lease did not hold")
	}
	if err := c.Release(ctx, j.ID, again); err != nil {
		t.Fatal(err)
	}
	gone(1)
	for name, err := range map[string]error{
		"renew the released": func() error { _, err := c.Renew(ctx, j.ID, again, time.Hour); return err }(),
		"renew the expired":  func() error { _, err := c.Renew(ctx, j.ID, short, time.Hour); return err }(),
	} {
		if client.Code(err) != "lease_not_found" {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := c.Release(ctx, j.ID, again); err != nil {
		t.Errorf("release twice: %v", err)
	}
}

// TestLeasesAreBounded: a reader cannot make the store keep everything.
func TestLeasesAreBounded(t *testing.T) {
	e := servertest.Start(t, servertest.Options{Wrap: described(t)})
	c, ctx := connect(t, e)
	j := create(t, c, ctx, e.JobDocument(2, nil))
	url := e.URL + "/v1/jobs/" + j.ID + "/checkpoints/0/leases"
	for _, tc := range []struct {
		body, field string
		status      int
	}{
		{`{"holder":"a","ttl":"1h"}`, "", 201},
		{`{"holder":"a"}`, "", 201},
		{`{"holder":"","ttl":"1h"}`, "holder", 422},
		{`{"ttl":"1h"}`, "holder", 422},
		{`{"holder":"a b"}`, "holder", 422},
		{`{"holder":"` + strings.Repeat("a", 129) + `"}`, "holder", 422},
		{`{"holder":"a","ttl":"1ms"}`, "ttl", 422},
		{`{"holder":"a","ttl":"25h"}`, "ttl", 422},
		{`{"holder":"a","ttl":"-1h"}`, "ttl", 422},
		{`{"holder":"a","ttl":"soon"}`, "ttl", 422},
		{`{"holder":"a","why":"b"}`, "why", 422},
	} {
		status, p := exchange(t, http.MethodPost, url, []byte(tc.body), map[string]string{"Content-Type": "application/json"})
		if status != tc.status || tc.field != "" && (len(p.Errors) != 1 || p.Errors[0].Name != tc.field) {
			t.Errorf("%s: status %d, %+v", tc.body, status, p)
		}
	}
	quick, err := client.New(e.URL, client.Options{Retries: -1})
	if err != nil {
		t.Fatal(err)
	}
	held := 2
	for ; held < 2000; held++ {
		if _, err := quick.Lease(ctx, j.ID, 0, "many", time.Hour); err != nil {
			if client.Code(err) != "too_many_leases" {
				t.Fatal(err)
			}
			break
		}
	}
	if held != 256 {
		t.Errorf("%d leases, expected 256", held)
	}
}

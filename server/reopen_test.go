package server_test

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"trainerd/client"
	"trainerd/internal/fault"
	"trainerd/server/servertest"
)

// answers asks a probe until it has a status.
func answers(t *testing.T, e *servertest.Env, path string, status int) problem {
	t.Helper()
	var got int
	var body problem
	for deadline := time.Now().Add(2 * time.Minute); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if got, body = exchange(t, http.MethodGet, e.URL+path, nil, nil); got == status {
			return body
		}
	}
	t.Fatalf("%s answers %d %+v, expected %d", path, got, body, status)
	return problem{}
}

// TestDeviceThatStaysLost: a device that is lost and cannot be opened again in
// this process is said at /readyz at once and at /healthz after some tries, whether
// or not a job is left that asks for it. Where it opens after all, all is well again;
// else a new process goes on with the bits of a run that was never disturbed.
func TestDeviceThatStaysLost(t *testing.T) {
	const n, batches = 3, 2
	at := func(j client.Job) bool { return j.PolicyStep == 3*batches && j.State == "waiting" }
	e := servertest.Start(t, servertest.Options{})
	model := e.ModelDir
	c, ctx := connect(t, e)
	j := create(t, c, ctx, e.JobDocument(n, wholeJob(n, 1)))
	feed(t, c, ctx, j.ID, n, 0, batches, 1)
	await(t, c, ctx, j.ID, "the end", at)
	want := bits(t, c, ctx, j.ID)
	e.Stop()

	lose := func(t *testing.T, o servertest.Options) (*servertest.Env, *client.Client, context.Context, string) {
		t.Helper()
		o.ModelDir, o.WrapDevice = model, newFragile("lose")
		e := servertest.Start(t, o)
		c, ctx := connect(t, e)
		good := create(t, c, ctx, e.JobDocument(n, wholeJob(n, 1)))
		feed(t, c, ctx, good.ID, n, 0, 1, 1)
		await(t, c, ctx, good.ID, "step 3", func(j client.Job) bool { return j.PolicyStep == 3 })
		doc := wholeJob(n, 2)
		doc["optimizer"] = map[string]any{"lr": poison}
		bad := create(t, c, ctx, e.JobDocument(n, doc))
		feed(t, c, ctx, bad.ID, n, 0, 1, 2)
		if j, err := c.Wait(ctx, bad.ID, 0, client.Job.Final); err != nil || j.State != "failed" {
			t.Fatalf("the broken job is %s: %v", j.State, err)
		}
		return e, c, ctx, good.ID
	}
	unopened := fault.New(fault.Unavailable, "no_driver", "cuInit gives 999")

	t.Run("another process", func(t *testing.T) {
		var tries atomic.Int64
		e, c, ctx, good := lose(t, servertest.Options{BeforeReopen: func() error { tries.Add(1); return unopened }})
		if body := answers(t, e, "/readyz", http.StatusServiceUnavailable); body.Code != "device_unavailable" || !strings.Contains(body.Detail, "cuInit gives 999") {
			t.Errorf("/readyz: %+v", body)
		}
		if body := answers(t, e, "/healthz", http.StatusServiceUnavailable); body.Code != "device_unavailable" || !strings.Contains(body.Detail, "start the server anew") {
			t.Errorf("/healthz: %+v", body)
		}
		if tries.Load() < 5 {
			t.Errorf("/healthz gave the process up after %d tries", tries.Load())
		}
		if j, err := c.Job(ctx, good); err != nil || j.State != "loading" || j.LastError == nil || !strings.Contains(j.LastError.Message, "cuInit gives 999") {
			t.Errorf("the healthy job is %s, %+v, %v", j.State, j.LastError, err)
		}
		second := e.Crash(t)
		answers(t, second, "/healthz", http.StatusOK)
		answers(t, second, "/readyz", http.StatusOK)
		c, ctx = connect(t, second)
		await(t, c, ctx, good, "the restored job", func(j client.Job) bool { return j.State == "waiting" })
		feed(t, c, ctx, good, n, 1, batches, 1)
		await(t, c, ctx, good, "the end", at)
		if d := cmp.Diff(want, bits(t, c, ctx, good)); d != "" {
			t.Errorf("checkpoints (-undisturbed +after the restart):\n%s", d)
		}
	})

	t.Run("it opens after all", func(t *testing.T) {
		var dead atomic.Bool
		dead.Store(true)
		e, c, ctx, good := lose(t, servertest.Options{BeforeReopen: func() error {
			if dead.Load() {
				return errors.New("the card is busy")
			}
			return nil
		}})
		answers(t, e, "/healthz", http.StatusServiceUnavailable)
		if _, err := c.Cancel(ctx, good); err != nil { // now nobody needs the device
			t.Fatal(err)
		}
		dead.Store(false)
		answers(t, e, "/healthz", http.StatusOK)
		answers(t, e, "/readyz", http.StatusOK)
		if j := create(t, c, ctx, e.JobDocument(n, wholeJob(n, 1))); j.ID == "" {
			t.Error("no job can be created")
		}
	})
}

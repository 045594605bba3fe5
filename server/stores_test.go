package server_test

import (
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"trainerd/client"
	"trainerd/internal/fault"
	"trainerd/server/servertest"
	"trainerd/storage"
	"trainerd/storage/disk"
)

// ailing is a store whose writes fail while it is down.
type ailing struct {
	storage.Blob
	down *atomic.Bool
}

func (a ailing) Put(ctx context.Context, key string, r io.Reader, size int64, c storage.Condition) (storage.Info, error) {
	if a.down.Load() {
		return storage.Info{}, fault.New(fault.Unavailable, "store_down", "put %q: the disk is full", key)
	}
	return a.Blob.Put(ctx, key, r, size, c)
}

// TestStoreFailure takes the store away for a while: rollouts are still
// accepted, nothing is published, the job says why, and it goes on by itself.
func TestStoreFailure(t *testing.T) {
	const n = 2
	var down atomic.Bool
	e := servertest.Start(t, servertest.Options{Wrap: described(t), WrapStore: func(b storage.Blob) storage.Blob { return ailing{b, &down} }})
	c, ctx := connect(t, e)
	j := create(t, c, ctx, e.JobDocument(n, nil))
	down.Store(true)
	if _, err := c.Submit(ctx, j.ID, servertest.Batch("a", 2, n, 0, 1), ""); err != nil {
		t.Fatal(err)
	}
	j = await(t, c, ctx, j.ID, "an error of the store", func(j client.Job) bool { return j.LastError != nil && j.Step == 1 })
	if j.LastError.Code != "publish_failed" || !strings.Contains(j.LastError.Message, "the disk is full") || j.PolicyStep != 0 {
		t.Errorf("policy step %d, last error %+v", j.PolicyStep, j.LastError)
	}
	_, p := exchange(t, http.MethodPost, e.URL+"/v1/jobs/"+j.ID+"/checkpoints", nil, nil)
	p.want(t, 503, "publish_failed", "", -1)
	down.Store(false)
	await(t, c, ctx, j.ID, "step 1 published", func(j client.Job) bool { return j.PolicyStep == 1 })
	if all, err := c.Checkpoints(ctx, j.ID); err != nil || len(all) != 2 {
		t.Errorf("%d checkpoints, %v", len(all), err)
	}
}

func TestModelFromObjectStore(t *testing.T) {
	dir := servertest.WriteModel(t, servertest.TinyConfig(), 4, "BF16")
	e := servertest.Start(t, servertest.Options{Wrap: described(t), OpenStore: func(_ context.Context, url string) (storage.Blob, error) {
		if url != "s3://models/tiny" {
			return nil, errors.New("no such bucket")
		}
		return disk.Open(dir)
	}})
	c, ctx := connect(t, e)
	j := create(t, c, ctx, e.JobDocument(2, map[string]any{"model": map[string]any{"source": "s3://models/tiny"}}))
	if j.Architecture == nil || j.Architecture.DType != "BF16" || j.Architecture.Vocab != 64 {
		t.Errorf("architecture %+v", j.Architecture)
	}
	// Like every source that is not on this machine, a wrong one shows in the job.
	bad, err := c.CreateJob(ctx, e.JobDocument(2, map[string]any{"model": map[string]any{"source": "s3://models/none"}}), "")
	if err != nil {
		t.Fatal(err)
	}
	bad = await(t, c, ctx, bad.ID, "an error", func(j client.Job) bool { return j.LastError != nil })
	if !strings.Contains(bad.LastError.Message, "no such bucket") || bad.State != "loading" {
		t.Errorf("job %s, %+v", bad.State, bad.LastError)
	}
	if bad, err = c.Cancel(ctx, bad.ID); err != nil || bad.State != "cancelled" {
		t.Errorf("cancel while loading: %s, %v", bad.State, err)
	}
}

// signing is a store whose objects can be read elsewhere.
type signing struct{ storage.Blob }

func (signing) Presign(_ context.Context, key string, ttl time.Duration) (string, error) {
	return "http://store.example/" + key + "?ttl=" + ttl.String(), nil
}

func TestRedirectToTheStore(t *testing.T) {
	client := &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	for _, tc := range []struct {
		wrap   func(storage.Blob) storage.Blob
		status int
	}{
		{nil, 200},
		{func(b storage.Blob) storage.Blob { return signing{b} }, 307},
	} {
		e := servertest.Start(t, servertest.Options{Wrap: described(t), WrapStore: tc.wrap})
		c, ctx := connect(t, e)
		j := create(t, c, ctx, e.JobDocument(2, nil))
		res, err := client.Get(e.URL + "/v1/jobs/" + j.ID + "/checkpoints/0/files/hf/config.json?redirect=true")
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		want := "http://store.example/jobs/" + j.ID + "/checkpoints/00000000-0/hf/config.json?ttl=15m0s"
		if res.StatusCode != tc.status || tc.status == 307 && res.Header.Get("Location") != want {
			t.Errorf("status %d, location %q; expected %d", res.StatusCode, res.Header.Get("Location"), tc.status)
		}
	}
}

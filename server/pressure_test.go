package server_test

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"trainerd/client"
	"trainerd/server/servertest"
	"trainerd/storage"
	"trainerd/trainer"
)

// slow is a store that takes its time for weights.
type slow struct {
	storage.Blob
	each time.Duration
}

func (s slow) Put(ctx context.Context, key string, r io.Reader, size int64, c storage.Condition) (storage.Info, error) {
	if strings.HasSuffix(key, ".safetensors") {
		time.Sleep(s.each)
	}
	return s.Blob.Put(ctx, key, r, size, c)
}

// TestWhoWaitsAsToldGetsIn fills the queue of a job whose steps take the 600 ms
// that its store needs for each, and waits as long as a 429 says. There must be
// room then, and not long before: at least a third of the wait was needed. A
// busy machine makes steps longer, and later answers say so: two are allowed.
func TestWhoWaitsAsToldGetsIn(t *testing.T) {
	const n, each = 2, 600 * time.Millisecond
	e := servertest.Start(t, servertest.Options{Wrap: described(t), Limits: trainer.Limits{MaxQueuedRollouts: 16, MaxQueuedBytes: 1 << 20},
		WrapStore: func(b storage.Blob) storage.Blob { return slow{b, each} }})
	_, ctx := connect(t, e)
	c, err := client.New(e.URL, client.Options{Retries: -1}) // what the server says is for us to follow
	if err != nil {
		t.Fatal(err)
	}
	j := create(t, c, ctx, endless(e, 1, nil))
	refused := func(name string, groups int) time.Duration {
		t.Helper()
		_, err := c.Submit(ctx, j.ID, servertest.Batch(name, groups, n, 0, 1), "")
		if err == nil {
			return 0
		}
		var refusal *client.Error
		if !errors.As(err, &refusal) || refusal.Code != "queue_full" || refusal.RetryAfter < time.Second || refusal.RetryAfter > 10*time.Minute {
			t.Fatalf("refused with %v", err)
		}
		return refusal.RetryAfter
	}
	submit(t, c, ctx, j.ID, "a", 4)
	await(t, c, ctx, j.ID, "a pace", func(j client.Job) bool { return j.Step == 4 })
	for i := 0; refused("fill"+string(rune('a'+i)), 2) == 0; i++ {
	}
	began := time.Now()
	room := make(chan time.Duration, 1) // when three steps' worth had left
	go func() {
		await(t, c, ctx, j.ID, "room", func(j client.Job) bool { return j.Queue.Rollouts <= 16-6*n })
		room <- time.Since(began)
	}()
	first := refused("late", 6)
	if first == 0 {
		t.Fatal("the queue is not full")
	}
	tries := 0
	for wait := first; wait > 0; wait = refused("late", 6) {
		if tries++; tries > 2 {
			t.Fatalf("still refused after two waits, the first of %v", first)
		}
		time.Sleep(wait)
	}
	if real := <-room; real < first/3 {
		t.Errorf("told to wait %v, there was room after %v", first, real)
	}
	t.Logf("told %v, in after %d waits and %v", first, tries, time.Since(began).Round(10*time.Millisecond))
}

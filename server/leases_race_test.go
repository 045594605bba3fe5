package server_test

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"trainerd/client"
	"trainerd/server/servertest"
	"trainerd/storage"
)

// slowDelete lets a test stand between the steps of a deletion.
type slowDelete struct {
	storage.Blob
	mu    sync.Mutex
	hold  chan struct{} // nil: deletions pass
	begun chan string
	fail  bool
}

func (s *slowDelete) Delete(ctx context.Context, key string) error {
	s.mu.Lock()
	hold, fail := s.hold, s.fail
	s.mu.Unlock()
	if hold != nil && strings.HasSuffix(key, "/manifest.json") {
		s.begun <- key
		<-hold
	}
	if fail && strings.HasSuffix(key, "/manifest.json") {
		return errors.New("the reply was lost")
	}
	return s.Blob.Delete(ctx, key)
}

func (s *slowDelete) set(hold chan struct{}, fail bool) {
	s.mu.Lock()
	s.hold, s.fail = hold, fail
	s.mu.Unlock()
}

// TestLeaseAgainstDeletion: while retention deletes a checkpoint, and after a
// deletion whose end is not known, a lease is refused; once it is gone there is
// none; and the other way round a lease that was given stops the deletion.
func TestLeaseAgainstDeletion(t *testing.T) {
	const n = 2
	blob := &slowDelete{begun: make(chan string, 8)}
	e := servertest.Start(t, servertest.Options{Wrap: described(t), WrapStore: func(b storage.Blob) storage.Blob { blob.Blob = b; return blob }})
	c, ctx := connect(t, e)
	j := create(t, c, ctx, e.JobDocument(n, map[string]any{"checkpoint": map[string]any{"keep_last": 1, "keep_every": 0, "snapshot_every_steps": 0}}))
	step(t, c, e, j.ID, n, 1)
	await(t, c, ctx, j.ID, "retention", func(client.Job) bool { return !has(t, c, e, j.ID, 0) })

	hold := make(chan struct{})
	blob.set(hold, true)
	step(t, c, e, j.ID, n, 2)
	if key := <-blob.begun; !strings.Contains(key, "00000001-") {
		t.Fatalf("deletes %s", key)
	}
	if _, err := c.Lease(ctx, j.ID, 1, "late", time.Hour); client.Code(err) != "checkpoint_going" {
		t.Errorf("lease of what is being deleted: %v", err)
	}
	blob.set(nil, true)
	close(hold)
	// The store's answer was lost: the manifest may go at any time.
	for range 20 {
		if _, err := c.Lease(ctx, j.ID, 1, "later", time.Hour); client.Code(err) != "checkpoint_going" {
			t.Fatalf("lease after a deletion that failed: %v", err)
		}
		time.Sleep(5 * time.Millisecond)
	}
	blob.set(nil, false)
	held, err := c.Lease(ctx, j.ID, 2, "first", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	step(t, c, e, j.ID, n, 3) // retention tries 1 again, and spares 2
	await(t, c, ctx, j.ID, "retention", func(client.Job) bool { return !has(t, c, e, j.ID, 1) })
	await(t, c, ctx, j.ID, "the end of the deletion", func(client.Job) bool {
		_, err := c.Lease(ctx, j.ID, 1, "latest", time.Hour)
		if code := client.Code(err); code != "checkpoint_not_found" && code != "checkpoint_going" {
			t.Fatal(err)
		}
		return client.Code(err) == "checkpoint_not_found"
	})
	if !has(t, c, e, j.ID, 2) {
		t.Errorf("%+v did not hold", held)
	}
}

// TestLeaseRaces takes leases while retention runs: each that is given holds.
func TestLeaseRaces(t *testing.T) {
	const n = 2
	e := servertest.Start(t, servertest.Options{})
	c, ctx := connect(t, e)
	j := create(t, c, ctx, e.JobDocument(n, map[string]any{"checkpoint": map[string]any{"keep_last": 1, "keep_every": 0, "snapshot_every_steps": 0}}))
	const steps = 12
	var mu sync.Mutex
	given := map[int64]client.Lease{}
	refused := 0
	var readers sync.WaitGroup
	stop := make(chan struct{})
	for range 3 {
		readers.Add(1)
		go func() {
			defer readers.Done()
			for {
				select {
				case <-stop:
					return
				default:
				}
				m, err := c.Checkpoint(ctx, j.ID, client.Latest)
				if err != nil {
					continue
				}
				at := max(m.Step-1, 0) // what retention is after
				l, err := c.Lease(ctx, j.ID, at, "reader", time.Hour)
				mu.Lock()
				switch code := client.Code(err); {
				case err == nil && given[at].ID == "":
					given[at] = l
				case err == nil:
					c.Release(ctx, j.ID, l)
				case code == "checkpoint_not_found", code == "checkpoint_going":
					refused++
				case ctx.Err() == nil:
					t.Errorf("lease of %d: %v", at, err)
				}
				mu.Unlock()
			}
		}()
	}
	for s := range int64(steps) {
		step(t, c, e, j.ID, n, s+1)
	}
	close(stop)
	readers.Wait()
	l, err := c.Lease(ctx, j.ID, steps, "last", time.Hour) // one at least
	if err != nil {
		t.Fatal(err)
	}
	given[steps] = l
	t.Logf("%d leases given, %d refused", len(given), refused)
	for at := range given {
		if !has(t, c, e, j.ID, at) {
			t.Errorf("step %d is gone although it was leased", at)
		}
	}
}

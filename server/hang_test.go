package server_test

import (
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"trainerd/client"
	"trainerd/server/servertest"
)

// TestStepsGoOnWhileTheDiskHangs: while the sync of an upload does not return,
// and others queue up behind it, what is complete is taken, trained and recorded,
// and the job answers. None of the uploads is accepted meanwhile; all are afterwards.
func TestStepsGoOnWhileTheDiskHangs(t *testing.T) {
	const n, uploads = 2, 5
	const timeout = 200 * time.Millisecond // of a group that never fills: its settling waits for the log too
	var hang atomic.Bool
	hung, free := make(chan struct{}, 64), make(chan struct{})
	release := sync.OnceFunc(func() { hang.Store(false); close(free) })
	e := servertest.Start(t, servertest.Options{BeforeSync: func() {
		if hang.Load() {
			hung <- struct{}{}
			<-free
		}
	}})
	t.Cleanup(release)
	c, ctx := connect(t, e)
	doc := endless(e, 1000, nil)
	doc["batch"].(map[string]any)["group_timeout"] = timeout.String()
	j := create(t, c, ctx, doc)
	await(t, c, ctx, j.ID, "step 0", func(j client.Job) bool { return j.PolicyStep >= 0 })
	if _, err := c.Pause(ctx, j.ID); err != nil {
		t.Fatal(err)
	}
	submit(t, c, ctx, j.ID, "before", 3) // two groups each, a step each
	if _, err := c.Submit(ctx, j.ID, servertest.Batch("lone", 1, n-1, 0, 9), ""); err != nil {
		t.Fatal(err)
	}

	hang.Store(true)
	accepted := make(chan error, uploads)
	for i := range uploads {
		go func() {
			_, err := c.Submit(ctx, j.ID, servertest.Batch("hung"+string(rune('a'+i)), 2, n, 0, uint64(i)), "")
			accepted <- err
		}()
	}
	select {
	case <-hung:
	case <-time.After(20 * time.Second):
		t.Fatal("no upload came to its sync")
	}
	time.Sleep(2 * timeout) // the lone row's time is over before a step may begin
	if _, err := c.Resume(ctx, j.ID); err != nil {
		t.Fatal(err)
	}
	got := await(t, c, ctx, j.ID, "three steps", func(j client.Job) bool { return j.Step == 3 })
	if got.Counts.Rollouts != 3*2*n+n-1 || got.Queue.Rollouts != n-1 {
		t.Errorf("%d rows counted, %d queued, expected %d and %d", got.Counts.Rollouts, got.Queue.Rollouts, 3*2*n+n-1, n-1)
	}
	select {
	case err := <-accepted:
		t.Errorf("an upload was answered before it was synced: %v", err)
	default:
	}
	release()
	for range uploads {
		if err := <-accepted; err != nil {
			t.Error(err)
		}
	}
	got = await(t, c, ctx, j.ID, "all steps", func(j client.Job) bool { return j.Step == 3+uploads && j.Queue.Rollouts == 0 })
	if got.Counts.GroupsRefused["group_timeout"] != 1 {
		t.Errorf("refused %v, expected the lone row's group", got.Counts.GroupsRefused)
	}
}

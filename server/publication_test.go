package server_test

import (
	"context"
	"fmt"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"trainerd/client"
	"trainerd/internal/fault"
	"trainerd/server/servertest"
	"trainerd/storage"
	"trainerd/trainer"
)

// gated is a store that keeps weights waiting while the gate is shut.
type gated struct {
	storage.Blob
	mu      sync.Mutex
	shut    chan struct{} // nil: open
	waiting atomic.Int32
}

func (g *gated) close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.shut = make(chan struct{})
}

func (g *gated) open() {
	g.mu.Lock()
	defer g.mu.Unlock()
	close(g.shut)
	g.shut = nil
}

func (g *gated) Put(ctx context.Context, key string, r io.Reader, size int64, c storage.Condition) (storage.Info, error) {
	g.mu.Lock()
	shut := g.shut
	g.mu.Unlock()
	if shut != nil && strings.HasSuffix(key, ".safetensors") {
		g.waiting.Add(1)
		defer g.waiting.Add(-1)
		select {
		case <-shut:
		case <-ctx.Done():
			return storage.Info{}, ctx.Err()
		}
	}
	return g.Blob.Put(ctx, key, r, size, c)
}

func startGated(t *testing.T, l trainer.Limits) (*servertest.Env, *gated) {
	t.Helper()
	g := &gated{}
	e := servertest.Start(t, servertest.Options{Wrap: described(t), Limits: l, WrapStore: func(b storage.Blob) storage.Blob { g.Blob = b; return g }})
	return e, g
}

// submit posts n batches of a step each, of policy step 0.
func submit(t *testing.T, c *client.Client, ctx context.Context, id, name string, n int) {
	t.Helper()
	for i := range n {
		if _, err := c.Submit(ctx, id, servertest.Batch(fmt.Sprintf("%s%d", name, i), 2, 2, 0, uint64(i)), ""); err != nil {
			t.Fatal(err)
		}
	}
}

// endless is a job without a limit of lag that publishes every so many steps.
func endless(e *servertest.Env, every int, extra map[string]any) map[string]any {
	doc := e.JobDocument(2, map[string]any{
		"batch":      map[string]any{"groups_per_step": 2, "max_tokens_per_micro_batch": 64, "max_policy_lag": -1},
		"checkpoint": map[string]any{"publish_every_steps": every, "keep_last": 0, "snapshot_every_steps": 2},
	})
	for k, v := range extra {
		doc[k] = v
	}
	return doc
}

// TestTrainingGoesOnWhileACheckpointIsWritten holds a publication up: the steps
// until the next one is due are done meanwhile, that one waits, and none is left out.
func TestTrainingGoesOnWhileACheckpointIsWritten(t *testing.T) {
	e, g := startGated(t, trainer.Limits{})
	c, ctx := connect(t, e)
	j := create(t, c, ctx, endless(e, 3, nil))
	g.close()
	submit(t, c, ctx, j.ID, "a", 8)
	// The publication of step 3 is under way at 6 steps, and step 7 has to wait for it.
	j = await(t, c, ctx, j.ID, "six steps", func(j client.Job) bool { return j.Step == 6 && g.waiting.Load() == 1 })
	if p := j.Publication; j.PolicyStep != 0 || p.Step == nil || *p.Step != 3 || p.HostBytes == 0 || p.Holds != "" || p.Synchronous != 0 {
		t.Errorf("policy step %d, publication %+v", j.PolicyStep, p)
	}
	time.Sleep(50 * time.Millisecond)
	if j, err := c.Job(ctx, j.ID); err != nil || j.Step != 6 {
		t.Errorf("step %d although the checkpoint of step 6 cannot begin, %v", j.Step, err)
	}
	g.open()
	j = await(t, c, ctx, j.ID, "the rest", func(j client.Job) bool { return j.Step == 8 && j.PolicyStep == 6 && j.Publication.Step == nil })
	if p := j.Publication; p.Waits != 1 || p.WaitSeconds < 0.05 || p.HostBytes != 0 || p.CaptureSeconds <= 0 {
		t.Errorf("publication %+v, expected one wait of 50 ms or more", p)
	}
	all, err := c.Checkpoints(ctx, j.ID)
	if err != nil {
		t.Fatal(err)
	}
	var steps []int64
	for _, m := range all {
		steps = append(steps, m.Step)
	}
	if d := cmp.Diff([]int64{0, 3, 6}, steps); d != "" {
		t.Errorf("published steps:\n%s", d)
	}
}

// TestCapturedCheckpointsAreThoseOfTheDevice trains the same rollouts with
// captures and without room for one: every file of every checkpoint is the same.
func TestCapturedCheckpointsAreThoseOfTheDevice(t *testing.T) {
	// Four checkpoints of two files; one is a snapshot, and has exact weights besides when hf/ is rounded.
	for dtype, want := range map[string]int{"F32": 9, "BF16": 11} {
		t.Run(dtype, func(t *testing.T) {
			files := func(l trainer.Limits, synchronous int64, holds string) map[string]string {
				e := servertest.Start(t, servertest.Options{Wrap: described(t), Limits: l})
				c, ctx := connect(t, e)
				j := create(t, c, ctx, endless(e, 1, map[string]any{
					"objective":  map[string]any{"name": "sa_grpo", "group_size": 2, "beta": 0.05},
					"checkpoint": map[string]any{"keep_last": 0, "snapshot_every_steps": 2, "dtype": dtype},
				}))
				submit(t, c, ctx, j.ID, "a", 3)
				j = await(t, c, ctx, j.ID, "step 3 published", func(j client.Job) bool { return j.PolicyStep == 3 })
				if p := j.Publication; p.Synchronous != synchronous || !strings.Contains(p.Holds, holds) || (holds == "") != (p.Holds == "") {
					t.Errorf("%+v, expected %d synchronous checkpoints because of %q", p, synchronous, holds)
				}
				all, err := c.Checkpoints(ctx, j.ID)
				if err != nil {
					t.Fatal(err)
				}
				out := map[string]string{}
				for _, m := range all {
					for _, f := range m.Files {
						if f.Name == "state/queue.bin" { // names the job
							continue
						}
						out[fmt.Sprint(m.Step, " ", f.Name)] = f.SHA256
					}
				}
				return out
			}
			captured := files(trainer.Limits{}, 0, "")
			device := files(trainer.Limits{MaxCaptureBytes: 1}, 4, "max_capture_bytes")
			if d := cmp.Diff(device, captured); d != "" || len(captured) != want {
				t.Errorf("%d files (-device +captured):\n%s", len(captured), d)
			}
		})
	}
}

// sometimes is a store that fails one file of every checkpoint while there are failures left.
type sometimes struct {
	storage.Blob
	name     string
	failures atomic.Int32
	puts     sync.Map // key -> times it was written whole
}

func (s *sometimes) Put(ctx context.Context, key string, r io.Reader, size int64, c storage.Condition) (storage.Info, error) {
	if strings.HasSuffix(key, s.name) && s.failures.Add(-1) >= 0 {
		return storage.Info{}, fault.New(fault.Unavailable, "store_down", "put %q: no route to host", key)
	}
	info, err := s.Blob.Put(ctx, key, r, size, c)
	if err == nil {
		n, _ := s.puts.LoadOrStore(key, new(atomic.Int32))
		n.(*atomic.Int32).Add(1)
	}
	return info, err
}

// TestAPublicationIsRepeated fails the store in the middle of a checkpoint: the
// job says so and trains on, and what was written stays written.
func TestAPublicationIsRepeated(t *testing.T) {
	for _, name := range []string{"optimizer.bin", "manifest.json", "latest.json"} {
		t.Run(name, func(t *testing.T) {
			s := &sometimes{name: name}
			e := servertest.Start(t, servertest.Options{Wrap: described(t), WrapStore: func(b storage.Blob) storage.Blob { s.Blob = b; return s }})
			c, ctx := connect(t, e)
			j := create(t, c, ctx, endless(e, 2, nil))
			s.failures.Store(1 << 30)
			submit(t, c, ctx, j.ID, "a", 3)
			// Step 3 is done while the checkpoint of step 2 is tried again.
			j = await(t, c, ctx, j.ID, "an error of the store", func(j client.Job) bool { return j.LastError != nil && j.Step == 3 })
			if j.LastError.Code != "publish_failed" || !strings.Contains(j.LastError.Message, "no route to host") || j.PolicyStep != 0 {
				t.Errorf("policy step %d, %+v", j.PolicyStep, j.LastError)
			}
			s.failures.Store(0)
			j = await(t, c, ctx, j.ID, "step 2 published", func(j client.Job) bool { return j.PolicyStep == 2 })
			if j.LastError != nil || j.Publication.Retries < 1 {
				t.Errorf("last error %+v, %+v", j.LastError, j.Publication)
			}
			weights := 0
			s.puts.Range(func(key, n any) bool {
				if k := key.(string); strings.Contains(k, "/00000002-") && strings.HasSuffix(k, "model.safetensors") {
					weights += int(n.(*atomic.Int32).Load())
				}
				return true
			})
			if weights != 1 {
				t.Errorf("the weights of step 2 were written %d times", weights)
			}
		})
	}
}

// TestEndsWithAPublicationUnderWay cancels, stops and finishes jobs whose
// checkpoint does not get to the store.
func TestEndsWithAPublicationUnderWay(t *testing.T) {
	t.Run("cancel", func(t *testing.T) {
		e, g := startGated(t, trainer.Limits{})
		c, ctx := connect(t, e)
		j := create(t, c, ctx, endless(e, 2, nil))
		g.close()
		submit(t, c, ctx, j.ID, "a", 2)
		await(t, c, ctx, j.ID, "a publication", func(client.Job) bool { return g.waiting.Load() == 1 })
		if j, err := c.Cancel(ctx, j.ID); err != nil || j.State != "cancelled" || j.PolicyStep != 0 || j.Publication.Step != nil {
			t.Errorf("%s at policy step %d, %+v, %v", j.State, j.PolicyStep, j.Publication, err)
		}
		if g.waiting.Load() != 0 {
			t.Error("the upload of a cancelled job goes on")
		}
	})
	t.Run("finish", func(t *testing.T) {
		e, g := startGated(t, trainer.Limits{})
		c, ctx := connect(t, e)
		j := create(t, c, ctx, endless(e, 2, map[string]any{"max_steps": 3}))
		g.close()
		submit(t, c, ctx, j.ID, "a", 3)
		await(t, c, ctx, j.ID, "the last step", func(j client.Job) bool { return j.Step == 3 })
		g.open()
		if j = await(t, c, ctx, j.ID, "the end", func(j client.Job) bool { return j.State == "finished" }); j.PolicyStep != 3 {
			t.Errorf("finished at policy step %d", j.PolicyStep)
		}
	})
	t.Run("stop", func(t *testing.T) {
		e, g := startGated(t, trainer.Limits{})
		c, ctx := connect(t, e)
		j := create(t, c, ctx, endless(e, 2, nil))
		g.close()
		submit(t, c, ctx, j.ID, "a", 3)
		await(t, c, ctx, j.ID, "three steps", func(j client.Job) bool { return j.Step == 3 && g.waiting.Load() == 1 })
		stopped := make(chan struct{})
		go func() { defer close(stopped); e.Stop() }()
		select {
		case <-stopped:
			t.Error("the server stopped without the checkpoint that was under way")
		case <-time.After(50 * time.Millisecond):
		}
		g.open()
		<-stopped
		e.Boot(t)
		c, ctx = connect(t, e)
		// What was under way was published, and after it the snapshot of the stop.
		j = await(t, c, ctx, j.ID, "the restored job", func(j client.Job) bool { return j.State == "waiting" })
		all, err := c.Checkpoints(ctx, j.ID)
		if err != nil || len(all) != 3 || all[1].Step != 2 || all[2].Step != 3 || !all[2].Snapshot {
			t.Errorf("%+v, %v", all, err)
		}
	})
}

// TestPublishNowWaitsItsTurn asks for a checkpoint while another is under way.
func TestPublishNowWaitsItsTurn(t *testing.T) {
	e, g := startGated(t, trainer.Limits{})
	c, ctx := connect(t, e)
	j := create(t, c, ctx, endless(e, 2, nil))
	g.close()
	submit(t, c, ctx, j.ID, "a", 3)
	await(t, c, ctx, j.ID, "three steps", func(j client.Job) bool { return j.Step == 3 && g.waiting.Load() == 1 })
	type answer struct {
		m   storage.Manifest
		err error
	}
	got := make(chan answer, 1)
	go func() { m, err := c.Publish(ctx, j.ID, true); got <- answer{m, err} }()
	select {
	case a := <-got:
		t.Fatalf("published %d before the one under way: %v", a.m.Step, a.err)
	case <-time.After(50 * time.Millisecond):
	}
	g.open()
	if a := <-got; a.err != nil || a.m.Step != 3 || !a.m.Snapshot || a.m.Parent == nil || *a.m.Parent != 2 {
		t.Errorf("%+v, %v", a.m, a.err)
	}
}

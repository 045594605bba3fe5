package server_test

import (
	"context"
	"encoding/json"
	"net/http"
	"strings"
	"testing"

	"trainerd/client"
	"trainerd/server/servertest"
)

// digests are those of a step's weights and optimizer state.
func digests(t *testing.T, c *client.Client, ctx context.Context, job string, step int64) (out [3]string) {
	t.Helper()
	m, err := c.Checkpoint(ctx, job, step)
	if err != nil {
		t.Fatal(err)
	}
	for i, name := range []string{"hf/model.safetensors", "state/weights/model.safetensors", "state/optimizer.bin"} {
		f, ok := m.File(name)
		if !ok {
			t.Fatalf("step %d of %s has no %s", step, job, name)
		}
		out[i] = f.SHA256
	}
	return out
}

// TestForkWithTrainingState: a fork at step 2 of a parent, fed what the parent
// got after it, has the parent's later weights and optimizer bit for bit, over a
// schedule, a reference that moves, and a crash of the fork; a fork of the
// weights alone has not. The same on compact moments and bfloat16 gradients.
func TestForkWithTrainingState(t *testing.T) {
	t.Run("float32", func(t *testing.T) {
		forkWithTrainingState(t, map[string]any{"moments": "float32", "gradients": "float32"})
	})
	t.Run("compact", func(t *testing.T) {
		forkWithTrainingState(t, map[string]any{"moments": "compact", "gradients": "bfloat16"})
	})
}

func forkWithTrainingState(t *testing.T, optimizer map[string]any) {
	const n = 3
	optimizer["lr"], optimizer["schedule"] = 1e-2, map[string]any{"name": "cosine", "warmup_steps": 3, "decay_steps": 6}
	e := servertest.Start(t, servertest.Options{Wrap: described(t), DType: "BF16"})
	c, ctx := connect(t, e)
	doc := func(model map[string]any) map[string]any {
		return e.JobDocument(n, map[string]any{
			"model": model,
			"objective": map[string]any{"name": "sa_grpo", "group_size": n, "beta": 0.05,
				"reference": map[string]any{"sync_every_steps": 3, "sync_alpha": 0.5}},
			"optimizer": optimizer,
			"batch":     map[string]any{"groups_per_step": 2, "max_tokens_per_micro_batch": 64, "max_policy_lag": -1},
			// A snapshot at every step: digests of all three.
			"checkpoint": map[string]any{"snapshot_every_steps": 1, "keep_last": 0},
		})
	}
	feed := func(c *client.Client, ctx context.Context, id string, from, to, base int64) {
		t.Helper()
		for s := from; s <= to; s++ {
			if _, err := c.Submit(ctx, id, servertest.Batch("s"+string(rune('a'+s)), 2, n, -1, uint64(s)), ""); err != nil {
				t.Fatal(err)
			}
			await(t, c, ctx, id, "step", func(j client.Job) bool { return j.PolicyStep == s-base })
		}
	}
	parent := create(t, c, ctx, doc(map[string]any{"source": "dir:" + e.ModelDir}))
	feed(c, ctx, parent.ID, 1, 5, 0)

	fork := create(t, c, ctx, doc(map[string]any{"source": "job:" + parent.ID + "@2", "state": "training"}))
	plain := create(t, c, ctx, doc(map[string]any{"source": "job:" + parent.ID + "@2"}))
	feed(c, ctx, fork.ID, 3, 4, 2)
	feed(c, ctx, plain.ID, 3, 4, 2)
	if got, want := digests(t, c, ctx, fork.ID, 2), digests(t, c, ctx, parent.ID, 4); got != want {
		t.Errorf("fork after two steps: %q, the parent has %q", got, want)
	}
	if got, want := digests(t, c, ctx, plain.ID, 2), digests(t, c, ctx, parent.ID, 4); got[0] == want[0] || got[2] == want[2] {
		t.Error("the optimizer's state makes no difference: the test shows nothing")
	}
	steps, err := c.Steps(ctx, fork.ID, 0)
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := c.Steps(ctx, parent.ID, 2)
	if err != nil {
		t.Fatal(err)
	}
	if len(steps) < 2 || steps[0].Metrics["lr"] != theirs[0].Metrics["lr"] || steps[1].Metrics["lr"] != theirs[1].Metrics["lr"] {
		t.Errorf("learning rates differ")
	}
	second := e.Crash(t)
	c2, ctx2 := connect(t, second)
	await(t, c2, ctx2, fork.ID, "the fork", func(j client.Job) bool { return j.State == "waiting" })
	feed(c2, ctx2, fork.ID, 5, 5, 2)
	if got, want := digests(t, c2, ctx2, fork.ID, 3), digests(t, c, ctx, parent.ID, 5); got != want {
		t.Errorf("fork after a crash: %q, the parent has %q", got, want)
	}
}

// TestForkReplaysFromItsSource: a fork that crashed before its first snapshot
// begins again with the source's training state, even when the source is gone.
func TestForkReplaysFromItsSource(t *testing.T) {
	const n = 2
	e := servertest.Start(t, servertest.Options{Wrap: described(t)})
	c, ctx := connect(t, e)
	keep := map[string]any{"keep_last": 1, "keep_every": 0, "snapshot_every_steps": 1}
	parent := create(t, c, ctx, e.JobDocument(n, map[string]any{"checkpoint": keep}))
	step(t, c, e, parent.ID, n, 1)
	fork := create(t, c, ctx, e.JobDocument(n, map[string]any{"model": map[string]any{"source": "job:" + parent.ID + "@latest", "state": "training"},
		"checkpoint": map[string]any{"snapshot_every_steps": 0, "keep_last": 0}}))
	step(t, c, e, fork.ID, n, 1)
	step(t, c, e, parent.ID, n, 2)
	await(t, c, ctx, parent.ID, "retention", func(client.Job) bool { return !has(t, c, e, parent.ID, 1) })
	before, err := c.Checkpoint(ctx, fork.ID, 1)
	if err != nil {
		t.Fatal(err)
	}
	second := e.Crash(t)
	c2, ctx2 := connect(t, second)
	j := await(t, c2, ctx2, fork.ID, "the fork", func(j client.Job) bool { return j.State == "waiting" })
	if j.Step != 1 {
		t.Errorf("at step %d", j.Step)
	}
	after, err := c2.Publish(ctx2, fork.ID, true)
	if err != nil {
		t.Fatal(err)
	}
	a, _ := before.File("hf/model.safetensors")
	b, _ := after.File("hf/model.safetensors")
	if a.SHA256 == "" || a.SHA256 != b.SHA256 {
		t.Errorf("replayed weights %s, published before %s", b.SHA256, a.SHA256)
	}
}

func TestForkRefusals(t *testing.T) {
	const n = 2
	e := servertest.Start(t, servertest.Options{Wrap: described(t)})
	c, ctx := connect(t, e)
	parent := create(t, c, ctx, e.JobDocument(n, map[string]any{"checkpoint": map[string]any{"snapshot_every_steps": 2, "keep_last": 0}}))
	for s := range int64(3) {
		step(t, c, e, parent.ID, n, s+1)
	}
	for _, tc := range []struct {
		model    map[string]any
		beta     float64
		expected string
		moments  string
	}{
		{map[string]any{"source": "dir:" + e.ModelDir, "state": "training"}, 0, "job:ID@STEP", "float32"},
		{map[string]any{"source": "job:" + parent.ID + "@1", "state": "training"}, 0, "of steps 2", "float32"},
		{map[string]any{"source": "job:" + parent.ID + "@2", "state": "everything"}, 0, "weights, training", "float32"},
		{map[string]any{"source": "job:" + parent.ID + "@2", "state": "training"}, 0.1, "reference", "float32"},
		{map[string]any{"source": "job:job-0123456789abcdef@latest", "state": "training"}, 0, "has none", "float32"},
		{map[string]any{"source": "job:" + parent.ID + "@2", "state": "training"}, 0, "float32, as in the source's state", "compact"},
	} {
		field := "model.state"
		if tc.moments != "float32" {
			field = "optimizer.moments"
		}
		raw, err := json.Marshal(e.JobDocument(n, map[string]any{"model": tc.model, "optimizer": map[string]any{"moments": tc.moments},
			"objective": map[string]any{"name": "sa_grpo", "group_size": n, "beta": tc.beta}}))
		if err != nil {
			t.Fatal(err)
		}
		status, p := exchange(t, http.MethodPost, e.URL+"/v1/jobs", raw, map[string]string{"Content-Type": "application/json"})
		if status != 422 || len(p.Errors) != 1 || p.Errors[0].Name != field || !strings.Contains(p.Errors[0].Expected, tc.expected) {
			t.Errorf("%v: %d, %+v", tc.model, status, p)
		}
	}
	// latest is the newest with state.
	fork := create(t, c, ctx, e.JobDocument(n, map[string]any{"model": map[string]any{"source": "job:" + parent.ID + "@latest", "state": "training"}}))
	if !strings.Contains(string(fork.Document), `"resolved_source":"job:`+parent.ID+`@2"`) {
		t.Errorf("%s", fork.Document)
	}
}

// TestHostMomentsOnTheCPU: moments beside the device's memory are refused where there is
// none beside it, by name, and nothing is made.
func TestHostMomentsOnTheCPU(t *testing.T) {
	e := servertest.Start(t, servertest.Options{Wrap: described(t)})
	raw, err := json.Marshal(e.JobDocument(2, map[string]any{"optimizer": map[string]any{"moments_in": "host"}}))
	if err != nil {
		t.Fatal(err)
	}
	status, p := exchange(t, http.MethodPost, e.URL+"/v1/jobs", raw, map[string]string{"Content-Type": "application/json"})
	if status != 422 || len(p.Errors) != 1 || p.Errors[0].Name != "optimizer.moments_in" || !strings.Contains(p.Errors[0].Expected, "device on cpu") {
		t.Errorf("%d, %+v", status, p)
	}
}

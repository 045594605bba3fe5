package server_test

import (
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"

	"trainerd/client"
	"trainerd/kernels/hostmem"
	"trainerd/server/servertest"
	"trainerd/trainer"
)

// TestLargeCaptures publishes snapshots of a model whose capture is large enough to be
// memory of its own, which a card writes to itself, and holds them against those of a
// server without memory for captures, which writes straight from the device: the same bits.
func TestLargeCaptures(t *testing.T) {
	cfg := servertest.TinyConfig()
	cfg.Hidden, cfg.FFN, cfg.Heads, cfg.KVHeads, cfg.HeadDim, cfg.InitStd = 128, 512, 4, 2, 32, 0.05
	dir := servertest.WriteModel(t, cfg, 3, "F32")
	const params = 64*128 + 128 + 2*(2*128+2*128*128+2*64*128+3*512*128)
	// The least that a snapshot captures: a float32 of each weight and both moments.
	if params*12 < hostmem.Large {
		t.Fatalf("a capture of %d parameters is not large", params)
	}
	run := func(l trainer.Limits) (map[string]string, *servertest.Env) {
		e := servertest.Start(t, servertest.Options{ModelDir: dir, Limits: l})
		c, ctx := connect(t, e)
		j := create(t, c, ctx, endless(e, 1, map[string]any{"checkpoint": map[string]any{"publish_every_steps": 1, "snapshot_every_steps": 1, "keep_last": 0, "dtype": "BF16"}}))
		for step := range int64(2) { // one after the other, so that the second capture takes the memory of the first
			if _, err := c.Submit(ctx, j.ID, servertest.Batch(fmt.Sprintf("b%d", step), 2, 2, 0, uint64(step)), ""); err != nil {
				t.Fatal(err)
			}
			await(t, c, ctx, j.ID, "a published step", func(j client.Job) bool { return j.PolicyStep == step+1 })
		}
		if j, err := c.Job(ctx, j.ID); err != nil || (j.Publication.Synchronous > 0) != (l.MaxCaptureBytes == 1) {
			t.Errorf("limit %d: %v, %d checkpoints were written while training waited", l.MaxCaptureBytes, err, j.Publication.Synchronous)
		}
		return bits(t, c, ctx, j.ID), e
	}
	got, e := run(trainer.Limits{})
	if n := metric(t, e, "trainerd_capture_pin_failures_total", ""); n != 0 {
		t.Errorf("the device refused the memory of %v captures", n)
	}
	want, _ := run(trainer.Limits{MaxCaptureBytes: 1})
	if diff := cmp.Diff(want, got); diff != "" || len(got) < 4 {
		t.Errorf("captured checkpoints differ from those written straight from the device (-device +captured), or are fewer than 4:\n%s\n%v", diff, got)
	}
}

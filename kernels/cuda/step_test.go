package cuda

import (
	"context"
	"fmt"
	"testing"

	"gorgonia.org/tensor"

	"trainerd/kernels"
	"trainerd/model"
	"trainerd/rollout"
	"trainerd/sagrpo"
)

// hollow is a recorder whose memory is all zeros, and which counts what makes the host wait for the card.
type hollow struct {
	*recorder
	syncs, waits, allocs, frees int
}

func (h *hollow) sync() error                    { h.syncs++; return nil }
func (h *hollow) wait(int) error                 { h.waits++; return nil }
func (h *hollow) alloc(n int64) (address, error) { h.allocs++; return h.recorder.alloc(n) }
func (h *hollow) free(a address) error           { h.frees++; return h.recorder.free(a) }
func (h *hollow) download(dst []byte, src address) error {
	clear(dst)
	if len(dst) == flagBytes {
		return h.recorder.download(dst, src)
	}
	return nil
}

// TestWaitsOfAStep: how often a step waits for the card does not depend on how
// many micro-batches it has.
func TestWaitsOfAStep(t *testing.T) {
	counts := map[int]hollow{}
	for _, groups := range []int{2, 9} {
		h := &hollow{recorder: &recorder{next: 1 << 20, room: 1 << 40, fail: map[string]error{}}}
		d, err := newDevice(kernels.Info{Name: "cuda:0"}, Options{}, func() (driver, error) { return h, nil })
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		cfg := model.Config{Type: "qwen2", Vocab: 50, Hidden: 32, FFN: 40, Layers: 2, Heads: 4, KVHeads: 2, HeadDim: 8, MaxPositions: 128,
			RopeTheta: 1e4, NormEps: 1e-6, Tied: true, QKVBias: true, InitStd: 0.1, BOS: -1}
		src, err := model.NewRandom(cfg, 3)
		if err != nil {
			t.Fatal(err)
		}
		m, err := model.Load(context.Background(), d, src, model.Options{Train: true, MaxTokens: 40})
		if err != nil {
			t.Fatal(err)
		}
		o := sagrpo.DefaultObjective("sa_grpo")
		o.GroupSize, o.Beta, o.Iterations, o.RewardWeights = 2, 0, 2, nil
		opt := sagrpo.DefaultOptimizer()
		e, err := sagrpo.NewEngine(m, sagrpo.Settings{Objective: o, Optimizer: opt, MaxTokens: 40})
		if err != nil {
			t.Fatal(err)
		}
		var work []rollout.Group
		for g := range groups {
			x := rollout.Group{ID: fmt.Sprint(g), Prompt: []int32{1, 2, 3, 4, 5, 6, 7, 8, 9, 10}}
			for i := range 2 {
				x.Rollouts = append(x.Rollouts, rollout.Rollout{GroupID: x.ID, Prompt: x.Prompt, Completion: []int32{3, 1, 4, 1, 5, 9, 2, 6, 5, 3}, Reward: float64(i)})
			}
			work = append(work, x)
		}
		c, err := e.Consume(context.Background(), work, 0)
		if err != nil {
			t.Fatal(err)
		}
		// The first step makes what lives as long as the device, the rotary frequencies.
		if _, _, err := c.Next(context.Background()); err != nil {
			t.Fatal(err)
		}
		before, launches := *h, len(h.launches)
		if _, _, err := c.Next(context.Background()); err != nil {
			t.Fatal(err)
		}
		launched := 0
		for _, l := range h.launches[launches:] {
			if l.kernel == "head_rows" {
				launched++
			}
		}
		if launched != groups {
			t.Fatalf("%d micro-batches, expected one for each of %d groups", launched, groups)
		}
		counts[groups] = hollow{syncs: h.syncs - before.syncs, waits: h.waits - before.waits, allocs: h.allocs - before.allocs, frees: h.frees - before.frees}
	}
	if few, many := counts[2], counts[9]; few != many {
		t.Errorf("2 micro-batches: %+v, 9: %+v", few, many)
	} else if few.syncs > 4 || few.waits+few.allocs+few.frees > 0 {
		t.Errorf("a step waits for the card by %+v, expected at most 4 syncs and nothing else", few)
	} else {
		t.Logf("a step waits for the card %d times", few.syncs)
	}
}

// TestFetch: what is fetched is there after Sync and not before an error is gone; what has no room is waited for.
func TestFetch(t *testing.T) {
	d, r := record(t)
	b := mustAlloc(t, d, kernels.F32, fetchBytes/4)
	got := make([]float32, 8)
	dense := func(x []float32) *tensor.Dense { return tensor.New(tensor.WithShape(len(x)), tensor.WithBacking(x)) }
	if err := d.Fetch(dense(got), b.Slice(0, 8)); err != nil {
		t.Fatal(err)
	}
	if err := d.Sync(); err != nil {
		t.Fatal(err)
	}
	if got[7] != words[float32]([]byte{0x7f, 0x7f, 0x7f, 0x7f})[0] {
		t.Errorf("after Sync the host has %v", got)
	}
	r.fail["swiglu_bf16"] = fmt.Errorf("boom")
	clear(got)
	if err := d.Fetch(dense(got), b.Slice(0, 8)); err != nil {
		t.Fatal(err)
	}
	x := mustAlloc(t, d, kernels.BF16, 80)
	d.SwiGLU(x.Slice(0, 40), x, 4, 10)
	if err := d.Sync(); err == nil || got[0] != 0 {
		t.Errorf("behind an error: %v, %v", err, got)
	}
	for range 2 {
		most := make([]float32, fetchBytes/4)
		if err := d.Fetch(dense(most), b); err != nil {
			t.Fatal(err)
		}
		if err := d.Fetch(dense(got), b.Slice(0, 8)); err != nil || got[0] == 0 {
			t.Errorf("what has no room was not waited for: %v, %v", err, got)
		}
		clear(got)
		if err := d.Sync(); err != nil || most[0] == 0 {
			t.Errorf("the room was not handed over: %v, %v", err, most[0])
		}
	}
}

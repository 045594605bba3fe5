package server_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/google/go-cmp/cmp"

	"trainerd/client"
	"trainerd/rollout/arrowio"
	"trainerd/server/servertest"
)

// TestBodiesUsedAgainTrainTheSame: rows that are left in the body they came in, whose
// memory later bodies get while steps go on, train to the same numbers as rows
// that were unpacked into memory of their own.
func TestBodiesUsedAgainTrainTheSame(t *testing.T) {
	const batches, groups, n, tokens = 12, 8, 4, 90
	var bodies [2][][]byte // as they are, and compressed
	for i := range batches {
		rng := rand.New(rand.NewPCG(uint64(i), 1))
		b := servertest.Batch(fmt.Sprintf("b%d", i), groups, n, 0, uint64(i))
		for k := range b.Rollouts {
			r := &b.Rollouts[k]
			r.Completion, r.SamplerLogProbs, r.Reward = nil, nil, rng.Float64()
			for range tokens {
				r.Completion = append(r.Completion, rng.Int32N(64))
				r.SamplerLogProbs = append(r.SamplerLogProbs, -4*rng.Float32())
			}
		}
		for k, codec := range []string{"", "zstd"} {
			var body bytes.Buffer
			if err := arrowio.Encode(&body, b, codec); err != nil {
				t.Fatal(err)
			}
			bodies[k] = append(bodies[k], body.Bytes())
		}
	}
	e := servertest.Start(t, servertest.Options{})
	c, ctx := connect(t, e)
	var metrics [2][]map[string]float64
	for k := range bodies {
		j := create(t, c, ctx, e.JobDocument(n, map[string]any{
			"objective":  map[string]any{"name": "sa_grpo", "group_size": n, "old_logprobs": "sampler"},
			"batch":      map[string]any{"groups_per_step": groups / 2, "max_tokens_per_micro_batch": 512, "max_policy_lag": nil},
			"checkpoint": map[string]any{"publish_every_steps": 1000},
		}))
		for i, body := range bodies[k] {
			if _, err := c.SubmitArrow(ctx, j.ID, body, fmt.Sprint("key", i)); err != nil {
				t.Fatal(err)
			}
			// Some bodies come when those before are trained, others while they are.
			if i%3 == 2 {
				await(t, c, ctx, j.ID, "trained", func(j client.Job) bool { return j.Step == int64(2*(i+1)) })
			}
		}
		steps, err := c.Steps(ctx, j.ID, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range steps {
			for _, name := range []string{"step_time", "tokens_per_second", "memory_peak_bytes"} {
				delete(s.Metrics, name)
			}
			metrics[k] = append(metrics[k], s.Metrics)
		}
	}
	if len(metrics[0]) != 2*batches {
		t.Fatalf("%d steps, expected %d", len(metrics[0]), 2*batches)
	}
	if diff := cmp.Diff(metrics[1], metrics[0]); diff != "" {
		t.Fatal("unpacked rows, and rows in their bodies:", diff)
	}
}

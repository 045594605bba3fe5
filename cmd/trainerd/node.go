package main

import (
	"context"
	"fmt"
	"time"

	"trainerd/client"
	"trainerd/kernels"
	"trainerd/model"
	"trainerd/model/hf"
	"trainerd/secloop"
	"trainerd/storage"
)

// node is an inference node: it follows a job's checkpoints over HTTP, loads
// each one from its own directory and samples from it on its own device.
type node struct {
	client *client.Client
	job    string
	dir    string // where checkpoints are pulled to
	device kernels.Device

	slots       int // sequences decoded at once
	maxPrompt   int
	maxTokens   int
	temperature float32

	model *model.Model
	step  int64
}

// follow waits for a checkpoint of at least the given step, pulls and loads it.
func (n *node) follow(ctx context.Context, step int64) error {
	if n.model != nil && n.step >= step {
		return nil
	}
	m, err := waitCheckpoint(ctx, n.client, n.job, step, 2*time.Minute)
	if err != nil {
		return err
	}
	if m, err = n.client.Pull(ctx, n.job, m.Step, n.dir); err != nil {
		return fmt.Errorf("pull checkpoint: %w", err)
	}
	src, err := hf.Open(n.dir)
	if err != nil {
		return err
	}
	defer src.Close()
	n.close()
	n.model, err = model.Load(ctx, n.device, src, model.Options{SampleSlots: n.slots, MaxTokens: n.slots * n.maxPrompt, MaxPredictions: n.slots,
		SampleTokens: n.slots * (n.maxPrompt + n.maxTokens)})
	if err != nil {
		return fmt.Errorf("load checkpoint: %w", err)
	}
	n.step = m.Step
	return nil
}

// Sample implements secloop.Sampler.
func (n *node) Sample(ctx context.Context, prompts [][]int32, count int, seed uint64) ([][]secloop.Sampled, int64, error) {
	done, err := n.model.Generate(ctx, model.GenerateRequest{Prompts: prompts, N: count, MaxTokens: n.maxTokens, Temperature: n.temperature, TopP: 1, Seed: seed})
	if err != nil {
		return nil, 0, err
	}
	out := make([][]secloop.Sampled, len(prompts))
	for _, c := range done {
		out[c.Prompt] = append(out[c.Prompt], secloop.Sampled{Tokens: c.Tokens, LogProbs: c.LogProbs, Stopped: c.Stopped})
	}
	return out, n.step, nil
}

func (n *node) close() {
	if n.model != nil {
		n.model.Close()
		n.model = nil
	}
}

// waitCheckpoint returns the job's newest checkpoint once it is of the given step or a later one.
func waitCheckpoint(ctx context.Context, c *client.Client, job string, step int64, wait time.Duration) (storage.Manifest, error) {
	what := "the newest checkpoint"
	if step > 0 {
		what = fmt.Sprintf("the checkpoint of step %d", step)
	}
	for end := time.Now().Add(wait); ; {
		left := time.Until(end)
		m, ok, err := c.Newer(ctx, job, step-1, min(max(left, 0), 30*time.Second))
		switch {
		case err != nil:
			return m, fmt.Errorf("get %s: %w", what, err)
		case ok:
			return m, nil
		case left <= 0:
			return m, fmt.Errorf("get %s: none after %v", what, wait)
		}
	}
}

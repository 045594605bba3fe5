package loop

import (
	"context"
	"fmt"
	"time"

	"trainerd/client"
	"trainerd/secloop"
)

// ServerSampler samples through the server's built-in inference node.
type ServerSampler struct {
	Client      *client.Client
	Job         string
	MaxTokens   int
	Temperature float64
}

// sampleRows bounds the completions of one request; the server's own limit is 4096.
const sampleRows = 1024

// Sample implements secloop.Sampler. Many prompts go in several requests; the
// step is the oldest that answered.
func (s ServerSampler) Sample(ctx context.Context, prompts [][]int32, n int, seed uint64) ([][]secloop.Sampled, int64, error) {
	out := make([][]secloop.Sampled, 0, len(prompts))
	step := int64(-1)
	each := max(1, sampleRows/n)
	for from := 0; from < len(prompts); from += each {
		part := prompts[from:min(from+each, len(prompts))]
		seed := seed + uint64(from)<<20
		r, err := s.Client.Sample(ctx, s.Job, client.SampleRequest{Prompts: part, N: n, MaxTokens: s.MaxTokens, Temperature: &s.Temperature, Seed: &seed})
		if err != nil {
			return nil, 0, err
		}
		got := make([][]secloop.Sampled, len(part))
		for _, c := range r.Completions {
			if c.Prompt < 0 || c.Prompt >= len(part) {
				return nil, 0, fmt.Errorf("sample: a completion of prompt %d of %d", c.Prompt, len(part))
			}
			got[c.Prompt] = append(got[c.Prompt], secloop.Sampled{Tokens: c.Tokens, LogProbs: c.LogProbs, Stopped: c.FinishReason == "stop"})
		}
		out = append(out, got...)
		if step < 0 || r.PolicyStep < step {
			step = r.PolicyStep
		}
	}
	return out, step, nil
}

// pollEvery is the pause between looks at a job's status.
const pollEvery = 20 * time.Millisecond

// loaded waits until a job can sample.
func loaded(ctx context.Context, c *client.Client, job string) (client.Job, error) {
	j, err := c.Wait(ctx, job, pollEvery, func(j client.Job) bool { return j.State != "loading" })
	if err == nil && j.State == "failed" {
		err = fmt.Errorf("job %s failed: %+v", job, j.LastError)
	}
	return j, err
}

// stepDone waits until a job has done a step and returns its record.
func stepDone(ctx context.Context, c *client.Client, job string, step int64) (client.Step, error) {
	j, err := c.Wait(ctx, job, pollEvery, func(j client.Job) bool { return j.Step >= step || j.Final() })
	if err != nil {
		return client.Step{}, err
	}
	if j.Step < step {
		return client.Step{}, fmt.Errorf("job %s is %s at step %d, expected step %d: %+v", job, j.State, j.Step, step, j.LastError)
	}
	steps, err := c.Steps(ctx, job, step-1)
	if err != nil {
		return client.Step{}, err
	}
	if len(steps) == 0 {
		return client.Step{}, fmt.Errorf("job %s has no record of step %d", job, step)
	}
	return steps[0], nil
}

// published waits for a checkpoint of at least the given step.
func published(ctx context.Context, c *client.Client, job string, step int64) (string, error) {
	for end := time.Now().Add(5 * time.Minute); ; {
		m, ok, err := c.Newer(ctx, job, step-1, 30*time.Second)
		switch {
		case err != nil:
			return "", fmt.Errorf("wait for checkpoint %d: %w", step, err)
		case ok:
			return m.Prefix, nil
		case time.Now().After(end):
			return "", fmt.Errorf("wait for checkpoint %d: none in 5 minutes", step)
		}
	}
}

// SampleOnly makes a job that only samples from a source, that many strategies at
// once, and returns its sampler.
func SampleOnly(ctx context.Context, c *client.Client, source string, sequences int, s Settings) (ServerSampler, error) {
	j, err := c.CreateJob(ctx, map[string]any{
		"version": 1, "name": "secloop-sample", "model": map[string]any{"source": source},
		"batch":    map[string]any{"max_tokens_per_micro_batch": min(s.MicroBatch, sequences*s.MaxPrompt)},
		"sampling": map[string]any{"max_sequences": sequences, "max_tokens": s.cacheTokens(sequences)},
	}, "")
	if err == nil {
		_, err = loaded(ctx, c, j.ID)
	}
	if err != nil {
		return ServerSampler{}, fmt.Errorf("load %s: %w", source, err)
	}
	return ServerSampler{c, j.ID, s.MaxTokens, s.Temperature}, nil
}

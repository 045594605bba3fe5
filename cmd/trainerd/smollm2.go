package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"time"

	"trainerd/client"
	"trainerd/model/hf"
	"trainerd/model/tokenizer"
	"trainerd/secloop"
)

// apiSampler samples through the server's built-in inference node.
type apiSampler struct {
	client      *client.Client
	job         string
	maxTokens   int
	temperature float64
}

// Sample implements secloop.Sampler.
func (s apiSampler) Sample(ctx context.Context, prompts [][]int32, n int, seed uint64) ([][]secloop.Sampled, int64, error) {
	r, err := s.client.Sample(ctx, s.job, client.SampleRequest{Prompts: prompts, N: n, MaxTokens: s.maxTokens, Temperature: &s.temperature, Seed: &seed})
	if err != nil {
		return nil, 0, err
	}
	out := make([][]secloop.Sampled, len(prompts))
	for _, c := range r.Completions {
		out[c.Prompt] = append(out[c.Prompt], secloop.Sampled{Tokens: c.Tokens, LogProbs: c.LogProbs, Stopped: c.FinishReason == "stop"})
	}
	return out, r.PolicyStep, nil
}

// runSmolLM2 runs a few SA-GRPO steps on a real pretrained model: the GGUF is
// imported, its tokenizer makes the prompts, a short warm start teaches it to
// end a strategy, then the server samples and every step is published.
func (d *demo) runSmolLM2(ctx context.Context) error {
	const groups, maxTokens, temperature = 2, 48, 0.7
	p, err := d.start(ctx)
	if err != nil {
		return err
	}
	defer func() {
		stop, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		p.Close(stop)
	}()
	base := filepath.Join(d.dir, "model")
	src, opts, err := openModel(d.smollm2)
	if err != nil {
		return err
	}
	err = hf.Write(ctx, d.con.sinkWithProgress(hf.DirSink(base), 4*parameters(src)), "", src, opts)
	src.Close()
	if err != nil {
		return fmt.Errorf("import %s: %w", d.smollm2, err)
	}
	codec, err := tokenizer.Load(base)
	if err != nil {
		return err
	}
	d.printf("trainerd demo: %s imported to %s, server %s\n", filepath.Base(d.smollm2), base, p.URL())

	var chat error
	d.agent = secloop.Agent{Codec: codec, Field: secloop.Drill{}, Judge: secloop.RuleJudge{},
		Opening: `[{"tool":"`,
		Prompt: func(a secloop.Alert) string {
			system, user := secloop.ChatPrompt(a)
			text, err := codec.ChatML([]tokenizer.Message{{Role: "system", Content: system}, {Role: "user", Content: user}})
			if err != nil {
				chat = err
			}
			return text
		}}
	eos, ok := codec.ID("<|im_end|>")
	if !ok {
		return fmt.Errorf("%s has no token <|im_end|>", d.smollm2)
	}
	warm, err := warmStart{steps: 6, rows: 8, ahead: 2, microBatch: 1024, lr: 1e-4, skill: 0.25, eos: eos}.run(ctx, d, "dir:"+base)
	if err != nil {
		return fmt.Errorf("warm start: %w", errors.Join(err, chat))
	}
	job, err := d.client.CreateJob(ctx, map[string]any{
		"version": 1, "name": "secloop-smollm2", "model": map[string]any{"source": warm},
		"objective":  map[string]any{"name": "sa_grpo", "group_size": d.size, "temperature": temperature},
		"optimizer":  map[string]any{"lr": 1e-5},
		"batch":      map[string]any{"groups_per_step": groups, "max_tokens_per_micro_batch": 2048, "max_policy_lag": 1},
		"checkpoint": map[string]any{"publish_every_steps": 1, "keep_last": 2},
		"sampling":   map[string]any{"max_sequences": groups * d.size, "max_tokens": groups * (512 + d.size*maxTokens)},
		"max_steps":  d.steps, "seed": d.seed,
	}, client.NewKey())
	if err != nil {
		return fmt.Errorf("create job: %w", err)
	}
	job, err = d.client.Wait(ctx, job.ID, pollEvery, func(j client.Job) bool { return j.State != "loading" })
	if err != nil {
		return err
	}
	d.agent.Sampler = apiSampler{d.client, job.ID, maxTokens, temperature}
	alerts := rand.New(rand.NewPCG(d.seed, 2))
	for step := range int64(d.steps) {
		batch := []secloop.Alert{secloop.Split{}.Draw(alerts), secloop.Split{}.Draw(alerts)}
		began := time.Now()
		episodes, at, err := d.agent.Play(ctx, batch, d.size, d.seed<<32|uint64(step))
		if err != nil || chat != nil {
			return fmt.Errorf("play: %w", errors.Join(err, chat))
		}
		sampled := time.Since(began)
		b, err := d.agent.Rollouts(episodes, at, func(i int) string { return fmt.Sprintf("s%d-%d", step, i) }, nil)
		if err != nil {
			return err
		}
		began = time.Now()
		if _, err := d.client.Submit(ctx, job.ID, b, fmt.Sprintf("step-%d", step)); err != nil {
			return err
		}
		st, err := d.waitStep(ctx, job.ID, step+1)
		if err != nil {
			return err
		}
		m, err := waitCheckpoint(ctx, d.client, job.ID, step+1, 2*time.Minute)
		if err != nil {
			return err
		}
		t := secloop.Count(episodes)
		d.printf("step %d: sampled %d strategies in %.1f s, trained and published in %.1f s; reward %.3f, format %.2f, loss %.4f, grad_norm %.3f, sampler difference %.1e; checkpoint %s\n",
			step+1, t.Episodes, sampled.Seconds(), time.Since(began).Seconds(), t.Reward, t.Format, st.Metrics["loss"], st.Metrics["grad_norm"],
			st.Metrics["sampling/logp_difference_max"], m.Prefix)
		d.printf("  %s\n  -> %.160s\n", batch[0].Key(), episodes[0][0].Completion)
	}
	return nil
}

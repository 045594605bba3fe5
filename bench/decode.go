package bench

import (
	"context"
	"fmt"

	"trainerd/kernels"
	"trainerd/model"
	"trainerd/sagrpo"
)

// DecodeResult is one line of output of Decode.
type DecodeResult struct {
	Name          string  `json:"name"`
	Impl          string  `json:"impl"`
	Device        string  `json:"device"`
	Workers       int     `json:"workers"`
	Shape         string  `json:"shape"`
	Sequences     int     `json:"sequences"`
	Prompt        int     `json:"prompt"`
	NewTokens     int     `json:"new_tokens"`      // of a sequence
	Seconds       float64 `json:"s"`               // median of a whole call
	PrefillS      float64 `json:"prefill_s"`       // of it, measured by a call for one token
	TokensS       float64 `json:"tokens_s"`        // sampled, over the whole call
	DecodeTokensS float64 `json:"decode_tokens_s"` // after the prefill
	PeakBytes     int64   `json:"peak_bytes"`
}

// DecodeOptions say what Decode measures.
type DecodeOptions struct {
	Shape     string
	Sequences int
	Group     int // sequences of a prompt
	Prompt    int // tokens
	NewTokens int
	Repeats   int
}

// Decode times sampling as POST /v1/jobs/ID/sample does it, without the HTTP around it:
// temperature 1, no top-p, no stop.
func Decode(ctx context.Context, dev kernels.Device, o DecodeOptions) (DecodeResult, error) {
	info := dev.Info()
	r := DecodeResult{Name: "decode", Impl: "trainerd", Device: info.Name, Workers: info.Workers, Shape: o.Shape, Sequences: o.Sequences, Prompt: o.Prompt, NewTokens: o.NewTokens}
	cfg, err := Shape(o.Shape)
	if err != nil {
		return r, err
	}
	if o.Repeats < 1 || o.NewTokens < 2 || o.Prompt < 1 || o.Group < 1 || o.Sequences < o.Group || o.Sequences%o.Group != 0 {
		return r, fmt.Errorf("%d repeats, %d new tokens, prompt %d, %d sequences of groups of %d: expected at least 1, 2, 1 and a multiple", o.Repeats, o.NewTokens, o.Prompt, o.Sequences, o.Group)
	}
	prompts := o.Sequences / o.Group
	l := Load{Prompt: o.Prompt, Groups: make([][]int, prompts)}
	opt := model.Options{MaxTokens: max(min(prompts*o.Prompt, 16384), o.Sequences), SampleSlots: o.Sequences, SampleTokens: prompts*o.Prompt + o.Sequences*o.NewTokens}
	t, err := newTrainee(ctx, dev, cfg, l, opt, sagrpo.Optimizer{})
	if err != nil {
		return r, err
	}
	defer t.m.Close()
	q := model.GenerateRequest{N: o.Group, Temperature: 1, TopP: 1, Seed: 1, Stop: []int32{}}
	for _, g := range t.groups {
		q.Prompts = append(q.Prompts, g.Prompt)
	}
	call := func(tokens int) func() error {
		return func() error {
			q.MaxTokens = tokens
			out, err := t.m.Generate(ctx, q)
			if err == nil && (len(out) != o.Sequences || len(out[0].Tokens) != tokens) {
				err = fmt.Errorf("%d sequences were sampled, expected %d of %d tokens", len(out), o.Sequences, tokens)
			}
			return err
		}
	}
	if r.PrefillS, err = medianSeconds(o.Repeats, call(1)); err != nil {
		return r, err
	}
	if r.Seconds, err = medianSeconds(o.Repeats, call(o.NewTokens)); err != nil {
		return r, err
	}
	n := float64(o.Sequences)
	r.TokensS, r.DecodeTokensS, r.PeakBytes = n*float64(o.NewTokens)/r.Seconds, n*float64(o.NewTokens-1)/max(r.Seconds-r.PrefillS, 1e-9), t.peak()
	return r, nil
}

package bench

import (
	"context"
	"fmt"

	"trainerd/kernels"
	"trainerd/rollout"
)

// ScoreResult is one line of output of Score.
type ScoreResult struct {
	Name        string  `json:"name"`
	Impl        string  `json:"impl"`
	Device      string  `json:"device"`
	Workers     int     `json:"workers"`
	Shape       string  `json:"shape"`
	Load        string  `json:"load"`
	Attention   string  `json:"attention,omitempty"`
	Rollouts    int     `json:"rollouts"`
	Tokens      int     `json:"tokens"` // computed: each prompt once
	Seconds     float64 `json:"s"`      // median
	TokensS     float64 `json:"tokens_s"`
	ScoredS     float64 `json:"scored_tokens_s"` // log-probs
	RolloutsS   float64 `json:"rollouts_s"`
	UsefulGFLOP float64 `json:"useful_gflop_s"`
	PeakBytes   int64   `json:"peak_bytes"`
	*Floor
}

// Score times log-probs of a load's completions as POST /v1/jobs/ID/logprobs
// computes them, without the HTTP around it.
func Score(ctx context.Context, dev kernels.Device, o StepOptions) (ScoreResult, error) {
	cfg, l, err := o.check()
	if err != nil {
		return ScoreResult{}, err
	}
	info, flops := dev.Info(), UsefulForwardFLOPs(cfg, l)
	r := ScoreResult{Name: "score", Impl: "trainerd", Device: info.Name, Workers: info.Workers, Shape: o.Shape, Load: o.Load, Attention: attention(dev), Rollouts: l.Rollouts(), Tokens: l.Tokens()}
	if o.Floor {
		if r.Floor, err = newFloor(ctx, dev, flops, l.Rollouts()); err != nil {
			return r, err
		}
	}
	opt, set, err := o.options(dev, cfg, o.MaxTokens)
	if err != nil {
		return r, err
	}
	t, err := newTrainee(ctx, dev, cfg, l, opt, set)
	if err != nil {
		return r, err
	}
	defer t.m.Close()
	var rows []rollout.Rollout
	scored := 0
	for _, g := range t.groups {
		rows = append(rows, g.Rollouts...)
	}
	for _, row := range rows {
		scored += len(row.Completion)
	}
	if r.Seconds, err = medianSeconds(o.Repeats, func() error {
		s, err := t.engine.Score(ctx, rows)
		if err == nil && len(s) != len(rows) {
			err = fmt.Errorf("%d rows were scored, expected %d", len(s), len(rows))
		}
		return err
	}); err != nil {
		return r, err
	}
	r.TokensS, r.ScoredS, r.RolloutsS = float64(r.Tokens)/r.Seconds, float64(scored)/r.Seconds, float64(r.Rollouts)/r.Seconds
	r.UsefulGFLOP, r.PeakBytes = flops/r.Seconds/1e9, t.peak()
	if r.Floor != nil {
		r.MFU = r.Floor.Seconds / r.Seconds
	}
	return r, nil
}

package parity

import (
	"context"
	"math"
	"testing"

	"trainerd/kernels"
	"trainerd/sagrpo"
)

// trlGolden is trl_dr_grpo.json: TRL's own loss code on given log-probs, in float64.
type trlGolden struct {
	Groups []struct {
		Completions []struct {
			LogProbs []float32 `json:"logprobs"`
			Old      []float32 `json:"old"`
			Mask     []bool    `json:"mask"`
			Reward   float64   `json:"reward"`
			DLogP    []float64 `json:"dlogp"`
		} `json:"completions"`
	} `json:"groups"`
	MaxCompletionTokens int     `json:"max_completion_tokens"`
	Loss                float64 `json:"loss"`
}

// objectiveTolerance is relative to the loss, and to the greatest derivative.
const objectiveTolerance = 1e-6

// TestSurrogateAgreesWithTRL compares token by token, given identical log-probs.
func TestSurrogateAgreesWithTRL(t *testing.T) {
	var g trlGolden
	readJSON(t, "trl_dr_grpo.json", &g)
	s := kernels.Surrogate{Kind: kernels.SurrogateClip, EpsLow: 0.2, EpsHigh: 0.28}
	rows := 0
	for _, group := range g.Groups {
		rows += len(group.Completions)
	}
	weight := 1 / float32(rows*g.MaxCompletionTokens)
	loss, scale, worst, clipped := 0.0, 0.0, 0.0, 0
	for _, group := range g.Groups {
		mean := 0.0
		for _, c := range group.Completions {
			mean += c.Reward / float64(len(group.Completions))
		}
		for _, c := range group.Completions {
			for i, lp := range c.LogProbs {
				w := weight
				if c.Mask != nil && !c.Mask[i] {
					w = 0
				}
				l, d, _ := s.Token(lp, c.Old[i], 0, float32(c.Reward-mean), w, 1, 0)
				loss += float64(l)
				scale = max(scale, math.Abs(c.DLogP[i]))
				worst = max(worst, math.Abs(float64(d)-c.DLogP[i]))
				if c.DLogP[i] == 0 && w != 0 {
					clipped++
				}
			}
		}
	}
	t.Logf("loss %.9f, TRL has %.9f; derivatives within %.1e of the greatest; %d tokens clipped", loss, g.Loss, worst/scale, clipped)
	if !(math.Abs(loss-g.Loss) <= objectiveTolerance*math.Abs(g.Loss)) {
		t.Errorf("loss %.9f, TRL has %.9f", loss, g.Loss)
	}
	if !(worst <= objectiveTolerance*scale) {
		t.Errorf("a derivative is off by %g of %g", worst, scale)
	}
	if clipped < 5 {
		t.Errorf("only %d tokens of the golden are clipped", clipped)
	}
}

// TestEngineAgreesWithTRL: the engine's dr_grpo loss on a real model is TRL's.
// Both start from the same weights, so the loss tolerance applies, not the tighter one above.
func TestEngineAgreesWithTRL(t *testing.T) {
	dev := device(t)
	ctx := context.Background()
	for _, name := range smallCases {
		g := readGolden(t, name+"/golden.json")
		e, err := sagrpo.NewEngine(load(t, dev, openDir(t, name), smallTokens), g.settings("dr_grpo"))
		if err != nil {
			t.Fatal(err)
		}
		c, err := e.Consume(ctx, g.rollouts(), 0)
		if err != nil {
			t.Fatal(err)
		}
		m, _, err := c.Next(ctx)
		if err != nil {
			t.Fatal(err)
		}
		d := math.Abs(m["loss"]-g.TRLDrGRPOLoss) / math.Abs(g.TRLDrGRPOLoss)
		t.Logf("%s: dr_grpo loss within %.1e relative of TRL's", name, d)
		if !(d <= lossTolerance) {
			t.Errorf("%s: dr_grpo loss %.8f, TRL has %.8f", name, m["loss"], g.TRLDrGRPOLoss)
		}
	}
}

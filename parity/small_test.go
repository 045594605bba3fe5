package parity

import (
	"context"
	"math"
	"testing"

	"trainerd/model"
	"trainerd/sagrpo"
)

// smallTokens holds a whole golden in one micro-batch.
const smallTokens = 512

func TestLogProbs(t *testing.T) {
	dev := device(t)
	for _, name := range smallCases {
		t.Run(name, func(t *testing.T) {
			g := readGolden(t, name+"/golden.json")
			m := load(t, dev, openDir(t, name), smallTokens)
			// One micro-batch, and many with repeated prompts.
			for _, tokens := range []int{smallTokens, 27} {
				d := scoreDistance(t, m, g.pack(t, tokens))
				t.Logf("micro-batches of %d: log-probs within %.1e of transformers", tokens, d)
				if !(d <= logProbTolerance) {
					t.Errorf("micro-batches of %d: log-probs differ by %g, tolerance %g", tokens, d, logProbTolerance)
				}
			}
			if s := g.spread(); s < 3 {
				t.Errorf("the golden's log-probs spread over %.2f nats, expected at least 3", s)
			}
		})
	}
}

// spread is the range of the golden's log-probs in nats.
func (g *golden) spread() float64 {
	low, high := math.Inf(1), math.Inf(-1)
	for _, gg := range g.Groups {
		for _, c := range gg.Completions {
			for _, v := range c.LogProbs64 {
				low, high = min(low, v), max(high, v)
			}
		}
	}
	return high - low
}

func TestGradients(t *testing.T) {
	dev := device(t)
	for _, name := range smallCases {
		t.Run(name, func(t *testing.T) {
			g := readGolden(t, name+"/golden.json")
			m := load(t, dev, openDir(t, name), smallTokens)
			ref := openDir(t, name+"/gradient")
			for _, tokens := range []int{smallTokens, 27} {
				d, at := gradientDistance(t, gradient(t, m, g.pack(t, tokens)), ref)
				t.Logf("micro-batches of %d: gradients within %.1e of float64 autograd (%s)", tokens, d, at)
				if !(d <= gradTolerance) {
					t.Errorf("micro-batches of %d: gradient of %s is off by %g, tolerance %g", tokens, at, d, gradTolerance)
				}
			}
		})
	}
}

// settings are the golden's objective and optimizer as a job would give them.
func (g *golden) settings(objective string) sagrpo.Settings {
	o := sagrpo.Objective{Name: objective, GroupSize: len(g.Groups[0].Completions), EpsilonLow: 0.2, EpsilonHigh: 0.28, Iterations: 1, Temperature: 1, OldLogProbs: "sampler"}
	if objective == "dr_grpo" {
		o.MaxCompletionTokens = g.MaxCompletionTokens
	}
	return sagrpo.Settings{
		Objective: o,
		Optimizer: sagrpo.Optimizer{Name: "adamw", Moments: sagrpo.Float32, MomentsIn: sagrpo.MomentsDevice, Gradients: sagrpo.Float32, LR: g.AdamW.LR, Betas: g.AdamW.Betas, Eps: g.AdamW.Eps, WeightDecay: g.AdamW.WeightDecay, MaxGradNorm: g.AdamW.MaxGradNorm,
			Schedule: sagrpo.Schedule{Name: "constant"}},
		MaxTokens: 64,
	}
}

// TestTraining runs the golden's ten AdamW steps through the engine, ten passes
// over the same groups with the old policy fixed.
func TestTraining(t *testing.T) {
	dev := device(t)
	ctx := context.Background()
	for _, name := range smallCases {
		t.Run(name, func(t *testing.T) {
			g := readGolden(t, name+"/golden.json")
			m := load(t, dev, openDir(t, name), smallTokens)
			s := g.settings("sa_grpo")
			s.Objective.Iterations = len(g.Losses)
			e, err := sagrpo.NewEngine(m, s)
			if err != nil {
				t.Fatal(err)
			}
			c, err := e.Consume(ctx, g.rollouts(), 0)
			if err != nil {
				t.Fatal(err)
			}
			worst := 0.0
			for step, want := range g.Losses {
				metrics, done, err := c.Next(ctx)
				if err != nil {
					t.Fatal(err)
				}
				if done != (step == len(g.Losses)-1) {
					t.Fatalf("step %d: done is %v", step, done)
				}
				d := math.Abs(metrics["loss"]-want) / math.Abs(want)
				worst = max(worst, d)
				if !(d <= lossTolerance) {
					t.Errorf("step %d: loss %.8f, PyTorch has %.8f (relative %g, tolerance %g)", step, metrics["loss"], want, d, lossTolerance)
				}
				// A norm adds up the errors of 30k numbers; it has the gradients' tolerance.
				if d := math.Abs(metrics["grad_norm"]-g.GradNorms[step]) / g.GradNorms[step]; !(d <= gradTolerance) {
					t.Errorf("step %d: grad_norm %.6f, PyTorch has %.6f", step, metrics["grad_norm"], g.GradNorms[step])
				}
			}
			t.Logf("ten losses within %.1e relative of float64 PyTorch, from %.4f to %.4f", worst, g.Losses[0], g.Losses[len(g.Losses)-1])
		})
	}
}

// TestTrainingSeesDecay: without weight decay the ten losses miss their
// tolerance, so the golden tells the difference.
func TestTrainingSeesDecay(t *testing.T) {
	dev := device(t)
	const name = "llama-untied"
	g := readGolden(t, name+"/golden.json")
	packs := g.pack(t, smallTokens)
	m := load(t, dev, openDir(t, name), smallTokens)
	worst := 0.0
	for _, want := range g.Losses {
		s, err := m.ForwardBackward(&packs[0].batch, packs[0].loss)
		if err != nil {
			t.Fatal(err)
		}
		worst = max(worst, math.Abs(total(packs[0].loss, s)-want)/math.Abs(want))
		o := model.AdamW{LR: g.AdamW.LR, Beta1: g.AdamW.Betas[0], Beta2: g.AdamW.Betas[1], Eps: g.AdamW.Eps, MaxGradNorm: g.AdamW.MaxGradNorm}
		if _, err := m.OptimStep(o); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("without decay the losses are off by %.1e relative", worst)
	if worst <= lossTolerance {
		t.Errorf("ten losses without weight decay are within %g of those with it", worst)
	}
}

// total is the loss of a micro-batch, given its fresh log-probs.
func total(l model.Loss, s model.Scores) float64 {
	sum := 0.0
	for i, lp := range s.LogProb {
		v, _, _ := l.Surrogate.Token(lp, l.Old[i], 0, l.Adv[i], l.Weight[i], 1, 0)
		sum += float64(v)
	}
	return sum
}

package sagrpo

import (
	"context"

	"trainerd/model"
	"trainerd/rollout"
)

// Engine runs steps of one objective on one model.
type Engine struct{}

// Settings are everything a step depends on besides weights, batches and step number.
type Settings struct {
	Objective Objective
	Optimizer Optimizer
	MaxSteps  int64 // for schedules that decay; 0: endless
	MaxTokens int   // token budget of a micro-batch
	PeakFLOPS float64
}

// NewEngine checks the settings against the model. The model must have been
// loaded with Train, and with Reference when Beta is not 0.
func NewEngine(m *model.Model, s Settings) (*Engine, error) { panic("not built yet") }

// Consumption is one use of a set of groups: Iterations optimizer steps on the
// same groups with the old policy fixed.
type Consumption struct{}

// Consume starts on groups; step is the number of optimizer steps done before.
// Everything that follows is a pure function of weights, state, groups and step.
func (e *Engine) Consume(ctx context.Context, groups []rollout.Group, step int64) (*Consumption, error) {
	panic("not built yet")
}

// Next runs the next optimizer step and returns its metrics; done is true after the last one.
func (c *Consumption) Next(ctx context.Context) (m Metrics, done bool, err error) {
	panic("not built yet")
}

// Metrics of one step, by the names of the field ("loss", "reward/mean",
// "clip_ratio/low_mean", ...). Keys that depend on time or memory are listed by
// IsTiming: they are not part of the deterministic record.
type Metrics map[string]float64

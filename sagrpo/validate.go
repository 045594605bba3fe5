package sagrpo

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"

	"trainerd/internal/fault"
	"trainerd/kernels"
)

// Validate judges an objective on its own. It returns one Invalid fault that
// names every bad field by its JSON path. A field that the objective would
// ignore is bad unless it is 0, which is what its absence means: a job that is
// written out with its defaults and read back stays valid.
func (o Objective) Validate() error {
	var c check
	c.objective(o)
	return invalid(c.bad)
}

// Validate judges an optimizer on its own; see Objective.Validate.
func (o Optimizer) Validate() error {
	var c check
	c.optimizer(o)
	return invalid(c.bad)
}

// Validate judges everything, what the members mean to each other included. The
// paths are those of a job's JSON.
func (s Settings) Validate() error {
	var c check
	c.objective(s.Objective)
	c.optimizer(s.Optimizer)
	c.require(s.MaxSteps >= 0, "max_steps", s.MaxSteps, "0 (endless) or more")
	c.require(s.MaxTokens >= 1 && s.MaxTokens <= math.MaxInt32, "batch.max_tokens_per_micro_batch", s.MaxTokens, "1..2147483647")
	c.require(s.PeakFLOPS >= 0 && finite(s.PeakFLOPS), "peak_flops", s.PeakFLOPS, "0 (unknown) or more")

	if d := s.Optimizer.Schedule; d.Name == "linear" || d.Name == "cosine" {
		end := s.decayEnd()
		switch {
		case end == 0:
			c.refuse("optimizer.schedule.decay_steps", d.DecaySteps, "a step, since the schedule decays and the job has no max_steps")
		case end <= int64(d.WarmupSteps):
			c.refuse("optimizer.schedule.warmup_steps", d.WarmupSteps, fmt.Sprintf("less than %d, where the decay ends", end))
		}
	} else if s.MaxSteps > 0 && int64(d.WarmupSteps) > s.MaxSteps {
		c.refuse("optimizer.schedule.warmup_steps", d.WarmupSteps, fmt.Sprintf("at most max_steps = %d", s.MaxSteps))
	}
	return invalid(c.bad)
}

// check collects bad fields in the order of the struct.
type check struct{ bad []fault.Field }

func (c *check) refuse(path string, got any, expected string) {
	c.bad = append(c.bad, fault.Field{Name: path, Row: -1, Got: fmt.Sprint(got), Expected: expected})
}

func (c *check) require(ok bool, path string, got any, expected string) {
	if !ok {
		c.refuse(path, got, expected)
	}
}

// unused refuses a value other than 0 of a field that would be ignored.
func (c *check) unused(path string, got float64, why string) {
	if got != 0 {
		c.refuse(path, got, "no value, "+why)
	}
}

func (c *check) objective(o Objective) {
	r, known := ruleOf(o.Name)
	if !known {
		names := make([]string, len(objectives))
		for i := range objectives {
			names[i] = objectives[i].name
		}
		c.refuse("objective.name", fmt.Sprintf("%q", o.Name), "one of "+strings.Join(names, ", "))
	}
	notIn := "since " + canonical(o.Name) + " has no use for it"

	switch {
	case o.GroupSize < 1:
		c.refuse("objective.group_size", o.GroupSize, "at least 1")
	case known && !r.rewards && o.GroupSize != 1:
		c.refuse("objective.group_size", o.GroupSize, "1, since a group of cross_entropy is one rollout")
	case r.scale == kernels.ScaleStd && o.GroupSize < 2:
		c.refuse("objective.group_size", o.GroupSize, "at least 2, since the advantages of "+canonical(o.Name)+" are divided by the group's standard deviation")
	}

	if known {
		c.clipping(o, r, notIn)
	}

	c.require(o.Beta >= 0 && fits(o.Beta), "objective.beta", o.Beta, "0 or more")
	if known && !r.rewards {
		c.unused("objective.beta", o.Beta, notIn)
	}
	c.require(o.EntropyCoef >= 0 && fits(o.EntropyCoef), "objective.entropy_coef", o.EntropyCoef, "0 or more")
	c.require(o.Iterations >= 1, "objective.iterations", o.Iterations, "at least 1")
	c.require(o.Temperature > 0 && fits(o.Temperature), "objective.temperature", o.Temperature, "more than 0")
	c.oldPolicy(o, known && !r.rewards, notIn)

	if known {
		if r.share == shareFixed {
			c.require(o.MaxCompletionTokens >= 1, "objective.max_completion_tokens", o.MaxCompletionTokens, "at least 1: it is a denominator of "+o.Name)
		} else {
			c.unused("objective.max_completion_tokens", float64(o.MaxCompletionTokens), notIn)
		}
	}
	c.rewardWeights(o, known && !r.rewards, notIn)

	ref := o.Reference
	c.require(ref.SyncEverySteps >= 0, "objective.reference.sync_every_steps", ref.SyncEverySteps, "0 (never) or more")
	if o.Beta == 0 {
		c.unused("objective.reference.sync_every_steps", float64(max(ref.SyncEverySteps, 0)), "since there is no reference when beta is 0")
	}
	if ref.SyncEverySteps == 0 {
		c.unused("objective.reference.sync_alpha", ref.SyncAlpha, "since sync_every_steps is 0")
	} else {
		c.require(ref.SyncAlpha > 0 && ref.SyncAlpha <= 1, "objective.reference.sync_alpha", ref.SyncAlpha, "more than 0 and at most 1")
	}
}

// clipping judges the bounds of the ratio.
func (c *check) clipping(o Objective, r rule, notIn string) {
	if r.clips() {
		c.require(o.EpsilonLow >= 0 && o.EpsilonLow < 1, "objective.epsilon_low", o.EpsilonLow, "0 or more and less than 1")
		c.require(o.EpsilonHigh >= 0 && fits(o.EpsilonHigh), "objective.epsilon_high", o.EpsilonHigh, "0 or more")
		// Compared as the device holds them: a bound that rounds into the clip range would be ignored.
		beyond := fits(o.Delta) && float32(o.Delta) > 1+float32(o.EpsilonHigh)
		c.require(o.Delta == 0 || beyond, "objective.delta", o.Delta, "0 (none) or more than 1 + epsilon_high")
	} else {
		c.unused("objective.epsilon_low", o.EpsilonLow, notIn)
		c.unused("objective.epsilon_high", o.EpsilonHigh, notIn)
		c.unused("objective.delta", o.Delta, notIn)
	}
	if r.caps() {
		c.require(o.RatioCap > 0 && fits(o.RatioCap), "objective.ratio_cap", o.RatioCap, "more than 0")
	} else {
		c.unused("objective.ratio_cap", o.RatioCap, notIn)
	}
}

// oldPolicy judges where old log-probs come from.
func (c *check) oldPolicy(o Objective, none bool, notIn string) {
	switch {
	case none && o.OldLogProbs != "":
		c.refuse("objective.old_logprobs", fmt.Sprintf("%q", o.OldLogProbs), "no value, "+notIn)
	case o.OldLogProbs != "" && o.OldLogProbs != OldSampler && o.OldLogProbs != OldTrainer:
		c.refuse("objective.old_logprobs", fmt.Sprintf("%q", o.OldLogProbs), "sampler, trainer or no value")
	}
	switch {
	case o.TISCap == 0:
	case none:
		c.unused("objective.tis_cap", o.TISCap, notIn)
	case !(o.TISCap > 0) || !fits(o.TISCap):
		c.refuse("objective.tis_cap", o.TISCap, "0 (off) or more")
	case o.OldLogProbs != OldTrainer:
		c.refuse("objective.tis_cap", o.TISCap, "no value unless old_logprobs is trainer")
	}
}

func (c *check) rewardWeights(o Objective, none bool, notIn string) {
	if none {
		if len(o.RewardWeights) > 0 {
			c.refuse("objective.reward_weights", fmt.Sprintf("%d weights", len(o.RewardWeights)), "no value, "+notIn)
		}
		return
	}
	signal := len(o.RewardWeights) == 0
	for _, name := range slices.Sorted(maps.Keys(o.RewardWeights)) {
		w := o.RewardWeights[name]
		c.require(name != "", "objective.reward_weights", `""`, "a name for every component")
		c.require(finite(w), "objective.reward_weights."+name, w, "a finite number")
		signal = signal || w != 0
	}
	c.require(signal, "objective.reward_weights", "only zeros", "a weight that is not 0")
}

func (c *check) optimizer(o Optimizer) {
	c.require(o.Name == "adamw", "optimizer.name", fmt.Sprintf("%q", o.Name), "adamw")
	c.require(o.LR >= 0 && finite(o.LR), "optimizer.lr", o.LR, "0 or more")
	for _, b := range o.Betas {
		if !(b >= 0 && b < 1) {
			c.refuse("optimizer.betas", o.Betas, "two numbers, 0 or more and less than 1")
			break
		}
	}
	c.require(o.Eps > 0 && finite(o.Eps), "optimizer.eps", o.Eps, "more than 0")
	c.require(o.WeightDecay >= 0 && finite(o.WeightDecay), "optimizer.weight_decay", o.WeightDecay, "0 or more")
	c.require(o.MaxGradNorm >= 0 && fits(o.MaxGradNorm), "optimizer.max_grad_norm", o.MaxGradNorm, "0 (no clipping) or more")
	c.require(o.Moments == Float32 || o.Moments == MomentsCompact, "optimizer.moments", fmt.Sprintf("%q", o.Moments), "float32 or compact")
	c.require(o.MomentsIn == MomentsDevice || o.MomentsIn == MomentsHost, "optimizer.moments_in", fmt.Sprintf("%q", o.MomentsIn), "device or host")
	c.require(o.Gradients == Float32 || o.Gradients == GradientsBFloat, "optimizer.gradients", fmt.Sprintf("%q", o.Gradients), "float32 or bfloat16")

	s := o.Schedule
	c.require(s.WarmupSteps >= 0, "optimizer.schedule.warmup_steps", s.WarmupSteps, "0 or more")
	switch s.Name {
	case "constant":
		const why = "since a constant schedule does not decay"
		c.unused("optimizer.schedule.decay_steps", float64(s.DecaySteps), why)
		c.unused("optimizer.schedule.min_ratio", s.MinRatio, why)
	case "linear", "cosine":
		c.require(s.DecaySteps >= 0, "optimizer.schedule.decay_steps", s.DecaySteps, "0 (max_steps) or more")
		c.require(s.MinRatio >= 0 && s.MinRatio <= 1, "optimizer.schedule.min_ratio", s.MinRatio, "0 to 1")
	default:
		c.refuse("optimizer.schedule.name", fmt.Sprintf("%q", s.Name), "constant, linear or cosine")
	}
}

func finite(x float64) bool { return !math.IsNaN(x) && !math.IsInf(x, 0) }

// fits reports whether a setting survives the device's float32: finite, and 0 only if it is 0.
func fits(x float64) bool {
	return finite(float64(float32(x))) && (float32(x) != 0 || x == 0)
}

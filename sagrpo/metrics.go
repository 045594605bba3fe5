package sagrpo

import (
	"math"
	"time"

	"trainerd/rollout"
)

// Metrics of one step, by the names of the field ("loss", "reward/mean",
// "clip_ratio/low_mean", ...); doc.go defines each. A metric that has no value in
// a step is absent. Keys that depend on time or memory are listed by IsTiming:
// they are not part of the deterministic record.
type Metrics map[string]float64

// IsTiming reports whether a metric depends on time or memory.
func IsTiming(name string) bool {
	switch name {
	case "tokens_per_second", "mfu", "step_time", "memory_peak_bytes":
		return true
	}
	return false
}

// spread is a mean and its extremes, in float64.
type spread struct {
	n, sum   float64
	min, max float64
}

func (s *spread) add(x float64) {
	if s.n == 0 {
		s.min, s.max = x, x
	}
	s.n++
	s.sum += x
	s.min, s.max = math.Min(s.min, x), math.Max(s.max, x)
}

func (s *spread) mean() float64 { return s.sum / s.n }

// describe returns the metrics that groups and step number alone determine.
// flat is the number of groups without signal.
func (e *Engine) describe(groups []rollout.Group, rows []*row, flat int, step int64) Metrics {
	m := Metrics{}
	var reward, std, adv, length, lag spread
	truncated := 0.0
	components := map[string]*spread{}
	for g := range groups {
		var inGroup spread
		for i := range groups[g].Rollouts {
			r := &groups[g].Rollouts[i]
			reward.add(r.Reward)
			inGroup.add(r.Reward)
			length.add(float64(len(r.Completion)))
			if r.Truncated {
				truncated++
			}
			if r.PolicyStep != rollout.NoPolicyStep {
				lag.add(float64(step - r.PolicyStep))
			}
			for k := range min(len(r.Components), len(groups[g].Components)) {
				name := groups[g].Components[k]
				if components[name] == nil {
					components[name] = new(spread)
				}
				components[name].add(r.Components[k])
			}
		}
		std.add(sampleStd(&groups[g], inGroup.mean()))
	}
	for _, r := range rows {
		adv.add(r.adv)
	}

	if e.loss.rule.rewards {
		m["reward/mean"] = reward.mean()
		m["reward/std"] = std.mean()
		for name, c := range components {
			m["reward/"+name+"/mean"] = c.mean()
		}
		m["frac_reward_zero_std"] = float64(flat) / float64(len(groups))
		m["advantage/mean"], m["advantage/min"], m["advantage/max"] = adv.mean(), adv.min, adv.max
	}
	m["completions/mean_length"], m["completions/min_length"], m["completions/max_length"] = length.mean(), length.min, length.max
	m["completions/clipped_ratio"] = truncated / length.n
	if lag.n > 0 {
		m["policy_lag/mean"], m["policy_lag/max"] = lag.mean(), lag.max
	}
	return m
}

// sampleStd returns the standard deviation (n-1) of a group's rewards, 0 for one rollout.
func sampleStd(g *rollout.Group, mean float64) float64 {
	if len(g.Rollouts) < 2 || noVariance(g) {
		return 0
	}
	sum := 0.0
	for i := range g.Rollouts {
		d := g.Rollouts[i].Reward - mean
		sum += d * d
	}
	return math.Sqrt(sum / float64(len(g.Rollouts)-1))
}

// observed is what a step's forward passes showed, over the active tokens that
// they computed.
type observed struct {
	tally
	klOld, klRef, entropy spread
	difference            spread  // |trainer - sampler| of log-probs, at the first consumption
	importance, squares   float64 // sums of exp(trainer - sampler) and of its square
	tokens                int     // that went forward and backward
	flops                 float64
}

// row adds one row's fresh log-probs and entropies.
func (s *observed) row(r *row, fresh, entropy []float32) {
	old, first := r.old(), r.first
	if old == nil {
		old = fresh
	}
	if first == nil {
		first = fresh
	}
	for i := range fresh {
		logp := float64(fresh[i])
		s.klOld.add(k3(float64(old[i]) - logp))
		s.entropy.add(float64(entropy[i]))
		if r.ref != nil {
			s.klRef.add(k3(float64(r.ref[i]) - logp))
		}
		if r.sampler != nil {
			d := float64(first[i]) - float64(r.sampler[i])
			s.difference.add(math.Abs(d))
			w := math.Exp(d)
			s.importance += w
			s.squares += w * w
		}
	}
}

// k3 is Schulman's estimator of KL(policy, other) at one sample, d = other - policy in nats.
func k3(d float64) float64 { return math.Expm1(d) - d }

// report writes the metrics of what was observed. A step that computed no token
// has loss 0 and nothing to say about ratios.
func (s *observed) report(m Metrics, r rule) {
	m["loss"] = s.loss
	m["tokens"] = float64(s.tokens)
	if s.entropy.n > 0 {
		m["entropy"] = s.entropy.mean()
	}
	if r.rewards && s.n > 0 {
		m["ratio/mean"], m["ratio/max"] = s.sum/s.n, s.max
		m["clip_ratio/low_mean"] = s.low / s.n
		m["clip_ratio/high_mean"] = s.high / s.n
		m["clip_ratio/region_mean"] = s.region / s.n
		m["kl"] = s.klOld.mean()
	}
	if s.klRef.n > 0 {
		m["kl/reference"] = s.klRef.mean()
	}
	if s.difference.n > 0 {
		m["sampling/logp_difference_mean"], m["sampling/logp_difference_max"] = s.difference.mean(), s.difference.max
		m["sampling/ess"] = s.importance / s.squares * s.importance / s.difference.n
	}
}

// timings writes the metrics that IsTiming lists.
func (e *Engine) timings(m Metrics, s *observed, took time.Duration) {
	seconds := took.Seconds()
	m["step_time"] = seconds
	m["memory_peak_bytes"] = float64(e.memory())
	if seconds > 0 {
		m["tokens_per_second"] = float64(s.tokens) / seconds
		if e.set.PeakFLOPS > 0 {
			m["mfu"] = s.flops / (seconds * e.set.PeakFLOPS)
		}
	}
}

package sagrpo

import (
	"math"

	"trainerd/rollout"
)

// This file is the independent reference: the objectives as their papers write
// them, in float64, one sequence after the other, sharing nothing with the
// engine. It is read against the table of objectives, not against the code.

// refToken is one completion token.
type refToken struct {
	id      int  // names the token: the engine's test gives every token its own id
	active  bool // not masked
	weight  float64
	sampler float64 // log-prob by the sampler; meaningless without refSeq.sampled
}

type refSeq struct {
	tokens  []refToken
	reward  float64
	sampled bool // has the sampler's log-probs
}

// refStep is one optimizer step: data, and the log-probs in force, by token id.
type refStep struct {
	o       Objective
	groups  [][]refSeq
	trainer []float64 // log-probs at the first consumption
	ref     []float64
	entropy []float64
}

// refOf copies what the reference needs out of groups, before anything is cut.
func refOf(o Objective, groups []rollout.Group) *refStep {
	s := &refStep{o: o}
	for _, g := range groups {
		var seqs []refSeq
		for _, r := range g.Rollouts {
			q := refSeq{reward: r.Reward, sampled: r.SamplerLogProbs != nil}
			for t, id := range r.Completion {
				k := refToken{id: int(id), active: true, weight: 1}
				if r.LossMask != nil && !r.LossMask[t] || o.MaskTruncated && r.Truncated {
					k.active = false
				}
				if r.LossWeights != nil {
					k.weight = float64(r.LossWeights[t])
				}
				if q.sampled {
					k.sampler = float64(r.SamplerLogProbs[t])
				}
				q.tokens = append(q.tokens, k)
			}
			seqs = append(seqs, q)
		}
		s.groups = append(s.groups, seqs)
	}
	return s
}

// terms is a loss with the sum of the magnitudes it was added up from: the scale
// against which a rounding error is judged.
type terms struct{ value, scale float64 }

func (t *terms) add(x, scale float64) {
	t.value += x
	t.scale += math.Abs(scale)
}

func (s *refStep) advantages(g []refSeq) []float64 {
	mean, n := 0.0, float64(len(g))
	for _, q := range g {
		mean += q.reward / n
	}
	variance := 0.0
	constant := true
	for _, q := range g {
		variance += (q.reward - mean) * (q.reward - mean) / (n - 1)
		constant = constant && q.reward == g[0].reward
	}
	adv := make([]float64, len(g))
	for i, q := range g {
		switch {
		case constant: // 0, not the rounding error of the mean
		case s.o.Name == "sa_grpo" || s.o.Name == "dr_grpo":
			adv[i] = q.reward - mean
		default:
			adv[i] = (q.reward - mean) / (math.Sqrt(variance) + 1e-4)
		}
	}
	return adv
}

// old is the old policy's log-prob of a token.
func (s *refStep) old(q refSeq, k refToken) float64 {
	if q.sampled && s.o.OldLogProbs != "trainer" {
		return k.sampler
	}
	return s.trainer[k.id]
}

func (s *refStep) tis(q refSeq, k refToken) float64 {
	if s.o.TISCap == 0 {
		return 1
	}
	return math.Min(math.Exp(s.trainer[k.id]-k.sampler), s.o.TISCap)
}

// clipped is min(r*A, clip(r)*A) with delta.
func (s *refStep) clipped(r, a float64) float64 {
	bounded := math.Max(1-s.o.EpsilonLow, math.Min(1+s.o.EpsilonHigh, r))
	if s.o.Delta > 0 {
		r = math.Min(r, s.o.Delta)
	}
	return math.Min(r*a, bounded*a)
}

func active(q refSeq) (n float64) {
	for _, k := range q.tokens {
		if k.active {
			n++
		}
	}
	return n
}

// reduce calls visit with every active token and its share of the loss.
func (s *refStep) reduce(visit func(q refSeq, a, share float64, k refToken)) {
	B, total, weights := 0.0, 0.0, 0.0
	for _, g := range s.groups {
		for _, q := range g {
			B++
			total += active(q)
			for _, k := range q.tokens {
				if k.active {
					weights += k.weight
				}
			}
		}
	}
	Q := float64(len(s.groups))
	for _, g := range s.groups {
		adv := make([]float64, len(g))
		if s.o.Name != "cross_entropy" {
			adv = s.advantages(g)
		}
		for i, q := range g {
			for _, k := range q.tokens {
				if !k.active {
					continue
				}
				share := math.NaN()
				switch s.o.Name {
				case "sa_grpo":
					share = 1 / Q / float64(len(g))
				case "grpo", "gspo":
					share = 1 / B / active(q)
				case "dr_grpo":
					share = 1 / B / float64(s.o.MaxCompletionTokens)
				case "dapo", "cispo":
					share = 1 / total
				case "cross_entropy":
					share = k.weight / weights
				}
				visit(q, adv[i], share, k)
			}
		}
	}
}

// loss is the step's loss as a function of the log-probs theta and entropies ent.
// base holds the log-probs at which stop-gradients are taken.
func (s *refStep) loss(theta, ent, base []float64) (sum terms) {
	s.reduce(func(q refSeq, a, share float64, k refToken) {
		logp := theta[k.id]
		switch s.o.Name {
		case "cross_entropy":
			sum.add(-logp*share, logp*share)
		case "cispo":
			g := math.Min(math.Exp(base[k.id]-s.old(q, k)), s.o.RatioCap)
			sum.add(-g*a*logp*s.tis(q, k)*share, g*a*logp*s.tis(q, k)*share)
		case "gspo":
			mean := 0.0
			for _, other := range q.tokens {
				if other.active {
					mean += (theta[other.id] - s.old(q, other)) / active(q)
				}
			}
			j := s.clipped(math.Exp(mean), a) * s.tis(q, k)
			sum.add(-j*share, j*share)
		default:
			j := s.clipped(math.Exp(logp-s.old(q, k)), a) * s.tis(q, k)
			sum.add(-j*share, j*share)
		}
		if s.o.Beta > 0 {
			d := s.ref[k.id] - logp
			sum.add(s.o.Beta*(math.Exp(d)-d-1)*share, s.o.Beta*(math.Exp(d)+math.Abs(d)+1)*share)
		}
		sum.add(-s.o.EntropyCoef*ent[k.id]*share, s.o.EntropyCoef*ent[k.id]*share)
	})
	return sum
}

// flows reports whether the gradient goes through the ratio r: the unclipped
// branch is the minimum, a tie included, and delta does not bound it.
func (s *refStep) flows(r, a float64) bool {
	bounded := math.Max(1-s.o.EpsilonLow, math.Min(1+s.o.EpsilonHigh, r))
	if s.o.Delta > 0 && a < 0 && r > s.o.Delta {
		return false
	}
	return r*a <= bounded*a
}

// gradient is the derivative of the loss by each log-prob, by formula, and by
// each entropy.
func (s *refStep) gradient(theta []float64) (dLogp, dEntropy map[int]terms) {
	dLogp, dEntropy = map[int]terms{}, map[int]terms{}
	add := func(m map[int]terms, id int, x, scale float64) {
		t := m[id]
		t.add(x, scale)
		m[id] = t
	}
	s.reduce(func(q refSeq, a, share float64, k refToken) {
		logp := theta[k.id]
		d := 0.0
		switch s.o.Name {
		case "cross_entropy":
			d = -1
		case "cispo":
			d = -math.Min(math.Exp(logp-s.old(q, k)), s.o.RatioCap) * a * s.tis(q, k)
		case "gspo":
			// dL/dlogp_t = -A*s/(B*len); the factors of importance sampling by their mean.
			mean, factor := 0.0, 0.0
			for _, other := range q.tokens {
				if other.active {
					mean += (theta[other.id] - s.old(q, other)) / active(q)
					factor += s.tis(q, other) / active(q)
				}
			}
			if r := math.Exp(mean); s.flows(r, a) {
				d = -a * r * factor
			}
		default:
			if g := math.Exp(logp - s.old(q, k)); s.flows(g, a) {
				d = -a * g * s.tis(q, k)
			}
		}
		add(dLogp, k.id, d*share, d*share)
		if s.o.Beta > 0 {
			e := math.Exp(s.ref[k.id] - logp)
			add(dLogp, k.id, s.o.Beta*(1-e)*share, s.o.Beta*(1+e)*share)
		}
		add(dEntropy, k.id, -s.o.EntropyCoef*share, s.o.EntropyCoef*share)
	})
	return dLogp, dEntropy
}

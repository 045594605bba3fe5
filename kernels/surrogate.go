package kernels

import "math"

// SurrogateKind selects the policy term of a token's loss.
type SurrogateKind uint8

const (
	// SurrogateClip is -min(g·A, clip(g, 1-EpsLow, 1+EpsHigh)·A), PPO's clipped
	// surrogate with separate bounds (SA-GRPO eq. 14-16).
	SurrogateClip SurrogateKind = iota
	// SurrogateCISPO is -stop_grad(min(g, RatioCap))·A·logp.
	SurrogateCISPO
	// SurrogateNLL is -logp (cross entropy); the advantage is ignored.
	SurrogateNLL
)

// Surrogate is the loss of one token as a function of its fresh log-prob and
// entropy. It is plain data, so that a device can fuse it with the head.
//
//	loss = Weight * (policy term * TIS + Beta*k3 - EntropyCoef*H)
//	k3   = exp(ref-logp) - (ref-logp) - 1                (Schulman 2020)
//	g    = exp(logp - old)
type Surrogate struct {
	Kind        SurrogateKind
	EpsLow      float32
	EpsHigh     float32
	Delta       float32 // upper bound of g where A < 0; 0 for none, else > 1+EpsHigh
	RatioCap    float32 // SurrogateCISPO only, absolute
	Beta        float32
	EntropyCoef float32
}

// Token returns the loss of one token and its derivatives with respect to the
// log-prob and the entropy. A tie of the two branches counts as unclipped. A
// token of weight 0 returns zeros whatever its other inputs are, NaN included.
func (s Surrogate) Token(logp, old, ref, adv, weight, tis, entropy float32) (loss, dLogp, dEntropy float32) {
	if weight == 0 {
		return 0, 0, 0
	}
	switch s.Kind {
	case SurrogateNLL:
		loss, dLogp = -logp, -1
	case SurrogateCISPO:
		g := min(exp32(logp-old), s.RatioCap)
		loss, dLogp = -g*adv*logp, -g*adv
	default:
		g := exp32(logp - old)
		clamped, clipped := s.clamp(g, adv)
		loss = -clamped * adv
		if !clipped {
			dLogp = -g * adv
		}
	}
	loss *= tis
	dLogp *= tis
	if s.Beta != 0 {
		d := ref - logp
		e := exp32(d)
		loss += s.Beta * (e - d - 1)
		dLogp += s.Beta * (1 - e)
	}
	if s.EntropyCoef != 0 {
		loss -= s.EntropyCoef * entropy
		dEntropy = -s.EntropyCoef * weight
	}
	return loss * weight, dLogp * weight, dEntropy
}

// clamp returns the ratio that min(g*A, clip(g)*A) multiplies A by, and whether
// the gradient through g vanishes there.
func (s Surrogate) clamp(g, adv float32) (ratio float32, clipped bool) {
	switch {
	case adv > 0 && g > 1+s.EpsHigh:
		return 1 + s.EpsHigh, true
	case adv < 0 && g < 1-s.EpsLow:
		return 1 - s.EpsLow, true
	case adv < 0 && s.Delta > 0 && g > s.Delta:
		return s.Delta, true
	}
	return g, false
}

func exp32(x float32) float32 { return float32(math.Exp(float64(x))) }

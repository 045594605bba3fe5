package sagrpo

import (
	"math"

	"trainerd/kernels"
	"trainerd/rollout"
)

// loss is an objective ready to be applied to tokens.
type loss struct {
	rule   rule
	set    Objective
	token  kernels.Surrogate // of one token; of a sequence-level objective only Beta and EntropyCoef are used
	tisCap float64
}

func newLoss(o Objective) loss {
	r, _ := ruleOf(o.Name)
	l := loss{rule: r, set: o, tisCap: o.TISCap}
	l.token = kernels.Surrogate{
		Kind:        r.kind,
		EpsLow:      float32(o.EpsilonLow),
		EpsHigh:     float32(o.EpsilonHigh),
		Delta:       float32(o.Delta),
		RatioCap:    float32(o.RatioCap),
		Beta:        float32(o.Beta),
		EntropyCoef: float32(o.EntropyCoef),
	}
	return l
}

// row is a rollout as a step sees it: its active tokens, their shares of the
// loss, and the log-probs that stay fixed while the groups are consumed. All
// slices are over active tokens, in order; a token that is not active has no
// share in the loss and is never predicted.
type row struct {
	group   *rollout.Group
	index   int // in group.Rollouts
	adv     float64
	active  []int32   // positions in the completion; shared by rows that have no mask
	weight  []float32 // share of each token in the loss, never 0
	sampler []float32 // the sampler's log-probs; nil when the column is absent; the rollout's own where all tokens are active
	first   []float32 // the trainer's at the first consumption; nil before it
	ref     []float32 // the reference's; nil until computed, and after the reference moved

	oldSampler bool // the old policy is the sampler
}

// old returns the log-probs under the old policy, nil when they are the fresh ones.
func (r *row) old() []float32 {
	if r.oldSampler {
		return r.sampler
	}
	return r.first
}

// activate finds the row's active tokens: those that the policy wrote
// (loss_mask), of a completion that counts (mask_truncated), with a weight.
// ordinals are 0, 1, 2, ... as far as any completion goes, and stay as they are.
func (r *row) activate(o Objective, ordinals []int32) {
	src := &r.group.Rollouts[r.index]
	if o.MaskTruncated && src.Truncated {
		return
	}
	n := len(src.Completion)
	if src.LossMask == nil && src.LossWeights == nil { // all are, and nothing has to be copied
		r.active, r.sampler = ordinals[:n:n], src.SamplerLogProbs
		return
	}
	off := func(t int) bool {
		return src.LossMask != nil && !src.LossMask[t] || src.LossWeights != nil && src.LossWeights[t] == 0
	}
	left := n
	for t := range src.Completion {
		if off(t) {
			left--
		}
	}
	r.active = make([]int32, 0, left)
	for t := range src.Completion {
		if !off(t) {
			r.active = append(r.active, int32(t))
		}
	}
	if src.SamplerLogProbs != nil {
		r.sampler = make([]float32, len(r.active))
		for i, t := range r.active {
			r.sampler[i] = src.SamplerLogProbs[t]
		}
	}
}

// ordinals returns 0 to at least n-1. Nobody may write to them.
func (e *Engine) ordinals(n int) []int32 {
	if len(e.counted) < n {
		e.counted = make([]int32, n)
		for i := range e.counted {
			e.counted[i] = int32(i)
		}
	}
	return e.counted
}

// weigh gives every active token of a step's rows its share of the loss. The
// rows are all of the step, those without signal or active tokens included:
// they count in the denominators. The shares lie in mem where it is large enough,
// and in what weigh returns.
func (l *loss) weigh(rows []*row, groups int, mem []float32) []float32 {
	B := float64(len(rows))
	var total float64 // active tokens, or their weights
	for _, r := range rows {
		total += r.mass(l.rule.share)
	}
	tokens := 0
	for _, r := range rows {
		tokens += len(r.active)
	}
	if cap(mem) < tokens {
		mem = make([]float32, tokens)
	}
	back := mem[:tokens]
	for _, r := range rows {
		var share float64
		switch l.rule.share {
		case shareGroup:
			share = 1 / (float64(len(r.group.Rollouts)) * float64(groups))
		case shareSequence:
			share = 1 / (B * float64(len(r.active)))
		case shareFixed:
			share = 1 / (B * float64(l.set.MaxCompletionTokens))
		case shareActive, shareWeighted:
			share = 1 / total
		}
		n := len(r.active)
		r.weight, back = back[:n:n], back[n:]
		weights := r.group.Rollouts[r.index].LossWeights
		if weights == nil {
			if n > 0 {
				r.weight[0] = float32(share)
			}
			for k := 1; k < n; k *= 2 { // copying is several times as fast as storing one by one
				copy(r.weight[k:], r.weight[:k])
			}
			continue
		}
		for i, t := range r.active {
			r.weight[i] = float32(float64(weights[t]) * share)
		}
	}
	return mem
}

// mass is what the row adds to a denominator that is summed over tokens.
func (r *row) mass(s share) float64 {
	weights := r.group.Rollouts[r.index].LossWeights
	if s != shareWeighted || weights == nil {
		return float64(len(r.active))
	}
	sum := 0.0
	for _, t := range r.active {
		sum += float64(weights[t])
	}
	return sum
}

// tally sums what metrics need over the tokens, or the sequences, of a ratio.
type tally struct {
	loss   float64 // share of the step's loss
	n      float64 // ratios seen
	sum    float64
	max    float64
	low    float64 // A < 0 and the ratio under the range
	high   float64 // A > 0 and the ratio over the range, or over the cap
	region float64 // the gradient is clipped away or capped, delta's clamp included
}

func (t *tally) ratio(g, adv float64, l *loss) {
	o := l.set
	t.n++
	t.sum += g
	t.max = math.Max(t.max, g)
	switch {
	case l.rule.caps():
		if g > o.RatioCap {
			t.high++
			t.region++
		}
	case adv < 0 && g < 1-o.EpsilonLow:
		t.low++
		t.region++
	case adv > 0 && g > 1+o.EpsilonHigh:
		t.high++
		t.region++
	case adv < 0 && o.Delta > 0 && g > o.Delta:
		t.region++
	}
}

// row applies the loss to one row given its fresh log-probs and entropies. It
// adds to the tally and, where they are not nil, writes the derivatives with
// respect to each log-prob and entropy.
//
// The arithmetic of a token is the device's, in float32; sequence ratios and all
// sums are float64.
func (l *loss) row(r *row, logp, entropy, dLogp, dEntropy []float32, t *tally) {
	old, tis := r.old(), l.tis(r, logp)
	if old == nil {
		old = logp
	}
	// A sequence-level policy term and its derivative, per unit of weight, are the
	// same for all tokens; the token's own terms are then KL and entropy only.
	var value, derivative float64
	adv := float32(r.adv)
	if l.rule.sequence {
		value, derivative = l.sequence(r, logp, old, tis, t)
		adv = 0
	}
	for i := range logp {
		ref, factor, w := float32(0), float32(1), r.weight[i]
		if r.ref != nil {
			ref = r.ref[i]
		}
		if tis != nil {
			factor = tis[i]
		}
		if l.rule.rewards && !l.rule.sequence {
			t.ratio(math.Exp(float64(logp[i])-float64(old[i])), r.adv, l)
		}
		own, dl, de := l.token.Token(logp[i], old[i], ref, adv, w, factor, entropy[i])
		t.loss += float64(own) + value*float64(w)
		if dLogp != nil {
			dLogp[i] = float32(float64(dl) + derivative*float64(w))
		}
		if dEntropy != nil {
			dEntropy[i] = de
		}
	}
}

// sequence returns -min(s*A, clip(s)*A) of a sequence and, per active token, its
// derivative with respect to the token's log-prob times the sequence's length.
// With weights 1/(B*len) the tokens' sums are the objective's. Factors of
// truncated importance sampling enter by their mean over the tokens.
func (l *loss) sequence(r *row, logp, old, tis []float32, t *tally) (value, derivative float64) {
	if len(logp) == 0 {
		return 0, 0
	}
	var logRatio float64
	factor := 1.0
	for i := range logp {
		logRatio += float64(logp[i]) - float64(old[i])
	}
	if tis != nil {
		factor = 0
		for _, f := range tis {
			factor += float64(f)
		}
		factor /= float64(len(tis))
	}
	s := math.Exp(logRatio / float64(len(logp)))
	t.ratio(s, r.adv, l)

	o := l.set
	clamped, derivative := s, -r.adv*s*factor
	switch {
	case r.adv > 0 && s > 1+o.EpsilonHigh:
		clamped, derivative = 1+o.EpsilonHigh, 0
	case r.adv < 0 && s < 1-o.EpsilonLow:
		clamped, derivative = 1-o.EpsilonLow, 0
	case r.adv < 0 && o.Delta > 0 && s > o.Delta:
		clamped, derivative = o.Delta, 0
	}
	return -clamped * r.adv * factor, derivative
}

// tis returns the constant factors of the policy term, nil when they are 1. At
// the first consumption the old log-probs are the fresh ones.
func (l *loss) tis(r *row, fresh []float32) []float32 {
	if l.tisCap == 0 {
		return nil
	}
	old := r.old()
	if old == nil {
		old = fresh
	}
	factors := make([]float32, len(old))
	for i := range old {
		factors[i] = float32(min(math.Exp(float64(old[i])-float64(r.sampler[i])), l.tisCap))
	}
	return factors
}

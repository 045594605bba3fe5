package kerneltest

import (
	"math"

	"trainerd/kernels"
)

// headRow is one row of the LM head.
type headRow struct {
	y       []float64 // logits over temperature
	mag     float64   // greatest sum of |h_c*w_c| over temperature: errors of y scale with it
	logP    []float64
	logProb float64
	entropy float64
	target  int32
	invTemp float64
}

func refHeadRow(hidden, w []float64, v int, target int32, temperature float64) headRow {
	d := len(hidden)
	r := headRow{y: make([]float64, v), logP: make([]float64, v), target: target, invTemp: 1 / temperature}
	top := math.Inf(-1)
	for j := range v {
		z, mag := dot64(hidden, w[j*d:][:d])
		r.y[j] = z * r.invTemp
		r.mag = max(r.mag, mag*r.invTemp)
		top = max(top, r.y[j])
	}
	sum := 0.0
	for _, y := range r.y {
		sum += math.Exp(y - top)
	}
	lse := top + math.Log(sum)
	for j, y := range r.y {
		r.logP[j] = y - lse
		r.entropy -= math.Exp(r.logP[j]) * r.logP[j]
	}
	r.logProb = r.logP[target]
	return r
}

// dlogits is the gradient of dLogProb*logp + dEntropy*H with respect to the
// undivided logits, with the magnitudes of its terms.
func (r headRow) dlogits(dLogProb, dEntropy float64) []value {
	out := make([]value, len(r.y))
	for j, lp := range r.logP {
		p := math.Exp(lp)
		out[j] = value{
			v:   -r.invTemp * p * (dLogProb + dEntropy*(lp+r.entropy)),
			mag: r.invTemp * p * (math.Abs(dLogProb) + math.Abs(dEntropy)*(1+math.Abs(lp)+r.entropy)),
		}
	}
	out[r.target].v += r.invTemp * dLogProb
	out[r.target].mag += r.invTemp * math.Abs(dLogProb)
	return out
}

// tokenInputs are one row's inputs of a surrogate.
type tokenInputs struct{ logp, old, ref, adv, weight, tis, entropy float64 }

// refToken is the loss of one token and its derivatives. frozen is the log-prob
// that a stopped gradient sees (CISPO's ratio). mag is the magnitude of the
// terms of dLogProb, and slope what |dLogProb| moves by for an error of 1 in logp.
func refToken(s kernels.Surrogate, x tokenInputs, frozen float64) (loss, dLogProb, dEntropy, mag, slope float64) {
	if x.weight == 0 {
		return 0, 0, 0, 0, 0
	}
	g := math.Exp(x.logp - x.old)
	switch s.Kind {
	case kernels.SurrogateNLL:
		loss, dLogProb, mag = -x.logp, -1, 1
	case kernels.SurrogateCISPO:
		g = min(math.Exp(frozen-x.old), float64(s.RatioCap))
		loss, dLogProb = -g*x.adv*x.logp, -g*x.adv
		mag = math.Abs(dLogProb)
		slope = mag
	default:
		low, high := 1-float64(s.EpsLow), 1+float64(s.EpsHigh)
		unclipped, clamped := g*x.adv, min(max(g, low), high)*x.adv
		bounded := g
		if x.adv < 0 && s.Delta > 0 {
			bounded = min(g, float64(s.Delta))
			unclipped = bounded * x.adv
		}
		loss = -min(unclipped, clamped)
		if unclipped <= clamped && bounded == g {
			dLogProb = -g * x.adv
		}
		mag = math.Abs(dLogProb)
		slope = mag
	}
	loss, dLogProb, mag, slope = loss*x.tis, dLogProb*x.tis, mag*math.Abs(x.tis), slope*math.Abs(x.tis)
	e := math.Exp(x.ref - x.logp)
	b := float64(s.Beta)
	if b != 0 {
		loss += b * (e - (x.ref - x.logp) - 1)
		dLogProb += b * (1 - e)
		mag += b * (1 + e)
		slope += b * e
	}
	loss -= float64(s.EntropyCoef) * x.entropy
	dEntropy = -float64(s.EntropyCoef)
	w := x.weight
	return loss * w, dLogProb * w, dEntropy * w, mag * math.Abs(w), slope * math.Abs(w)
}

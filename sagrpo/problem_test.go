package sagrpo

import (
	"fmt"
	"math"
	"math/rand/v2"

	"trainerd/rollout"
)

// promptToken is the id of every prompt token; no completion uses it.
const promptToken = 0

// shape says what a random problem has.
type shape struct {
	masks      bool
	truncated  bool
	incomplete bool    // one group has fewer rollouts
	sampler    float64 // share of rollouts with the sampler's log-probs
	weights    bool
	steps      int // tables of log-probs, one per iteration
}

// problem is groups with the tables that a fakePolicy answers from.
type problem struct {
	groups []rollout.Group
	logp   [][]float32
	ref    []float32
	ent    []float32
}

func (p *problem) fake() *fakePolicy {
	return &fakePolicy{logp: p.logp, ref: p.ref, entropy: p.ent}
}

// newProblem makes groups of unequal lengths. Per rollout, old and new policy are
// equal, close (inside any clip range, gspo's included) or far apart on either
// side; rewards repeat, and one group has no variance.
func newProblem(rng *rand.Rand, o Objective, s shape) *problem {
	p := &problem{}
	tables := max(s.steps, 1)
	p.logp = make([][]float32, tables)
	add := func() int32 {
		for i := range p.logp {
			p.logp[i] = append(p.logp[i], 0)
		}
		p.ref = append(p.ref, 0)
		p.ent = append(p.ent, float32(rng.Float64()*4))
		return int32(len(p.ref) - 1)
	}
	add() // promptToken
	for q := range 4 {
		g := rollout.Group{ID: fmt.Sprintf("g%d", q), Prompt: make([]int32, 1+rng.IntN(5)), Components: []string{"format", "penalty"}}
		n := o.GroupSize
		if s.incomplete && q == 1 {
			n = max(1, n-2)
		}
		for i := range n {
			r := rollout.Rollout{GroupID: g.ID, PolicyStep: int64(3 + q), Truncated: s.truncated && rng.IntN(3) == 0}
			r.Reward = []float64{-1, 0, 0.5, 2, 1.0 / 3}[rng.IntN(5)]
			if q == 2 {
				r.Reward = 1.0 / 3 // no variance
			} else if i == 0 {
				r.Reward = 3 // some
			}
			r.Components = []float64{r.Reward, float64(i)}
			size := 1 + rng.IntN(9)
			if s.masks {
				r.LossMask = make([]bool, size)
			}
			noise := []float64{0, 1e-4, 0.3, 1}[rng.IntN(4)]
			shift := noise * (rng.Float64() - 0.5) * 2
			withSampler := rng.Float64() < s.sampler
			for t := range size {
				id := add()
				r.Completion = append(r.Completion, id)
				base := -0.05 - 6*rng.Float64()
				for k := range p.logp {
					p.logp[k][id] = float32(base + 0.2*float64(k)*rng.NormFloat64())
				}
				p.ref[id] = float32(base + 0.5*rng.NormFloat64())
				if s.masks {
					r.LossMask[t] = rng.IntN(4) > 0 && !(q == 3 && i == 0)
				}
				if withSampler {
					lp := p.logp[0][id] + float32(shift+0.3*noise*rng.NormFloat64())
					if s.masks && !r.LossMask[t] {
						lp = float32(math.NaN())
					}
					r.SamplerLogProbs = append(r.SamplerLogProbs, lp)
				}
				if s.weights {
					r.LossWeights = append(r.LossWeights, []float32{0, 0.25, 1, 2}[rng.IntN(4)])
				}
			}
			g.Rollouts = append(g.Rollouts, r)
		}
		p.groups = append(p.groups, g)
	}
	return p
}

func float64s(x []float32) []float64 {
	y := make([]float64, len(x))
	for i := range x {
		y[i] = float64(x[i])
	}
	return y
}

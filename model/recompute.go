package model

import (
	"trainerd/kernels"
)

// Recompute trades arithmetic for activation memory. What is computed again has
// the bits that it had: the choice changes no result.
type Recompute uint8

const (
	// RecomputeCheap computes norm and SwiGLU outputs again and keeps the rest
	// of each layer: they cost one pass over memory, which reading them back would too.
	RecomputeCheap Recompute = iota
	// RecomputeMLP computes gate and up again as well, the widest activations of a
	// layer (2F of the 2d+W+H·hd+2F kept numbers a token): a fifth more arithmetic.
	RecomputeMLP
	// RecomputeLayers keeps each layer's input only and runs its forward pass
	// again: about a third more arithmetic, activations independent of depth but for T*d.
	RecomputeLayers
)

// String returns "cheap", "mlp" or "layers".
func (r Recompute) String() string { return [...]string{"cheap", "mlp", "layers"}[r] }

// recompute is the mode of a layer.
func (o Options) recompute(layer int) Recompute {
	if layer < o.RecomputeMore {
		return o.Recompute + 1
	}
	return o.Recompute
}

// Fit returns opt with as little recomputation, a layer at a time, as makes the
// plan fit the budget in bytes, and that plan; opt's own Recompute is where it
// begins. With ok false nothing fits, and the plan is the smallest there is.
func Fit(dev kernels.Device, cfg Config, opt Options, budget int64) (_ Options, plan kernels.Plan, ok bool, err error) {
	if err := cfg.Validate(); err != nil {
		return opt, plan, false, err
	}
	at := func(level int) (Options, kernels.Plan, error) {
		o := opt
		o.Recompute, o.RecomputeMore = Recompute(level/cfg.Layers), level%cfg.Layers
		p, err := Plan(dev, cfg, o)
		return o, p, err
	}
	low, high := int(opt.Recompute)*cfg.Layers+opt.RecomputeMore, int(RecomputeLayers)*cfg.Layers
	if !opt.Train {
		high = low // there are no activations to be saved
	}
	// The plan shrinks from level to level, so the first that fits is found by halving.
	best, plan, err := at(low)
	if err != nil || plan.Total <= budget || low == high {
		return best, plan, plan.Total <= budget, err
	}
	best, plan, err = at(high)
	if err != nil || plan.Total > budget {
		return best, plan, false, err
	}
	for high-low > 1 { // low does not fit, high does
		mid := (low + high) / 2
		o, p, err := at(mid)
		if err != nil {
			return best, plan, false, err
		}
		if p.Total <= budget {
			high, best, plan = mid, o, p
		} else {
			low = mid
		}
	}
	return best, plan, true, nil
}

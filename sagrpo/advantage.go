package sagrpo

import (
	"trainerd/kernels"
	"trainerd/rollout"
)

// noVariance reports whether a group has no signal: its greatest reward equals its least.
func noVariance(g *rollout.Group) bool {
	for i := range g.Rollouts {
		if g.Rollouts[i].Reward != g.Rollouts[0].Reward {
			return false
		}
	}
	return true
}

// advantages computes the advantage of every rollout of groups, in their order,
// in float64 on the device. Members that are masked or truncated count in their
// group's mean. In a group without variance every advantage is exactly 0, where
// the arithmetic would leave the rounding error of the mean.
func advantages(device func(kernels.Advantages), scale kernels.AdvantageScale, groups []rollout.Group) (adv []float64, flat []bool) {
	var rewards []float64
	start := []int32{0}
	for g := range groups {
		for i := range groups[g].Rollouts {
			rewards = append(rewards, groups[g].Rollouts[i].Reward)
		}
		start = append(start, int32(len(rewards)))
	}
	adv = make([]float64, len(rewards))
	device(kernels.Advantages{Out: adv, R: rewards, Start: start, Scale: scale})

	flat = make([]bool, len(groups))
	for g := range groups {
		if flat[g] = noVariance(&groups[g]); flat[g] {
			clear(adv[start[g]:start[g+1]])
		}
	}
	return adv, flat
}

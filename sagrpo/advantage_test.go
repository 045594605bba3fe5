package sagrpo

import (
	"math"
	"testing"

	"trainerd/kernels"
	"trainerd/rollout"
)

// textbook computes advantages without care for a mean's rounding error, or for
// the deviation of a single reward, as a device may.
func textbook(a kernels.Advantages) {
	for g := range len(a.Start) - 1 {
		rewards, out := a.R[a.Start[g]:a.Start[g+1]], a.Out[a.Start[g]:a.Start[g+1]]
		sum, squares := 0.0, 0.0
		for _, r := range rewards {
			sum += r
		}
		mean := sum / float64(len(rewards))
		for i, r := range rewards {
			out[i] = r - mean
			squares += out[i] * out[i]
		}
		if a.Scale == kernels.ScaleStd {
			for i := range out {
				out[i] /= math.Sqrt(squares/float64(len(rewards)-1)) + 1e-4
			}
		}
	}
}

func TestAdvantages(t *testing.T) {
	for name, dev := range map[string]func(kernels.Advantages){"device": device(t), "textbook": textbook} {
		t.Run(name, func(t *testing.T) { testAdvantages(t, dev) })
	}
}

func testAdvantages(t *testing.T, dev func(kernels.Advantages)) {
	group := func(rewards ...float64) (g rollout.Group) {
		for _, r := range rewards {
			g.Rollouts = append(g.Rollouts, rollout.Rollout{Reward: r})
		}
		return g
	}
	groups := []rollout.Group{group(3, 0, 0), group(5), group(-1, 1), group(2, 2)}
	// Rewards whose mean is not exact: the rounding error must not look like signal.
	for n := 2; n < 12; n++ {
		g := group()
		for range n {
			g.Rollouts = append(g.Rollouts, rollout.Rollout{Reward: 0.1})
		}
		groups = append(groups, g)
	}
	for scale, want := range map[kernels.AdvantageScale][]float64{
		kernels.ScaleNone: {2, -1, -1, 0, -1, 1},
		kernels.ScaleStd:  {2 / (math.Sqrt(3) + 1e-4), -1 / (math.Sqrt(3) + 1e-4), -1 / (math.Sqrt(3) + 1e-4), 0, -1 / (math.Sqrt2 + 1e-4), 1 / (math.Sqrt2 + 1e-4)},
	} {
		adv, flat := advantages(dev, scale, groups)
		for i := range adv {
			w := 0.0
			if i < len(want) {
				w = want[i]
			}
			if w == 0 && adv[i] != 0 || math.Abs(adv[i]-w) > 1e-15 {
				t.Errorf("scale %d: advantage %d is %.17g, expected %.17g", scale, i, adv[i], w)
			}
		}
		for g := range groups {
			if want := g != 0 && g != 2; flat[g] != want {
				t.Errorf("scale %d: group %d without variance: %v, expected %v", scale, g, flat[g], want)
			}
		}
	}
}

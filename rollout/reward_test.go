package rollout_test

import (
	"errors"
	"math"
	"testing"

	"trainerd/internal/fault"
	"trainerd/rollout"
)

// TestCheckRewards: what no gradient survives is refused with its row, NaN of
// components that overflowed both ways among it.
func TestCheckRewards(t *testing.T) {
	for _, c := range []struct {
		reward float64
		ok     bool
	}{{0, true}, {-rollout.MaxReward, true}, {rollout.MaxReward, true}, {1.01e12, false}, {-1e300, false}, {math.Inf(1), false}, {math.NaN(), false}} {
		for _, column := range []string{"reward", "reward_harm"} {
			b := rollout.Batch{HasReward: true, Rollouts: []rollout.Rollout{{Reward: 1}, {Reward: c.reward}}}
			if column != "reward" {
				b.Components = []string{"harm"}
			}
			err := b.CheckRewards()
			if c.ok != (err == nil) {
				t.Errorf("%v: %v", c.reward, err)
			}
			if f := new(fault.Error); err != nil && (!errors.As(err, &f) || f.Fields[0].Name != column || f.Fields[0].Row != 1) {
				t.Errorf("%v: %+v, expected column %s and row 1", c.reward, err, column)
			}
		}
	}
}

package loop

import (
	"context"
	"fmt"
	"math/rand/v2"
	"time"

	"trainerd/secloop"
	"trainerd/secloop/scenario"
)

// RoundTime is one measurement of how long a round of battle-fields takes,
// beside the paper's model T_sim * ceil(B*G / N_env).
type RoundTime struct {
	B, G, Env int
	Measured  time.Duration // mean of the repetitions
	Model     time.Duration
}

// TimeRounds measures T_sim as the mean of single episodes, then rounds of B
// incidents with G strategies each on N_env fields at a time. Strategies are drawn at random.
func TimeRounds(ctx context.Context, f Field, seed uint64, bs, gs, envs []int, repeats int) (single time.Duration, out []RoundTime, err error) {
	play := func(rng *rand.Rand, n, env int) (time.Duration, error) {
		type task struct {
			a secloop.Alert
			s secloop.Strategy
		}
		tasks := make([]task, n)
		for i := range tasks {
			a := scenario.Draw(rng, false)
			tasks[i] = task{a, scenario.RandomStrategy(rng, a)}
		}
		began := time.Now()
		err := inParallel(ctx, env, n, func(ctx context.Context, i int) error {
			_, err := f.Play(ctx, tasks[i].a, tasks[i].s)
			return err
		})
		return time.Since(began), err
	}
	const episodes = 32
	took, err := play(seeded(seed, "single", 0), episodes, 1)
	if err != nil {
		return 0, nil, fmt.Errorf("time single episodes: %w", err)
	}
	single = took / episodes
	for _, b := range bs {
		for _, g := range gs {
			for _, env := range envs {
				t := RoundTime{B: b, G: g, Env: env, Model: single * time.Duration((b*g+env-1)/env)}
				for k := range repeats {
					took, err := play(seeded(seed, fmt.Sprint(b, g, env), int64(k)), b*g, env)
					if err != nil {
						return single, out, fmt.Errorf("time a round: %w", err)
					}
					t.Measured += took / time.Duration(repeats)
				}
				out = append(out, t)
			}
		}
	}
	return single, out, nil
}

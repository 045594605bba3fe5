package loop

import (
	"context"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"sync"

	"trainerd/internal/fault"
	"trainerd/secloop"
	"trainerd/secloop/scenario"
	"trainerd/secloop/sensor"
)

// Incident is one attack that calls for a strategy.
type Incident struct {
	Truth     secloop.Alert    `json:"truth"`     // what really happens; the policy never sees it
	Seed      uint64           `json:"seed"`      // of the observation
	Summaries []sensor.Summary `json:"summaries"` // what the sensors made of it
}

// Set says which incidents are meant. No incident belongs to two sets.
type Set string

const (
	Train     Set = "train"     // training scenarios, seven of eight situations
	Incidents Set = "incidents" // training scenarios, situations that training never draws
	Scenarios Set = "scenarios" // attack types that training never draws
)

// Sets lists the sets that are kept from training.
var Sets = []Set{Incidents, Scenarios}

// Field is where strategies meet attacks; secloop/sim and secloop/field are such.
type Field interface {
	// Play runs one strategy against one incident's attack on a field of its own.
	Play(ctx context.Context, a secloop.Alert, s secloop.Strategy) (scenario.Outcome, error)
	// Observe returns what the sensors report of the attack on an undefended field.
	Observe(ctx context.Context, a secloop.Alert, seed uint64) ([]sensor.Alert, error)
}

// Source draws incidents and has them sensed.
type Source struct {
	Field    Field
	Most     int // summaries of one incident
	Parallel int // observations at a time
}

// draw returns the next situation of a set.
func (set Set) draw(r *rand.Rand) (secloop.Alert, error) {
	for range 10000 {
		a := scenario.Draw(r, set == Scenarios)
		if set == Scenarios || secloop.HeldOut(a) == (set == Incidents) {
			return a, nil
		}
	}
	return secloop.Alert{}, fault.New(fault.Internal, "no_incidents", "draw an incident of the set %q: none in 10000 draws", set)
}

// Draw draws n incidents of a set and senses each.
func (s Source) Draw(ctx context.Context, r *rand.Rand, set Set, n int) ([]Incident, error) {
	out := make([]Incident, n)
	for i := range out {
		a, err := set.draw(r)
		if err != nil {
			return nil, err
		}
		out[i] = Incident{Truth: a, Seed: r.Uint64() >> 11} // 53 bits: whole in every JSON reader
	}
	return out, inParallel(ctx, s.Parallel, n, func(ctx context.Context, i int) error {
		alerts, err := s.Field.Observe(ctx, out[i].Truth, out[i].Seed)
		if err != nil {
			return fmt.Errorf("observe %s: %w", out[i].Truth.Key(), err)
		}
		out[i].Summaries = sensor.Summarize(alerts, s.Most)
		return nil
	})
}

// inParallel calls f for 0 to n-1, at most some at a time, and returns the first error.
func inParallel(ctx context.Context, parallel, n int, f func(ctx context.Context, i int) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	next := make(chan int)
	var wg sync.WaitGroup
	for range min(max(parallel, 1), n) {
		wg.Go(func() {
			for i := range next {
				if err := f(ctx, i); err != nil {
					cancel(err)
					return
				}
			}
		})
	}
	for i := range n {
		select {
		case next <- i:
			continue
		case <-ctx.Done():
		}
		break
	}
	close(next)
	wg.Wait()
	return context.Cause(ctx)
}

// seeded returns the random numbers of one purpose. What is drawn for a step
// depends on nothing that was drawn before, so that a run can go on anywhere.
func seeded(seed uint64, purpose string, step int64) *rand.Rand {
	h := fnv.New64a()
	fmt.Fprintf(h, "%s/%d", purpose, step)
	return rand.New(rand.NewPCG(seed, h.Sum64()))
}

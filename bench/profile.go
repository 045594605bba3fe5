package bench

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"math"
	"slices"
	"text/tabwriter"
	"time"

	"trainerd/kernels"
)

// StepProfile says where the time of a step goes. Phases and Gaps add up to
// StepSeconds by definition; Residue is what of Gaps the device's own clock
// did not see: the host's way in and out of the step.
type StepProfile struct {
	Steps       int              `json:"steps"`  // averaged
	StepSeconds float64          `json:"step_s"` // by the host's clock, with every operation timed
	Overhead    float64          `json:"overhead"`
	Phases      []PhaseTime      `json:"phases"`
	Gaps        float64          `json:"gaps_s"`  // step less phases: launches, and the host between operations
	Residue     float64          `json:"residue"` // (step - phases - gaps seen by the device's clock) / step
	Ops         []kernels.OpTime `json:"ops"`     // dearest first
}

// PhaseTime is one phase of a step.
type PhaseTime struct {
	Phase   string  `json:"phase"`
	Seconds float64 `json:"s"`
	Share   float64 `json:"share"` // of the step
	Calls   int     `json:"calls"`
}

// profileSteps averages steps in which every operation is timed; alone is the time of a step without.
func profileSteps(ctx context.Context, clock kernels.Profiler, steps int, alone float64, step func(context.Context) error) (*StepProfile, error) {
	p := &StepProfile{Steps: steps}
	var sum kernels.Profile
	for i := range steps + 1 { // the first makes the clock's events
		began := time.Now()
		clock.StartProfile(true)
		err := step(ctx)
		one, stopped := clock.StopProfile()
		if err != nil {
			return nil, err
		}
		if stopped != nil {
			return nil, fmt.Errorf("profile a step: %w", stopped)
		}
		if i == 0 {
			continue
		}
		p.StepSeconds += time.Since(began).Seconds() / float64(steps)
		sum.Gaps += one.Gaps / float64(steps)
		for _, o := range one.Ops {
			at := slices.IndexFunc(sum.Ops, func(x kernels.OpTime) bool { return x.Op == o.Op })
			if at < 0 {
				at = len(sum.Ops)
				sum.Ops = append(sum.Ops, kernels.OpTime{Op: o.Op, Phase: o.Phase, Calls: o.Calls})
			}
			sum.Ops[at].Seconds += o.Seconds / float64(steps)
		}
	}
	for _, phase := range kernels.Phases() {
		s, calls := sum.Phase(phase)
		p.Phases = append(p.Phases, PhaseTime{phase.String(), s, s / p.StepSeconds, calls})
	}
	p.Gaps = p.StepSeconds - sum.Total()
	p.Residue = (p.Gaps - sum.Gaps) / p.StepSeconds
	p.Overhead = p.StepSeconds/alone - 1
	p.Ops = sum.Ops
	slices.SortFunc(p.Ops, func(a, b kernels.OpTime) int { return cmp.Compare(b.Seconds, a.Seconds) })
	return p, nil
}

// Table prints phases, gaps and their sum.
func (p *StepProfile) Table(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "phase\tms\tshare\tcalls\t")
	sum := p.Gaps
	for _, x := range p.Phases {
		sum += x.Seconds
		fmt.Fprintf(t, "%s\t%.3f\t%.1f %%\t%d\t\n", x.Phase, 1e3*x.Seconds, 100*x.Share, x.Calls)
	}
	fmt.Fprintf(t, "launch gaps\t%.3f\t%.1f %%\t\t\n", 1e3*p.Gaps, 100*p.Gaps/p.StepSeconds)
	fmt.Fprintf(t, "step\t%.3f\t100 %%\t\tresidue %.2f %%, %.1f %% slower than a step without a profile\n", 1e3*sum, 100*math.Abs(p.Residue), 100*p.Overhead)
	for _, o := range p.Ops {
		fmt.Fprintf(t, "  %s\t%.3f\t%.1f %%\t%d\t\n", o.Op, 1e3*o.Seconds, 100*o.Seconds/p.StepSeconds, o.Calls)
	}
	return t.Flush()
}

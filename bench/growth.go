package bench

import (
	"context"
	"fmt"
	"math"
	"slices"
	"syscall"

	"trainerd/internal/plot"
	"trainerd/kernels"
)

// GrowthResult is one line of output of Growth: a step at one point of an axis.
type GrowthResult struct {
	Name         string  `json:"name"`
	Device       string  `json:"device"`
	Workers      int     `json:"workers"`
	Shape        string  `json:"shape"`
	Layers       int     `json:"layers"`
	Axis         string  `json:"axis"`   // groups, group_size or prompt
	Groups       int     `json:"groups"` // the point: all three, of which the axis' varies
	GroupSize    int     `json:"group_size"`
	Prompt       int     `json:"prompt"`
	Completion   int     `json:"completion"`
	Tokens       int     `json:"tokens"`          // computed: each prompt once
	Repeated     int     `json:"repeated_tokens"` // with the prompt before every completion
	StepSeconds  float64 `json:"step_s"`          // median
	Processor    float64 `json:"processor_s"`     // of this process in a step, all cores together; median
	RolloutsS    float64 `json:"rollouts_s"`
	UsefulGFLOP  float64 `json:"useful_gflop_s"`
	StateBytes   int64   `json:"state_bytes"`   // weights, gradients, moments
	ScratchBytes int64   `json:"scratch_bytes"` // activations, gradients of activations, logits: used
}

// GrowthOptions say what Growth measures.
type GrowthOptions struct {
	Shape      string
	Layers     int // instead of the shape's; 0: the shape's
	Prompt     int // tokens; the axis goes from a quarter to four times that
	Completion int
	GroupSize  int // the axis from a quarter to four times that
	Repeats    int
	Formats
}

// axisFactors are the points of an axis.
var axisFactors = []float64{0.25, 0.5, 1, 2, 4}

// Growth times steps of one micro-batch whose groups, group size or prompt grow
// while the others stay, each on a freshly loaded model, whose scratch memory is the step's.
func Growth(ctx context.Context, dev kernels.Device, o GrowthOptions, emit func(GrowthResult) error) error {
	if o.Repeats < 1 || o.Prompt < 4 || o.Completion < 1 || o.GroupSize < 4 {
		return fmt.Errorf("%d repeats, prompt %d, completion %d, group size %d: expected at least 1, 4, 1 and 4", o.Repeats, o.Prompt, o.Completion, o.GroupSize)
	}
	cfg, err := Shape(o.Shape)
	if err != nil {
		return err
	}
	if o.Layers > 0 {
		cfg.Layers = o.Layers
	}
	info := dev.Info()
	for _, axis := range GrowthAxes {
		for _, f := range axisFactors {
			r := GrowthResult{Name: "growth", Device: info.Name, Workers: info.Workers, Shape: o.Shape, Layers: cfg.Layers, Axis: axis,
				Groups: 2, GroupSize: o.GroupSize, Prompt: o.Prompt, Completion: o.Completion}
			at := r.point()
			if axis == "groups" {
				*at = int(4 * f)
			} else {
				*at = int(f * float64(*at))
			}
			l := Load{Prompt: r.Prompt}
			for range r.Groups {
				l.Groups = append(l.Groups, same(r.GroupSize, r.Completion))
			}
			formats := o.Formats
			opt, set, err := formats.options(dev, cfg, l.Tokens())
			if err != nil {
				return err
			}
			t, err := newTrainee(ctx, dev, cfg, l, opt, set)
			if err != nil {
				return fmt.Errorf("%s %d: %w", axis, *at, err)
			}
			var processor []float64
			r.StepSeconds, err = medianSeconds(o.Repeats, func() error {
				before := processorSeconds()
				err := t.step(ctx)
				processor = append(processor, processorSeconds()-before)
				return err
			})
			if err == nil {
				r.Processor = median(processor[1:])
			}
			r.Tokens, r.Repeated = l.Tokens(), l.Rollouts()*(r.Prompt+r.Completion)
			r.RolloutsS, r.UsefulGFLOP = float64(l.Rollouts())/r.StepSeconds, UsefulFLOPs(cfg, l)/r.StepSeconds/1e9
			r.ScratchBytes = t.m.ScratchPeak()
			r.StateBytes = t.peak() - r.ScratchBytes
			if closed := t.m.Close(); err == nil {
				err = closed
			}
			if err != nil {
				return fmt.Errorf("%s %d: %w", axis, *at, err)
			}
			if err := emit(r); err != nil {
				return err
			}
		}
	}
	return nil
}

// GrowthAxes names what Growth lets grow.
var GrowthAxes = []string{"groups", "group_size", "prompt"}

// point is the number that the axis varies.
func (r *GrowthResult) point() *int {
	switch r.Axis {
	case "groups":
		return &r.Groups
	case "group_size":
		return &r.GroupSize
	}
	return &r.Prompt
}

// processorSeconds is what this process has used so far. On a machine that is
// busy with other work it says more about a step on the CPU than the clock does.
func processorSeconds() float64 {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0 // it cannot fail for this process
	}
	return float64(u.Utime.Sec+u.Stime.Sec) + float64(u.Utime.Usec+u.Stime.Usec)/1e6
}

// GrowthPlot draws an axis: everything as a multiple of what it is at the first
// point. The time is the processors' on the CPU, the clock's on a card.
func GrowthPlot(axis string, results []GrowthResult) []byte {
	results = slices.DeleteFunc(slices.Clone(results), func(r GrowthResult) bool { return r.Axis != axis })
	took, name := func(r GrowthResult) float64 { return r.StepSeconds }, "time of a step"
	if len(results) > 0 && results[0].Device == "cpu" {
		took, name = func(r GrowthResult) float64 { return r.Processor }, "processor time of a step"
	}
	lines := []plot.Line{{Name: name}, {Name: "scratch memory"}, {Name: "tokens, each prompt once"}, {Name: "tokens, a prompt for every completion"}}
	most := 1.0
	for i := range results {
		r, first := &results[i], &results[0]
		for k, y := range []float64{took(*r) / took(*first), float64(r.ScratchBytes) / float64(first.ScratchBytes),
			float64(r.Tokens) / float64(first.Tokens), float64(r.Repeated) / float64(first.Repeated)} {
			lines[k].X, lines[k].Y = append(lines[k].X, float64(*r.point())), append(lines[k].Y, y)
			most = max(most, y)
		}
	}
	title := map[string]string{"groups": "groups in a step", "group_size": "completions of a prompt", "prompt": "tokens of a prompt"}[axis]
	if len(results) > 0 {
		r := results[0]
		title = fmt.Sprintf("%s: %s with %d layers on %s", title, r.Shape, r.Layers, r.Device)
	}
	return plot.LinePlot(title, axis, "times the first point", 5*math.Ceil(most/5), lines)
}

package bench

import (
	"context"
	"fmt"
	"io"
	"slices"
	"text/tabwriter"
	"time"

	"trainerd/kernels"
)

// KernelResult is one line of output of Kernels: an operation at one of the sizes of a load.
type KernelResult struct {
	Name      string  `json:"name"`
	Device    string  `json:"device"`
	Workers   int     `json:"workers"`
	Model     string  `json:"shape"`
	Load      string  `json:"load"`
	Op        string  `json:"op"`
	Sizes     string  `json:"sizes"`
	Attention string  `json:"attention,omitempty"`
	Calls     int     `json:"calls"` // in a step of the load as one micro-batch; 0: none
	Seconds   float64 `json:"s"`     // of one call
	GBs       float64 `json:"gb_s,omitempty"`
	TFLOPS    float64 `json:"tflop_s,omitempty"`
	Bound     string  `json:"bound,omitempty"` // memory or compute: which ceiling its floor comes from; none for transfers and the host
	Share     float64 `json:"share,omitempty"` // floor / time
	Extra     int64   `json:"extra_bytes,omitempty"`
}

// KernelsOptions say what Kernels measures.
type KernelsOptions struct {
	Shape, Load string
	MaxTokens   int           // the leading groups of the load that fit are the micro-batch
	Only        string        // an operation; "": all
	Budget      time.Duration // of one operation
}

// coldBytes is what the sets of buffers that a measurement goes round cover: five times an H100's L2 cache.
const coldBytes = 256 << 20

// mostSets bounds them where an operation touches little.
const mostSets = 16

// Kernels times every operation of kernels.Device at the sizes it has in a step
// of the load, one after the other, and the device's ceilings before them.
//
// An operation's floor is the greater of bytes / copy bandwidth and FLOPs / rate
// of a large product. Bytes count each element that must be read or written
// once, FLOPs two for each multiply-add of a product or of attention's scores and values
// (kernelCases has the formulas). Small working sets rotate through coldBytes
// of buffers. On CUDA, an operation that takes less than its launch shows its launch.
func Kernels(ctx context.Context, dev kernels.Device, o KernelsOptions, emit func(any) error) error {
	cfg, err := Shape(o.Shape)
	if err != nil {
		return err
	}
	l, err := LoadByName(o.Load)
	if err != nil {
		return err
	}
	if o.MaxTokens < 1 {
		return fmt.Errorf("max-tokens is %d, expected 1 or more", o.MaxTokens)
	}
	packed, err := pack(l, o.MaxTokens)
	if err != nil {
		return err
	}
	m := newMeter(dev, o.Budget)
	cases := kernelCases(dev.Info(), cfg, packed, m.dev.(kernels.Scratcher))
	if o.Only != "" {
		cases = slices.DeleteFunc(cases, func(c kernelCase) bool { return c.op != o.Only })
		if len(cases) == 0 {
			return fmt.Errorf("unknown operation %q", o.Only)
		}
	}
	ceilings, err := MeasureCeilings(ctx, dev)
	if err != nil {
		return fmt.Errorf("measure ceilings: %w", err)
	}
	if err := emit(ceilings); err != nil {
		return err
	}
	for _, c := range cases {
		r, err := c.measure(ctx, m, ceilings)
		if err != nil {
			return fmt.Errorf("time %s (%s): %w", c.op, c.sizes, err)
		}
		r.Model, r.Load = o.Shape, o.Load
		if err := emit(r); err != nil {
			return err
		}
	}
	return nil
}

// measure runs one case on sets of buffers in turn.
func (c *kernelCase) measure(ctx context.Context, m *meter, ceilings Ceilings) (KernelResult, error) {
	info := m.dev.Info()
	r := KernelResult{Name: "kernel", Device: info.Name, Workers: info.Workers, Op: c.op, Sizes: c.sizes, Attention: attention(m.dev), Calls: c.calls, Extra: c.scratch}
	sets := min(max(int(coldBytes/max(c.touched(), 1)), 1), m.sets)
	for sets > 1 && int64(sets)*c.touched() > info.MemFree/2 {
		sets--
	}
	b := newBuffers(m.dev)
	defer b.free()
	// Everything an operation may ask for at once, and its inputs that live in an arena.
	arena, err := m.dev.NewArena(c.scratch + c.arena + 1<<16)
	if err != nil {
		return r, err
	}
	defer m.dev.FreeArena(arena)
	runs := make([]func(), sets)
	if c.shared != nil {
		c.shared(b, arena)
	}
	for i := range runs {
		if b.err == nil {
			runs[i] = c.make(b, arena)
		}
	}
	if b.err != nil {
		return r, b.err
	}
	if r.Seconds, err = m.seconds(ctx, func(i int) { runs[i%sets]() }); err != nil {
		return r, err
	}
	if b.err != nil {
		return r, b.err
	}
	r.GBs, r.TFLOPS = c.bytes/r.Seconds/1e9, c.flops/r.Seconds/1e12
	if c.transfer {
		return r, nil
	}
	memory, compute := c.bytes/(ceilings.CopyGBs*1e9), c.flops/(ceilings.MatmulTFLOPS*1e12)
	r.Bound, r.Share = "memory", memory/r.Seconds
	if compute > memory {
		r.Bound, r.Share = "compute", compute/r.Seconds
	}
	return r, nil
}

// KernelTable prints results and what the measured calls of a step add up to.
func KernelTable(w io.Writer, results []KernelResult) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "operation\tsizes\ttime, µs\tGB/s\tTFLOP/s\tfloor / time\tx calls, ms\t")
	sum := 0.0
	for _, r := range results {
		share, step := "", ""
		if r.Bound != "" {
			share = fmt.Sprintf("%.0f %% %s", 100*r.Share, r.Bound)
		}
		if r.Calls > 0 {
			sum += float64(r.Calls) * r.Seconds
			step = fmt.Sprintf("%d: %.2f", r.Calls, 1e3*float64(r.Calls)*r.Seconds)
		}
		fmt.Fprintf(t, "%s\t%s\t%.1f\t%.1f\t%.3g\t%s\t%s\t\n", r.Op, r.Sizes, 1e6*r.Seconds, r.GBs, r.TFLOPS, share, step)
	}
	fmt.Fprintf(t, "sum over a step\t\t\t\t\t\t%.2f\t\n", 1e3*sum)
	return t.Flush()
}

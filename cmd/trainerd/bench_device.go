package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"trainerd/bench"
	"trainerd/internal/fault"
	"trainerd/kernels"
)

// benchDevice are the flags that all benchmarks of a device have.
type benchDevice struct {
	device           string
	attention        string
	workers, repeats int
}

func (b *benchDevice) flags(c *cobra.Command) {
	b.deviceFlags(c)
	c.Flags().IntVar(&b.repeats, "repeats", 5, "timed repetitions after one warm-up")
}

// deviceFlags are all but repeats, for what repeats by a budget of time.
func (b *benchDevice) deviceFlags(c *cobra.Command) {
	c.Flags().StringVar(&b.device, "device", "auto", "cpu, cuda:N or auto")
	c.Flags().StringVar(&b.attention, "attention", attentionMMA, "mma or wgmma, as the server's cuda_attention")
	c.Flags().IntVar(&b.workers, "workers", 0, "CPU workers; 0: one per core")
}

// on runs f on the device.
func (b *benchDevice) on(f func(kernels.Device) error) error {
	if b.attention != attentionMMA && b.attention != attentionWgmma {
		return fault.BadField("attention", b.attention, attentionMMA+" or "+attentionWgmma)
	}
	dev, err := openDeviceWith(b.device, b.workers, deviceOptions{attention: b.attention})
	if err != nil {
		return err
	}
	if err := f(dev); err != nil {
		_ = dev.Close()
		return err
	}
	return dev.Close()
}

// stepFlags are those of the benchmarks that run a load on a model.
func stepFlags(c *cobra.Command, o *bench.StepOptions, shape, load string) {
	c.Flags().StringVar(&o.Shape, "shape", shape, "smoke, 135m, 0.5b, 1.5b or 7b")
	c.Flags().StringVar(&o.Load, "load", load, "smoke, cpu512, flat, secloop or reason")
	c.Flags().IntVar(&o.MaxTokens, "max-tokens", 16384, "token budget of a micro-batch")
	c.Flags().StringVar(&o.Moments, "moments", "float32", "float32 or compact, as optimizer.moments of a job")
	c.Flags().StringVar(&o.MomentsIn, "moments-in", "device", "device or host (a card's alone), as optimizer.moments_in")
	c.Flags().StringVar(&o.Gradients, "gradients", "float32", "float32 or bfloat16, as optimizer.gradients")
	c.Flags().StringVar(&o.Recompute, "recompute", "auto", "auto, cheap, mlp or layers, as batch.recompute")
}

func newBenchStep() *cobra.Command {
	var d benchDevice
	var o bench.StepOptions
	c := &cobra.Command{
		Use:   "step",
		Short: "Whole SA-GRPO steps of a randomly initialised model (the table of a profile goes to stderr)",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			return d.on(func(dev kernels.Device) error {
				o.Repeats = d.repeats
				r, err := bench.Step(cmd.Context(), dev, o)
				if err != nil {
					return err
				}
				if r.Profile != nil {
					if err := r.Profile.Table(cmd.ErrOrStderr()); err != nil {
						return err
					}
				}
				return json.NewEncoder(cmd.OutOrStdout()).Encode(r)
			})
		},
	}
	d.flags(c)
	stepFlags(c, &o, "135m", "cpu512")
	c.Flags().BoolVar(&o.Floor, "floor", false, "measure the rate of a large product first, and say which share of it the step reaches")
	c.Flags().BoolVar(&o.Profile, "profile", false, "time every operation of three more steps and say where the time goes")
	return c
}

func newBenchScore() *cobra.Command {
	var d benchDevice
	var o bench.StepOptions
	c := &cobra.Command{
		Use:   "score",
		Short: "Log-probs of a load, as POST /v1/jobs/ID/logprobs computes them",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			return d.on(func(dev kernels.Device) error {
				o.Repeats = d.repeats
				r, err := bench.Score(cmd.Context(), dev, o)
				if err != nil {
					return err
				}
				return json.NewEncoder(cmd.OutOrStdout()).Encode(r)
			})
		},
	}
	d.flags(c)
	stepFlags(c, &o, "0.5b", "secloop")
	c.Flags().BoolVar(&o.Floor, "floor", false, "measure the rate of a large product first, and say which share of it is reached")
	return c
}

func newBenchDecode() *cobra.Command {
	var d benchDevice
	var o bench.DecodeOptions
	c := &cobra.Command{
		Use:   "decode",
		Short: "Sampling with a key-value cache, as POST /v1/jobs/ID/sample does it",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			return d.on(func(dev kernels.Device) error {
				o.Repeats = d.repeats
				r, err := bench.Decode(cmd.Context(), dev, o)
				if err != nil {
					return err
				}
				return json.NewEncoder(cmd.OutOrStdout()).Encode(r)
			})
		},
	}
	d.flags(c)
	c.Flags().StringVar(&o.Shape, "shape", "0.5b", "smoke, 135m, 0.5b, 1.5b or 7b")
	c.Flags().IntVar(&o.Sequences, "sequences", 64, "decoded at once")
	c.Flags().IntVar(&o.Group, "group", 8, "sequences of a prompt")
	c.Flags().IntVar(&o.Prompt, "prompt", 1536, "tokens of a prompt")
	c.Flags().IntVar(&o.NewTokens, "new-tokens", 128, "tokens of a sequence")
	return c
}

func newBenchKernels() *cobra.Command {
	var d benchDevice
	var o bench.KernelsOptions
	c := &cobra.Command{
		Use:   "kernels",
		Short: "Every operation of the device at the sizes of a load, beside its floor (the table goes to stderr)",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			return d.on(func(dev kernels.Device) error {
				enc := json.NewEncoder(cmd.OutOrStdout())
				var results []bench.KernelResult
				err := bench.Kernels(cmd.Context(), dev, o, func(r any) error {
					switch r := r.(type) {
					case bench.KernelResult:
						results = append(results, r)
					case bench.Ceilings:
						fmt.Fprintf(cmd.ErrOrStderr(), "%s (%s): copy %.1f GB/s, product of %d³ %.4g TFLOP/s\n", r.Device, r.Model, r.CopyGBs, r.Matmul, r.MatmulTFLOPS)
					}
					return enc.Encode(r)
				})
				if err != nil {
					return err
				}
				return bench.KernelTable(cmd.ErrOrStderr(), results)
			})
		},
	}
	d.deviceFlags(c)
	c.Flags().StringVar(&o.Shape, "shape", "0.5b", "smoke, 135m, 0.5b, 1.5b or 7b")
	c.Flags().StringVar(&o.Load, "load", "secloop", "smoke, cpu512, flat, secloop or reason")
	c.Flags().IntVar(&o.MaxTokens, "max-tokens", 16384, "the leading groups of the load that fit are timed")
	c.Flags().StringVar(&o.Only, "only", "", "one operation by its name in the output")
	c.Flags().DurationVar(&o.Budget, "budget", 150*time.Millisecond, "time for one operation, after which it is repeated no more")
	return c
}

func newBenchGrowth() *cobra.Command {
	var d benchDevice
	var o bench.GrowthOptions
	var dir string
	c := &cobra.Command{
		Use:   "growth",
		Short: "Time and memory of a step against groups, group size and prompt length",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			return d.on(func(dev kernels.Device) error {
				o.Repeats = d.repeats
				enc := json.NewEncoder(cmd.OutOrStdout())
				var results []bench.GrowthResult
				err := bench.Growth(cmd.Context(), dev, o, func(r bench.GrowthResult) error {
					results = append(results, r)
					return enc.Encode(r)
				})
				if err != nil || dir == "" {
					return err
				}
				if err := os.MkdirAll(dir, 0o755); err != nil {
					return err
				}
				for _, axis := range bench.GrowthAxes {
					if err := os.WriteFile(filepath.Join(dir, "growth-"+axis+".svg"), bench.GrowthPlot(axis, results), 0o644); err != nil {
						return err
					}
				}
				return nil
			})
		},
	}
	d.flags(c)
	c.Flags().StringVar(&o.Shape, "shape", "135m", "smoke, 135m, 0.5b, 1.5b or 7b")
	c.Flags().IntVar(&o.Layers, "layers", 0, "instead of the shape's; 0: the shape's")
	c.Flags().IntVar(&o.Prompt, "prompt", 512, "tokens of a prompt, in the middle of its axis")
	c.Flags().IntVar(&o.Completion, "completion", 64, "tokens of a completion")
	c.Flags().IntVar(&o.GroupSize, "group-size", 8, "completions of a prompt, in the middle of its axis")
	c.Flags().StringVar(&dir, "plots", "", "directory for growth-groups.svg, growth-group_size.svg and growth-prompt.svg; default: none are drawn")
	return c
}

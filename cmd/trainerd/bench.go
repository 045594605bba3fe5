package main

import (
	"encoding/json"

	"github.com/spf13/cobra"

	"trainerd/bench"
)

func newBench() *cobra.Command {
	root := &cobra.Command{Use: "bench", Short: "Measure this machine: one JSON object per line"}
	var device, shape, load string
	var workers, repeats, tokens int

	step := &cobra.Command{
		Use:   "step",
		Short: "Whole SA-GRPO steps of a randomly initialised model",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			dev, err := openDevice(device, workers)
			if err != nil {
				return err
			}
			defer dev.Close()
			r, err := bench.Step(cmd.Context(), dev, shape, load, repeats, tokens)
			if err != nil {
				return err
			}
			return json.NewEncoder(cmd.OutOrStdout()).Encode(r)
		},
	}
	step.Flags().StringVar(&shape, "shape", "135m", "135m, 0.5b, 1.5b or 7b")
	step.Flags().StringVar(&load, "load", "cpu512", "cpu512, flat, secloop or reason")
	step.Flags().IntVar(&tokens, "max-tokens", 16384, "token budget of a micro-batch")

	gemm := &cobra.Command{
		Use:   "gemm",
		Short: "Matrix products at the shapes of a 135M step",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			dev, err := openDevice(device, workers)
			if err != nil {
				return err
			}
			defer dev.Close()
			enc := json.NewEncoder(cmd.OutOrStdout())
			return bench.Gemm(cmd.Context(), dev, repeats, func(r bench.GemmResult) error { return enc.Encode(r) })
		},
	}
	for _, c := range []*cobra.Command{step, gemm} {
		c.Flags().StringVar(&device, "device", "auto", "cpu, cuda:N or auto")
		c.Flags().IntVar(&workers, "workers", 0, "CPU workers; 0: one per core")
		c.Flags().IntVar(&repeats, "repeats", 5, "timed repetitions after one warm-up")
	}
	root.AddCommand(step, gemm)
	return root
}

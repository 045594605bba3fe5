package main

import (
	"encoding/json"
	"os"

	"github.com/spf13/cobra"

	"trainerd/bench"
	"trainerd/storage/disk"
)

func newBench() *cobra.Command {
	root := &cobra.Command{Use: "bench", Short: "Measure this machine: one JSON object per line"}
	var device string
	var workers, repeats int

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
	var checkpoint bench.CheckpointOptions
	var dir string
	ckpt := &cobra.Command{
		Use:   "checkpoint",
		Short: "What a checkpoint costs training: capture, write, and a step beside it (the table goes to stderr)",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			dev, err := openDevice(device, workers)
			if err != nil {
				return err
			}
			defer dev.Close()
			tmp, err := os.MkdirTemp(dir, "trainerd-bench-")
			if err != nil {
				return err
			}
			defer os.RemoveAll(tmp)
			store, err := disk.Open(tmp)
			if err != nil {
				return err
			}
			defer store.Close()
			checkpoint.Repeats, checkpoint.Store = repeats, store
			r, err := bench.Checkpoint(cmd.Context(), dev, checkpoint)
			if err != nil {
				return err
			}
			if err := r.Table(cmd.ErrOrStderr()); err != nil {
				return err
			}
			return json.NewEncoder(cmd.OutOrStdout()).Encode(r)
		},
	}
	ckpt.Flags().StringVar(&checkpoint.Shape, "shape", "135m", "smoke, 135m, 0.5b, 1.5b or 7b")
	ckpt.Flags().StringVar(&checkpoint.Load, "load", "cpu512", "smoke, cpu512, flat, secloop or reason")
	ckpt.Flags().IntVar(&checkpoint.MaxTokens, "max-tokens", 16384, "token budget of a micro-batch")
	ckpt.Flags().StringVar(&checkpoint.DType, "dtype", "BF16", "F32, BF16 or F16: of the published weights")
	ckpt.Flags().BoolVar(&checkpoint.Snapshot, "snapshot", false, "with optimizer state")
	ckpt.Flags().StringVar(&dir, "dir", "", "directory for the store; default: the system's for temporary files")
	for _, c := range []*cobra.Command{gemm, ckpt} {
		c.Flags().StringVar(&device, "device", "auto", "cpu, cuda:N or auto")
		c.Flags().IntVar(&workers, "workers", 0, "CPU workers; 0: one per core")
		c.Flags().IntVar(&repeats, "repeats", 5, "timed repetitions after one warm-up")
	}
	root.AddCommand(newBenchLoad(), newBenchIngest(), newBenchStep(), newBenchKernels(), newBenchScore(), newBenchDecode(), newBenchGrowth(), gemm, ckpt)
	return root
}

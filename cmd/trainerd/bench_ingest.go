package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/pprof"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"trainerd/bench"
)

func newBenchIngest() *cobra.Command {
	o := bench.IngestOptions{}
	var dir, profile string
	cmd := &cobra.Command{
		Use:   "ingest",
		Short: "What accepting rollouts costs: HTTP, decode, validate, spool, pack (the table goes to stderr)",
		Long: `Producers, in a process of their own, post bodies of rollouts over loopback to a
server in this one. Every body is read, hashed, decoded, validated, written and
synced to the spool, assembled into groups, and packed for a step; the step is
then recorded without computing the model. Printed are MB/s of Arrow on the wire,
by wall clock and by second of this process's processor time, the disk's own
synced rate with writes of the same sizes, and the stages alone.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			tmp, err := os.MkdirTemp(dir, "trainerd-bench-")
			if err != nil {
				return err
			}
			defer os.RemoveAll(tmp)
			o.Dir = tmp
			o.Feed = feedProcess
			if profile != "" {
				f, err := os.Create(filepath.Clean(profile))
				if err != nil {
					return err
				}
				defer f.Close()
				if err := pprof.StartCPUProfile(f); err != nil {
					return err
				}
				defer pprof.StopCPUProfile()
			}
			r, err := bench.Ingest(cmd.Context(), o)
			if err != nil {
				return err
			}
			if err := r.Table(cmd.ErrOrStderr()); err != nil {
				return err
			}
			return json.NewEncoder(cmd.OutOrStdout()).Encode(r)
		},
	}
	f := cmd.Flags()
	f.IntVar(&o.Rows, "rows", 65536, "rollouts in all")
	f.IntVar(&o.BatchRows, "batch", 256, "rollouts of a body")
	f.IntVar(&o.GroupSize, "group-size", 8, "rollouts of a group, which share a prompt")
	f.IntVar(&o.Prompt, "prompt", 256, "tokens of a prompt, which each rollout repeats")
	f.IntVar(&o.Completion, "completion", 768, "tokens of a completion, each with a log-prob")
	f.IntVar(&o.Producers, "producers", 8, "bodies under way at once")
	f.BoolVar(&o.RowIDs, "row-ids", false, "rows have a rollout_id, so that each row's content is fingerprinted")
	f.DurationVar(&o.StageTime, "stage-time", 300*time.Millisecond, "processor time for which each stage alone is repeated; the disk is measured for four times as long")
	f.StringVar(&dir, "dir", "", "directory for the data, whose disk is measured; default: the system's for temporary files")
	f.StringVar(&profile, "cpuprofile", "", "write a CPU profile of this process to a file")
	cmd.AddCommand(newIngestFeed())
	return cmd
}

// newIngestFeed is the producers' process: it reads bench.FeedOptions and writes a bench.FeedResult.
func newIngestFeed() *cobra.Command {
	return &cobra.Command{
		Use:    "feed",
		Short:  "The producers of bench ingest, which starts them itself",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			var f bench.FeedOptions
			if err := json.NewDecoder(cmd.InOrStdin()).Decode(&f); err != nil {
				return fmt.Errorf("read what to send: %w", err)
			}
			r, err := bench.Feed(cmd.Context(), f)
			if err != nil {
				return err
			}
			return json.NewEncoder(cmd.OutOrStdout()).Encode(r)
		},
	}
}

// feedProcess runs the producers as a process of this executable.
func feedProcess(ctx context.Context, f bench.FeedOptions) (r bench.FeedResult, err error) {
	self, err := os.Executable()
	if err != nil {
		return r, err
	}
	in, err := json.Marshal(f)
	if err != nil {
		return r, err
	}
	cmd := exec.CommandContext(ctx, self, "bench", "ingest", "feed")
	var out, complaint bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(in), &out, &complaint
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Run(); err != nil {
		return r, fmt.Errorf("producers: %w: %s", err, bytes.TrimSpace(complaint.Bytes()))
	}
	if err := json.Unmarshal(out.Bytes(), &r); err != nil {
		return r, fmt.Errorf("producers: read what they saw: %w", err)
	}
	return r, nil
}

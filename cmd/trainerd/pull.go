package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"trainerd/client"
	"trainerd/internal/fault"
	"trainerd/storage"
)

const pullLong = `Fetch the Hugging Face directory of a job's checkpoint over HTTP. Every digest is verified before DIR changes,
and DIR is swapped in one step: an inference node never sees a part of a policy.

--exec PROGRAM runs PROGRAM, with the arguments after "--", once DIR is the new checkpoint: to make an engine load
it. No shell is involved. Its environment has TRAINERD_JOB, TRAINERD_STEP, TRAINERD_DIR (absolute),
TRAINERD_DIGEST (SHA-256 of the manifest), TRAINERD_PREFIX and TRAINERD_SERVER, and not TRAINERD_TOKEN.

--follow stays and takes each newer checkpoint. It runs PROGRAM once at the start too, since the engine may have
been away, and again with growing pauses while PROGRAM fails. The server hears under the name --node which step is
served, that is, was last loaded by PROGRAM with success (GET /v1/jobs/JOB/nodes). A server that is away is waited
for; SIGTERM ends both PROGRAM and the command, with status 0.`

type puller struct {
	url, step, program, node string
	wait, timeout, interval  time.Duration
	report                   time.Duration
	follow, delta, direct    bool
	to                       dial
}

func newPull() *cobra.Command {
	var p puller
	cmd := &cobra.Command{
		Use:     "pull JOB DIR [-- ARG...]",
		Short:   "Fetch a job's checkpoint, verify it and swap it in as DIR; follow the job with --follow",
		Long:    pullLong,
		Example: "  trainerd pull --follow --exec deploy/inference/sglang.py JOB /models/policy -- http://127.0.0.1:30000",
		Args:    takes(2, -1),
		RunE:    func(cmd *cobra.Command, args []string) error { return p.run(cmd, args) },
	}
	f := cmd.Flags()
	f.StringVar(&p.url, "server", "http://127.0.0.1:8080", "address of the server")
	f.StringVar(&p.step, "step", "latest", "latest, or a step number")
	f.DurationVar(&p.wait, "wait", 0, "wait this long for the checkpoint")
	f.BoolVar(&p.follow, "follow", false, "stay, and take each newer checkpoint")
	f.StringVar(&p.program, "exec", "", "program to run when DIR is the new checkpoint; its arguments come after --")
	f.DurationVar(&p.timeout, "exec-timeout", 10*time.Minute, "how long the program may take before it is ended and counts as failed")
	f.StringVar(&p.node, "node", "", "name to report under with --follow; default: the host's name; \"-\": no reports")
	f.DurationVar(&p.interval, "interval", 0, "with --follow: at least this long between two checkpoints taken")
	f.DurationVar(&p.report, "report", 15*time.Second, "with --follow: between two reports")
	f.BoolVar(&p.delta, "delta", false, "fetch only the values that differ from the checkpoint that lies in DIR, where the server can tell them")
	f.BoolVar(&p.direct, "direct", false, "fetch files from the store itself (presigned addresses), where the server has such")
	p.to.bind(cmd)
	return cmd
}

func (p *puller) run(cmd *cobra.Command, args []string) error {
	extra := args[2:]
	switch dash := cmd.ArgsLenAtDash(); {
	case len(extra) > 0 && dash != 2:
		return fmt.Errorf("%d arguments, expected JOB and DIR; those of the program come after --", len(args))
	case len(extra) > 0 && p.program == "":
		return fmt.Errorf("arguments after --: expected --exec PROGRAM, which they are for")
	case p.follow && (p.step != "latest" || p.wait != 0):
		return fmt.Errorf("--follow takes every newer checkpoint: expected neither --step nor --wait")
	case !p.follow && (p.node != "" || p.interval != 0 || cmd.Flags().Changed("report")):
		return fmt.Errorf("--node, --interval and --report: expected --follow with them")
	case p.program == "" && cmd.Flags().Changed("exec-timeout"):
		return fmt.Errorf("--exec-timeout: expected --exec with it")
	case p.timeout <= 0 || p.report < time.Second:
		return fmt.Errorf("--exec-timeout %v, --report %v: expected more than 0 and at least 1s", p.timeout, p.report)
	}
	if p.program != "" { // found now rather than after the download
		path, err := exec.LookPath(p.program)
		if err != nil {
			return fmt.Errorf("--exec: %w", err)
		}
		p.program = path
	}
	con := newConsole(cmd)
	o, err := p.to.options(os.Getenv)
	if err != nil {
		return err
	}
	c, err := client.New(p.url, o)
	if err != nil {
		return err
	}
	if p.follow {
		return p.stay(cmd.Context(), con, c, args[0], args[1], extra)
	}
	m, stats, err := p.once(cmd.Context(), con, c, args[0], args[1])
	if err != nil {
		return err
	}
	fmt.Fprintf(con.out, "%s: step %d of job %s, %d files, %d bytes, all digests match\n", args[1], m.Step, m.Job, len(m.Files), m.Bytes("hf/"))
	if p.delta {
		fmt.Fprintf(con.out, "fetched %d bytes: a delta of %d, whole files of %d; %d were here already\n", stats.Delta+stats.Fetched, stats.Delta, stats.Fetched, stats.Kept)
	}
	if p.program == "" {
		return nil
	}
	was, err := storage.ReadPulled(args[1])
	if err != nil {
		return err
	}
	run := p.command(con, extra)
	return run(cmd.Context(), client.Checkpoint{Job: m.Job, Step: m.Step, Prefix: m.Prefix, Digest: was.SHA256, Dir: absolute(args[1])})
}

// once fetches one checkpoint.
func (p *puller) once(ctx context.Context, con console, c *client.Client, job, dir string) (storage.Manifest, storage.PullStats, error) {
	n := int64(0)
	var err error
	if p.step != "latest" {
		if n, err = strconv.ParseInt(p.step, 10, 64); err != nil || n < 0 {
			return storage.Manifest{}, storage.PullStats{}, fault.BadField("step", p.step, "latest or a step number")
		}
	}
	if p.step == "latest" || p.wait > 0 {
		m, err := waitCheckpoint(ctx, c, job, n, p.wait)
		if err != nil {
			return m, storage.PullStats{}, err
		}
		if p.step == "latest" {
			n = m.Step
		}
	}
	return c.PullWith(ctx, job, n, dir, p.options(con))
}

func (p *puller) options(con console) client.PullOptions {
	return client.PullOptions{Holder: p.name(), Delta: p.delta, Direct: p.direct,
		Note: func(err error) { con.log.Warn("pull", "err", err) }}
}

// name is what the server knows this node by.
func (p *puller) name() string {
	if p.node != "" && p.node != "-" {
		return p.node
	}
	host, err := os.Hostname()
	if err != nil || host == "" {
		return "node"
	}
	return host
}

func (p *puller) stay(ctx context.Context, con console, c *client.Client, job, dir string, extra []string) error {
	o := client.FollowOptions{Job: job, Dir: dir, Node: p.name(), Report: p.report, Interval: p.interval, Pull: p.options(con), Log: con.log}
	if p.node == "-" {
		o.Node = ""
	}
	if p.program != "" {
		o.Apply = p.command(con, extra)
	}
	return c.Follow(ctx, o)
}

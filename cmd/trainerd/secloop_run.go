package main

import (
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"trainerd/internal/fault"
	"trainerd/secloop/loop"
)

// loopFlags are the settings of a run on the command line.
type loopFlags struct {
	loop.Settings
	weights string
	without []string
	smollm2 string
}

// byteSettings are those that the small byte-level model learns with.
func byteSettings() loop.Settings {
	return loop.Settings{
		Seed: 1, Objective: "sa_grpo", Weights: loop.DefaultWeights(), LR: 2e-4, Temperature: 1, Steps: 40, Groups: 32, Size: 7,
		Most: 3, MaxPrompt: 128, MaxTokens: 80, MicroBatch: 16384, EvalIncidents: 240, EvalScenarios: 120, EvalEvery: 10,
		Warm: loop.Warm{Steps: 300, Rows: 64, Ahead: 20, Pool: 1024, LR: 3e-3, Skill: 0.35, EOS: byteEOS},
	}
}

// smolSettings are those of SmolLM2-135M-Instruct with brief prompts, for an hour of two cores.
func smolSettings() loop.Settings {
	s := byteSettings()
	s.LR, s.Groups = 2e-5, 16
	s.MaxPrompt, s.MaxTokens, s.MicroBatch = 192, 48, 1536
	s.EvalIncidents, s.EvalScenarios = 120, 60
	s.Warm = loop.Warm{Steps: 60, Rows: 16, Ahead: 10, Pool: 512, LR: 1e-4, Skill: 0.35}
	return s
}

func (l *loopFlags) bind(cmd *cobra.Command) {
	f := cmd.Flags()
	l.Settings = byteSettings()
	f.StringVar(&l.smollm2, "smollm2", "", "GGUF of SmolLM2-135M-Instruct: train that, with brief prompts and settings for a CPU")
	f.Uint64Var(&l.Seed, "seed", l.Seed, "seed of weights, incidents and sampling")
	f.StringVar(&l.Objective, "objective", l.Objective, "sa_grpo, grpo, dr_grpo, dapo, gspo or cispo")
	f.StringVar(&l.weights, "weights", "", "weights of the reward modules, as format=1,execution=1,evaluation=1,penalty=-1")
	f.StringSliceVar(&l.without, "without", nil, "reward modules to switch off (weight 0)")
	f.BoolVar(&l.Shuffle, "control", false, "shuffle the rewards within each group: nothing must be learned")
	f.Float64Var(&l.LR, "lr", l.LR, "learning rate")
	f.Float64Var(&l.Temperature, "temperature", l.Temperature, "of sampling and of the objective")
	f.IntVar(&l.Steps, "steps", l.Steps, "turns of the loop; 0 only measures")
	f.IntVar(&l.Groups, "groups", l.Groups, "incidents per turn (B)")
	f.IntVar(&l.Size, "group-size", l.Size, "strategies per incident (G)")
	f.IntVar(&l.Most, "summaries", l.Most, "most summaries in a prompt")
	f.IntVar(&l.MaxPrompt, "max-prompt", l.MaxPrompt, "tokens of a prompt that memory is planned with")
	f.IntVar(&l.MaxTokens, "max-tokens", l.MaxTokens, "longest strategy in tokens")
	f.IntVar(&l.MicroBatch, "micro-batch", l.MicroBatch, "tokens of a micro-batch")
	f.IntVar(&l.Warm.Steps, "warm-steps", l.Warm.Steps, "cross_entropy steps of the warm start; 0: none")
	f.IntVar(&l.Warm.Rows, "warm-rows", l.Warm.Rows, "demonstrations per warm-start step")
	f.IntVar(&l.Warm.Pool, "warm-pool", l.Warm.Pool, "different incidents that are demonstrated on")
	f.Float64Var(&l.Warm.LR, "warm-lr", l.Warm.LR, "learning rate of the warm start")
	f.Float64Var(&l.Warm.Skill, "warm-skill", l.Warm.Skill, "how often the operator picks a tool that helps")
	f.IntVar(&l.EvalIncidents, "eval-incidents", l.EvalIncidents, "held-out incidents of training scenarios")
	f.IntVar(&l.EvalScenarios, "eval-scenarios", l.EvalScenarios, "incidents of held-out scenarios")
	f.IntVar(&l.EvalEvery, "eval-every", l.EvalEvery, "turns between measurements")
}

// settle returns the settings that the flags ask for.
func (l *loopFlags) settle(cmd *cobra.Command) (loop.Settings, error) {
	s := l.Settings
	if l.smollm2 != "" {
		// What was given on the command line stays; the rest is for the larger model.
		given := map[string]string{}
		for _, name := range []string{"lr", "temperature", "steps", "groups", "summaries", "max-prompt", "max-tokens", "micro-batch", "warm-steps", "warm-rows",
			"warm-pool", "warm-lr", "eval-incidents", "eval-scenarios", "eval-every"} {
			if f := cmd.Flags().Lookup(name); f.Changed {
				given[name] = f.Value.String()
			}
		}
		d := smolSettings()
		d.Seed, d.Objective, d.Shuffle, d.Size, d.Warm.Skill = s.Seed, s.Objective, s.Shuffle, s.Size, s.Warm.Skill
		l.Settings = d
		for name, v := range given {
			if err := cmd.Flags().Set(name, v); err != nil {
				return s, err
			}
		}
		s = l.Settings
	}
	s.Weights = loop.DefaultWeights()
	for part := range strings.SplitSeq(l.weights, ",") {
		if part == "" {
			continue
		}
		name, text, _ := strings.Cut(part, "=")
		v, err := strconv.ParseFloat(text, 64)
		if _, ok := s.Weights[name]; !ok || err != nil || math.IsNaN(v) || math.IsInf(v, 0) {
			return s, fault.BadField("weights", part, "format=W, execution=W, evaluation=W or penalty=W")
		}
		s.Weights[name] = v
	}
	for _, name := range l.without {
		if _, ok := s.Weights[name]; !ok {
			return s, fault.BadField("without", name, "format, execution, evaluation or penalty")
		}
		s.Weights[name] = 0
	}
	return s, s.Validate()
}

func newSecloopRun() *cobra.Command {
	l := &loopEnv{}
	var flags loopFlags
	var out string
	var story, check bool
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Train a policy in the loop",
		Long: "Train a policy: a warm start on an operator's demonstrations, then turns of the loop. Everything is kept in --out, and\n" +
			"the same command goes on where a run was ended. Without --server a server runs inside this process.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			l.con = newLoopConsole(cmd)
			s, err := flags.settle(cmd)
			if err != nil {
				return err
			}
			if flags.smollm2 != "" {
				l.modelIs = flags.smollm2
				if !cmd.Flags().Changed("prompt") {
					l.prompt = "brief"
				}
			}
			if out == "" {
				if out, err = os.MkdirTemp("", "trainerd-secloop-"); err != nil {
					return err
				}
				defer os.RemoveAll(out)
			}
			began := time.Now()
			r, err := l.run(cmd, s, out, story)
			if err != nil {
				return err
			}
			if err := loop.Plots(out, r); err != nil {
				return err
			}
			report(l.con.out, r)
			fmt.Fprintf(l.con.out, "\n%.0f s in all\n", time.Since(began).Seconds())
			if !check {
				return nil
			}
			return verdict(l.con.err, r)
		},
	}
	flags.bind(cmd)
	l.bindField(cmd)
	l.bindPolicy(cmd, "bytes")
	l.bindJudge(cmd)
	cmd.Flags().StringVar(&out, "out", "", "directory to keep everything in; default: a temporary one that is removed")
	cmd.Flags().BoolVar(&story, "story", false, "show the first turns stage by stage")
	cmd.Flags().BoolVar(&check, "check", false, "exit 1 unless the run gained what it must (30 points; with --control at most 5)")
	return cmd
}

// run does one training run in a directory.
func (l *loopEnv) run(cmd *cobra.Command, s loop.Settings, dir string, story bool) (loop.Result, error) {
	ctx := cmd.Context()
	f, closeField, err := l.openField()
	if err != nil {
		return loop.Result{}, err
	}
	defer closeField()
	p, err := l.openPolicy(ctx, dir, s.Seed)
	if err != nil {
		return loop.Result{}, err
	}
	s.Warm.EOS = p.eos
	a, err := l.agent(p, f, s.MaxTokens, s.Temperature)
	if err != nil {
		return loop.Result{}, err
	}
	if err := l.connect(ctx, filepath.Join(dir, "server")); err != nil {
		return loop.Result{}, err
	}
	defer l.stop()
	r := &loop.Run{Client: l.client, Agent: a, Source: loop.Source{Field: f, Most: s.Most, Parallel: l.parallel}, Settings: s, Model: p.source, Dir: dir,
		Story: story, Printf: func(format string, args ...any) { fmt.Fprintf(l.con.out, format, args...) }}
	return r.Do(ctx)
}

// report prints the table and the curve of a run.
func report(w io.Writer, r loop.Result) {
	for _, set := range loop.Sets {
		before, ok := r.Before(set)
		if !ok {
			continue
		}
		after, _ := r.After(set)
		title := map[loop.Set]string{loop.Incidents: "held-out incidents of training scenarios", loop.Scenarios: "held-out scenarios"}[set]
		fmt.Fprintf(w, "\n%s: %+.1f points\n", title, 100*(after.Accuracy-before.Accuracy))
		loop.Table(w, []string{"warm start", fmt.Sprintf("step %d", after.Step)}, []loop.Point{before, after})
		fmt.Fprintln(w)
		for _, p := range r.Points {
			if p.Set == set {
				const width = 50
				n := int(p.Accuracy*width + 0.5)
				fmt.Fprintf(w, "%4d  |%s%s| %5.1f %%  reward %6.3f\n", p.Step, strings.Repeat("█", n), strings.Repeat(" ", width-n), 100*p.Accuracy, p.Reward)
			}
		}
	}
}

const (
	minLoopGain    = 30 // points of held-out accuracy that a run must show
	maxLoopControl = 5  // points that the control may gain
)

// verdict says whether a run showed what it must.
func verdict(w io.Writer, r loop.Result) error {
	before, _ := r.Before(loop.Incidents)
	after, _ := r.After(loop.Incidents)
	gain := 100 * (after.Accuracy - before.Accuracy)
	switch {
	case r.Settings.Shuffle && gain > maxLoopControl:
		fmt.Fprintf(w, "FAILED: the control gained %.1f points, at most %d are chance\n", gain, maxLoopControl)
		return exitError{1}
	case !r.Settings.Shuffle && gain < minLoopGain:
		fmt.Fprintf(w, "FAILED: a gain of %.1f points, at least %d are expected\n", gain, minLoopGain)
		return exitError{1}
	}
	return nil
}

package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"trainerd/internal/fault"
	"trainerd/secloop/loop"
)

func newSecloopEval() *cobra.Command {
	l := &loopEnv{}
	s := byteSettings()
	var out, job string
	var constant int
	cmd := &cobra.Command{
		Use:   "eval",
		Short: "Measure a policy per scenario and tactic on what training never saw",
		Long: "Measure a policy on held-out incidents of the training scenarios and on held-out scenarios: one strategy for each\n" +
			"incident. Prints a table; with --out writes eval.json, scenarios.svg and tactics.svg. --model takes the directory\n" +
			"\"policy\" that a run leaves behind.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			l.con = newLoopConsole(cmd)
			s.Steps, s.Warm.Steps = 0, 0
			if err := s.Validate(); err != nil {
				return err
			}
			ctx := cmd.Context()
			dir, err := os.MkdirTemp("", "trainerd-secloop-")
			if err != nil {
				return err
			}
			defer os.RemoveAll(dir)
			f, closeField, err := l.openField()
			if err != nil {
				return err
			}
			defer closeField()
			p, err := l.openPolicy(ctx, dir, s.Seed)
			if err != nil {
				return err
			}
			a, err := l.agent(p, f, s.MaxTokens, s.Temperature)
			if err != nil {
				return err
			}
			switch {
			case a.Sampler != nil: // an endpoint
			case job != "" && l.server == "":
				return fault.BadField("job", job, "--server, whose job it is")
			default:
				if err := l.connect(ctx, dir); err != nil {
					return err
				}
				defer l.stop()
				if job != "" {
					a.Sampler = loop.ServerSampler{Client: l.client, Job: job, MaxTokens: s.MaxTokens, Temperature: s.Temperature}
				} else if a.Sampler, err = loop.SampleOnly(ctx, l.client, p.source, 64, s); err != nil {
					return err
				}
			}
			exam, err := loop.NewExam(ctx, loop.Source{Field: f, Most: s.Most, Parallel: l.parallel}, s.Seed, map[loop.Set]int{loop.Incidents: s.EvalIncidents, loop.Scenarios: s.EvalScenarios})
			if err != nil {
				return err
			}
			points, _, err := exam.Sit(ctx, a, s.Seed)
			if err != nil {
				return err
			}
			result := struct {
				Settings loop.Settings  `json:"settings"`
				Points   []loop.Point   `json:"points"`
				Constant *loop.Constant `json:"constant,omitempty"`
			}{s, points, nil}
			for _, p := range points {
				fmt.Fprintf(l.con.out, "\n%s\n", p.Set)
				loop.Table(l.con.out, []string{fmt.Sprintf("policy step %d", p.Step)}, []loop.Point{p})
			}
			if constant > 0 {
				in := exam[loop.Incidents]
				c, err := loop.BestConstant(ctx, f, a.Rate, l.parallel, in[:min(constant, len(in))])
				if err != nil {
					return err
				}
				result.Constant = &c
				fmt.Fprintf(l.con.out, "\nbest constant strategy %.1f %%: %s\nbest constant tool with parameters copied %.1f %%: %s\n", 100*c.Accuracy, c.Strategy, 100*c.Copied, c.Tool)
			}
			if out == "" {
				return nil
			}
			if err := os.MkdirAll(out, 0o755); err != nil {
				return err
			}
			b, err := json.MarshalIndent(result, "", "  ")
			if err != nil {
				return err
			}
			if err := os.WriteFile(filepath.Join(out, "eval.json"), append(b, '\n'), 0o644); err != nil {
				return err
			}
			return loop.EvalPlots(out, points)
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&out, "out", "", "directory for eval.json and the plots")
	fl.StringVar(&job, "job", "", "with --server: measure the newest policy of this job")
	fl.Uint64Var(&s.Seed, "seed", s.Seed, "seed of incidents and sampling")
	fl.Float64Var(&s.Temperature, "temperature", s.Temperature, "of sampling; 0 takes the likeliest token")
	fl.IntVar(&s.EvalIncidents, "incidents", s.EvalIncidents, "held-out incidents of training scenarios")
	fl.IntVar(&s.EvalScenarios, "scenarios", s.EvalScenarios, "incidents of held-out scenarios")
	fl.IntVar(&s.Most, "summaries", s.Most, "most summaries in a prompt, as in training")
	fl.IntVar(&s.MaxPrompt, "max-prompt", s.MaxPrompt, "tokens of a prompt that memory is planned with")
	fl.IntVar(&s.MaxTokens, "max-tokens", s.MaxTokens, "longest strategy in tokens")
	fl.IntVar(&constant, "constant", 0, "also try every constant strategy on this many incidents")
	l.bindField(cmd)
	l.bindPolicy(cmd, "")
	l.bindJudge(cmd)
	return cmd
}

package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"trainerd/secloop/loop"
)

func newSecloopReplay() *cobra.Command {
	l := &loopEnv{}
	var p loop.Pick
	var showOnly bool
	cmd := &cobra.Command{
		Use:   "replay DIR",
		Short: "Show a recorded episode step by step and play it again",
		Long:  "Show an episode of a run's directory: prompt, strategy, calls, stages, reward. Then play it on a battle-field again;\nexits 1 when it came out otherwise.",
		Args:  takes(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			l.con = newLoopConsole(cmd)
			rec, err := loop.Recorded(args[0], p)
			if err != nil {
				return err
			}
			rec.Show(l.con.out)
			if showOnly {
				return nil
			}
			f, closeField, err := l.openField()
			if err != nil {
				return err
			}
			defer closeField()
			rate, err := l.judge()
			if err != nil {
				return err
			}
			diff, err := loop.Replay(cmd.Context(), &loop.Agent{Field: f, Rate: rate, Timeout: l.timeout}, rec)
			if err != nil {
				return err
			}
			if len(diff) == 0 {
				fmt.Fprintln(l.con.out, "replay     the same")
				return nil
			}
			for _, d := range diff {
				fmt.Fprintf(l.con.out, "replay     %s\n", d)
			}
			return exitError{1}
		},
	}
	f := cmd.Flags()
	f.Int64Var(&p.Step, "step", 0, "step of the loop, from 1; 0: the last one")
	f.IntVar(&p.Group, "incident", 0, "incident of the step, from 0")
	f.IntVar(&p.Index, "strategy", 0, "strategy of the incident, from 0")
	f.BoolVar(&showOnly, "show-only", false, "do not play it again")
	l.bindField(cmd)
	l.bindJudge(cmd)
	return cmd
}

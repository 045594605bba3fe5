package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"trainerd/internal/fault"
	"trainerd/secloop/loop"
)

func newSecloopSweep() *cobra.Command {
	l := &loopEnv{}
	var flags loopFlags
	var out string
	var only []string
	var seeds int
	var tableOnly, quiet bool
	cmd := &cobra.Command{
		Use:   "sweep",
		Short: "Compare objectives, reward modules and group sizes over several seeds",
		Long: "Run every variant for every seed, one after the other, each from the seed's warm start. A finished run is a line of\n" +
			"sweep.jsonl in --out and is not run again: the same command goes on where it was ended. Prints the table at the end.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			l.con = newLoopConsole(cmd)
			s, err := flags.settle(cmd)
			if err != nil {
				return err
			}
			switch {
			case out == "":
				return fault.BadField("out", `""`, "a directory")
			case seeds < 1:
				return fault.BadField("seeds", seeds, "1 or more")
			case l.modelIs != "bytes" || flags.smollm2 != "" || l.server != "" || l.endpoint != "":
				return fault.BadField("model", l.modelIs, "bytes, with the server in this process")
			}
			variants := loop.Variants()
			if len(only) > 0 {
				variants = slices.DeleteFunc(variants, func(v loop.Variant) bool { return !slices.Contains(only, v.Name) })
				if len(variants) != len(only) {
					return fault.BadField("only", strings.Join(only, ","), "names of "+names(loop.Variants()))
				}
			}
			sw := &loop.Sweep{Dir: out, Base: s, Variants: variants, Load: loadAverage,
				Printf: func(format string, args ...any) { fmt.Fprintf(l.con.out, format, args...) },
				Run: func(ctx context.Context, s loop.Settings, source, dir string) (loop.Result, error) {
					one := *l
					if source != "" {
						one.modelIs = strings.TrimPrefix(source, "dir:")
					}
					if quiet {
						one.con.out = discard{}
					}
					return one.run(cmd, s, dir, false)
				}}
			sw.Base.Warm.EOS = byteEOS
			for i := range seeds {
				sw.Seeds = append(sw.Seeds, s.Seed+uint64(i))
			}
			if tableOnly {
				sw.Run = func(context.Context, loop.Settings, string, string) (loop.Result, error) {
					return loop.Result{}, fault.New(fault.NotFound, "not_run", "--table: a run is missing")
				}
			}
			lines, err := sw.Do(cmd.Context())
			if terr := loop.SweepTable(l.con.out, variants, lines); terr != nil {
				return terr
			}
			if perr := loop.SweepPlots(out, lines); perr != nil {
				return perr
			}
			if tableOnly {
				return nil
			}
			return err
		},
	}
	flags.bind(cmd)
	l.bindField(cmd)
	l.bindPolicy(cmd, "bytes")
	l.bindJudge(cmd)
	f := cmd.Flags()
	f.StringVar(&out, "out", "", "directory of sweep.jsonl, the plots and what runs leave behind")
	f.IntVar(&seeds, "seeds", 3, "seeds, from --seed on")
	f.StringSliceVar(&only, "only", nil, "only these variants: "+names(loop.Variants()))
	f.BoolVar(&tableOnly, "table", false, "run nothing: print the table of what is done")
	f.BoolVar(&quiet, "quiet", true, "print one line for each run only")
	return cmd
}

func names(v []loop.Variant) string {
	var out []string
	for _, x := range v {
		out = append(out, x.Name)
	}
	return strings.Join(out, ", ")
}

type discard struct{}

// Write implements io.Writer.
func (discard) Write(p []byte) (int, error) { return len(p), nil }

// loadAverage is the machine's load over the last minute, -1 where it is not told.
func loadAverage() float64 {
	b, err := os.ReadFile("/proc/loadavg")
	var v float64
	if err == nil {
		_, err = fmt.Sscan(string(b), &v)
	}
	if err != nil {
		return -1
	}
	return v
}

func newSecloopRounds() *cobra.Command {
	l := &loopEnv{}
	var bs, gs, envs []int
	var repeats int
	var seed uint64
	cmd := &cobra.Command{
		Use:   "rounds",
		Short: "Time rounds of battle-fields beside T_sim * ceil(B*G / N_env)",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			l.con = newLoopConsole(cmd)
			for name, list := range map[string][]int{"b": bs, "g": gs, "env": envs, "repeats": {repeats}} {
				if len(list) == 0 || slices.Min(list) < 1 {
					return fault.BadField(name, list, "numbers from 1 on")
				}
			}
			if l.pace < 0 || l.pace > 0 && l.fieldIs != "namespaces" {
				return fault.BadField("pace", l.pace, "a duration from 0 on, above 0 with --field namespaces only: a simulated attack waits for nothing")
			}
			l.parallel = slices.Max(envs)
			f, closeField, err := l.openField()
			if err != nil {
				return err
			}
			defer closeField()
			before := loadAverage()
			single, rounds, err := loop.TimeRounds(cmd.Context(), f, seed, bs, gs, envs, repeats)
			if err != nil {
				return err
			}
			w := l.con.out
			fmt.Fprintf(w, "field %s, T_sim %.1f ms, load %.1f before and %.1f after, mean of %d\n\n", filepath.Base(l.fieldIs), float64(single.Microseconds())/1000, before, loadAverage(), repeats)
			fmt.Fprintln(w, "| B | G | N_env | measured (ms) | T_sim * ceil(B*G/N_env) (ms) | measured / model |")
			fmt.Fprintln(w, "|---|---|---|---|---|---|")
			for _, r := range rounds {
				fmt.Fprintf(w, "| %d | %d | %d | %.0f | %.0f | %.2f |\n", r.B, r.G, r.Env, float64(r.Measured.Microseconds())/1000, float64(r.Model.Microseconds())/1000,
					float64(r.Measured)/float64(r.Model))
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.IntSliceVar(&bs, "b", []int{2, 4, 8}, "incidents of a round (B)")
	f.IntSliceVar(&gs, "g", []int{3, 7}, "strategies per incident (G)")
	f.IntSliceVar(&envs, "env", []int{1, 2, 4, 8}, "battle-fields at a time (N_env)")
	f.IntVar(&repeats, "repeats", 3, "rounds of each kind")
	f.Uint64Var(&seed, "seed", 1, "seed of incidents and strategies")
	f.StringVar(&l.fieldIs, "field", "sim", "sim (in memory) or namespaces (Linux, as root)")
	f.DurationVar(&l.pace, "pace", 0, "time that an attack takes at least, its stages spread evenly (T_sim of a real battle-field)")
	return cmd
}

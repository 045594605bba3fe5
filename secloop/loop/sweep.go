package loop

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"text/tabwriter"
	"time"

	"trainerd/internal/fault"
	"trainerd/internal/plot"
)

// Variant is one change of the settings that a sweep compares.
type Variant struct {
	Name   string
	Change func(*Settings)
}

// Variants lists what a sweep compares: objectives, reward modules switched off,
// group sizes, and the control. The first is what the others are compared with.
func Variants() []Variant {
	objective := func(name string) Variant { return Variant{name, func(s *Settings) { s.Objective = name }} }
	without := func(modules ...string) Variant {
		name := "without"
		for _, m := range modules {
			name += "_" + m
		}
		return Variant{name, func(s *Settings) {
			s.Weights = maps.Clone(s.Weights)
			for _, m := range modules {
				s.Weights[m] = 0
			}
		}}
	}
	size := func(n int) Variant { return Variant{fmt.Sprintf("group_size_%d", n), func(s *Settings) { s.Size = n }} }
	return []Variant{
		objective("sa_grpo"), objective("grpo"), objective("dapo"), objective("gspo"),
		without("format"), without("execution"), without("evaluation"), without("penalty"), without("execution", "evaluation"),
		size(3), size(5), size(9),
		{"control", func(s *Settings) { s.Shuffle = true }},
	}
}

// Sweep runs variants over seeds, one run at a time, from one warm start per
// seed. Finished runs are lines of sweep.jsonl and are not run again; a run that
// was ended goes on.
type Sweep struct {
	Dir      string
	Base     Settings
	Seeds    []uint64
	Variants []Variant
	// Run does one run from a model source ("" for a fresh model) in a directory.
	Run    func(ctx context.Context, s Settings, source, dir string) (Result, error)
	Load   func() float64 // of the machine, for the record
	Printf func(format string, args ...any)
}

// SweepLine is one finished run.
type SweepLine struct {
	Variant  string   `json:"variant"`
	Seed     uint64   `json:"seed"`
	Settings Settings `json:"settings"`
	Points   []Point  `json:"points"`
	Seconds  float64  `json:"seconds"`
	Load     float64  `json:"load"` // of the machine, when the run ended
	Time     string   `json:"time"`
}

const (
	fileSweep = "sweep.jsonl"
	runLimit  = 4 * time.Minute // what a run should stay under
)

// Do runs what is missing and returns the lines of the whole plan.
func (s *Sweep) Do(ctx context.Context) ([]SweepLine, error) {
	if err := os.MkdirAll(s.Dir, 0o755); err != nil {
		return nil, err
	}
	path := filepath.Join(s.Dir, fileSweep)
	var known []SweepLine
	if err := readLines(path, func(l SweepLine) error { known = append(known, l); return nil }); err != nil {
		return nil, err
	}
	type item struct {
		v Variant
		s Settings
	}
	var plan []item
	var done []SweepLine
	for _, seed := range s.Seeds {
		for _, v := range s.Variants {
			set := s.Base
			set.Seed = seed
			v.Change(&set)
			set.Warm = Warm{EOS: set.Warm.EOS}
			i := slices.IndexFunc(known, func(l SweepLine) bool { return l.Variant == v.Name && reflect.DeepEqual(l.Settings, set) })
			if i >= 0 {
				done = append(done, known[i])
				continue
			}
			plan = append(plan, item{v, set})
		}
	}
	total := len(plan) + len(done)
	s.printf("%d runs, %d of them done before\n", total, len(done))
	var ran time.Duration      // by runs, without warm starts
	var warmed []time.Duration // by warm starts that were not there
	seeds := map[uint64]bool{}
	for i, it := range plan {
		at := time.Now()
		warm, err := s.warm(ctx, it.s.Seed)
		if !seeds[it.s.Seed] {
			seeds[it.s.Seed] = true
			warmed = append(warmed, time.Since(at))
		}
		if err != nil {
			return done, fmt.Errorf("warm start of seed %d: %w", it.s.Seed, err)
		}
		dir := filepath.Join(s.Dir, fmt.Sprintf("%s-%d", it.v.Name, it.s.Seed))
		at = time.Now()
		r, err := s.Run(ctx, it.s, "dir:"+warm, dir)
		var f *fault.Error
		if ctx.Err() == nil && asFault(err, &f) && f.Code == "other_run" { // left behind by a sweep with other settings
			if err := os.RemoveAll(dir); err != nil {
				return done, err
			}
			r, err = s.Run(ctx, it.s, "dir:"+warm, dir)
		}
		if err != nil {
			return done, fmt.Errorf("%s, seed %d: %w", it.v.Name, it.s.Seed, err)
		}
		line := SweepLine{Variant: it.v.Name, Seed: it.s.Seed, Settings: it.s, Points: r.Points, Seconds: time.Since(at).Seconds(), Time: time.Now().UTC().Format(time.RFC3339)}
		if s.Load != nil {
			line.Load = s.Load()
		}
		if err := appendLines(path, line); err != nil {
			return done, err
		}
		for _, heavy := range []string{"server", "model", dirPolicy, fileEpisodes} {
			if err := os.RemoveAll(filepath.Join(dir, heavy)); err != nil {
				return done, err
			}
		}
		done = append(done, line)
		ran += time.Since(at)
		left := ran / time.Duration(i+1) * time.Duration(len(plan)-i-1)
		left += slices.Max(warmed) * time.Duration(len(s.Seeds)-len(seeds)) // at most: some may be there
		over := ""
		if line.Seconds > runLimit.Seconds() {
			over = fmt.Sprintf(", over %v", runLimit)
		}
		s.printf("[%d/%d] %s, seed %d: %+.1f points in %.0f s%s; about %v left\n", len(done), total, it.v.Name, it.s.Seed, line.gain(Incidents), line.Seconds, over, left.Round(time.Second))
	}
	return done, nil
}

func (s *Sweep) printf(format string, args ...any) {
	if s.Printf != nil {
		s.Printf(format, args...)
	}
}

// warm makes the warm-started model of a seed, unless it is there, and returns its directory.
func (s *Sweep) warm(ctx context.Context, seed uint64) (string, error) {
	dir, err := filepath.Abs(filepath.Join(s.Dir, fmt.Sprintf("warm-%d", seed)))
	if err != nil {
		return "", err
	}
	policy := filepath.Join(dir, dirPolicy)
	set := s.Base
	set.Seed, set.Steps = seed, 0
	if raw, err := os.ReadFile(filepath.Join(dir, fileResult)); err == nil {
		var r Result
		if json.Unmarshal(raw, &r) == nil && reflect.DeepEqual(r.Settings, set) {
			return policy, nil
		}
		if err := os.RemoveAll(dir); err != nil {
			return "", err
		}
	}
	began := time.Now()
	r, err := s.Run(ctx, set, "", dir)
	var f *fault.Error
	if ctx.Err() == nil && asFault(err, &f) && f.Code == "other_run" {
		if err := os.RemoveAll(dir); err != nil {
			return "", err
		}
		r, err = s.Run(ctx, set, "", dir)
	}
	if err != nil {
		return "", err
	}
	p, _ := r.After(Incidents)
	s.printf("warm start of seed %d: accuracy %.1f %% in %.0f s\n", seed, 100*p.Accuracy, time.Since(began).Seconds())
	return policy, os.RemoveAll(filepath.Join(dir, "server"))
}

// gain is the points of accuracy that a run gained on a set.
func (l SweepLine) gain(set Set) float64 {
	a, _ := pick(l.Points, set, true)
	b, _ := pick(l.Points, set, false)
	return 100 * (a.Accuracy - b.Accuracy)
}

// after is a run's last accuracy on a set, in percent.
func (l SweepLine) after(set Set) float64 {
	a, _ := pick(l.Points, set, true)
	return 100 * a.Accuracy
}

// spread is mean, sample standard deviation, least and greatest.
type spread struct {
	n                   int
	mean, sd, low, high float64
}

func spreadOf(v []float64) spread {
	if len(v) == 0 {
		return spread{}
	}
	s := spread{n: len(v), low: slices.Min(v), high: slices.Max(v)}
	for _, x := range v {
		s.mean += x / float64(len(v))
	}
	if len(v) > 1 {
		for _, x := range v {
			s.sd += (x - s.mean) * (x - s.mean)
		}
		s.sd = math.Sqrt(s.sd / float64(len(v)-1))
	}
	return s
}

func (s spread) String() string {
	if s.n == 1 {
		return fmt.Sprintf("%.1f", s.mean)
	}
	return fmt.Sprintf("%.1f ± %.1f (%.1f to %.1f)", s.mean, s.sd, s.low, s.high)
}

// SweepTable prints means and spreads over the seeds of each variant, as Markdown.
func SweepTable(w io.Writer, variants []Variant, lines []SweepLine) error {
	tw := tabwriter.NewWriter(w, 0, 0, 1, ' ', 0)
	fmt.Fprintln(tw, "| variant\t| seeds\t| accuracy after, held-out incidents (%)\t| gain (points)\t| held-out scenarios after (%)\t| gain (points)\t| s per run\t|")
	fmt.Fprintln(tw, "|---\t|---\t|---\t|---\t|---\t|---\t|---\t|")
	for _, v := range variants {
		var after, gain, newAfter, newGain, seconds []float64
		for _, l := range lines {
			if l.Variant == v.Name {
				after, gain = append(after, l.after(Incidents)), append(gain, l.gain(Incidents))
				newAfter, newGain = append(newAfter, l.after(Scenarios)), append(newGain, l.gain(Scenarios))
				seconds = append(seconds, l.Seconds)
			}
		}
		if len(after) > 0 {
			fmt.Fprintf(tw, "| %s\t| %d\t| %v\t| %v\t| %v\t| %v\t| %.0f\t|\n", v.Name, len(after), spreadOf(after), spreadOf(gain), spreadOf(newAfter), spreadOf(newGain), spreadOf(seconds).mean)
		}
	}
	return tw.Flush()
}

// SweepPlots writes objectives.svg, modules.svg and sizes.svg: mean accuracy on
// held-out incidents over steps, with the band from the least to the greatest.
func SweepPlots(dir string, lines []SweepLine) error {
	for file, names := range map[string][]string{
		"objectives.svg": {"sa_grpo", "grpo", "dapo", "gspo", "control"},
		"modules.svg":    {"sa_grpo", "without_format", "without_execution", "without_evaluation", "without_penalty", "without_execution_evaluation"},
		"sizes.svg":      {"group_size_3", "group_size_5", "sa_grpo", "group_size_9"},
	} {
		var out []plot.Line
		for _, name := range names {
			at := map[float64][]float64{}
			for _, l := range lines {
				for _, p := range l.Points {
					if l.Variant == name && p.Set == Incidents {
						at[float64(p.Step)] = append(at[float64(p.Step)], 100*p.Accuracy)
					}
				}
			}
			l := plot.Line{Name: name}
			if file == "sizes.svg" && name == "sa_grpo" {
				l.Name = "group_size_7"
			}
			for _, x := range slices.Sorted(maps.Keys(at)) {
				s := spreadOf(at[x])
				l.X, l.Y, l.Low, l.High = append(l.X, x), append(l.Y, s.mean), append(l.Low, s.low), append(l.High, s.high)
			}
			if len(l.X) > 0 {
				out = append(out, l)
			}
		}
		if err := writeFile(filepath.Join(dir, file), plot.LinePlot("accuracy on held-out incidents, mean and range over seeds", "step", "%", 100, out)); err != nil {
			return err
		}
	}
	return nil
}

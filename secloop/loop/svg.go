package loop

import (
	"maps"
	"path/filepath"
	"slices"

	"trainerd/internal/plot"
)

// Plots writes the pictures of a run: curve.svg, and scenarios.svg and
// tactics.svg with the first and the last measurement.
func Plots(dir string, r Result) error {
	var lines []plot.Line
	for _, set := range Sets {
		l := plot.Line{Name: "held-out " + string(set)}
		for _, p := range r.Points {
			if p.Set == set {
				l.X, l.Y = append(l.X, float64(p.Step)), append(l.Y, 100*p.Accuracy)
			}
		}
		if len(l.X) > 0 {
			lines = append(lines, l)
		}
	}
	if err := writeFile(filepath.Join(dir, "curve.svg"), plot.LinePlot("accuracy of "+r.Settings.Objective, "step", "%", 100, lines)); err != nil {
		return err
	}
	for file, of := range map[string]func(Tally) map[string]Share{
		"scenarios.svg": func(t Tally) map[string]Share { return t.ByScenario },
		"tactics.svg":   func(t Tally) map[string]Share { return t.ByTactic },
	} {
		var names []string
		var before, after []float64
		for _, set := range Sets {
			b, ok := r.Before(set)
			if !ok {
				continue
			}
			a, _ := r.After(set)
			for _, n := range slices.Sorted(maps.Keys(of(a.Tally))) {
				label := n
				if set == Scenarios {
					label += " (new)"
				}
				names, before, after = append(names, label), append(before, of(b.Tally)[n].Of()), append(after, of(a.Tally)[n].Of())
			}
		}
		picture := plot.Bars("accuracy on what was kept from training", names, []string{"warm start", "trained"}, func(i, k int) float64 {
			return [][]float64{before, after}[k][i]
		})
		if err := writeFile(filepath.Join(dir, file), picture); err != nil {
			return err
		}
	}
	return nil
}

// EvalPlots writes scenarios.svg and tactics.svg of one measurement.
func EvalPlots(dir string, points []Point) error {
	for file, of := range map[string]func(Tally) map[string]Share{
		"scenarios.svg": func(t Tally) map[string]Share { return t.ByScenario },
		"tactics.svg":   func(t Tally) map[string]Share { return t.ByTactic },
	} {
		var names []string
		var values []float64
		for _, p := range points {
			for _, n := range slices.Sorted(maps.Keys(of(p.Tally))) {
				label := n
				if p.Set == Scenarios {
					label += " (new)"
				}
				names, values = append(names, label), append(values, of(p.Tally)[n].Of())
			}
		}
		picture := plot.Bars("accuracy on what was kept from training", names, []string{"policy"}, func(i, _ int) float64 { return values[i] })
		if err := writeFile(filepath.Join(dir, file), picture); err != nil {
			return err
		}
	}
	return nil
}

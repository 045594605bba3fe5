package sensor

import (
	"cmp"
	"fmt"
	"slices"
	"time"
)

// Summary is what a prompt says of the alerts of one type between one source
// and one target: time range, count, type, source, target and risk level.
type Summary struct {
	Type     string        `json:"type"`
	Count    int           `json:"count"`
	Source   string        `json:"source"`
	Target   string        `json:"target"` // host name where it is known, else the address
	From, To time.Duration `json:"-"`
	Risk     string        `json:"risk"` // high, medium or low: the gravest severity among them
}

// risks are the names of the severities 1 to 3.
var risks = [...]string{1: "high", 2: "medium", 3: "low"}

func risk(severity int) string { return risks[min(max(severity, 1), 3)] }

// String is one line of a prompt.
func (s Summary) String() string {
	return fmt.Sprintf("%d x %s from %s against %s between %.1f s and %.1f s, risk %s",
		s.Count, s.Type, s.Source, s.Target, s.From.Seconds(), s.To.Seconds(), s.Risk)
}

// Summarize merges alerts by type, source and target and returns at most that
// many summaries, the gravest first, then the most frequent. The order of the
// alerts does not matter.
func Summarize(alerts []Alert, most int) []Summary {
	type key struct{ name, source, target string }
	type merged struct {
		Summary
		severity int
	}
	byKey := map[key]*merged{}
	for _, a := range alerts {
		target := cmp.Or(a.Host, a.Target)
		k := key{a.Name, a.Source, target}
		m := byKey[k]
		if m == nil {
			m = &merged{Summary{Type: a.Name, Source: a.Source, Target: target, From: a.At, To: a.At}, a.Severity}
			byKey[k] = m
		}
		m.Count++
		m.From, m.To, m.severity = min(m.From, a.At), max(m.To, a.At), min(m.severity, a.Severity)
	}
	var all []merged
	for _, m := range byKey {
		m.Risk = risk(m.severity)
		all = append(all, *m)
	}
	slices.SortFunc(all, func(a, b merged) int {
		return cmp.Or(cmp.Compare(a.severity, b.severity), cmp.Compare(b.Count, a.Count),
			cmp.Compare(a.Type, b.Type), cmp.Compare(a.Source, b.Source), cmp.Compare(a.Target, b.Target))
	})
	out := make([]Summary, 0, max(0, min(most, len(all))))
	for _, m := range all[:max(0, min(most, len(all)))] {
		out = append(out, m.Summary)
	}
	return out
}

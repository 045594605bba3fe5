package loop

import (
	"context"

	"trainerd/secloop"
	"trainerd/secloop/scenario"
)

// Constant is the best policy that does not read its prompt.
type Constant struct {
	Strategy string  `json:"strategy"` // always this one
	Accuracy float64 `json:"accuracy"`
	Tool     string  `json:"tool"` // always this tool, with parameters out of the incident's truth
	Copied   float64 `json:"copied"`
}

// picks are the choices of what an incident does not say, see scenario.CallFor.
const picks = 6

// BestConstant tries on incidents every constant strategy of one call that fits
// some incident, and every constant tool whose parameters are copied.
func BestConstant(ctx context.Context, f Field, rate secloop.Rater, parallel int, incidents []Incident) (Constant, error) {
	type candidate struct {
		fixed   secloop.Strategy // or
		tool    scenario.Tool    // with
		pick    int
		correct []bool
	}
	var all []*candidate
	seen := map[string]bool{}
	for _, t := range scenario.Tools() {
		for pick := range picks {
			c := &candidate{tool: t, pick: pick, correct: make([]bool, len(incidents))}
			fresh := false
			for _, in := range incidents {
				s := secloop.Strategy{scenario.CallFor(t, in.Truth, pick)}
				if !seen[s.String()] {
					seen[s.String()], fresh = true, true
					if s[0].Params["ip"] == "" { // one address is right once in ninety times: not worth the time
						all = append(all, &candidate{fixed: s, correct: make([]bool, len(incidents))})
					}
				}
			}
			if fresh {
				all = append(all, c)
			}
		}
	}
	n := len(incidents)
	err := inParallel(ctx, parallel, len(all)*n, func(ctx context.Context, k int) error {
		c, in := all[k/n], incidents[k%n]
		s := c.fixed
		if s == nil {
			s = secloop.Strategy{scenario.CallFor(c.tool, in.Truth, c.pick)}
		}
		r, _, err := secloop.ScoreBy(ctx, &player{field: f, timeout: (&Agent{}).timeout()}, rate, in.Truth, s.String())
		c.correct[k%n] = r.Correct
		return err
	})
	var best Constant
	for _, c := range all {
		hits := 0
		for _, ok := range c.correct {
			if ok {
				hits++
			}
		}
		share := float64(hits) / float64(max(n, 1))
		switch {
		case c.fixed != nil && (share > best.Accuracy || best.Strategy == ""):
			best.Strategy, best.Accuracy = c.fixed.String(), share
		case c.fixed == nil && (share > best.Copied || best.Tool == ""):
			best.Tool, best.Copied = c.tool.Name, share
		}
	}
	return best, err
}

package scenario

import (
	"fmt"
	"math/rand/v2"
	"strconv"

	"trainerd/secloop"
)

// Draw draws an alert uniformly over the scenarios for training or the held-out
// ones, their targets and the sources. What it returns is the truth about an
// incident, which only the field and the judge may see.
func Draw(r *rand.Rand, heldout bool) secloop.Alert {
	return draw(r, Scenarios(heldout))
}

// RandomAlert draws an alert over all scenarios.
func RandomAlert(r *rand.Rand) secloop.Alert { return draw(r, catalogue) }

func draw(r *rand.Rand, from []Scenario) secloop.Alert {
	s := from[r.IntN(len(from))]
	return secloop.Alert{
		Attack: s.Name, Target: s.Targets[r.IntN(len(s.Targets))], Count: 1 + r.IntN(99), Risk: s.Risk,
		Source: fmt.Sprintf("198.18.0.%d", FirstSource+r.IntN(LastSource-FirstSource+1)),
	}
}

// CallFor fills in a tool's parameters from an alert: its source, its target,
// and the pick-th choice of what the alert does not say.
func CallFor(t Tool, a secloop.Alert, pick int) secloop.Call {
	p := map[string]string{}
	for _, q := range t.Params {
		switch {
		case q.Name == "host":
			p[q.Name] = a.Target
		case q.Enum != nil:
			p[q.Name] = q.Enum[pick%len(q.Enum)]
		case q.Name == "port":
			p[q.Name] = []string{"80", "8009"}[pick%2]
		case q.Max > 0:
			p[q.Name] = strconv.Itoa(min(q.Max, 8+pick%4))
		default:
			p[q.Name] = a.Source
		}
	}
	return secloop.Call{Tool: t.Name, Params: p}
}

// RandomStrategy draws one to three calls about an alert.
func RandomStrategy(r *rand.Rand, a secloop.Alert) secloop.Strategy {
	var s secloop.Strategy
	for range 1 + r.IntN(3) {
		s = append(s, CallFor(tools[r.IntN(len(tools))], a, r.IntN(64)))
	}
	return s
}

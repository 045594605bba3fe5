package scenario

import (
	"math/rand/v2"
	"strconv"

	"trainerd/secloop"
)

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

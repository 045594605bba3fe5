package scenario

import "trainerd/secloop"

// Judge is secloop.RuleJudge for these tools: it starts at 1 and takes off for
// calls that go to another host, do nothing against the attack, or repeat what
// is already done. A call that destroys service leaves nothing: stopping every
// attack that way must not pay.
type Judge struct{}

// Rationality implements secloop.Judge.
func (Judge) Rationality(a secloop.Alert, s secloop.Strategy) float64 {
	sc, _ := ByName(a.Attack)
	w, done := 1.0, false
	for _, c := range s {
		t, ok := ToolByName(c.Tool)
		about := c.Params["host"]
		if c.Tool == "block_ip" {
			about = c.Params["ip"]
		}
		helps := false
		for _, h := range sc.Helps { // the class of request and the port are part of the remedy
			helps = helps || h.Tool == c.Tool && h.Params["rule"] == c.Params["rule"] && h.Params["port"] == c.Params["port"]
		}
		switch {
		case ok && t.Harmful:
			return 0
		case !ok, about != a.Target && about != a.Source:
			w -= 0.5
		case done || !helps:
			w -= 0.25
		default:
			done = true
		}
	}
	return max(w, 0)
}

package secloop

import "math/rand/v2"

// Operator writes demonstrations: well-formed strategies with the right
// parameter, but the right tool only with probability Skill; otherwise any tool.
// A model warmed up on them knows the format and the tools, not which tool helps.
type Operator struct{ Skill float64 }

// Demonstrate returns one strategy for an alert.
func (o Operator) Demonstrate(r *rand.Rand, a Alert) Strategy {
	t := tools[r.IntN(len(tools))]
	if r.Float64() < o.Skill {
		t = remedy(a.Attack)
	}
	v := a.Target
	if t.Param == "ip" {
		v = a.Source
	}
	return Strategy{{Tool: t.Name, Params: map[string]string{t.Param: v}}}
}

// remedy returns the tool that stops every stage of an attack without taking the service down.
func remedy(attack string) tool {
	for _, t := range tools {
		if t.breaks {
			continue
		}
		all := true
		for _, st := range attacks[attack] {
			found := false
			for _, n := range st.Stopped {
				found = found || n == t.Name
			}
			all = all && found
		}
		if all {
			return t
		}
	}
	panic("secloop: attack without a remedy: " + attack)
}

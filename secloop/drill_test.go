package secloop

import (
	"context"
	"math/rand/v2"
	"testing"
)

func correct(t *testing.T, a Alert, s Strategy) bool {
	t.Helper()
	r, err := Score(context.Background(), Drill{}, RuleJudge{}, a, s.String())
	if err != nil {
		t.Fatal(err)
	}
	return r.Correct
}

// TestNoConstantStrategyWins tries every constant strategy of one call, the
// longest ones (one tool on all hosts, eight tools on one host), and every
// constant choice of tool with the parameter copied from the alert: none may
// pass 40 %. (A correct answer needs the remedy on the target, so a list of
// MaxCalls constant calls covers at most 8 of 80 attack-and-target pairs.)
func TestNoConstantStrategyWins(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	var alerts []Alert
	for range 2000 {
		alerts = append(alerts, Split{Heldout: true}.Draw(r))
	}
	share := func(f func(Alert) Strategy) float64 {
		n := 0
		for _, a := range alerts {
			if correct(t, a, f(a)) {
				n++
			}
		}
		return float64(n) / float64(len(alerts))
	}
	var calls []Call
	for _, tl := range tools {
		if tl.Param == "ip" {
			for n := firstSource; n <= lastSource; n += 10 {
				calls = append(calls, Call{tl.Name, map[string]string{"ip": sourceAddress(n)}})
			}
			continue
		}
		for _, h := range hosts {
			calls = append(calls, Call{tl.Name, map[string]string{"host": h}})
		}
	}
	best := 0.0
	for _, c := range calls {
		best = max(best, share(func(Alert) Strategy { return Strategy{c} }))
	}
	// All hosts under one tool, and one host under as many tools as a strategy may hold.
	for _, tl := range tools[1:] {
		var s Strategy
		for _, h := range hosts {
			s = append(s, Call{tl.Name, map[string]string{"host": h}})
		}
		best = max(best, share(func(Alert) Strategy { return s }))
	}
	for _, h := range hosts {
		var s Strategy
		for _, tl := range tools[1:9] {
			s = append(s, Call{tl.Name, map[string]string{"host": h}})
		}
		best = max(best, share(func(Alert) Strategy { return s }))
	}
	copied := 0.0
	for _, tl := range tools {
		copied = max(copied, share(func(a Alert) Strategy {
			v := a.Target
			if tl.Param == "ip" {
				v = a.Source
			}
			return Strategy{{tl.Name, map[string]string{tl.Param: v}}}
		}))
	}
	t.Logf("best constant strategy %.3f, best constant tool with copied parameter %.3f", best, copied)
	if best > 0.4 || copied > 0.4 {
		t.Fatalf("a constant strategy reaches %.3f, a constant tool %.3f; both must stay at or under 0.4", best, copied)
	}
}

func TestEveryAttackHasARemedy(t *testing.T) {
	for _, name := range attackNames {
		a := Alert{Attack: name, Source: sourceAddress(33), Target: "web1", Count: 3, Risk: "low"}
		s := Operator{Skill: 1}.Demonstrate(rand.New(rand.NewPCG(1, 1)), a)
		r, err := Score(context.Background(), Drill{}, RuleJudge{}, a, s.String())
		if err != nil {
			t.Fatal(err)
		}
		if !r.Correct || r.Total() != 3 {
			t.Errorf("%s: remedy %v scores %+v, expected a correct strategy worth 3", name, s, r)
		}
	}
}

func TestSplitSidesShareNoSituation(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	train := map[string]bool{}
	for range 20000 {
		train[Split{}.Draw(r).Key()] = true
	}
	held := map[string]bool{}
	for range 2000 {
		k := Split{Heldout: true}.Draw(r).Key()
		if train[k] {
			t.Fatalf("situation %q is on both sides", k)
		}
		held[k] = true
	}
	if len(held) < 200 {
		t.Fatalf("only %d held-out situations", len(held))
	}
}

func TestScoreGates(t *testing.T) {
	through := 2.0 / 3.0 // a variable: the rounding of run time, not of exact constants
	a := Alert{Attack: "ssh_guess", Source: "203.0.113.40", Target: "web1", Count: 9, Risk: "high"}
	for _, c := range []struct {
		name, text string
		want       Reward
	}{
		{"not JSON", "block it", Reward{Penalty: 1}},
		{"text after the list", `[{"tool":"secure_sshd","params":{"host":"web1"}}] ok`, Reward{Penalty: 1}},
		{"empty list", `[]`, Reward{Penalty: 1}},
		{"unknown member", `[{"tool":"secure_sshd","params":{"host":"web1"},"why":"x"}]`, Reward{Penalty: 1}},
		{"null parameters", `[{"tool":"secure_sshd","params":null}]`, Reward{Penalty: 1}},
		{"unknown tool", `[{"tool":"pray","params":{"host":"web1"}}]`, Reward{Format: 1, Penalty: 0.5}},
		{"unknown host", `[{"tool":"secure_sshd","params":{"host":"web9"}}]`, Reward{Format: 1, Penalty: 0.5}},
		{"command in a parameter", `[{"tool":"block_ip","params":{"ip":"203.0.113.40; rm -rf /"}}]`, Reward{Format: 1, Penalty: 0.5}},
		{"right", `[{"tool":"secure_sshd","params":{"host":"web1"}}]`, Reward{Format: 1, Execution: 1, Evaluation: 1, Correct: true}},
		{"wrong host", `[{"tool":"secure_sshd","params":{"host":"web2"}}]`, Reward{Format: 1, Execution: 1, Penalty: 0.5}},
		{"last stage only", `[{"tool":"rotate_creds","params":{"host":"web1"}}]`, Reward{Format: 1, Execution: 1, Evaluation: 1 - through}},
		{"stops all, breaks service", `[{"tool":"isolate_host","params":{"host":"web1"}}]`, Reward{Format: 1, Execution: 1, Evaluation: 1, Penalty: 1}},
		{"blocking one of many sources", `[{"tool":"block_ip","params":{"ip":"203.0.113.40"}}]`, Reward{Format: 1, Execution: 1, Penalty: 0.25}},
		{"over-defence", `[{"tool":"secure_sshd","params":{"host":"web1"}},{"tool":"block_ip","params":{"ip":"203.0.113.40"}}]`, Reward{Format: 1, Execution: 1, Evaluation: 1, Penalty: 0.25, Correct: true}},
	} {
		got, err := Score(context.Background(), Drill{}, RuleJudge{}, a, c.text)
		if err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		if got != c.want {
			t.Errorf("%s: got %+v, expected %+v", c.name, got, c.want)
		}
	}
}

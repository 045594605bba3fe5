package sim

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"trainerd/secloop"
	"trainerd/secloop/scenario"
)

func alert(t *testing.T, name string, target int) secloop.Alert {
	t.Helper()
	s, ok := scenario.ByName(name)
	if !ok {
		t.Fatalf("no scenario %q", name)
	}
	return secloop.Alert{Attack: name, Source: "198.18.0.37", Target: s.Targets[target%len(s.Targets)], Count: 5, Risk: s.Risk}
}

func play(t *testing.T, a secloop.Alert, s secloop.Strategy) scenario.Outcome {
	t.Helper()
	out, err := Field{}.Play(context.Background(), a, s)
	if err != nil {
		t.Fatalf("%s: %v", a.Key(), err)
	}
	return out
}

var harmless = secloop.Strategy{{Tool: "block_ip", Params: map[string]string{"ip": "198.18.0.5"}}} // nobody's address

// TestEveryChainGoesThroughUnlessStopped plays every scenario on every target:
// undefended all stages succeed; each remedy stops all and leaves users alone;
// isolation stops all and takes the host down.
func TestEveryChainGoesThroughUnlessStopped(t *testing.T) {
	for _, sc := range scenario.All() {
		for i := range sc.Targets {
			a := alert(t, sc.Name, i)
			out := play(t, a, harmless)
			if out.Feedback.Attacked != 1 {
				t.Errorf("%s: undefended: %+v", a.Key(), out.Stages)
			}
			ep, err := scenario.New(a)
			if err != nil {
				t.Fatal(err)
			}
			for _, r := range ep.Remedies() {
				out := play(t, a, r)
				if want := (secloop.Feedback{Executed: 1, Service: true}); !cmp.Equal(out.Feedback, want) {
					t.Errorf("%s with %s: %+v, stages %+v, down %v", a.Key(), r, out.Feedback, out.Stages, out.Down)
				}
			}
			out = play(t, a, secloop.Strategy{{Tool: "isolate_host", Params: map[string]string{"host": a.Target}}})
			// A scan finds the other hosts, and a flood has its way when users are cut off by the defender.
			spared := sc.Name == "port_scan" || sc.Stages[0].Success.UsersBelow > 0
			if !spared && out.Feedback.Attacked != 0 || !slices.Contains(out.Down, a.Target) {
				t.Errorf("%s isolated: %+v, down %v", a.Key(), out.Stages, out.Down)
			}
		}
	}
}

// TestSameAlertSameFeedback plays random alerts and strategies twice, from many
// goroutines.
func TestSameAlertSameFeedback(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 1))
	errs := make(chan error, 32)
	for range cap(errs) {
		a := scenario.RandomAlert(r)
		s := scenario.RandomStrategy(r, a)
		go func() {
			first, err := Field{}.Run(context.Background(), a, s)
			if err == nil {
				var again secloop.Feedback
				if again, err = (Field{}).Run(context.Background(), a, s); err == nil && !cmp.Equal(first, again) {
					err = fmt.Errorf("%s with %s: %+v, then %+v", a.Key(), s, first, again)
				}
			}
			errs <- err
		}()
	}
	for range cap(errs) {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
}

// TestNoConstantToolWins tries every tool, with the alert's source and target
// and every choice of what the alert does not say, on every scenario: none is
// right for more than a quarter of them, and no MaxChanges of them for more than half.
func TestNoConstantToolWins(t *testing.T) {
	type constant struct {
		name       string
		ran, right map[string]bool
	}
	var all []constant
	for _, tool := range scenario.Tools() {
		picks := 1
		for _, p := range tool.Params {
			if p.Enum != nil && p.Name != "host" {
				picks = len(p.Enum)
			}
			if p.Name == "port" {
				picks = 2
			}
		}
		for pick := range picks {
			c := constant{fmt.Sprintf("%s/%d", tool.Name, pick), map[string]bool{}, map[string]bool{}}
			for _, sc := range scenario.All() {
				a := alert(t, sc.Name, 0)
				one := scenario.CallFor(tool, a, pick)
				if _, err := scenario.ParseCall(one); err != nil {
					continue // it cannot run there
				}
				f := play(t, a, secloop.Strategy{one}).Feedback
				c.ran[sc.Name] = f.Executed == 1
				c.right[sc.Name] = f.Executed == 1 && f.Attacked == 0 && f.Service
			}
			all = append(all, c)
		}
	}
	n := len(scenario.All())
	right := func(cs ...constant) int { // of all calls together, where all of them run
		k := 0
		for _, sc := range scenario.All() {
			ran, stopped := true, false
			for _, c := range cs {
				ran, stopped = ran && c.ran[sc.Name], stopped || c.right[sc.Name]
			}
			if ran && stopped {
				k++
			}
		}
		return k
	}
	best, most := "", 0
	for i, x := range all {
		t.Logf("%-24s right for %d of %d", x.name, right(x), n)
		if 4*right(x) > n {
			t.Errorf("%s is right for %d of %d scenarios", x.name, right(x), n)
		}
		for j, y := range all[:i] {
			for _, z := range all[:j] {
				if k := right(x, y, z); k > most {
					best, most = x.name+", "+y.name+" and "+z.name, k
				}
			}
		}
	}
	t.Logf("%s are right for %d of %d", best, most, n)
	if 2*most > n {
		t.Errorf("%s are right for %d of %d scenarios, expected at most half", best, most, n)
	}
}

func BenchmarkEpisode(b *testing.B) {
	r := rand.New(rand.NewPCG(1, 1))
	for b.Loop() {
		a := scenario.RandomAlert(r)
		if _, err := (Field{}).Run(context.Background(), a, scenario.RandomStrategy(r, a)); err != nil {
			b.Fatal(err)
		}
	}
}

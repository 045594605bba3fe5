package loop

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"trainerd/internal/fault"
	"trainerd/model/tokenizer"
	"trainerd/secloop"
	"trainerd/secloop/scenario"
	"trainerd/secloop/sensor"
	"trainerd/secloop/sim"
)

// byteCodec is a codec whose ids are bytes.
type byteCodec struct{}

func (byteCodec) Encode(text string) ([]int32, error) {
	ids := make([]int32, len(text))
	for i := range text {
		ids[i] = int32(text[i])
	}
	return ids, nil
}

func (byteCodec) Decode(ids []int32, _ bool) string {
	b := make([]byte, len(ids))
	for i, id := range ids {
		b[i] = byte(id)
	}
	return string(b)
}

// script is a sampler that says the same to everybody.
type script []string

func (s script) Sample(_ context.Context, prompts [][]int32, n int, _ uint64) ([][]secloop.Sampled, int64, error) {
	out := make([][]secloop.Sampled, len(prompts))
	for i := range out {
		for k := range n {
			ids, _ := byteCodec{}.Encode(s[k%len(s)])
			out[i] = append(out[i], secloop.Sampled{Tokens: ids, LogProbs: make([]float32, len(ids)), Stopped: true})
		}
	}
	return out, 7, nil
}

// fakeField does what a test says.
type fakeField struct {
	play func(ctx context.Context, a secloop.Alert, s secloop.Strategy) (scenario.Outcome, error)
}

func (f fakeField) Play(ctx context.Context, a secloop.Alert, s secloop.Strategy) (scenario.Outcome, error) {
	return f.play(ctx, a, s)
}

func (fakeField) Observe(context.Context, secloop.Alert, uint64) ([]sensor.Alert, error) {
	return []sensor.Alert{{Name: "Something odd", Source: "198.18.0.20", Target: "198.18.2.11", Host: "web1", Severity: 1}}, nil
}

func rules(_ context.Context, a secloop.Alert, s secloop.Strategy) (float64, error) {
	return scenario.Judge{}.Rationality(a, s), nil
}

func incident(attack, target string) Incident {
	return Incident{Truth: secloop.Alert{Attack: attack, Source: "198.18.0.20", Target: target, Count: 3, Risk: "high"},
		Summaries: []sensor.Summary{{Type: "Something odd", Count: 3, Source: "198.18.0.20", Target: target, Risk: "high"}}}
}

const (
	right  = `[{"tool":"waf_rule","params":{"host":"web1","rule":"sqli"}}]`
	breaks = `[{"tool":"isolate_host","params":{"host":"web1"}}]`
)

func agent(f Field, s ...string) (*Agent, *[]string) {
	var mu sync.Mutex
	var said []string
	return &Agent{Codec: byteCodec{}, Form: Terse{}, Sampler: script(s), Field: f, Rate: rules, Parallel: 4, Timeout: 50 * time.Millisecond,
		Report: func(format string, args ...any) {
			mu.Lock()
			said = append(said, fmt.Sprintf(format, args...))
			mu.Unlock()
		}}, &said
}

// TestBadStrategies gives the loop what a policy may come up with: each is
// scored on the simulated field and the round ends.
func TestBadStrategies(t *testing.T) {
	long := `[` + strings.Repeat(`{"tool":"waf_rule","params":{"host":"web1","rule":"sqli"}},`, 4000)
	for _, c := range []struct {
		name, text string
		want       secloop.Reward
	}{
		{"right", right, secloop.Reward{Format: 1, Execution: 1, Evaluation: 1, Correct: true}},
		{"stops the service", breaks, secloop.Reward{Format: 1, Execution: 1, Evaluation: 1, Penalty: 1}},
		{"empty", "", secloop.Reward{Penalty: 1}},
		{"prose", "I would block the attacker.", secloop.Reward{Penalty: 1}},
		{"endless", long, secloop.Reward{Penalty: 1}},
		{"deep", strings.Repeat("[", 100_000), secloop.Reward{Penalty: 1}},
		{"too many calls", `[` + strings.Repeat(right[1:len(right)-1]+`,`, secloop.MaxCalls) + right[1:], secloop.Reward{Penalty: 1}},
		{"not UTF-8", "\xff\xfe[", secloop.Reward{Penalty: 1}},
		{"unknown tool", `[{"tool":"pray","params":{"host":"web1"}}]`, secloop.Reward{Format: 1, Penalty: 0.5}},
		{"out of range", `[{"tool":"connection_limit","params":{"host":"web1","per_source":"65"}}]`, secloop.Reward{Format: 1, Penalty: 0.25}},
		{"injection", `[{"tool":"waf_rule","params":{"host":"web1; rm -rf /","rule":"sqli"}}]`, secloop.Reward{Format: 1, Penalty: 0.5}},
		{"injection into a name", `[{"tool":"$(reboot)","params":{"host":"web1"}}]`, secloop.Reward{Format: 1, Penalty: 0.5}},
	} {
		a, said := agent(sim.Field{}, c.text)
		a.Timeout = 20 * time.Second
		r, err := a.Play(t.Context(), []Incident{incident("sql_injection", "web1")}, 1, 1)
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		if got := r.Episodes[0][0]; got.Reward != c.want || got.Void != "" {
			t.Errorf("%s: %+v, expected %+v (%s %v)", c.name, got.Reward, c.want, got.Void, *said)
		}
	}
}

// TestLengthLimit shows that what the length limit cut is posted as such.
func TestLengthLimit(t *testing.T) {
	a, _ := agent(sim.Field{}, `[{"tool":"waf_ru`)
	r, err := a.Play(t.Context(), []Incident{incident("sql_injection", "web1")}, 1, 1)
	if err != nil {
		t.Fatal(err)
	}
	r.Episodes[0][0].Sampled.Stopped = false
	b := secloop.Batch(r.Groups(func(int) string { return "g" }), r.PolicyStep, nil)
	if got := b.Rollouts[0]; !got.Truncated || got.PolicyStep != 7 || got.GroupID != "g" || got.Components[3] != 1 {
		t.Errorf("rollout %+v", got)
	}
}

// TestFailingFields has a tool that hangs, a service that dies, a plug-in that
// crashes and one that panics: each is scored or reported, and the round ends.
func TestFailingFields(t *testing.T) {
	fine := scenario.Outcome{Feedback: secloop.Feedback{Executed: 1, Service: true}}
	var calls atomic.Int32
	for _, c := range []struct {
		name string
		play func(ctx context.Context, a secloop.Alert, s secloop.Strategy) (scenario.Outcome, error)
		want secloop.Reward
		void string // part of it
		said string
		n    int32 // plays
	}{
		{"a tool hangs", func(ctx context.Context, _ secloop.Alert, _ secloop.Strategy) (scenario.Outcome, error) {
			<-ctx.Done()
			return scenario.Outcome{}, ctx.Err()
		}, secloop.Reward{Format: 1}, "", "scored as not executed", 2},
		{"a tool hangs and heeds nothing", func(context.Context, secloop.Alert, secloop.Strategy) (scenario.Outcome, error) {
			time.Sleep(5 * time.Second)
			return fine, nil
		}, secloop.Reward{Format: 1}, "", "scored as not executed", 2},
		{"a service dies", func(context.Context, secloop.Alert, secloop.Strategy) (scenario.Outcome, error) {
			return scenario.Outcome{Feedback: secloop.Feedback{Executed: 1}, Down: []string{"web1"}}, nil
		}, secloop.Reward{Format: 1, Execution: 1, Evaluation: 1}, "", "", 1},
		{"a plug-in crashes once", func(context.Context, secloop.Alert, secloop.Strategy) (scenario.Outcome, error) {
			if calls.Load() == 1 {
				return scenario.Outcome{}, errors.New("red: exit status 2")
			}
			return fine, nil
		}, secloop.Reward{Format: 1, Execution: 1, Evaluation: 1, Correct: true}, "", "played again: score strategy: red: exit status 2", 2},
		{"a plug-in always crashes", func(context.Context, secloop.Alert, secloop.Strategy) (scenario.Outcome, error) {
			return scenario.Outcome{}, errors.New("red: exit status 2")
		}, secloop.Reward{}, "red: exit status 2", "played again", 3},
		{"a plug-in panics", func(context.Context, secloop.Alert, secloop.Strategy) (scenario.Outcome, error) {
			panic("index out of range")
		}, secloop.Reward{}, "panicked: index out of range", "played again", 3},
	} {
		t.Run(c.name, func(t *testing.T) {
			calls.Store(0)
			a, said := agent(fakeField{func(ctx context.Context, al secloop.Alert, s secloop.Strategy) (scenario.Outcome, error) {
				calls.Add(1)
				return c.play(ctx, al, s)
			}}, right)
			r, err := a.Play(t.Context(), []Incident{incident("sql_injection", "web1")}, 1, 1)
			if err != nil {
				t.Fatal(err)
			}
			e := r.Episodes[0][0]
			if e.Reward != c.want || (c.void == "") != (e.Void == "") || !strings.Contains(e.Void, c.void) {
				t.Errorf("%+v, void %q; expected %+v, %q", e.Reward, e.Void, c.want, c.void)
			}
			if calls.Load() != c.n || !strings.Contains(strings.Join(*said, "\n"), c.said) || c.said == "" && len(*said) > 0 {
				t.Errorf("%d plays, %q; expected %d, %q", calls.Load(), *said, c.n, c.said)
			}
		})
	}
}

// TestVoidGroupsAreReplaced has one scenario whose field always fails: its group
// makes way for another incident, and a field that fails for all ends the round.
func TestVoidGroupsAreReplaced(t *testing.T) {
	a, said := agent(fakeField{func(_ context.Context, al secloop.Alert, _ secloop.Strategy) (scenario.Outcome, error) {
		if al.Attack == "xss" {
			return scenario.Outcome{}, errors.New("red crashed")
		}
		return scenario.Outcome{Feedback: secloop.Feedback{Executed: 1, Service: true}}, nil
	}}, right, breaks)
	r, err := a.Play(t.Context(), []Incident{incident("sql_injection", "web1"), incident("xss", "web1")}, 3, 1)
	if err != nil {
		t.Fatal(err)
	}
	err = a.Replace(t.Context(), &r, 3, 1, func(n int) ([]Incident, error) {
		if n != 1 {
			t.Errorf("%d replacements asked for, expected 1", n)
		}
		return []Incident{incident("lfi", "web1")}, nil
	})
	if err != nil || r.Voided != 1 || r.Episodes[1][0].Truth.Attack != "lfi" || len(r.Episodes[1]) != 3 || !strings.Contains(strings.Join(*said, "\n"), "1 groups replaced") {
		t.Errorf("%v, %d replaced, %q", err, r.Voided, *said)
	}
	if tally := Count(r.Episodes); tally.N != 6 || tally.Void != 0 {
		t.Errorf("tally %+v", tally)
	}
	r.Episodes[1][0].Void = "x"
	err = a.Replace(t.Context(), &r, 3, 1, func(int) ([]Incident, error) { return []Incident{incident("xss", "web1")}, nil })
	var f *fault.Error
	if !errors.As(err, &f) || f.Code != "field_failed" {
		t.Errorf("a field that always fails: %v", err)
	}
}

// TestCancel ends a round in which every episode hangs.
func TestCancel(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	a, _ := agent(fakeField{func(ctx context.Context, _ secloop.Alert, _ secloop.Strategy) (scenario.Outcome, error) {
		cancel()
		<-ctx.Done()
		return scenario.Outcome{}, ctx.Err()
	}}, right)
	a.Timeout = time.Hour
	if _, err := a.Play(ctx, []Incident{incident("xss", "web1")}, 4, 1); !errors.Is(err, context.Canceled) {
		t.Errorf("%v, expected canceled", err)
	}
}

// TestEpisodesInParallel shows that as many play at a time as were asked for, and no more.
func TestEpisodesInParallel(t *testing.T) {
	var now, most atomic.Int32
	a, _ := agent(fakeField{func(context.Context, secloop.Alert, secloop.Strategy) (scenario.Outcome, error) {
		n := now.Add(1)
		defer now.Add(-1)
		for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
		}
		for end := time.Now().Add(10 * time.Second); most.Load() < 4 && time.Now().Before(end); { // wait for the others
			time.Sleep(time.Millisecond)
		}
		return scenario.Outcome{}, nil
	}}, right)
	a.Timeout = time.Minute
	if _, err := a.Play(t.Context(), []Incident{incident("xss", "web1"), incident("lfi", "web1")}, 7, 1); err != nil || most.Load() != 4 {
		t.Errorf("%v, %d at a time, expected 4", err, most.Load())
	}
}

func TestCachePlaysEqualStrategiesOnce(t *testing.T) {
	var plays atomic.Int32
	a, _ := agent(fakeField{func(context.Context, secloop.Alert, secloop.Strategy) (scenario.Outcome, error) {
		plays.Add(1)
		return scenario.Outcome{Feedback: secloop.Feedback{Executed: 1, Service: true}}, nil
	}}, right, breaks)
	a.Cache = true
	r, err := a.Play(t.Context(), []Incident{incident("sql_injection", "web1"), incident("sql_injection", "web1")}, 6, 1)
	if err != nil || plays.Load() != 4 {
		t.Fatalf("%v, %d plays, expected 2 for each of 2 incidents", err, plays.Load())
	}
	for _, g := range r.Episodes {
		for k, e := range g {
			if e.Completion != []string{right, breaks}[k%2] || len(e.Sampled.Tokens) != len(e.Completion) || e.Reward.Execution != 1 {
				t.Errorf("strategy %d: %+v", k, e)
			}
		}
	}
}

// TestSetsShareNothing draws many incidents: no situation of a held-out set is trained on.
func TestSetsShareNothing(t *testing.T) {
	train := map[string]bool{}
	r := seeded(1, "test", 0)
	for range 5000 {
		a, err := Train.draw(r)
		if err != nil {
			t.Fatal(err)
		}
		train[a.Key()] = true
	}
	for _, set := range Sets {
		kinds := map[string]bool{}
		for range 500 {
			a, err := set.draw(r)
			if err != nil {
				t.Fatal(err)
			}
			if train[a.Key()] {
				t.Fatalf("%s is in %s and in training", a.Key(), set)
			}
			kinds[a.Attack] = true
		}
		for k := range kinds {
			known := false
			for key := range train {
				known = known || strings.HasPrefix(key, k+"|")
			}
			if known != (set == Incidents) {
				t.Errorf("%s of %s is trained on: %v", k, set, known)
			}
		}
	}
}

func TestPrompts(t *testing.T) {
	s := []sensor.Summary{{Type: "SQL syntax in query", Count: 3, Source: "198.18.0.20", Target: "web1", Risk: "high"}}
	text, err := Terse{}.Prompt(s)
	if want := "SSIQ 0.20 web1\n="; err != nil || text != want {
		t.Errorf("terse prompt %q, %v, expected %q", text, err, want)
	}
	chat := Chat{Render: func(m []tokenizer.Message) (string, error) { return m[0].Content + "|" + m[1].Content, nil }}
	if text, err = chat.Prompt(s); err != nil || !strings.HasPrefix(text, ChatSystem()+"|") || !strings.Contains(text, "- "+s[0].String()+"\n") {
		t.Errorf("chat prompt %q, %v, expected the environment and %s", text, err, s[0])
	}
	chat.Brief = true
	text, err = chat.Prompt(s)
	if want := "You defend a network.|Alerts:\n- SQL syntax in query from 198.18.0.20 against web1\nStrategy:"; err != nil || text != want {
		t.Errorf("brief prompt %q, %v, expected %q", text, err, want)
	}
	names := map[string]string{}
	for _, sig := range sensor.Signatures() {
		short := terseType(sig.Name)
		if names[short] != "" {
			t.Errorf("%q and %q are both %q in a terse prompt", sig.Name, names[short], short)
		}
		names[short] = sig.Name
	}
	for _, tool := range scenario.Tools() {
		if !strings.Contains(Environment(), "- "+tool.Name+"("+tool.Params[0].Name) {
			t.Errorf("the chat prompt does not name %s and its parameters", tool.Name)
		}
	}
	for _, h := range scenario.Hosts() {
		if !strings.Contains(Environment(), h.Name) {
			t.Errorf("the chat prompt does not name %s", h.Name)
		}
	}
}

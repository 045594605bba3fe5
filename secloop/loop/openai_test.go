package loop

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"trainerd/internal/fault"
	"trainerd/rollout"
	"trainerd/secloop"
)

// vllm answers /v1/completions in the form of vLLM: completion k of prompt i is
// the tokens [i, k, 2]; legacy leaves token_ids out, as releases before 0.10.2 do.
type vllm struct {
	legacy bool
	model  string
	header string
	change func(map[string]any) // of the answer
	asked  atomic.Pointer[map[string]any]
}

func (v *vllm) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	raw, _ := io.ReadAll(q.Body)
	var in struct {
		Model  string
		Prompt [][]int32
		N      int
	}
	var all map[string]any
	if q.URL.Path != "/v1/completions" || json.Unmarshal(raw, &in) != nil || json.Unmarshal(raw, &all) != nil {
		http.Error(w, "bad request", http.StatusBadRequest)
		return
	}
	all["authorization"] = q.Header.Get("Authorization")
	v.asked.Store(&all)
	var choices []any
	for i := range in.Prompt {
		for k := range in.N {
			ids := []int{i, k, 2}
			finish, stop := "stop", any(2)
			if k == 1 {
				finish, stop = "length", nil
			}
			c := map[string]any{"index": i*in.N + k, "text": "x", "finish_reason": finish, "stop_reason": stop, "prompt_logprobs": nil,
				"logprobs": map[string]any{"text_offset": []int{0, 1, 2}, "token_logprobs": []float64{-0.5, -0.25, 0},
					"tokens":       []string{fmt.Sprintf("token_id:%d", ids[0]), fmt.Sprintf("token_id:%d", ids[1]), "token_id:2"},
					"top_logprobs": []any{map[string]float64{"token_id:1": -0.5}, nil, nil}},
				"token_ids": ids, "prompt_token_ids": in.Prompt[i]}
			if v.legacy {
				delete(c, "token_ids")
				delete(c, "prompt_token_ids")
			}
			choices = append([]any{c}, choices...) // in any order
		}
	}
	answer := map[string]any{"id": "cmpl-1", "object": "text_completion", "created": 1, "model": v.model, "choices": choices,
		"usage": map[string]int{"prompt_tokens": 3, "total_tokens": 9, "completion_tokens": 6}, "kv_transfer_params": nil}
	if v.change != nil {
		v.change(answer)
	}
	if v.header != "" {
		w.Header().Set("Trainerd-Policy-Step", v.header)
	}
	json.NewEncoder(w).Encode(answer)
}

func openai(t *testing.T, h http.Handler) *OpenAI {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	o, err := NewOpenAI(OpenAIOptions{URL: s.URL + "/v1", Model: "secloop", Key: "k", MaxTokens: 8, Temperature: 1, Retries: 2})
	if err != nil {
		t.Fatal(err)
	}
	return o
}

func TestOpenAISamples(t *testing.T) {
	want := [][]secloop.Sampled{}
	for i := range int32(2) {
		want = append(want, []secloop.Sampled{
			{Tokens: []int32{i, 0, 2}, LogProbs: []float32{-0.5, -0.25, 0}, Stopped: true},
			{Tokens: []int32{i, 1, 2}, LogProbs: []float32{-0.5, -0.25, 0}},
		})
	}
	for _, c := range []struct {
		v    *vllm
		step int64
	}{
		{&vllm{model: "secloop"}, rollout.NoPolicyStep},
		{&vllm{model: "secloop@12"}, 12},
		{&vllm{model: "secloop@12", header: "13", legacy: true}, 13},
	} {
		got, step, err := openai(t, c.v).Sample(t.Context(), [][]int32{{1, 2}, {3}}, 2, 5)
		if diff := cmp.Diff(want, got); err != nil || diff != "" || step != c.step {
			t.Errorf("%+v: step %d, %v\n%s", c.v.model, step, err, diff)
		}
		asked := *c.v.asked.Load()
		for name, v := range map[string]any{"prompt": []any{[]any{1., 2.}, []any{3.}}, "n": 2., "max_tokens": 8., "temperature": 1., "top_p": 1., "top_k": -1.,
			"min_p": 0., "return_token_ids": true, "return_tokens_as_token_ids": true, "logprobs": 1., "authorization": "Bearer k", "model": "secloop"} {
			if diff := cmp.Diff(v, asked[name]); diff != "" {
				t.Errorf("request's %s: %s", name, diff)
			}
		}
	}
}

func TestOpenAIRefusesAnswers(t *testing.T) {
	first := func(a map[string]any) map[string]any { return a["choices"].([]any)[0].(map[string]any) }
	for _, c := range []struct {
		name, want string
		change     func(map[string]any)
	}{
		{"text tokens", "expected token_id:N", func(a map[string]any) {
			delete(first(a), "token_ids")
			first(a)["logprobs"].(map[string]any)["tokens"] = []string{"a", "b", "c"}
		}},
		{"no log-probs", "has no logprobs", func(a map[string]any) { first(a)["logprobs"] = nil }},
		{"null log-prob", "not a number", func(a map[string]any) {
			first(a)["logprobs"].(map[string]any)["token_logprobs"] = []any{nil, -1, -1}
		}},
		{"positive log-prob", "not a number up to 0", func(a map[string]any) {
			first(a)["logprobs"].(map[string]any)["token_logprobs"] = []any{0.1, -1, -1}
		}},
		{"fewer log-probs", "as many of both", func(a map[string]any) { first(a)["logprobs"].(map[string]any)["token_logprobs"] = []any{-1} }},
		{"no tokens", "1 to 8", func(a map[string]any) { first(a)["token_ids"] = []int{} }},
		{"a choice twice", "or twice", func(a map[string]any) { first(a)["index"] = 0 }},
		{"an index beyond", "choice index 9", func(a map[string]any) { first(a)["index"] = 9 }},
		{"a choice missing", "3 choices, expected 4", func(a map[string]any) { a["choices"] = a["choices"].([]any)[1:] }},
		{"filtered", "finish_reason", func(a map[string]any) { first(a)["finish_reason"] = "content_filter" }},
		{"a bad step", "expected a step number", func(a map[string]any) { a["model"] = "secloop@new" }},
	} {
		_, _, err := openai(t, &vllm{model: "secloop", change: c.change}).Sample(t.Context(), [][]int32{{1, 2}, {3}}, 2, 5)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, expected %q", c.name, err, c.want)
		}
	}
}

// TestEndpointRepeats counts calls: what may pass by itself is repeated.
func TestEndpointRepeats(t *testing.T) {
	for _, c := range []struct {
		status      int
		calls       int32
		unavailable bool
	}{{500, 3, true}, {503, 3, true}, {429, 3, true}, {400, 1, true}, {401, 1, true}, {302, 1, true}} {
		var calls atomic.Int32
		o := openai(t, http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
			calls.Add(1)
			w.WriteHeader(c.status)
		}))
		_, _, err := o.Sample(t.Context(), [][]int32{{1}}, 1, 1)
		if err == nil || calls.Load() != c.calls || unavailable(err) != c.unavailable {
			t.Errorf("status %d: %d calls, %v; expected %d", c.status, calls.Load(), err, c.calls)
		}
	}
	for _, url := range []string{"", "host:80", "ftp://x/v1", "http://u:p@x/v1", "http://x/v1?key=1"} {
		if _, err := NewOpenAI(OpenAIOptions{URL: url, Model: "m"}); err == nil || strings.Contains(err.Error(), "u:p") {
			t.Errorf("address %q: %v", url, err)
		}
	}
}

// judgeServer answers verdicts in the form of /v1/chat/completions.
func judgeServer(t *testing.T, answer func(call int32) (status int, content string)) (*LLMJudge, *atomic.Int32) {
	t.Helper()
	var calls atomic.Int32
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		status, content := answer(calls.Add(1))
		if q.URL.Path != "/v1/chat/completions" || q.Header.Get("Authorization") != "Bearer k" {
			status = http.StatusTeapot
		}
		w.WriteHeader(status)
		json.NewEncoder(w).Encode(map[string]any{"choices": []any{map[string]any{"index": 0, "message": map[string]any{"role": "assistant", "content": content}}}})
	}))
	t.Cleanup(s.Close)
	j, err := NewLLMJudge(LLMJudgeOptions{URL: s.URL + "/v1", Model: "judge", Key: "k", Retries: 1, Timeout: 10 * time.Second, Environment: Environment()})
	if err != nil {
		t.Fatal(err)
	}
	return j, &calls
}

func TestLLMJudge(t *testing.T) {
	al := incident("xss", "web1").Truth
	s, err := secloop.ParseStrategy(right)
	if err != nil {
		t.Fatal(err)
	}
	j, calls := judgeServer(t, func(int32) (int, string) { return 200, `{"rationality": 0.75}` })
	for range 3 {
		if w, err := j.Rate(t.Context(), al, s); w != 0.75 || err != nil {
			t.Fatalf("%v, %v", w, err)
		}
	}
	if calls.Load() != 1 {
		t.Errorf("%d calls for one question", calls.Load())
	}
	long := secloop.Strategy{{Tool: strings.Repeat("x", 1<<20), Params: map[string]string{}}}
	if w, err := j.Rate(t.Context(), al, long); w != 0 || err != nil || calls.Load() != 1 {
		t.Errorf("an endless strategy: %v, %v, %d calls", w, err, calls.Load())
	}
	for _, bad := range []string{"", "0.5", `{"rationality": "high"}`, `{"rationality": 1.5}`, `{"rationality": -1}`, `{"rationality": 0.5} ok`, `{"score": 1}`, `{}`,
		`{"rationality": null}`, `{"rationality": 0.5, "why": "x"}`, "```json\n{\"rationality\": 1}\n```"} {
		j, calls := judgeServer(t, func(int32) (int, string) { return 200, bad })
		if _, err := j.Rate(t.Context(), al, s); !unavailable(err) || calls.Load() != 2 {
			t.Errorf("verdict %q: %v after %d calls, expected unavailable after 2", bad, err, calls.Load())
		}
	}
	j, calls = judgeServer(t, func(n int32) (int, string) {
		if n == 1 {
			return 503, ""
		}
		return 200, `{"rationality": 1}`
	})
	if w, err := j.Rate(t.Context(), al, s); w != 1 || err != nil || calls.Load() != 2 {
		t.Errorf("after one 503: %v, %v, %d calls", w, err, calls.Load())
	}
}

// TestJudgePausesTheRound takes the judge away: nothing is scored without it,
// the pause is reported, and the round ends when the judge is back.
func TestJudgePausesTheRound(t *testing.T) {
	j, calls := judgeServer(t, func(n int32) (int, string) {
		if n <= 2 {
			return 503, ""
		}
		return 200, `{"rationality": 0.5}`
	})
	a, said := agent(fakeField{nil}, right)
	a.Field = simField()
	a.Rate, a.Timeout = j.Rate, 20*time.Second
	r, err := a.Play(t.Context(), []Incident{incident("sql_injection", "web1")}, 1, 1)
	if err != nil || r.Episodes[0][0].Reward.Penalty != 0.5 || calls.Load() != 3 {
		t.Fatalf("%v, %+v, %d calls", err, r.Episodes[0], calls.Load())
	}
	if !strings.Contains(strings.Join(*said, "\n"), "round paused") {
		t.Errorf("the pause was not reported: %q", *said)
	}
	a.Rate = func(context.Context, secloop.Alert, secloop.Strategy) (float64, error) {
		return 0, fault.New(fault.Unavailable, "x", "gone")
	}
	a.Patience = time.Millisecond
	if _, err := a.Play(t.Context(), []Incident{incident("sql_injection", "web1")}, 1, 1); !unavailable(err) {
		t.Errorf("out of patience: %v", err)
	}
	a.Rate = func(context.Context, secloop.Alert, secloop.Strategy) (float64, error) {
		return 0, errors.New("broken")
	}
	if _, err := a.Play(t.Context(), []Incident{incident("sql_injection", "web1")}, 1, 1); err == nil || !strings.Contains(err.Error(), "broken") {
		t.Errorf("a broken judge: %v", err)
	}
}

func FuzzParseRationality(f *testing.F) {
	for _, s := range []string{`{"rationality": 0.5}`, `{"rationality": 1e400}`, `{}`, `[`, `{"rationality": 0.5}}`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		if w, err := parseRationality(text); err == nil && !(w >= 0 && w <= 1) {
			t.Errorf("%q became %v", text, w)
		}
	})
}

package loop

import (
	"context"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"trainerd/internal/fault"
	"trainerd/rollout"
	"trainerd/secloop"
)

// OpenAI samples from an OpenAI-compatible completions endpoint that speaks token
// ids, as vLLM does. What is needed of it, beyond OpenAI's own:
//
//   - "prompt" as a list of lists of token ids, and "n" completions of each, with choice
//     index = prompt*n + i;
//   - the ids of what was sampled, end token included: "token_ids" of a choice
//     (return_token_ids, vLLM 0.10.2 and later), else tokens "token_id:N" in its
//     log-probs (return_tokens_as_token_ids);
//   - "logprobs" of the sampled tokens under the full softmax at the temperature. vLLM
//     reports those of temperature 1 unless it runs with --logprobs-mode processed_logprobs,
//     so any other temperature needs that option;
//   - no other limit on what is sampled: top_p 1, top_k -1 and min_p 0 are sent.
//
// The policy step that sampled is the answer's header Trainerd-Policy-Step, else
// what follows the last @ of its "model" ("secloop@12"), else unknown.
type OpenAI struct {
	endpoint    endpoint
	Model       string
	MaxTokens   int
	Temperature float64
}

// OpenAIOptions of a sampler.
type OpenAIOptions struct {
	URL         string // up to and including /v1
	Model       string
	Key         string // API key; "": none
	MaxTokens   int
	Temperature float64
	Timeout     time.Duration // of one request; default 2 minutes
	Retries     int           // repetitions of a request that failed by itself; default 5
}

// NewOpenAI checks the options; it asks nothing yet.
func NewOpenAI(o OpenAIOptions) (*OpenAI, error) {
	if o.Timeout <= 0 {
		o.Timeout = 2 * time.Minute
	}
	if o.Retries == 0 {
		o.Retries = 5
	}
	e, err := newEndpoint("endpoint", o.URL, o.Key, o.Timeout, o.Retries, 256<<20)
	if err != nil {
		return nil, err
	}
	if o.Model == "" {
		return nil, fault.BadField("endpoint-model", `""`, "the name that the endpoint serves the policy by")
	}
	return &OpenAI{e, o.Model, o.MaxTokens, o.Temperature}, nil
}

type completionRequest struct {
	Model       string    `json:"model"`
	Prompt      [][]int32 `json:"prompt"`
	N           int       `json:"n"`
	MaxTokens   int       `json:"max_tokens"`
	Temperature float64   `json:"temperature"`
	TopP        float64   `json:"top_p"`
	TopK        int       `json:"top_k"`
	MinP        float64   `json:"min_p"`
	Seed        int64     `json:"seed"`
	LogProbs    int       `json:"logprobs"`
	AsIDs       bool      `json:"return_tokens_as_token_ids"`
	IDs         bool      `json:"return_token_ids"`
}

type completionAnswer struct {
	Model   string `json:"model"`
	Choices []struct {
		Index        int     `json:"index"`
		FinishReason string  `json:"finish_reason"`
		TokenIDs     []int32 `json:"token_ids"`
		LogProbs     *struct {
			Tokens   []string   `json:"tokens"`
			LogProbs []*float64 `json:"token_logprobs"`
		} `json:"logprobs"`
	} `json:"choices"`
}

// Sample implements secloop.Sampler.
func (o *OpenAI) Sample(ctx context.Context, prompts [][]int32, n int, seed uint64) ([][]secloop.Sampled, int64, error) {
	var a completionAnswer
	header, err := o.endpoint.post(ctx, "/completions", completionRequest{Model: o.Model, Prompt: prompts, N: n, MaxTokens: o.MaxTokens,
		Temperature: o.Temperature, TopP: 1, TopK: -1, Seed: int64(seed >> 1), LogProbs: 1, AsIDs: true, IDs: true}, &a)
	if err != nil {
		return nil, 0, err
	}
	bad := func(format string, args ...any) error {
		return fault.New(fault.Malformed, "endpoint_answer", "completions of %s: "+format, append([]any{o.Model}, args...)...)
	}
	out := make([][]secloop.Sampled, len(prompts))
	for i := range out {
		out[i] = make([]secloop.Sampled, n)
	}
	seen := make([]bool, len(prompts)*n)
	for _, c := range a.Choices {
		if c.Index < 0 || c.Index >= len(seen) || seen[c.Index] {
			return nil, 0, bad("choice index %d of %d prompts with n %d, or twice", c.Index, len(prompts), n)
		}
		seen[c.Index] = true
		s := secloop.Sampled{Tokens: c.TokenIDs, Stopped: c.FinishReason == "stop"}
		if !s.Stopped && c.FinishReason != "length" {
			return nil, 0, bad("choice %d: finish_reason %q, expected stop or length", c.Index, c.FinishReason)
		}
		if c.LogProbs == nil {
			return nil, 0, bad("choice %d has no logprobs", c.Index)
		}
		if s.Tokens == nil {
			if s.Tokens, err = idsOf(c.LogProbs.Tokens); err != nil {
				return nil, 0, bad("choice %d: %v", c.Index, err)
			}
		}
		if len(s.Tokens) == 0 || len(s.Tokens) > o.MaxTokens || len(c.LogProbs.LogProbs) != len(s.Tokens) {
			return nil, 0, bad("choice %d: %d token ids and %d log-probs, expected as many of both, 1 to %d", c.Index, len(s.Tokens), len(c.LogProbs.LogProbs), o.MaxTokens)
		}
		for k, p := range c.LogProbs.LogProbs {
			if p == nil || math.IsNaN(*p) || *p > 0 {
				return nil, 0, bad("choice %d: log-prob %d is not a number up to 0", c.Index, k)
			}
			s.LogProbs = append(s.LogProbs, float32(*p))
		}
		out[c.Index/n][c.Index%n] = s
	}
	if len(a.Choices) != len(seen) {
		return nil, 0, bad("%d choices, expected %d", len(a.Choices), len(seen))
	}
	step, err := stepOf(header.Get("Trainerd-Policy-Step"), a.Model)
	return out, step, err
}

// idsOf reads tokens of the form token_id:N.
func idsOf(tokens []string) ([]int32, error) {
	ids := make([]int32, len(tokens))
	for i, t := range tokens {
		n, err := strconv.ParseInt(strings.TrimPrefix(t, "token_id:"), 10, 32)
		if err != nil || !strings.HasPrefix(t, "token_id:") || n < 0 {
			return nil, fmt.Errorf("token %d is %.40q, expected token_id:N: the endpoint must return token ids", i, t)
		}
		ids[i] = int32(n)
	}
	return ids, nil
}

// stepOf finds the policy step that an answer came from.
func stepOf(header, model string) (int64, error) {
	text := header
	if text == "" {
		i := strings.LastIndexByte(model, '@')
		if i < 0 {
			return rollout.NoPolicyStep, nil
		}
		text = model[i+1:]
	}
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil || n < 0 {
		return 0, fault.New(fault.Malformed, "endpoint_answer", "policy step of the endpoint: %.60q, expected a step number", text)
	}
	return n, nil
}

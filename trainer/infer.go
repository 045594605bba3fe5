package trainer

import (
	"bytes"
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"time"

	"trainerd/internal/fault"
	"trainerd/model"
	"trainerd/rollout"
	"trainerd/rollout/arrowio"
)

// SampleRequest asks for N completions of each prompt under the current policy.
type SampleRequest struct {
	Prompts     [][]int32
	N           int
	MaxTokens   int      // most new tokens of a completion
	Temperature *float64 // nil: the objective's
	TopP        float64  // in (0,1]
	Seed        *uint64  // nil: chosen from the job's seed and the request's number
	Stop        []int32  // nil: the model's end tokens
}

// Sampled is one completion. Its policy step is that of the weights which
// sampled it; it may be newer than the newest published checkpoint.
type Sampled struct {
	Prompt       int       `json:"prompt"` // index in the request's prompts
	Index        int       `json:"index"`  // in [0,n) of the prompt
	Tokens       []int32   `json:"tokens"`
	LogProbs     []float32 `json:"logprobs"`      // of the full softmax at the temperature, before top-p
	FinishReason string    `json:"finish_reason"` // stop (its last token is the stop id) or length
	PolicyStep   int64     `json:"policy_step"`
}

// SampleResult is the answer to a SampleRequest. The same request with the same
// seed under the same policy step gives the same completions.
type SampleResult struct {
	PolicyStep  int64     `json:"policy_step"`
	Seed        uint64    `json:"seed"`
	Completions []Sampled `json:"completions"` // by prompt, then index
}

// Sample decodes completions on the device between steps.
func (j *Job) Sample(ctx context.Context, r SampleRequest) (SampleResult, error) {
	g, err := j.admitSample(r)
	if err != nil {
		return SampleResult{}, err
	}
	res := SampleResult{Seed: g.Seed}
	var done []model.Completion
	err = j.withModel(ctx, laneRequest, func() error {
		if j.model == nil {
			return j.notLoaded("sample")
		}
		res.PolicyStep = j.weights
		done, err = j.model.Generate(ctx, g)
		return err
	})
	if err != nil {
		return SampleResult{}, err
	}
	res.Completions = make([]Sampled, len(done))
	tokens := 0
	for i, c := range done {
		s := Sampled{Prompt: c.Prompt, Index: i % g.N, Tokens: c.Tokens, LogProbs: c.LogProbs, FinishReason: "length", PolicyStep: res.PolicyStep}
		if c.Stopped {
			s.FinishReason = "stop"
		}
		tokens += len(c.Tokens)
		res.Completions[i] = s
	}
	j.mu.Lock()
	j.counts.SampledTokens += int64(tokens)
	j.mu.Unlock()
	return res, nil
}

// notLoaded is the refusal of a request that needs weights on the device.
func (j *Job) notLoaded(doing string) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.state == Loading {
		return j.wrongState(doing)
	}
	return &fault.Error{Kind: fault.Conflict, Code: "not_loaded",
		Msg: fmt.Sprintf("%s: the %s job's model is no longer on the device; create a job from job:%s@latest", doing, j.state, j.ID)}
}

// admitSample validates a request and gathers all that is wrong with it.
func (j *Job) admitSample(r SampleRequest) (model.GenerateRequest, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	cfg := j.rec.Model
	if j.state == Loading || cfg.Vocab == 0 {
		return model.GenerateRequest{}, j.wrongState("sample")
	}
	if j.spec.Sampling.MaxSequences == 0 {
		return model.GenerateRequest{}, &fault.Error{Kind: fault.Conflict, Code: "sampling_off", Msg: "the job was created without sampling",
			Fields: []fault.Field{{Name: "sampling.max_sequences", Row: -1, Got: "0", Expected: "1 or more"}}}
	}
	var f faults
	if len(r.Prompts) == 0 {
		f.add("prompts", "none", "at least one")
	}
	if r.N < 1 {
		f.add("n", r.N, "1 or more")
	}
	if r.MaxTokens < 1 {
		f.add("max_tokens", r.MaxTokens, "1 or more")
	}
	if !(r.TopP > 0 && r.TopP <= 1) {
		f.add("top_p", r.TopP, "in (0, 1]")
	}
	temperature := j.spec.Objective.Temperature
	if r.Temperature != nil {
		temperature = *r.Temperature
	}
	if !(temperature >= 0 && temperature <= math.MaxFloat32) {
		f.add("temperature", temperature, "0 or more")
	}
	if r.N > 0 && len(r.Prompts) > j.m.limits.MaxSampleRows/r.N {
		f.add("n", fmt.Sprintf("%d of %d prompts", r.N, len(r.Prompts)), fmt.Sprintf("at most %d completions of one request", j.m.limits.MaxSampleRows))
	}
	longest := min(cfg.MaxPositions, int(j.spec.Sampling.MaxTokens))
	for i, p := range r.Prompts {
		switch {
		case len(f) > 16: // enough to see what is wrong
		case len(p) == 0:
			f = append(f, fault.Field{Name: "prompts", Row: i, Got: "an empty prompt", Expected: "at least one token"})
		case len(p) > longest-min(r.MaxTokens, longest):
			f = append(f, fault.Field{Name: "prompts", Row: i, Got: fmt.Sprintf("%d tokens and %d new ones", len(p), r.MaxTokens),
				Expected: fmt.Sprintf("at most %d together", longest)})
		default:
			badTokens(&f, "prompts", i, p, cfg.Vocab)
		}
	}
	badTokens(&f, "stop", -1, r.Stop, cfg.Vocab)
	if len(f) > 0 {
		return model.GenerateRequest{}, &fault.Error{Kind: fault.Invalid, Code: "invalid_request", Msg: "sampling request", Fields: f}
	}
	j.samples++
	seed := rand.NewPCG(uint64(j.spec.Seed), j.samples).Uint64() >> 11 // 53 bits: whole in every JSON reader
	if r.Seed != nil {
		seed = *r.Seed
	}
	return model.GenerateRequest{Prompts: r.Prompts, N: r.N, MaxTokens: r.MaxTokens, Temperature: float32(temperature),
		TopP: float32(r.TopP), Seed: seed, Stop: r.Stop}, nil
}

// badTokens reports the first id outside the vocabulary.
func badTokens(f *faults, name string, row int, tokens []int32, vocab int) {
	for i, id := range tokens {
		if id < 0 || int(id) >= vocab {
			*f = append(*f, fault.Field{Name: name, Row: row, Got: fmt.Sprintf("token %d at %d", id, i), Expected: fmt.Sprintf("ids in [0, %d)", vocab)})
			return
		}
	}
}

// LogProbs scores the rows of an Arrow body under the current policy and says
// which step that is.
func (j *Job) LogProbs(ctx context.Context, body []byte) (rows []arrowio.ScoreRow, policyStep int64, err error) {
	j.mu.Lock()
	if j.state == Loading || j.rec.Model.Vocab == 0 {
		err = j.wrongState("score")
	}
	limits := j.limits()
	j.mu.Unlock()
	if err != nil {
		return nil, 0, err
	}
	rows, err = j.decodeScores(ctx, body, limits)
	if err != nil {
		return nil, 0, err
	}
	in := make([]rollout.Rollout, len(rows))
	for i, r := range rows {
		in[i] = rollout.Rollout{Prompt: r.Prompt, Completion: r.Completion}
	}
	began := time.Now()
	var scores []model.Scores
	err = j.withModel(ctx, laneRequest, func() error {
		if j.engine == nil {
			return j.notLoaded("score")
		}
		policyStep = j.weights
		scores, err = j.engine.Score(ctx, in)
		return err
	})
	if err != nil {
		return nil, 0, err
	}
	tokens := 0
	for i := range rows {
		rows[i].LogProbs, rows[i].Entropy = scores[i].LogProb, scores[i].Entropy
		tokens += len(rows[i].Completion)
	}
	j.mu.Lock()
	j.counts.ScoredTokens += int64(tokens)
	j.mu.Unlock()
	j.m.log.Debug("scored", "job", j.ID, "rows", len(rows), "seconds", time.Since(began).Seconds())
	return rows, policyStep, nil
}

// decodeScores decodes a body, waiting for one of the decoders.
func (j *Job) decodeScores(ctx context.Context, body []byte, l rollout.Limits) ([]arrowio.ScoreRow, error) {
	select {
	case j.m.decode <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	defer func() { <-j.m.decode }()
	return arrowio.DecodeScores(bytes.NewReader(body), l)
}

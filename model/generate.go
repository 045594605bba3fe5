package model

import (
	"context"
	"encoding/binary"
	"fmt"
	"math"
	"slices"

	"trainerd/internal/fault"
)

// GenerateRequest asks for N completions of each prompt.
type GenerateRequest struct {
	Prompts     [][]int32
	N           int
	MaxTokens   int     // most new tokens of a completion
	Temperature float32 // 0: the most likely token, log-probs at temperature 1
	TopP        float32 // in (0,1]; 0 is taken as 1
	Seed        uint64  // the completions are a pure function of weights, request and seed
	Stop        []int32 // ids that end a completion; nil: the config's EOS
}

// Completion is one sampled continuation. LogProbs are of the full tempered
// softmax, before top-p, one per token.
type Completion struct {
	Prompt   int // index in GenerateRequest.Prompts
	Tokens   []int32
	LogProbs []float32
	Stopped  bool // ended by a stop id (which is its last token), not by MaxTokens
}

// Generate decodes all completions together; those of one prompt share its
// cache. Completion j of prompt i is element i*N+j, whatever the batching.
//
// At most Options.SampleSlots sequences run at once: one that ends leaves the
// batch and the next takes its slot. Prompts that do not fit in the cache
// together are taken in several rounds. The random number of token t of
// completion (i,j) depends on (seed,i,j,t) only.
func (m *Model) Generate(ctx context.Context, r GenerateRequest) ([]Completion, error) {
	if m.broken != nil {
		return nil, m.broken
	}
	if err := m.checkRequest(&r); err != nil {
		return nil, err
	}
	out := make([]Completion, len(r.Prompts)*r.N)
	for i := range out {
		out[i].Prompt = i / r.N
	}
	distinct := distinctPrompts(r)
	for len(distinct) > 0 {
		round, err := m.takeRound(distinct, &r)
		if err != nil {
			return nil, err
		}
		distinct = distinct[len(round.prompts):]
		if err := round.run(ctx, out); err != nil {
			return nil, err
		}
	}
	return out, nil
}

func (m *Model) checkRequest(r *GenerateRequest) error {
	if m.cache == nil {
		return fault.New(fault.Unavailable, "no_sampling", "the model was loaded without sample slots")
	}
	if r.TopP == 0 {
		r.TopP = 1
	}
	if r.Stop == nil {
		r.Stop = m.cfg.EOS
	}
	switch {
	case len(r.Prompts) == 0:
		return fault.BadField("prompts", "0 prompts", "at least one")
	case r.N < 1 || r.N > maxDim:
		return fault.BadField("n", r.N, fmt.Sprintf("1 to %d", maxDim))
	case r.MaxTokens < 1:
		return fault.BadField("max_tokens", r.MaxTokens, "1 or more")
	case !(r.Temperature >= 0) || math.IsInf(float64(r.Temperature), 0):
		return fault.BadField("temperature", r.Temperature, "a number >= 0")
	case !(r.TopP > 0 && r.TopP <= 1):
		return fault.BadField("top_p", r.TopP, "in (0,1]")
	}
	for i, p := range r.Prompts {
		if len(p) == 0 {
			return fault.BadRow("prompts", i, "an empty prompt", "at least one token")
		}
		if len(p) > m.cfg.MaxPositions-r.MaxTokens {
			return fault.BadRow("prompts", i, fmt.Sprintf("%d tokens and %d new ones", len(p), r.MaxTokens),
				fmt.Sprintf("at most %d together (max_position_embeddings)", m.cfg.MaxPositions))
		}
		for _, id := range p {
			if id < 0 || int(id) >= m.cfg.Vocab {
				return fault.BadRow("prompts", i, fmt.Sprintf("token %d", id), fmt.Sprintf("0 to %d", m.cfg.Vocab-1))
			}
		}
	}
	return nil
}

// prompt is a distinct prompt with the completions wanted of it.
type prompt struct {
	tokens  []int32
	row     int   // first cache row
	wanted  []int // indices in the result
	lastRow int32 // row of its last token in the chunk that is being filled
}

// distinctPrompts merges equal prompts, in the order of their first occurrence.
func distinctPrompts(r GenerateRequest) []*prompt {
	var out []*prompt
	seen := map[string]*prompt{}
	for i, tokens := range r.Prompts {
		key := make([]byte, 0, 4*len(tokens))
		for _, id := range tokens {
			key = binary.LittleEndian.AppendUint32(key, uint32(id))
		}
		p := seen[string(key)]
		if p == nil {
			p = &prompt{tokens: tokens}
			seen[string(key)] = p
			out = append(out, p)
		}
		for j := range r.N {
			p.wanted = append(p.wanted, i*r.N+j)
		}
	}
	return out
}

// round is a set of prompts whose cache rows and slots fit together.
type round struct {
	m       *Model
	r       *GenerateRequest
	prompts []*prompt
	slots   int
	tail    int // cache rows of a slot: the last sampled token is never fed
	base    int // first row of slot 0
	waiting []*sequence
}

// sequence is a completion that goes on.
type sequence struct {
	out    int // index in the result
	prompt *prompt
	slot   int
	last   int32 // token to feed next
	fed    int   // own tokens in the cache
}

// takeRound takes the leading prompts that fit in the cache with a slot for
// each of their completions (as far as there are slots), and at least one.
func (m *Model) takeRound(distinct []*prompt, r *GenerateRequest) (*round, error) {
	w := &round{m: m, r: r, tail: r.MaxTokens - 1}
	rows, wanted, capacity := 0, 0, m.opt.SampleTokens
	for _, p := range distinct {
		rows, wanted = rows+len(p.tokens), wanted+len(p.wanted)
		if len(w.prompts) > 0 && rows+min(wanted, m.opt.SampleSlots)*w.tail > capacity {
			break
		}
		p.row = rows - len(p.tokens)
		w.prompts = append(w.prompts, p)
		w.base, w.slots = rows, min(wanted, m.opt.SampleSlots)
	}
	if w.tail > 0 {
		w.slots = min(w.slots, (capacity-w.base)/w.tail)
	}
	if w.base > capacity || w.slots < 1 {
		return nil, fault.New(fault.TooLarge, "prompt_too_large", "a prompt of %d tokens with %d new ones needs %d cache rows, expected at most %d (sample_tokens)",
			len(w.prompts[0].tokens), r.MaxTokens, w.base+w.tail, capacity)
	}
	return w, nil
}

// run prefills the prompts and decodes all their completions.
func (w *round) run(ctx context.Context, out []Completion) error {
	if err := w.prefill(ctx, out); err != nil {
		return err
	}
	active := make([]*sequence, 0, w.slots)
	free := make([]int, w.slots)
	for i := range free {
		free[i] = w.slots - 1 - i
	}
	for {
		for len(free) > 0 && len(w.waiting) > 0 {
			s := w.waiting[0]
			w.waiting = w.waiting[1:]
			s.slot, free = free[len(free)-1], free[:len(free)-1]
			active = append(active, s)
		}
		if len(active) == 0 {
			return nil
		}
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("generate: %w", err)
		}
		tokens, logProbs, err := w.m.decode(w, active, out)
		if err != nil {
			return err
		}
		going := active[:0]
		for i, s := range active {
			s.fed++
			if w.accept(out, s.out, tokens[i], logProbs[i]) {
				s.last = tokens[i]
				going = append(going, s)
			} else {
				free = append(free, s.slot)
			}
		}
		active = going
	}
}

// accept appends a sampled token and reports whether the completion goes on.
func (w *round) accept(out []Completion, i int, token int32, logProb float32) bool {
	c := &out[i]
	c.Tokens, c.LogProbs = append(c.Tokens, token), append(c.LogProbs, logProb)
	c.Stopped = slices.Contains(w.r.Stop, token)
	return !c.Stopped && len(c.Tokens) < w.r.MaxTokens
}

// uniform is the random number in [0,1) of token t of result i.
func (w *round) uniform(i, t int) float32 {
	key := mix(mix(mix(w.r.Seed)^uint64(i/w.r.N))^uint64(i%w.r.N)) + uint64(t)*0x9e3779b97f4a7c15
	return float32(mix(key)>>40) / (1 << 24)
}

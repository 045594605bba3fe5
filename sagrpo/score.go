package sagrpo

import (
	"context"
	"fmt"
	"slices"

	"trainerd/internal/fault"
	"trainerd/model"
	"trainerd/rollout"
)

// Score computes the log-prob and entropy of every completion token of rows
// under the current policy, at the objective's temperature, in the order of rows
// and of their tokens, masked ones included. Only prompts and completions are
// read. Rows with the same prompt share its computation wherever they stand.
func (e *Engine) Score(ctx context.Context, rows []rollout.Rollout) ([]model.Scores, error) {
	groups, from := byPrompt(rows)
	out := make([]model.Scores, len(rows))
	var all []*row
	place := map[*row]int{}
	for g := range groups {
		for i := range groups[g].Rollouts {
			at, n := from[g][i], len(groups[g].Rollouts[i].Completion)
			switch need := len(groups[g].Prompt) + n - 1; {
			case len(groups[g].Prompt) == 0:
				return nil, fault.BadRow("prompt_tokens", at, "none", "at least one token")
			case n == 0:
				return nil, fault.BadRow("completion_tokens", at, "none", "at least one token")
			case need > e.set.MaxTokens:
				return nil, fault.BadRow("completion_tokens", at, fmt.Sprintf("%d tokens with the prompt", need+1),
					fmt.Sprintf("at most %d (batch.max_tokens_per_micro_batch)", e.set.MaxTokens+1))
			}
			r := &row{group: &groups[g], index: i, active: e.ordinals(n)[:n:n]}
			all = append(all, r)
			place[r] = at
		}
	}
	micros, _, err := cut(all, e.set.MaxTokens, e.cost, nil)
	if err != nil {
		return nil, fmt.Errorf("pack rows: %w", err)
	}
	for i := range micros {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		s, err := e.policy.Score(&micros[i].batch, model.Policy, float32(e.set.Objective.Temperature))
		if err != nil {
			return nil, fmt.Errorf("score rows: %w", err)
		}
		for _, sp := range micros[i].spans {
			out[place[sp.row]] = model.Scores{LogProb: slices.Clone(sp.of(s.LogProb)), Entropy: slices.Clone(sp.of(s.Entropy))}
		}
	}
	return out, nil
}

// byPrompt groups rows with equal prompts, in the order of their first; from
// holds each member's index in rows.
func byPrompt(rows []rollout.Rollout) (groups []rollout.Group, from [][]int) {
	known := map[string]int{}
	var key []byte
	for i := range rows {
		key = key[:0]
		for _, t := range rows[i].Prompt {
			key = append(key, byte(t), byte(t>>8), byte(t>>16), byte(t>>24))
		}
		g, ok := known[string(key)]
		if !ok {
			g = len(groups)
			known[string(key)] = g
			groups = append(groups, rollout.Group{Prompt: rows[i].Prompt})
			from = append(from, nil)
		}
		groups[g].Rollouts = append(groups[g].Rollouts, rows[i])
		from[g] = append(from[g], i)
	}
	return groups, from
}

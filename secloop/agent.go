package secloop

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"

	"trainerd/rollout"
)

// Codec turns text into token ids and back; model/tokenizer implements it.
type Codec interface {
	Encode(text string) ([]int32, error)
	Decode(ids []int32, skipSpecial bool) string
}

// Sampled is one completion with the sampler's log-probs.
type Sampled struct {
	Tokens   []int32
	LogProbs []float32
	Stopped  bool // ended by an end token, not by the length limit
}

// Sampler generates n completions of each prompt from one policy step. The
// result is [prompt][completion]; the same weights, prompts and seed give the same completions.
type Sampler interface {
	Sample(ctx context.Context, prompts [][]int32, n int, seed uint64) (completions [][]Sampled, policyStep int64, err error)
}

// Agent is the loop between alerts and rewards, without the training.
type Agent struct {
	Codec   Codec
	Prompt  func(Alert) string
	Opening string // how every strategy begins: the end of the prompt, put before each completion again ("" for none)
	Sampler Sampler
	Field   Battlefield
	Judge   Judge
}

// Episode is one strategy's life: what was asked, what came, what it was worth.
type Episode struct {
	Alert      Alert
	Completion string // the whole strategy's text
	Sampled    Sampled
	Reward     Reward
}

// Play samples n strategies for every alert and scores each on its own
// battle-field. The result is [alert][strategy], with the policy step that sampled them.
func (a Agent) Play(ctx context.Context, alerts []Alert, n int, seed uint64) ([][]Episode, int64, error) {
	prompts := make([][]int32, len(alerts))
	for i, al := range alerts {
		ids, err := a.encode(al)
		if err != nil {
			return nil, 0, err
		}
		prompts[i] = ids
	}
	completions, step, err := a.Sampler.Sample(ctx, prompts, n, seed)
	if err != nil {
		return nil, 0, fmt.Errorf("sample strategies: %w", err)
	}
	if len(completions) != len(alerts) {
		return nil, 0, fmt.Errorf("sample strategies: %d prompts answered, expected %d", len(completions), len(alerts))
	}
	out := make([][]Episode, len(alerts))
	for i, al := range alerts {
		for _, c := range completions[i] {
			e := Episode{Alert: al, Sampled: c, Completion: a.Opening + a.Codec.Decode(c.Tokens, true)}
			if e.Reward, err = Score(ctx, a.Field, a.Judge, al, e.Completion); err != nil {
				return nil, 0, err
			}
			out[i] = append(out[i], e)
		}
	}
	return out, step, nil
}

// Example returns the prompt of an alert and the completion that a strategy
// would be, for supervised training; the end token is the caller's.
func (a Agent) Example(al Alert, s Strategy) (prompt, completion []int32, err error) {
	if prompt, err = a.encode(al); err != nil {
		return nil, nil, err
	}
	text, ok := strings.CutPrefix(s.String(), a.Opening)
	if !ok {
		return nil, nil, fmt.Errorf("encode strategy: %q does not begin with %q", s.String(), a.Opening)
	}
	completion, err = a.Codec.Encode(text)
	return prompt, completion, err
}

func (a Agent) encode(al Alert) ([]int32, error) {
	ids, err := a.Codec.Encode(a.Prompt(al) + a.Opening)
	if err != nil {
		return nil, fmt.Errorf("encode prompt: %w", err)
	}
	return ids, nil
}

// Rollouts turns episodes into the batch that is posted: one group per alert,
// named group(i). With shuffle, each group's rewards are permuted among its
// members first: the control that must not learn.
func (a Agent) Rollouts(episodes [][]Episode, step int64, group func(int) string, shuffle *rand.Rand) (*rollout.Batch, error) {
	var groups []Group
	for i, g := range episodes {
		if len(g) == 0 {
			continue
		}
		prompt, err := a.encode(g[0].Alert)
		if err != nil {
			return nil, err
		}
		out := Group{ID: group(i), Prompt: prompt}
		for _, e := range g {
			out.Sampled = append(out.Sampled, e.Sampled)
			out.Rewards = append(out.Rewards, e.Reward)
		}
		groups = append(groups, out)
	}
	return Batch(groups, step, shuffle), nil
}

// Group is one prompt's completions and what each was worth, by index.
type Group struct {
	ID      string
	Prompt  []int32
	Sampled []Sampled
	Rewards []Reward
}

// Batch makes the batch that is posted of groups that policy step sampled. The
// rows of a group share its prompt. With shuffle, each group's rewards are
// permuted among its members first.
func Batch(groups []Group, step int64, shuffle *rand.Rand) *rollout.Batch {
	b := &rollout.Batch{Components: slices.Clone(Components)}
	for _, g := range groups {
		rewards := slices.Clone(g.Rewards)
		if shuffle != nil {
			shuffle.Shuffle(len(rewards), func(x, y int) { rewards[x], rewards[y] = rewards[y], rewards[x] })
		}
		for i, c := range g.Sampled {
			b.Rollouts = append(b.Rollouts, rollout.Rollout{
				GroupID: g.ID, Prompt: g.Prompt, Completion: c.Tokens, SamplerLogProbs: c.LogProbs,
				Components: rewards[i].Values(), PolicyStep: step, Truncated: !c.Stopped,
			})
		}
	}
	return b
}

// Tally summarises episodes.
type Tally struct {
	Episodes int
	Reward   float64 // mean of Reward.Total
	Accuracy float64 // share of correct strategies
	Format   float64 // share of completions that are strategies
	ByAttack map[string]float64
}

// Count summarises episodes over all groups.
func Count(episodes [][]Episode) Tally {
	t := Tally{ByAttack: map[string]float64{}}
	n := map[string]float64{}
	for _, g := range episodes {
		for _, e := range g {
			t.Episodes++
			t.Reward += e.Reward.Total()
			t.Format += e.Reward.Format
			n[e.Alert.Attack]++
			if e.Reward.Correct {
				t.Accuracy++
				t.ByAttack[e.Alert.Attack]++
			}
		}
	}
	if t.Episodes > 0 {
		t.Reward /= float64(t.Episodes)
		t.Accuracy /= float64(t.Episodes)
		t.Format /= float64(t.Episodes)
	}
	for k, v := range n {
		t.ByAttack[k] /= v
	}
	return t
}

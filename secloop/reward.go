package secloop

import (
	"context"
	"fmt"
)

// Reward holds the four modules of one completion (arXiv 2512.09485, eq. 18-21)
// and whether the strategy was correct: it executed, the attack was defended
// and nothing on the blue side was disrupted.
type Reward struct {
	Format     float64
	Execution  float64
	Evaluation float64 // 1 - rs_attack
	Penalty    float64 // 1 - rationality
	Correct    bool
}

// Components are the names of the reward columns, sorted, in the order of Reward.Values.
var Components = []string{"evaluation", "execution", "format", "penalty"}

// Values returns the modules in the order of Components.
func (r Reward) Values() []float64 {
	return []float64{r.Evaluation, r.Execution, r.Format, r.Penalty}
}

// Total is the reward with the paper's weights: 1, 1, 1 and -1.
func (r Reward) Total() float64 { return r.Format + r.Execution + r.Evaluation - r.Penalty }

// Judge rates how rational a strategy is for an alert, in [0,1].
type Judge interface {
	Rationality(a Alert, s Strategy) float64
}

// RuleJudge is the default judge: it starts at 1 and takes off for calls that
// destroy service, do nothing for the target, or repeat what is already done.
type RuleJudge struct{}

// Rationality implements Judge.
func (RuleJudge) Rationality(a Alert, s Strategy) float64 {
	w := 1.0
	needed := false
	for _, c := range s {
		t, ok := toolByName(c.Tool)
		switch {
		case !ok:
			w -= 0.5
		case t.breaks:
			w = 0
		case needed:
			w -= 0.25
		case c.Params[t.Param] != a.Target && c.Params[t.Param] != a.Source:
			w -= 0.5
		case !stops(a.Attack, t.Name):
			w -= 0.25
		default:
			needed = true
		}
	}
	return max(w, 0)
}

// stops reports whether a tool stops at least one stage of an attack.
func stops(attack, tool string) bool {
	for _, st := range attacks[attack] {
		for _, n := range st.Stopped {
			if n == tool {
				return true
			}
		}
	}
	return false
}

// Score runs the gated reward of one completion: a completion that is no
// strategy has format 0 and penalty 1; one that fails execution is not evaluated.
func Score(ctx context.Context, field Battlefield, judge Judge, a Alert, completion string) (Reward, error) {
	r, _, err := ScoreBy(ctx, field, func(_ context.Context, a Alert, s Strategy) (float64, error) { return judge.Rationality(a, s), nil }, a, completion)
	return r, err
}

// Rater is a judge that may fail, because it asks somebody else.
type Rater func(ctx context.Context, a Alert, s Strategy) (float64, error)

// ScoreBy is Score with a judge that may fail. It returns what the field said
// besides; a completion that is no strategy never meets the attack, and stops nothing.
func ScoreBy(ctx context.Context, field Battlefield, rate Rater, a Alert, completion string) (Reward, Feedback, error) {
	s, err := ParseStrategy(completion)
	if err != nil {
		return Reward{Penalty: 1}, Feedback{Attacked: 1, Service: true, Errors: []string{err.Error()}}, nil
	}
	f, err := field.Run(ctx, a, s)
	if err != nil {
		return Reward{}, f, fmt.Errorf("score strategy: %w", err)
	}
	w, err := rate(ctx, a, s)
	if err != nil {
		return Reward{}, f, fmt.Errorf("judge strategy: %w", err)
	}
	if !(w >= 0 && w <= 1) {
		return Reward{}, f, fmt.Errorf("judge strategy: rationality %v, expected 0 to 1", w)
	}
	r := Reward{Format: 1, Penalty: 1 - w}
	if f.Executed < 1 {
		return r, f, nil
	}
	r.Execution = 1
	r.Evaluation = 1 - f.Attacked
	r.Correct = f.Attacked == 0 && f.Service
	return r, f, nil
}

package loop

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"trainerd/internal/fault"
	"trainerd/secloop"
	"trainerd/secloop/scenario"
)

// Agent answers incidents with strategies and has each one tried.
type Agent struct {
	Codec   secloop.Codec
	Form    Form
	Sampler secloop.Sampler
	Field   Field
	Rate    secloop.Rater

	Parallel int           // episodes at a time
	Timeout  time.Duration // of one episode; default 30 s
	Patience time.Duration // how long a judge that does not answer may pause the round; default 10 min
	Cache    bool          // play equal strategies against one incident once: for fields that repeat

	// Report is told what went wrong and was got over: a field that failed, a
	// judge that does not answer. It may be called from several goroutines.
	Report func(format string, args ...any)
}

// Episode is one strategy's life: what was asked, what came, what it was worth.
type Episode struct {
	Incident
	Completion string                  `json:"completion"` // the strategy's text
	Sampled    secloop.Sampled         `json:"-"`
	Reward     secloop.Reward          `json:"reward"`
	Feedback   secloop.Feedback        `json:"feedback"`
	Stages     []scenario.StageOutcome `json:"stages,omitempty"`
	Down       []string                `json:"down,omitempty"` // hosts whose users were not served
	Millis     float64                 `json:"millis"`
	Void       string                  `json:"void,omitempty"` // why it has no reward: the field failed, not the strategy
}

// Round is what came of some incidents.
type Round struct {
	PolicyStep int64
	Prompts    [][]int32   // by incident
	Episodes   [][]Episode // by incident, then strategy
	Sampling   time.Duration
	Playing    time.Duration
	Voided     int // groups that were replaced because a field failed
}

// Prompt returns an incident's prompt, as text and as tokens.
func (a *Agent) Prompt(in Incident) (string, []int32, error) {
	text, err := a.Form.Prompt(in.Summaries)
	if err != nil {
		return "", nil, fmt.Errorf("make prompt: %w", err)
	}
	text += a.Form.Opening()
	ids, err := a.Codec.Encode(text)
	if err != nil {
		return "", nil, fmt.Errorf("encode prompt: %w", err)
	}
	return text, ids, nil
}

// Play samples n strategies for each incident and tries each one. Groups of
// which an episode is void stay in; see Replace.
func (a *Agent) Play(ctx context.Context, incidents []Incident, n int, seed uint64) (Round, error) {
	r := Round{Prompts: make([][]int32, len(incidents)), Episodes: make([][]Episode, len(incidents))}
	var err error
	for i, in := range incidents {
		if _, r.Prompts[i], err = a.Prompt(in); err != nil {
			return r, err
		}
	}
	began := time.Now()
	completions, step, err := a.Sampler.Sample(ctx, r.Prompts, n, seed)
	if err != nil {
		return r, fmt.Errorf("sample strategies: %w", err)
	}
	r.PolicyStep, r.Sampling = step, time.Since(began)
	if len(completions) != len(incidents) {
		return r, fmt.Errorf("sample strategies: %d prompts answered, expected %d", len(completions), len(incidents))
	}
	began = time.Now()
	once := make([]cache, len(incidents))
	for i, in := range incidents {
		if len(completions[i]) != n {
			return r, fmt.Errorf("sample strategies: %d completions of prompt %d, expected %d", len(completions[i]), i, n)
		}
		for _, c := range completions[i] {
			text := a.Form.Opening() + a.Codec.Decode(c.Tokens, true)
			r.Episodes[i] = append(r.Episodes[i], Episode{Incident: in, Completion: text, Sampled: c})
		}
	}
	err = inParallel(ctx, a.Parallel, len(incidents)*n, func(ctx context.Context, k int) error {
		e := &r.Episodes[k/n][k%n]
		if !a.Cache {
			return a.try(ctx, e)
		}
		return once[k/n].do(e, func() error { return a.try(ctx, e) })
	})
	r.Playing = time.Since(began)
	return r, err
}

// Replace plays other incidents, drawn by again, for those with a void episode, a few times.
func (a *Agent) Replace(ctx context.Context, r *Round, n int, seed uint64, again func(n int) ([]Incident, error)) error {
	for try := uint64(1); ; try++ {
		var void []int
		var why string
		for i, g := range r.Episodes {
			for _, e := range g {
				if e.Void != "" {
					void, why = append(void, i), e.Void
					break
				}
			}
		}
		if len(void) == 0 {
			return nil
		}
		if try > 3 {
			return fault.New(fault.Unavailable, "field_failed", "play round: %d of %d groups still without a battle-field after 3 replacements: %s", len(void), len(r.Episodes), why)
		}
		a.report("%d groups replaced: %s", len(void), why)
		incidents, err := again(len(void))
		if err != nil {
			return err
		}
		fresh, err := a.Play(ctx, incidents, n, seed^try<<56)
		if err != nil {
			return err
		}
		if fresh.PolicyStep < r.PolicyStep {
			r.PolicyStep = fresh.PolicyStep // an older checkpoint answered: the batch says the older one
		}
		for j, i := range void {
			r.Prompts[i], r.Episodes[i] = fresh.Prompts[j], fresh.Episodes[j]
		}
		r.Voided += len(void)
	}
}

// cache remembers what one incident's strategies came to.
type cache struct {
	mu   sync.Mutex
	done map[string]*struct {
		once sync.Once
		e    Episode
		err  error
	}
}

func (c *cache) do(e *Episode, try func() error) error {
	c.mu.Lock()
	if c.done == nil {
		c.done = map[string]*struct {
			once sync.Once
			e    Episode
			err  error
		}{}
	}
	d := c.done[e.Completion]
	if d == nil {
		d = &struct {
			once sync.Once
			e    Episode
			err  error
		}{}
		c.done[e.Completion] = d
	}
	c.mu.Unlock()
	d.once.Do(func() { d.err = try(); d.e = *e })
	sampled := e.Sampled
	*e, e.Sampled = d.e, sampled
	return d.err
}

// judgeFailure marks an error that is the judge's and not the field's.
type judgeFailure struct{ error }

func (j judgeFailure) Unwrap() error { return j.error }

const (
	triesAfterCrash   = 3 // of an episode whose field failed
	triesAfterTimeout = 2 // of an episode that did not end: the second time it is the strategy's doing
)

// try plays one episode until it has a reward or is void. An error ends the round.
func (a *Agent) try(ctx context.Context, e *Episode) error {
	began := time.Now()
	defer func() { e.Millis = float64(time.Since(began).Microseconds()) / 1000 }()
	for crashes, timeouts := 0, 0; ; {
		p := &player{field: a.Field, timeout: a.timeout()}
		reward, feedback, err := secloop.ScoreBy(ctx, p, a.rate, e.Truth, e.Completion)
		if err == nil {
			e.Reward, e.Feedback, e.Stages, e.Down = reward, feedback, p.out.Stages, p.out.Down
			return nil
		}
		var j judgeFailure
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case errors.As(err, &j):
			return err
		case errors.Is(err, errTimeout):
			timeouts++
		default:
			crashes++
		}
		if timeouts == triesAfterTimeout {
			return a.stuck(ctx, e)
		}
		if crashes == triesAfterCrash {
			e.Void = err.Error()
			return nil
		}
		a.report("%s: episode played again: %v", e.Truth.Key(), err)
	}
}

// stuck scores a strategy whose episode does not end as one that does not execute.
func (a *Agent) stuck(ctx context.Context, e *Episode) error {
	text := fmt.Sprintf("not ended after %v, twice", a.timeout())
	var err error
	e.Reward, e.Feedback, err = secloop.ScoreBy(ctx, unended(text), a.rate, e.Truth, e.Completion)
	a.report("%s: %s: scored as not executed", e.Truth.Key(), text)
	return err
}

type unended string

func (u unended) Run(context.Context, secloop.Alert, secloop.Strategy) (secloop.Feedback, error) {
	return secloop.Feedback{Attacked: 1, Errors: []string{string(u)}}, nil
}

func (a *Agent) timeout() time.Duration {
	if a.Timeout > 0 {
		return a.Timeout
	}
	return 30 * time.Second
}

func (a *Agent) report(format string, args ...any) {
	if a.Report != nil {
		a.Report(format, args...)
	}
}

// rate asks the judge. One who does not answer pauses the episode, and with it
// the round, until it does or patience ends; nothing is scored without it.
func (a *Agent) rate(ctx context.Context, al secloop.Alert, s secloop.Strategy) (float64, error) {
	patience := a.Patience
	if patience <= 0 {
		patience = 10 * time.Minute
	}
	began := time.Now()
	for pause := time.Second; ; pause = min(2*pause, 30*time.Second) {
		w, err := a.Rate(ctx, al, s)
		if err == nil {
			return w, nil
		}
		if !unavailable(err) || ctx.Err() != nil || time.Since(began)+pause > patience {
			return 0, judgeFailure{err}
		}
		a.report("round paused, the judge is asked again in %v: %v", pause, err)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return 0, judgeFailure{ctx.Err()}
		}
	}
}

// player makes a Field a secloop.Battlefield that ends in time, whatever the field does.
type player struct {
	field   Field
	timeout time.Duration
	out     scenario.Outcome
}

var errTimeout = errors.New("the episode did not end in time")

// Run implements secloop.Battlefield. A field that neither ends nor heeds its
// context is left behind after a grace; one that panics has failed.
func (p *player) Run(ctx context.Context, al secloop.Alert, s secloop.Strategy) (secloop.Feedback, error) {
	inner, cancel := context.WithTimeout(ctx, p.timeout)
	defer cancel()
	type result struct {
		out scenario.Outcome
		err error
	}
	done := make(chan result, 1)
	go func() {
		var r result
		defer func() {
			if v := recover(); v != nil {
				r.err = fmt.Errorf("the battle-field panicked: %v", v)
			}
			done <- r
		}()
		r.out, r.err = p.field.Play(inner, al, s)
	}()
	var r result
	select {
	case r = <-done:
	case <-inner.Done():
		select {
		case r = <-done:
		case <-time.After(grace):
			return secloop.Feedback{}, errTimeout
		}
	}
	if r.err != nil && inner.Err() != nil && ctx.Err() == nil {
		return secloop.Feedback{}, fmt.Errorf("%w: %v", errTimeout, r.err)
	}
	p.out = r.out
	return r.out.Feedback, r.err
}

const grace = time.Second // for a field to end after its context has

// Groups returns the episodes as what is posted; names are group(i).
func (r Round) Groups(group func(i int) string) []secloop.Group {
	out := make([]secloop.Group, len(r.Episodes))
	for i, g := range r.Episodes {
		out[i] = secloop.Group{ID: group(i), Prompt: r.Prompts[i]}
		for _, e := range g {
			out[i].Sampled = append(out[i].Sampled, e.Sampled)
			out[i].Rewards = append(out[i].Rewards, e.Reward)
		}
	}
	return out
}

// Demonstration returns a prompt and an operator's strategy as tokens, for the
// warm start; the end token is the caller's.
func (a *Agent) Demonstration(in Incident, s secloop.Strategy) (prompt, completion []int32, err error) {
	if _, prompt, err = a.Prompt(in); err != nil {
		return nil, nil, err
	}
	text := s.String()
	open := a.Form.Opening()
	if len(text) < len(open) || text[:len(open)] != open {
		return nil, nil, fmt.Errorf("encode strategy: %q does not begin with %q", text, open)
	}
	completion, err = a.Codec.Encode(text[len(open):])
	return prompt, completion, err
}

// Operator writes demonstrations: well-formed strategies whose parameters come
// from the incident, but the right tool only with probability Skill. A model
// warmed up on them knows the format and the tools, not which tool helps.
type Operator struct{ Skill float64 }

// Demonstrate returns one strategy for an incident.
func (o Operator) Demonstrate(r *rand.Rand, in Incident) (secloop.Strategy, error) {
	if r.Float64() < o.Skill {
		ep, err := scenario.New(in.Truth)
		if err != nil {
			return nil, err
		}
		right := ep.Remedies()
		return right[r.IntN(len(right))], nil
	}
	tools := scenario.Tools()
	return secloop.Strategy{scenario.CallFor(tools[r.IntN(len(tools))], in.Truth, r.IntN(64))}, nil
}

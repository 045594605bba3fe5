package scenario

import (
	"cmp"
	"context"
	"fmt"
	"time"

	"trainerd/internal/fault"
	"trainerd/secloop"
	"trainerd/secloop/sensor"
)

// UserConnections is how many connections legitimate clients open to each host
// for a verdict on its service.
const UserConnections = 10

// MaxChanges is how many calls of a strategy are carried out: what one change
// window allows. Those beyond fail, so that applying every tool at once, which
// would stop most attacks without a thought, is no strategy.
const MaxChanges = 3

// Sides are the two teams and the users of one battle-field.
type Sides interface {
	// Apply makes an action's effects real and verifies them.
	Apply(ctx context.Context, a Action) error
	// Attack runs stage i of the chain. Pressure that the stage built up stays until Release.
	Attack(ctx context.Context, i int) (Result, error)
	// Release ends what red still holds open.
	Release(ctx context.Context) error
	// Users returns how many of n legitimate clients, all at once, were served by
	// a host. Under pressure they give up sooner.
	Users(ctx context.Context, host string, n int, pressure bool) (served int, err error)
	// Events returns what blue's services and kernel saw so far.
	Events(ctx context.Context) ([]Event, error)
}

// Event is one line of blue's logs.
type Event struct {
	At     time.Duration `json:"at"` // since the episode began
	Kind   string        `json:"kind"`
	Source string        `json:"source"`
	Host   string        `json:"host"`
	Detail string        `json:"detail"` // cut to 200 bytes
}

// BlockedEvents turns a sensor's alerts about refused packets into lines of a log.
func BlockedEvents(alerts []sensor.Alert) []Event {
	var out []Event
	for _, a := range alerts {
		out = append(out, Event{At: a.At, Kind: Blocked, Source: a.Source, Host: cmp.Or(a.Host, a.Target),
			Detail: fmt.Sprintf("%s, port %d", a.Category, max(a.SourcePort, a.TargetPort))})
	}
	return out
}

// Outcome is one played episode.
type Outcome struct {
	Feedback secloop.Feedback
	Stages   []StageOutcome
	Down     []string // hosts whose users were not served afterwards
	Events   []Event
}

// StageOutcome is one stage as it went.
type StageOutcome struct {
	Name      string
	Succeeded bool
	Result    Result
}

// Play runs one episode: the strategy is applied, the chain runs, users try
// every service. A call that fails is feedback; an error means that the field
// itself failed.
func Play(ctx context.Context, e Episode, strategy secloop.Strategy, s Sides) (Outcome, error) {
	var out Outcome
	ran := 0
	for i, c := range strategy {
		var a Action
		var err error = fault.New(fault.Invalid, "too_many_calls", "a change window allows %d calls", MaxChanges)
		if i < MaxChanges {
			a, err = ParseCall(c)
		}
		if err == nil {
			err = s.Apply(ctx, a)
		}
		if err != nil {
			if ctx.Err() != nil {
				return out, ctx.Err()
			}
			out.Feedback.Errors = append(out.Feedback.Errors, fmt.Sprintf("call %d: %v", i, err))
			continue
		}
		ran++
	}
	if len(strategy) > 0 {
		out.Feedback.Executed = float64(ran) / float64(len(strategy))
	}
	through := 0
	chain := e.Chain()
	for i, st := range chain {
		r, err := s.Attack(ctx, i)
		if err != nil {
			return out, fmt.Errorf("attack stage %s: %w", st.Name, err)
		}
		served := 1.0
		if st.Success.UsersBelow > 0 {
			n, err := s.Users(ctx, e.Target.Name, UserConnections, true)
			if err != nil {
				return out, fmt.Errorf("probe users: %w", err)
			}
			served = float64(n) / UserConnections
		}
		ok := st.Success.Met(r, served)
		if ok {
			through++
		}
		out.Stages = append(out.Stages, StageOutcome{Name: st.Name, Succeeded: ok, Result: r})
	}
	out.Feedback.Attacked = float64(through) / float64(len(chain))
	if err := s.Release(ctx); err != nil {
		return out, fmt.Errorf("release: %w", err)
	}
	for _, h := range hosts {
		n, err := s.Users(ctx, h.Name, UserConnections, false)
		if err != nil {
			return out, fmt.Errorf("probe users: %w", err)
		}
		if n < UserConnections {
			out.Down = append(out.Down, h.Name)
		}
	}
	out.Feedback.Service = len(out.Down) == 0
	var err error
	out.Events, err = s.Events(ctx)
	return out, err
}

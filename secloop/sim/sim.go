package sim

import (
	"context"
	"fmt"
	"time"

	"trainerd/secloop"
	"trainerd/secloop/blue"
	"trainerd/secloop/red"
	"trainerd/secloop/scenario"
	"trainerd/secloop/sensor"
)

// Field is the simulated battle-field. It is safe for concurrent use.
type Field struct {
	Fault scenario.Fault // put into every episode, for tests: PluginCrashes or ServiceCrashes
}

// Run implements secloop.Battlefield.
func (f Field) Run(ctx context.Context, a secloop.Alert, s secloop.Strategy) (secloop.Feedback, error) {
	out, err := f.Play(ctx, a, s)
	return out.Feedback, err
}

// Play runs one episode and says everything about it.
func (f Field) Play(ctx context.Context, a secloop.Alert, s secloop.Strategy) (scenario.Outcome, error) {
	if err := ctx.Err(); err != nil {
		return scenario.Outcome{}, err
	}
	ep, err := scenario.New(a)
	if err != nil {
		return scenario.Outcome{}, err
	}
	ep.Fault = f.Fault
	n := newNetwork()
	b, err := blue.Start(ep, n)
	if err != nil {
		return scenario.Outcome{}, fmt.Errorf("build simulated field: %w", err)
	}
	t := &teams{network: n, blue: b, red: red.New(ep, n)}
	defer b.Close()
	defer t.red.Release()
	return scenario.Play(ctx, ep, s, t)
}

// Observe plays an incident's chain against an undefended clone among background
// noise and returns what the sensor raised. Time does not pass here: the
// sensor's clock is the seed's pace.
func (Field) Observe(ctx context.Context, a secloop.Alert, seed uint64) ([]sensor.Alert, error) {
	ep, err := scenario.New(a)
	if err != nil {
		return nil, err
	}
	n := newNetwork()
	n.tap = sensor.NewEngine(scenario.Network)
	b, err := blue.Start(ep, n)
	if err != nil {
		return nil, fmt.Errorf("build simulated field: %w", err)
	}
	t := &teams{network: n, blue: b, red: red.New(ep, n)}
	defer b.Close()
	defer t.red.Release()
	if err := scenario.Observe(ctx, ep, seed, t); err != nil {
		return nil, fmt.Errorf("observe incident: %w", err)
	}
	alerts, _ := n.tap.Alerts()
	return alerts, nil
}

// Visit implements scenario.Watched.
func (t *teams) Visit(ctx context.Context, v scenario.Visit) error {
	if scenario.RedNet.Contains(v.From) {
		t.red.Visit(ctx, v)
	} else {
		blue.Visit(ctx, t.network, v)
	}
	t.blue.Settle()
	return ctx.Err()
}

// Skip implements scenario.Watched.
func (t *teams) Skip(_ context.Context, d time.Duration) error {
	t.now += d
	t.network.tap.At(t.now)
	return nil
}

// teams implements scenario.Sides.
type teams struct {
	network *network
	blue    *blue.Blue
	red     *red.Red
	now     time.Duration // of the sensor
}

func (t *teams) Apply(_ context.Context, a scenario.Action) error {
	for _, e := range a.Effects {
		switch {
		case e.Rule != nil:
			t.network.addRule(*e.Rule, a.Tool)
		case e.Sysctl != nil:
			t.network.setSysctl(*e.Sysctl)
		case e.Setting != nil:
			if err := t.blue.Set(*e.Setting); err != nil {
				return err
			}
		case e.Shape != nil:
			t.network.limit(*e.Shape)
		}
	}
	return nil
}

func (t *teams) Attack(ctx context.Context, i int) (scenario.Result, error) {
	if t.red.Listens(i) {
		if err := t.red.Prepare(i); err != nil {
			return scenario.Result{}, err
		}
		if !t.blue.Tick(ctx) {
			return scenario.Result{Error: "nobody came"}, nil
		}
	}
	return t.red.Run(ctx, i), nil
}

func (t *teams) Release(context.Context) error {
	t.red.Release()
	t.blue.Settle()
	return nil
}

func (t *teams) Users(ctx context.Context, host string, n int, _ bool) (int, error) {
	h, ok := scenario.HostByName(host)
	if !ok {
		return 0, fmt.Errorf("unknown host %q", host)
	}
	return blue.Users(ctx, t.network, h, n), nil
}

func (t *teams) Events(context.Context) ([]scenario.Event, error) {
	return append(t.blue.Events(), t.network.kernelEvents()...), nil
}

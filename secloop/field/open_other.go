//go:build !linux

package field

import (
	"context"
	"time"

	"trainerd/internal/fault"
	"trainerd/secloop"
	"trainerd/secloop/scenario"
	"trainerd/secloop/sensor"
)

// Options of a field.
type Options struct {
	Parallel int
	Real     bool
	Pace     time.Duration
	Fault    scenario.Fault
	Canary   []string
}

// Field is a battle-field out of Linux namespaces; there is none here.
type Field struct{}

// Main does nothing where there are no namespaces.
func Main() {}

// Open says that this is not Linux.
func Open(Options) (*Field, error) {
	return nil, fault.New(fault.Unavailable, "no_namespaces", "open battle-field: namespaces need Linux; use secloop/sim")
}

// Run implements secloop.Battlefield.
func (*Field) Run(context.Context, secloop.Alert, secloop.Strategy) (secloop.Feedback, error) {
	return secloop.Feedback{}, fault.New(fault.Unavailable, "no_namespaces", "run battle-field: namespaces need Linux")
}

// Play is Run with everything that happened.
func (*Field) Play(context.Context, secloop.Alert, secloop.Strategy) (scenario.Outcome, error) {
	return scenario.Outcome{}, fault.New(fault.Unavailable, "no_namespaces", "run battle-field: namespaces need Linux")
}

// Observe plays an incident before a sensor.
func (*Field) Observe(context.Context, secloop.Alert, uint64) ([]sensor.Alert, error) {
	return nil, fault.New(fault.Unavailable, "no_namespaces", "observe incident: namespaces need Linux")
}

// Close does nothing.
func (*Field) Close() error { return nil }

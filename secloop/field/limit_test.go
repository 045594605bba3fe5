//go:build field && linux

package field

import (
	"context"
	"slices"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"trainerd/secloop"
	"trainerd/secloop/scenario"
	"trainerd/secloop/sim"
)

// TestConnectionLimits holds the twins together where limits on open connections
// meet connections that end at once: of every scenario, alone and in front of
// services that are shut down or closed off.
func TestConnectionLimits(t *testing.T) {
	f := open(t, Options{Parallel: 4})
	var wg sync.WaitGroup
	for i, sc := range scenario.All() {
		a := alertFor(sc, i)
		limit := call("connection_limit", "host", a.Target, "per_source", "4")
		for _, s := range []secloop.Strategy{
			limit,
			append(slices.Clip(limit), call("shutdown_service", "host", a.Target)...),
			append(slices.Clip(limit), call("close_port", "host", a.Target, "port", "80")...),
		} {
			wg.Go(func() {
				want, err := sim.Field{}.Play(context.Background(), a, s)
				if err != nil {
					t.Error(err)
					return
				}
				got, err := f.Play(context.Background(), a, s)
				if err != nil {
					t.Errorf("%s with %s: %v", a.Key(), s, err)
				} else if d := cmp.Diff(want.Feedback, got.Feedback) + cmp.Diff(blockedBy(want.Events), blockedBy(got.Events)); d != "" {
					t.Errorf("%s with %s: simulator -, namespaces +\n%s\nstages %+v, down %v", a.Key(), s, d, got.Stages, got.Down)
				}
			})
		}
	}
	wg.Wait()
}

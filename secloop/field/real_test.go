//go:build field && fieldreal && linux

package field

import (
	"context"
	"testing"

	"github.com/google/go-cmp/cmp"

	"trainerd/secloop/scenario"
	"trainerd/secloop/sim"
)

// TestRealStores plays every scenario against data stores, with redis-server
// in their place: the feedback is that of the simulator, and redis_require_auth
// changes the configuration of the real thing.
func TestRealStores(t *testing.T) {
	f := open(t, Options{Parallel: 2, Real: true})
	played := 0
	for _, sc := range scenario.All() {
		h, _ := scenario.HostByName(sc.Targets[len(sc.Targets)-1])
		if h.Service != scenario.Store {
			continue
		}
		played++
		a := alertFor(sc, len(sc.Targets)-1)
		ep, err := scenario.New(a)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range append(ep.Remedies(), call("block_ip", "ip", "198.18.0.5"), call("redis_require_auth", "host", a.Target),
			call("isolate_host", "host", a.Target), call("shutdown_service", "host", a.Target)) {
			want, err := sim.Field{}.Play(context.Background(), a, s)
			if err != nil {
				t.Fatal(err)
			}
			got, err := f.Play(context.Background(), a, s)
			if err != nil {
				t.Fatalf("%s with %s: %v", a.Key(), s, err)
			}
			if d := cmp.Diff(want.Feedback, got.Feedback); d != "" {
				t.Errorf("%s with %s: simulator -, real store +\n%s\nstages %+v", a.Key(), s, d, got.Stages)
			}
		}
		wantAlerts, err := sim.Field{}.Observe(context.Background(), a, 3)
		if err != nil {
			t.Fatal(err)
		}
		gotAlerts, err := f.Observe(context.Background(), a, 3)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(tally(wantAlerts), tally(gotAlerts)); d != "" {
			t.Errorf("%s: alerts: simulator -, real store +\n%s", a.Key(), d)
		}
	}
	if played < 3 {
		t.Errorf("%d scenarios played, expected those against stores", played)
	}
}

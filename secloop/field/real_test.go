//go:build field && fieldreal && linux

package field

import (
	"context"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"trainerd/secloop"
	"trainerd/secloop/scenario"
	"trainerd/secloop/sim"
)

// TestRealServices plays every scenario against data stores and the remote
// login, with redis-server and sshd in their place: the feedback and the alerts
// are those of the simulator, and redis_require_auth, secure_sshd and
// rotate_credentials change the real thing.
func TestRealServices(t *testing.T) {
	f := open(t, Options{Parallel: 2, Real: true})
	played := 0
	for _, sc := range scenario.All() {
		target := slices.IndexFunc(sc.Targets, func(name string) bool {
			h, _ := scenario.HostByName(name)
			return h.Service == scenario.Store || h.Service == scenario.Shell
		})
		if target < 0 {
			continue
		}
		played++
		a := alertFor(sc, target)
		ep, err := scenario.New(a)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range append(ep.Remedies(), call("block_ip", "ip", "198.18.0.5"), call("redis_require_auth", "host", a.Target), call("secure_sshd", "host", a.Target), call("rotate_credentials", "host", a.Target),
			call("isolate_host", "host", a.Target), call("shutdown_service", "host", a.Target), call("throttle_upload", "host", a.Target, "kbit", "8")) {
			want, err := sim.Field{}.Play(context.Background(), a, s)
			if err != nil {
				t.Fatal(err)
			}
			got, err := f.Play(context.Background(), a, s)
			if err != nil {
				t.Fatalf("%s with %s: %v", a.Key(), s, err)
			}
			if d := cmp.Diff(want.Feedback, got.Feedback); d != "" {
				t.Errorf("%s with %s: simulator -, real service +\n%s\nstages %+v", a.Key(), s, d, got.Stages)
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
			t.Errorf("%s: alerts: simulator -, real service +\n%s", a.Key(), d)
		}
	}
	if played < 3 {
		t.Errorf("%d scenarios played, expected those against stores and the remote login", played)
	}
}

// TestRealLogin guesses at sshd: it logs each wrong password, three a connection
// until the right one, and what a login learns is the flag.
func TestRealLogin(t *testing.T) {
	sc, _ := scenario.ByName("ssh_guess")
	a := alertFor(sc, 0)
	ep, err := scenario.New(a)
	if err != nil {
		t.Fatal(err)
	}
	wrong := 2 * slices.Index(ep.Words, ep.Password) // in each of two stages
	for _, c := range []struct {
		strategy secloop.Strategy
		failed   int
		attacked float64
	}{
		{call("block_ip", "ip", "198.18.0.5"), wrong, 1},
		{call("rotate_credentials", "host", "jump1"), 2*len(ep.Words) + 1, 0}, // with the probe of the call
		{call("secure_sshd", "host", "jump1"), 0, 0},                          // no password is even taken
	} {
		out, err := open(t, Options{Parallel: 1, Real: true}).Play(context.Background(), a, c.strategy)
		if err != nil {
			t.Fatal(err)
		}
		failed := 0
		for _, e := range out.Events {
			if e.Kind == "login_failed" && e.Host == "jump1" {
				failed++
			}
		}
		want := secloop.Feedback{Executed: 1, Attacked: c.attacked, Service: true}
		if d := cmp.Diff(want, out.Feedback); d != "" || failed != c.failed {
			t.Errorf("%s: %d failed logins, expected %d; expected -, got +\n%s\nstages %+v", c.strategy, failed, c.failed, d, out.Stages)
		}
	}
}

// TestRealLoginIsJailed lets whoever logs in try the canaries and what else is
// not theirs; on undefended ground the chain then runs as ever.
func TestRealLoginIsJailed(t *testing.T) {
	canary, came := canaries(t)
	sc, _ := scenario.ByName("ssh_guess")
	out, err := open(t, Options{Parallel: 1, Real: true, Canary: canary}).Play(context.Background(), alertFor(sc, 0), call("block_ip", "ip", "198.18.0.5"))
	if err != nil {
		t.Fatal(err)
	}
	if out.Feedback.Attacked != 1 || came.Load() != 0 {
		t.Errorf("%d connections reached the host; stages %+v", came.Load(), out.Stages)
	}
}

//go:build field && linux

package field

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"trainerd/secloop"
	"trainerd/secloop/scenario"
	"trainerd/secloop/sim"
)

func TestMain(m *testing.M) {
	Main()
	if os.Getenv(superviseVar) != "" {
		supervise()
	}
	os.Exit(m.Run())
}

// open fails the test where namespaces are not allowed: whoever runs this suite
// asked for them.
func open(t testing.TB, o Options) *Field {
	t.Helper()
	f, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func alertFor(sc scenario.Scenario, target int) secloop.Alert {
	return secloop.Alert{Attack: sc.Name, Source: "198.18.0.37", Target: sc.Targets[target%len(sc.Targets)], Count: 5, Risk: sc.Risk}
}

func call(tool string, kv ...string) secloop.Strategy {
	p := map[string]string{}
	for i := 0; i < len(kv); i += 2 {
		p[kv[i]] = kv[i+1]
	}
	return secloop.Strategy{{Tool: tool, Params: p}}
}

// TestTwins holds the namespaces and the simulator together: every scenario
// against nothing useful, each of its remedies, isolation, a limit on
// connections, a throttle, a wrong host, a call that cannot run and two tools in
// turn gives the same feedback, stage by stage.
func TestTwins(t *testing.T) {
	f := open(t, Options{Parallel: 4})
	for i, sc := range scenario.All() {
		a := alertFor(sc, i)
		ep, err := scenario.New(a)
		if err != nil {
			t.Fatal(err)
		}
		strategies := append(ep.Remedies(),
			call("block_ip", "ip", "198.18.0.5"), call("block_ip", "ip", a.Source), call("isolate_host", "host", a.Target),
			call("rate_limit", "host", a.Target, "per_hour", "2"), call("patch_service", "host", "dns1"),
			call("throttle_upload", "host", a.Target, "kbit", "8"),
			append(call("harden_kernel", "host", a.Target), call("filter_egress", "host", a.Target)...))
		for k, tool := range scenario.Tools() { // each tool meets every twentieth scenario and the one half-way
			if n := len(scenario.Tools()); k == i%n || k == (i+n/2)%n {
				strategies = append(strategies, secloop.Strategy{scenario.CallFor(tool, a, i)})
			}
		}
		for _, s := range strategies {
			t.Run(sc.Name+"/"+s[0].Tool, func(t *testing.T) {
				t.Parallel()
				want, err := sim.Field{}.Play(context.Background(), a, s)
				if err != nil {
					t.Fatal(err)
				}
				got, err := f.Play(context.Background(), a, s)
				if err != nil {
					t.Fatal(err)
				}
				if d := cmp.Diff(want.Feedback, got.Feedback); d != "" {
					t.Errorf("%s with %s: simulator -, namespaces +\n%s", a.Key(), s, d)
				}
				for k := range want.Stages {
					if want.Stages[k].Succeeded != got.Stages[k].Succeeded {
						t.Errorf("stage %s: simulator %+v, namespaces %+v", want.Stages[k].Name, want.Stages[k], got.Stages[k])
					}
				}
				if w, g := has(want.Events, scenario.Refused), has(got.Events, scenario.Refused); w != g {
					t.Errorf("rules turned somebody away: simulator %v, namespaces %v", w, g)
				}
				if d := cmp.Diff(blockedBy(want.Events), blockedBy(got.Events)); d != "" {
					t.Errorf("who was turned away: simulator -, namespaces +\n%s", d)
				}
				if d := cmp.Diff(want.Down, got.Down); d != "" {
					t.Errorf("hosts down: simulator -, namespaces +\n%s", d)
				}
				// The simulator's floods are made of one packet each, and nobody waits for the answers.
				flood := sc.Stages[0].Success.UsersBelow > 0
				if d := cmp.Diff(throttledHosts(want.Events), throttledHosts(got.Events)); d != "" && !flood {
					t.Errorf("whose packets waited: simulator -, namespaces +\n%s", d)
				}
			})
		}
	}
}

var (
	twinPairs = flag.Int("pairs", 60, "random incidents and strategies of TestRandomTwins")
	twinSeed  = flag.Uint64("seed", 1, "their seed; 0 for a new one")
)

// TestRandomTwins is TestTwins for random incidents and strategies: the same
// feedback from the simulator and, twice, from the namespaces. `make field-twins`
// runs thousands of new ones.
func TestRandomTwins(t *testing.T) {
	seed := *twinSeed
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 3))
	f := open(t, Options{Parallel: 4})
	var wg sync.WaitGroup
	for range *twinPairs {
		a := scenario.RandomAlert(r)
		s := scenario.RandomStrategy(r, a)
		wg.Go(func() {
			want, err := sim.Field{}.Play(context.Background(), a, s)
			if err != nil {
				t.Error(err)
				return
			}
			for range 2 {
				got, err := f.Play(context.Background(), a, s)
				if err != nil {
					t.Errorf("%s with %s: %v", a.Key(), s, err)
				} else if d := cmp.Diff(want.Feedback, got.Feedback) + cmp.Diff(blockedBy(want.Events), blockedBy(got.Events)); d != "" {
					t.Errorf("%s, count %d, with %s: simulator -, namespaces +\n%s\nstages %+v, down %v", a.Key(), a.Count, s, d, got.Stages, got.Down)
				}
			}
		})
	}
	wg.Wait()
}

func has(events []scenario.Event, kind string) bool {
	return slices.ContainsFunc(events, func(e scenario.Event) bool { return e.Kind == kind })
}

// TestRefusedPacketsAreLogged reads from blue's log who was turned away: an
// attacker by address, users and a flood by network; a kernel that cannot log has its counters.
func TestRefusedPacketsAreLogged(t *testing.T) {
	guess, _ := scenario.ByName("ssh_guess")
	flood, _ := scenario.ByName("syn_flood")
	host := flood.Targets[0]
	h, _ := scenario.HostByName(host)
	port := fmt.Sprint(h.Port)
	for _, c := range []struct {
		name     string
		fault    scenario.Fault
		alert    secloop.Alert
		strategy secloop.Strategy
		want     []string
	}{
		{"attacker", "", alertFor(guess, 0), call("block_ip", "ip", "198.18.0.37"), []string{"198.18.0.37 and jump1: block_ip, port 22"}},
		{"flood and users", "", alertFor(flood, 0), call("close_port", "host", host, "port", port),
			[]string{"198.18.1.0/24 and " + host + ": close_port, port " + port, "198.18.4.0/24 and " + host + ": close_port, port " + port}},
		{"no log", scenario.NoPacketLog, alertFor(guess, 0), call("block_ip", "ip", "198.18.0.37"), nil},
	} {
		out, err := open(t, Options{Parallel: 1, Fault: c.fault}).Play(context.Background(), c.alert, c.strategy)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(c.want, blockedBy(out.Events)); d != "" {
			t.Errorf("%s: expected -, got +\n%s", c.name, d)
		}
		if !has(out.Events, scenario.Refused) {
			t.Errorf("%s: the rule's counter is 0", c.name)
		}
	}
}

// blockedBy lists who was turned away from where by which rule.
func blockedBy(events []scenario.Event) []string {
	var out []string
	for _, e := range events {
		if e.Kind == scenario.Blocked {
			out = append(out, fmt.Sprintf("%s and %s: %s", e.Source, e.Host, e.Detail))
		}
	}
	slices.Sort(out)
	return out
}

// canaries puts listeners on every address and on a socket of the host and
// makes sure that they sing; came counts who comes.
func canaries(t *testing.T) (canary []string, came *atomic.Int32) {
	came = new(atomic.Int32)
	listen := func(network, at string) string {
		ln, err := net.Listen(network, at)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ln.Close() })
		go func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				came.Add(1)
				c.Close()
			}
		}()
		return ln.Addr().String()
	}
	_, port, _ := net.SplitHostPort(listen("tcp", ":0"))
	canary = []string{listen("unix", "@secloop-canary")}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addrs {
		ip, _, _ := net.ParseCIDR(a.String())
		if ip.IsLinkLocalUnicast() {
			continue
		}
		canary = append(canary, net.JoinHostPort(ip.String(), port))
	}
	for _, at := range canary { // the canaries sing
		network := "tcp"
		if strings.HasPrefix(at, "@") {
			network = "unix"
		}
		c, err := net.DialTimeout(network, at, time.Second)
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
	}
	for end := time.Now().Add(time.Second); int(came.Load()) < len(canary) && time.Now().Before(end); {
		time.Sleep(time.Millisecond)
	}
	if n := came.Swap(0); int(n) != len(canary) {
		t.Fatalf("%d of %d canaries answer from the host itself", n, len(canary))
	}
	return canary, came
}

// TestNobodyReachesTheHost lets red and blue of every scenario try the canaries
// past all guards, and counts who came.
func TestNobodyReachesTheHost(t *testing.T) {
	canary, came := canaries(t)
	f := open(t, Options{Parallel: 4, Canary: canary})
	var wg sync.WaitGroup
	for _, sc := range scenario.All() {
		wg.Go(func() {
			out, err := f.Play(context.Background(), alertFor(sc, 0), call("block_ip", "ip", "198.18.0.5"))
			if err != nil {
				t.Errorf("%s: %v", sc.Name, err)
			} else if out.Feedback.Attacked != 1 {
				t.Errorf("%s: the chain did not run: %+v", sc.Name, out.Stages)
			}
		})
	}
	wg.Wait()
	if n := came.Load(); n != 0 {
		t.Errorf("%d connections reached the host from a battle-field", n)
	}
}

// TestBadInputIsScored: what is wrong with a strategy is feedback, what is
// wrong with an alert is an error, and the field goes on.
func TestBadInputIsScored(t *testing.T) {
	f := open(t, Options{Parallel: 1})
	sc, _ := scenario.ByName("xss")
	for _, s := range []secloop.Strategy{
		call("format_disk"), call("block_ip", "ip", "198.18.0.1; reboot"), call("block_ip", "ip", "127.0.0.1"), call("close_port", "host", "web1", "port", "0"),
	} {
		got, err := f.Run(context.Background(), alertFor(sc, 0), s)
		if err != nil {
			t.Errorf("%s: %v", s, err)
		} else if got.Executed != 0 || len(got.Errors) != 1 || got.Attacked != 1 || !got.Service {
			t.Errorf("%s: %+v, expected one error, the attack through and the service up", s, got)
		}
	}
	bad := alertFor(sc, 0)
	bad.Source = "8.8.8.8"
	if _, err := f.Run(context.Background(), bad, call("block_ip", "ip", "198.18.0.1")); err == nil {
		t.Error("an alert whose source is outside the battle-field was played")
	}
}

// TestFaultsAreScoredOrReported breaks a part of every episode: what the
// episode can still say is scored, the loss of blue is an error, and the next
// episode goes as ever.
func TestFaultsAreScoredOrReported(t *testing.T) {
	sc, _ := scenario.ByName("sql_injection")
	a := alertFor(sc, 0)
	for _, c := range []struct {
		fault scenario.Fault
		want  secloop.Feedback
		err   bool
	}{
		{"", secloop.Feedback{Executed: 1, Attacked: 1, Service: true}, false},
		{scenario.ToolHangs, secloop.Feedback{Executed: 0, Attacked: 1, Service: true, Errors: []string{"call 0: block_ip: hangs, given up after 5s"}}, false},
		{scenario.ServiceCrashes, secloop.Feedback{Executed: 1, Attacked: 0, Service: false}, false},
		{scenario.NoPacketLog, secloop.Feedback{Executed: 1, Attacked: 1, Service: true}, false},
		{scenario.PluginCrashes, secloop.Feedback{Executed: 1, Attacked: 0, Service: true}, false},
		{scenario.RedDies, secloop.Feedback{Executed: 1, Attacked: 0, Service: true}, false},
		{scenario.BlueDies, secloop.Feedback{}, true},
		{"", secloop.Feedback{Executed: 1, Attacked: 1, Service: true}, false},
	} {
		f := open(t, Options{Parallel: 1, Fault: c.fault})
		got, err := f.Run(context.Background(), a, call("block_ip", "ip", "198.18.0.5"))
		if (err != nil) != c.err {
			t.Errorf("%q: error %v", c.fault, err)
		}
		if d := cmp.Diff(c.want, got); !c.err && d != "" {
			t.Errorf("%q: expected -, got +\n%s", c.fault, d)
		}
	}
}

// BenchmarkEpisodes prints episodes per minute at 1, 4 and 8 in parallel, of
// chains as fast as they go and of chains that take a second, and
// BenchmarkCreate the time from nothing to a field that answers.
func BenchmarkEpisodes(b *testing.B) {
	for _, o := range []Options{{Parallel: 1}, {Parallel: 4}, {Parallel: 8}, {Parallel: 1, Pace: time.Second}, {Parallel: 4, Pace: time.Second}, {Parallel: 8, Pace: time.Second}} {
		b.Run(fmt.Sprintf("chain=%s/parallel=%d", o.Pace, o.Parallel), func(b *testing.B) {
			f := open(b, o)
			r := rand.New(rand.NewPCG(1, 1))
			b.ResetTimer()
			start := time.Now()
			var wg sync.WaitGroup
			for range b.N {
				a := scenario.RandomAlert(r)
				s := scenario.RandomStrategy(r, a)
				wg.Go(func() {
					if _, err := f.Run(context.Background(), a, s); err != nil {
						b.Error(err)
					}
				})
			}
			wg.Wait()
			b.ReportMetric(float64(b.N)/time.Since(start).Minutes(), "episodes/min")
		})
	}
}

func BenchmarkCreate(b *testing.B) {
	f := open(b, Options{Parallel: 1})
	for b.Loop() {
		w, err := f.start()
		if err == nil {
			err = w.peer.call("check", needed[:1], nil)
			w.end()
		}
		if err != nil {
			b.Fatal(err)
		}
	}
}

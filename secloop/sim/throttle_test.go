package sim

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"trainerd/secloop"
	"trainerd/secloop/scenario"
)

func throttle(host, kbit string) secloop.Call {
	return secloop.Call{Tool: "throttle_upload", Params: map[string]string{"host": host, "kbit": kbit}}
}

func throttled(out scenario.Outcome) []string {
	var hosts []string
	for _, e := range out.Events {
		if e.Kind == scenario.Throttled {
			hosts = append(hosts, e.Host)
		}
	}
	return hosts
}

// TestThrottleStopsVolumeOnly throttles the target of every scenario to every
// rate, and twice: volume is stopped, everything else goes on, users are served.
func TestThrottleStopsVolumeOnly(t *testing.T) {
	tool, _ := scenario.ToolByName("throttle_upload")
	volume := 0
	for _, sc := range scenario.All() {
		a := alert(t, sc.Name, 0)
		for i, kbit := range tool.Params[1].Enum {
			s := secloop.Strategy{throttle(a.Target, kbit), throttle(a.Target, tool.Params[1].Enum[(i+1)%3])}
			out := play(t, a, s)
			through, held := 0, []string(nil)
			for k, st := range sc.Stages {
				if st.With["least"] == "" {
					through++
				} else {
					held = []string{a.Target}
					volume++
				}
				if got := out.Stages[k]; got.Succeeded != (st.With["least"] == "") {
					t.Errorf("%s throttled to %s: stage %s: %+v", a.Key(), kbit, st.Name, got)
				} else if d := time.Duration(got.Result.Millis * float64(time.Millisecond)); !got.Succeeded && d > scenario.MostPatience/2 {
					t.Errorf("%s: stage %s waited %s on a field without time", a.Key(), st.Name, d)
				}
			}
			want := secloop.Feedback{Executed: 1, Service: true, Attacked: float64(through) / float64(len(sc.Stages))}
			if d := cmp.Diff(want, out.Feedback) + cmp.Diff(held, throttled(out)); d != "" {
				t.Errorf("%s throttled to %s: expected -, got +\n%s", a.Key(), kbit, d)
			}
		}
	}
	if volume == 0 {
		t.Error("no stage transfers volume")
	}
}

// TestThrottleIsOfOneHost: another host's throttle changes nothing.
func TestThrottleIsOfOneHost(t *testing.T) {
	a := alert(t, "exfiltration", 0)
	for _, h := range scenario.HostNames() {
		out := play(t, a, secloop.Strategy{throttle(h, "8")})
		if stopped := out.Feedback.Attacked == 0; stopped != (h == a.Target) || !slices.Equal(throttled(out), map[bool][]string{true: {h}}[stopped]) {
			t.Errorf("%s with %s throttled: %+v, throttled %v", a.Key(), h, out.Feedback, throttled(out))
		}
	}
}

// TestShapesOfAHost: the lower rate holds, a burst is not refilled by a second
// call that changes nothing, small packets and others have a burst each, and only the way out is limited.
func TestShapesOfAHost(t *testing.T) {
	n := newNetwork()
	h, _ := scenario.HostByName("db1")
	red, user := netip.MustParseAddr("198.18.0.37"), scenario.UserAddrs()[0]
	const burst = 1000
	n.limit(scenario.Shape{Src: h.Addr, Rate: 8000, Burst: burst})
	for _, c := range []struct {
		name     string
		from, to netip.Addr
		bytes    int
		want     int
	}{
		{"to a user", h.Addr, user, 5000, 5000},
		{"to another host", h.Addr, scenario.TrustedWWW, 5000, 5000},
		{"from red", red, h.Addr, 5000, 5000},
		{"another host's", scenario.TrustedWWW, red, 5000, 5000},
		{"of the burst", h.Addr, red, 900, 900},
		{"the rest of it", h.Addr, red, 900, 100},
		{"beyond it", h.Addr, red, 900, 0},
		{"small", h.Addr, red, 200, 200},
	} {
		if got := n.leaves(c.from, c.to, c.bytes); got != c.want {
			t.Errorf("%s: %d of %d bytes leave, expected %d", c.name, got, c.bytes, c.want)
		}
	}
	for _, rate := range []int{16000, 8000} {
		n.limit(scenario.Shape{Src: h.Addr, Rate: rate, Burst: burst})
		if s := n.shapes[h.Addr]; s.shape.Rate != 8000 || s.bulk != 0 {
			t.Errorf("after a call with %d bit/s: %+v", rate, s)
		}
	}
	n.limit(scenario.Shape{Src: h.Addr, Rate: 4000, Burst: burst})
	if s := n.shapes[h.Addr]; s.shape.Rate != 4000 {
		t.Errorf("after a call with a lower rate: %+v", s)
	}
	var said []string
	for _, e := range n.kernelEvents() {
		said = append(said, e.Kind+" "+e.Host)
	}
	if got := strings.Join(said, ", "); got != "" {
		t.Errorf("a fresh shape has held back: %s", got)
	}
}

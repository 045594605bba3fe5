package scenario

import (
	"net/netip"
	"strconv"
	"testing"

	"trainerd/secloop"
)

// TestThrottleLeavesAMargin does the sums of throttle.go over all rates and all
// stages that wait for volume.
func TestThrottleLeavesAMargin(t *testing.T) {
	tool, _ := ToolByName("throttle_upload")
	stages := 0
	for i, kbit := range tool.Params[1].Enum {
		a := secloop.Alert{Target: "db1"}
		act, err := ParseCall(CallFor(tool, a, i))
		if err != nil {
			t.Fatal(err)
		}
		s := act.Effects[0].Shape
		if len(act.Effects) != 1 || s == nil || strconv.Itoa(s.Rate/1000) != kbit || s.Src != mustHost(t, "db1").Addr {
			t.Fatalf("%s kbit is %+v", kbit, act)
		}
		sent := func(seconds float64) float64 { // at most, by both queues
			return 2 * (float64(s.Burst) + LargestFrame + float64(s.Rate)/8*seconds)
		}
		for _, sc := range All() {
			for _, st := range sc.Stages {
				if st.With["least"] == "" {
					if st.Success.Count > s.Burst {
						t.Errorf("%s, stage %s asks for %d bytes and does not say when it gives up", sc.Name, st.Name, st.Success.Count)
					}
					continue
				}
				stages++
				least, err := strconv.Atoi(st.With["least"])
				if err != nil {
					t.Fatal(err)
				}
				if got := sent(PatienceTick.Seconds() * Patience); got >= float64(least) {
					t.Errorf("%s, stage %s: %v bytes come in time at %s kbit/s, %d keep it waiting", sc.Name, st.Name, got, kbit, least)
				}
				if got := sent(MostPatience.Seconds()); got >= float64(st.Success.Count) {
					t.Errorf("%s, stage %s: %v bytes come at all at %s kbit/s, %d are a success", sc.Name, st.Name, got, kbit, st.Success.Count)
				}
				if least*2 > st.Success.Count { // two windows at least: one slow moment is not the end
					t.Errorf("%s, stage %s: %d of %d bytes at a time", sc.Name, st.Name, least, st.Success.Count)
				}
			}
		}
	}
	if stages == 0 {
		t.Error("no stage waits for volume")
	}
}

func mustHost(t *testing.T, name string) Host {
	t.Helper()
	h, ok := HostByName(name)
	if !ok {
		t.Fatalf("no host %q", name)
	}
	return h
}

func TestOutside(t *testing.T) {
	for _, c := range []struct {
		addr string
		want bool
	}{
		{"198.18.0.37", true}, {"198.18.4.9", true}, {"198.18.1.10", false}, {"198.18.2.14", false}, {"127.0.0.1", false}, {"192.0.2.1", false},
	} {
		if got := Outside(netip.MustParseAddr(c.addr)); got != c.want {
			t.Errorf("%s outside: %v", c.addr, got)
		}
	}
}

package sensor

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestRefused: each source is told of once for each rule, target and port;
// trusted clients and many sources of one network are their network; who a blue
// host calls is the source.
func TestRefused(t *testing.T) {
	blue := netip.MustParsePrefix("198.18.2.0/24")
	e := NewEngine(Network{
		Host: func(a netip.Addr) string {
			if blue.Contains(a) {
				return "web1"
			}
			return ""
		},
		Trusted: netip.MustParsePrefix("198.18.1.0/24").Contains,
	})
	web := netip.MustParseAddrPort("198.18.2.11:80")
	from := func(net, last int) netip.AddrPort {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 18, byte(net), byte(last)}), uint16(40000+last))
	}
	for range 3 {
		e.Refused(from(0, 37), web, "block_ip")
		e.Refused(from(0, 37), web, "close_port")
		e.Refused(web, from(0, 67), "filter_egress")
		for i := range 5 {
			e.Refused(from(1, 10+i), web, "close_port")
		}
		for i := range 200 {
			e.Refused(from(4, 1+i), web, "close_port")
		}
	}
	var got []string
	alerts, lost := e.Alerts()
	for _, a := range alerts {
		got = append(got, fmt.Sprintf("%d %s: %s:%d to %s:%d (%s)", a.Signature, a.Category, a.Source, a.SourcePort, a.Target, a.TargetPort, a.Host))
	}
	slices.Sort(got)
	want := []string{
		"1007 block_ip: 198.18.0.37:0 to 198.18.2.11:80 (web1)",
		"1007 close_port: 198.18.0.37:0 to 198.18.2.11:80 (web1)",
		"1007 close_port: 198.18.1.0/24:0 to 198.18.2.11:80 (web1)",
		"1007 close_port: 198.18.4.0/24:0 to 198.18.2.11:80 (web1)",
		"1007 filter_egress: 198.18.0.67:40067 to 198.18.2.11:0 (web1)",
	}
	if d := cmp.Diff(want, got); d != "" || lost != 0 {
		t.Errorf("%d lost; expected -, got +\n%s", lost, d)
	}
}

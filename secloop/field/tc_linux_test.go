//go:build field && linux

package field

import (
	"context"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"trainerd/secloop"
	"trainerd/secloop/scenario"
)

// alone runs a test on a thread in a network namespace of its own, which ends
// with the thread, with a link as blue has one to the outside.
func alone(t *testing.T, test func(t *testing.T, h *netlink.Handle)) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Errorf("make a network namespace: %v", err)
			return
		}
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			t.Error(err)
			return
		}
		defer h.Close()
		attrs := netlink.NewLinkAttrs()
		attrs.Name = outsideLink
		if err := h.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "red0"}); err != nil {
			t.Errorf("add %s: %v", outsideLink, err)
			return
		}
		for _, name := range []string{outsideLink, "red0"} {
			link, err := h.LinkByName(name)
			if err == nil {
				err = bound(h, link)
			}
			if err == nil {
				err = h.LinkSetUp(link)
			}
			if err != nil {
				t.Errorf("make %s: %v", name, err)
				return
			}
		}
		test(t, h)
	}()
	<-done
}

func shapeOf(host string, rate int) scenario.Shape {
	h, _ := scenario.HostByName(host)
	return scenario.Shape{Src: h.Addr, Rate: rate, Burst: scenario.UploadBurst}
}

// TestShaperReadsBack applies shapes and looks at the kernel's classes and
// filters: of two rates of one host the lower holds, hosts have classes of
// their own, nothing is added twice.
func TestShaperReadsBack(t *testing.T) {
	alone(t, func(t *testing.T, h *netlink.Handle) {
		var s shaper
		for _, c := range []struct {
			host  string
			rate  int
			rates []uint64 // of all classes afterwards, in bytes per second
		}{
			{"db1", 8000, []uint64{1000, 1000}},
			{"db1", 8000, []uint64{1000, 1000}},
			{"db1", 16000, []uint64{1000, 1000}},
			{"db1", 4000, []uint64{500, 500}},
			{"db1", 8000, []uint64{500, 500}},
			{"web1", 16000, []uint64{500, 500, 2000, 2000}},
		} {
			if err := s.limit(shapeOf(c.host, c.rate)); err != nil {
				t.Errorf("%s to %d: %v", c.host, c.rate, err)
				return
			}
			classes, err := s.classes()
			if err != nil {
				t.Error(err)
				return
			}
			var rates []uint64
			for id, class := range classes {
				if id == netlink.MakeHandle(rootMajor, otherClass) {
					if class.Rate != linkRate {
						t.Errorf("the default class has %d bytes per second", class.Rate)
					}
					continue
				}
				rates = append(rates, class.Rate)
				if burst := netlink.Xmitsize(class.Rate, class.Buffer); burst < scenario.UploadBurst-1 || burst > scenario.UploadBurst {
					t.Errorf("%s to %d: a burst of %d bytes", c.host, c.rate, burst)
				}
			}
			slices.Sort(rates)
			filters, err := h.FilterList(s.link, netlink.MakeHandle(rootMajor, 0))
			if err != nil {
				t.Error(err)
				return
			}
			used := 0
			for _, f := range filters {
				if u, ok := f.(*netlink.U32); ok && u.ClassId != 0 {
					used++
				}
			}
			if d := cmp.Diff(c.rates, rates); d != "" || used != len(rates) {
				t.Errorf("%s to %d: %d filters; expected -, got +\n%s", c.host, c.rate, used, d)
			}
		}
	})
}

// TestShaperNotices: what somebody else changed, or what never was, does not
// count as applied; a shape of somebody who is not a host is refused.
func TestShaperNotices(t *testing.T) {
	for _, c := range []struct {
		name   string
		damage func(s *shaper, h *netlink.Handle) error
		want   string
	}{
		{"nothing", func(*shaper, *netlink.Handle) error { return nil }, ""},
		{"no filter", func(s *shaper, h *netlink.Handle) error {
			filters, err := h.FilterList(s.link, netlink.MakeHandle(rootMajor, 0))
			for _, f := range filters {
				if u, ok := f.(*netlink.U32); ok && u.Priority == filterBulk && u.ClassId != 0 {
					return h.FilterDel(u)
				}
			}
			return fmt.Errorf("no filter among %v (%v)", filters, err)
		}, "read filters back: 0 to class"},
		{"a filter for another host", func(s *shaper, h *netlink.Handle) error {
			db1, db2 := shapeOf("db1", 8).Src, shapeOf("db2", 8).Src
			return h.FilterAdd(s.filter(classOf(bulkClass, db1), filterBulk, db2))
		}, ""}, // it takes nothing from the right one
		{"a higher rate", func(s *shaper, h *netlink.Handle) error {
			return h.ClassChange(s.class(classOf(bulkClass, shapeOf("db1", 8).Src), shapeOf("db1", 1_000_000)))
		}, "bytes per second"},
		{"another burst", func(s *shaper, h *netlink.Handle) error {
			want := shapeOf("db1", 8000)
			want.Burst *= 4
			return h.ClassChange(s.class(classOf(smallClass, want.Src), want))
		}, "a burst of"},
		{"no root", func(s *shaper, h *netlink.Handle) error {
			return h.QdiscDel(netlink.NewHtb(netlink.QdiscAttrs{LinkIndex: s.link.Attrs().Index, Handle: netlink.MakeHandle(rootMajor, 0), Parent: netlink.HANDLE_ROOT}))
		}, "read class"},
	} {
		t.Run(c.name, func(t *testing.T) {
			alone(t, func(t *testing.T, h *netlink.Handle) {
				var s shaper
				want := shapeOf("db1", 8000)
				if err := s.limit(want); err != nil {
					t.Error(err)
					return
				}
				if err := c.damage(&s, h); err != nil {
					t.Error(err)
					return
				}
				err := s.verify(want)
				if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
					t.Errorf("%v, expected %q", err, c.want)
				}
			})
		})
	}
	alone(t, func(t *testing.T, _ *netlink.Handle) {
		var s shaper
		for _, bad := range []scenario.Shape{
			{}, {Src: netip.MustParseAddr("198.18.0.37"), Rate: 8000, Burst: 1}, {Src: netip.MustParseAddr("0.0.0.0"), Rate: 8000, Burst: 1},
			{Src: scenario.TrustedWWW, Rate: 0, Burst: 1}, {Src: scenario.TrustedWWW, Rate: 8000},
		} {
			if err := s.limit(bad); err == nil {
				t.Errorf("%+v was applied", bad)
			}
		}
	})
}

// TestLinksAreBounded floods a link as fast as it goes: no more than the burst
// and the rate's share of the time come through, before a throttle and after it.
func TestLinksAreBounded(t *testing.T) {
	const frames, size = 16 << 20 / scenario.LargestFrame, scenario.LargestFrame
	alone(t, func(t *testing.T, h *netlink.Handle) {
		flood := func(when string) {
			link, err := h.LinkByName(outsideLink)
			if err != nil {
				t.Error(err)
				return
			}
			fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				t.Error(err)
				return
			}
			defer unix.Close(fd)
			frame := make([]byte, size)
			copy(frame, "\xff\xff\xff\xff\xff\xff\x02\x00\x00\x00\x00\x01\x88\xb5") // an Ethernet type for experiments
			before, start := came(t, h), time.Now()
			for range frames {
				unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: link.Attrs().Index}) // what finds the queue full is lost
			}
			got := came(t, h) - before
			most := linkBurst + scenario.LargestFrame + linkRate*time.Since(start).Seconds()
			t.Logf("%s: %d of %d bytes in %s, at most %.0f", when, got, frames*size, time.Since(start), most)
			if float64(got) > most || got < linkBurst/2 {
				t.Errorf("%s: %d bytes, expected %d to %.0f", when, got, linkBurst/2, most)
			}
		}
		flood("bound")
		var s shaper
		if err := s.limit(shapeOf("db1", 8000)); err != nil {
			t.Error(err)
			return
		}
		flood("others than the throttled host")
	})
}

// came is how many bytes the other end of the link has received.
func came(t *testing.T, h *netlink.Handle) uint64 {
	link, err := h.LinkByName("red0")
	if err != nil {
		t.Error(err)
		return 0
	}
	return link.Attrs().Statistics.RxBytes
}

// TestThrottledTransferFails steals volume from hosts throttled to every rate,
// and twice: of what is asked for the bursts come and little more, the attacker gives up, the users are served.
func TestThrottledTransferFails(t *testing.T) {
	sc, _ := scenario.ByName("exfiltration")
	tool, _ := scenario.ToolByName("throttle_upload")
	f := open(t, Options{Parallel: 3})
	for i, kbit := range tool.Params[1].Enum {
		for _, second := range []string{"", tool.Params[1].Enum[0], tool.Params[1].Enum[2]} {
			t.Run(kbit+"/"+second, func(t *testing.T) {
				t.Parallel()
				a := alertFor(sc, i)
				s := call("throttle_upload", "host", a.Target, "kbit", kbit)
				if second != "" {
					s = append(s, call("throttle_upload", "host", a.Target, "kbit", second)...)
				}
				out, err := f.Play(context.Background(), a, s)
				if err != nil {
					t.Fatal(err)
				}
				if d := cmp.Diff(secloop.Feedback{Executed: 1, Service: true}, out.Feedback); d != "" {
					t.Errorf("expected -, got +\n%s", d)
				}
				for _, st := range out.Stages {
					t.Logf("stage %s: %d bytes in %.0f ms: %s", st.Name, st.Result.Count, st.Result.Millis, st.Result.Error)
					if !strings.HasPrefix(st.Result.Error, "gave up") {
						t.Errorf("stage %s ended with %q, expected it to be given up", st.Name, st.Result.Error)
					}
				}
				if first := out.Stages[0].Result.Count; first < scenario.UploadBurst/2 {
					t.Errorf("%d bytes came at first, expected most of a burst of %d", first, scenario.UploadBurst)
				}
				if d := cmp.Diff([]string{a.Target}, throttledHosts(out.Events)); d != "" {
					t.Errorf("hosts whose packets wait: expected -, got +\n%s", d)
				}
			})
		}
	}
}

// throttledHosts lists whose packets waited.
func throttledHosts(events []scenario.Event) []string {
	var hosts []string
	for _, e := range events {
		if e.Kind == scenario.Throttled {
			hosts = append(hosts, e.Host)
		}
	}
	return hosts
}

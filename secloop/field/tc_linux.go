package field

import (
	"errors"
	"fmt"
	"math"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"trainerd/secloop/scenario"
)

// What a link of a field carries at most, in each direction: a flood of one
// field must leave processor time to the others. Nothing that an episode does
// comes near it (128 KiB at once, 1 MB/s of forged SYNs), so no verdict depends on it.
const (
	linkRate  = 25_000_000 // bytes per second
	linkBurst = 256 << 10  // bytes
	linkQueue = 1 << 20    // bytes that wait; what exceeds them is dropped
)

// bound limits what leaves by a link, see linkRate. On a link that is not up
// yet the kernel need not wait for packets under way.
func bound(h *netlink.Handle, link netlink.Link) error {
	err := h.QdiscReplace(&netlink.Tbf{
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: link.Attrs().Index, Handle: netlink.MakeHandle(boundMajor, 0), Parent: netlink.HANDLE_ROOT},
		Rate:       linkRate, Buffer: netlink.Xmittime(linkRate, linkBurst), Limit: linkQueue,
	})
	if err != nil {
		return fmt.Errorf("bound %s: %w", link.Attrs().Name, err)
	}
	return nil
}

// shaper is the traffic control of blue's link to the outside: an HTB root whose
// default class, for whoever is not throttled, has the link's rate, and for each
// throttled host two classes, of small packets and of others, with u32 filters on
// the source address. All of it is made over netlink out of typed values, at the
// first throttle, and goes with the namespace. The zero value has limited nothing.
type shaper struct {
	h    *netlink.Handle
	link netlink.Link // nil before the first throttle
}

const outsideLink = "blue0"

// Handles: a link's bound is 2:; the root that replaces it is 1:, its default class
// 1:1, a host's classes are 1:1xx and 1:2xx, xx being the last byte of its address.
const (
	boundMajor  = 2
	rootMajor   = 1
	otherClass  = 1
	bulkClass   = 0x100
	smallClass  = 0x200
	filterSmall = 1 // priorities: small packets are looked for first
	filterBulk  = 2
)

// begin puts the root on the link. Packets leave the stack as they leave the link:
// the classes must not meet a buffer of 64 KiB that is cut up behind them.
func (s *shaper) begin() error {
	if s.link != nil {
		return nil
	}
	if s.h == nil {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return fmt.Errorf("open netlink: %w", err)
		}
		s.h = h
	}
	link, err := s.h.LinkByName(outsideLink)
	if err != nil {
		return fmt.Errorf("find %s: %w", outsideLink, err)
	}
	if err := s.h.LinkSetGSOMaxSegs(link, 1); err != nil {
		return fmt.Errorf("set segments of %s: %w", outsideLink, err)
	}
	root := netlink.NewHtb(netlink.QdiscAttrs{LinkIndex: link.Attrs().Index, Handle: netlink.MakeHandle(rootMajor, 0), Parent: netlink.HANDLE_ROOT})
	root.Defcls = otherClass
	if err := s.h.QdiscReplace(root); err != nil {
		return fmt.Errorf("add htb to %s: %w", outsideLink, err)
	}
	others := netlink.NewHtbClass(
		netlink.ClassAttrs{LinkIndex: link.Attrs().Index, Handle: netlink.MakeHandle(rootMajor, otherClass), Parent: netlink.MakeHandle(rootMajor, 0)},
		netlink.HtbClassAttrs{Rate: 8 * linkRate, Ceil: 8 * linkRate, Buffer: linkBurst, Cbuffer: linkBurst, Quantum: scenario.LargestFrame})
	if err := s.h.ClassAdd(others); err != nil {
		return fmt.Errorf("add default class to %s: %w", outsideLink, err)
	}
	link, err = s.h.LinkByName(outsideLink)
	if err != nil {
		return fmt.Errorf("read %s back: %w", outsideLink, err)
	}
	qdiscs, err := s.h.QdiscList(link)
	if err != nil {
		return fmt.Errorf("read qdiscs of %s back: %w", outsideLink, err)
	}
	if len(qdiscs) != 1 || qdiscs[0].Type() != "htb" || qdiscs[0].Attrs().Parent != netlink.HANDLE_ROOT || link.Attrs().GSOMaxSegs != 1 {
		return fmt.Errorf("read qdiscs of %s back: %v with %d segments, expected one htb and 1", outsideLink, qdiscs, link.Attrs().GSOMaxSegs)
	}
	s.link = link
	return nil
}

// limit applies a shape and reads classes and filters back. A host that is
// throttled to the same or a lower rate stays as it is.
func (s *shaper) limit(want scenario.Shape) error {
	if !scenario.HostNet.Contains(want.Src) || want.Rate < 8 || want.Burst < 1 {
		return fmt.Errorf("shape %+v: expected a host, a rate and a burst", want)
	}
	if err := s.begin(); err != nil {
		return err
	}
	have, err := s.classes()
	if err != nil {
		return err
	}
	rate := uint64(want.Rate / 8)
	for _, c := range []struct{ class, priority uint16 }{{smallClass, filterSmall}, {bulkClass, filterBulk}} {
		id := classOf(c.class, want.Src)
		old := have[id]
		if old != nil && old.Rate <= rate {
			continue
		}
		if old != nil {
			if err := s.remove(old); err != nil {
				return err
			}
		}
		if err := s.h.ClassAdd(s.class(id, want)); err != nil {
			return fmt.Errorf("add class %s: %w", netlink.HandleStr(id), err)
		}
		if err := s.h.FilterAdd(s.filter(id, c.priority, want.Src)); err != nil {
			return fmt.Errorf("add filter to %s: %w", netlink.HandleStr(id), err)
		}
	}
	return s.verify(want)
}

// remove takes a class and its filters away. A class whose rate is changed in
// place would keep its burst as a time, which is fewer bytes at the lower rate.
func (s *shaper) remove(c *netlink.HtbClass) error {
	filters, err := s.h.FilterList(s.link, netlink.MakeHandle(rootMajor, 0))
	if err != nil {
		return fmt.Errorf("read filters: %w", err)
	}
	for _, f := range filters {
		if u, ok := f.(*netlink.U32); ok && u.ClassId == c.Handle {
			if err := s.h.FilterDel(u); err != nil {
				return fmt.Errorf("remove filter to %s: %w", netlink.HandleStr(c.Handle), err)
			}
		}
	}
	if err := s.h.ClassDel(c); err != nil {
		return fmt.Errorf("remove class %s: %w", netlink.HandleStr(c.Handle), err)
	}
	return nil
}

func classOf(kind uint16, host netip.Addr) uint32 {
	return netlink.MakeHandle(rootMajor, kind|uint16(host.As4()[3]))
}

// class is an HTB class that never borrows: its ceiling is its rate.
func (s *shaper) class(id uint32, want scenario.Shape) *netlink.HtbClass {
	return netlink.NewHtbClass(
		netlink.ClassAttrs{LinkIndex: s.link.Attrs().Index, Handle: id, Parent: netlink.MakeHandle(rootMajor, 0)},
		netlink.HtbClassAttrs{Rate: uint64(want.Rate), Ceil: uint64(want.Rate), Buffer: uint32(want.Burst), Cbuffer: uint32(want.Burst), Quantum: scenario.LargestFrame})
}

// Offsets in the IPv4 header, as u32 reads it: words of 4 bytes.
const (
	u32Length = 0 // version, header length, service and, in the low half, total length
	u32Source = 12
)

// filter sends a host's packets to a class; of priority filterSmall only those
// whose total length is below scenario.SmallPacket.
func (s *shaper) filter(id uint32, priority uint16, host netip.Addr) *netlink.U32 {
	a := host.As4()
	keys := []netlink.TcU32Key{{Mask: math.MaxUint32, Val: uint32(a[0])<<24 | uint32(a[1])<<16 | uint32(a[2])<<8 | uint32(a[3]), Off: u32Source}}
	if priority == filterSmall {
		keys = append(keys, netlink.TcU32Key{Mask: math.MaxUint16 &^ (scenario.SmallPacket - 1), Off: u32Length})
	}
	return &netlink.U32{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: s.link.Attrs().Index, Parent: netlink.MakeHandle(rootMajor, 0), Priority: priority, Protocol: unix.ETH_P_IP},
		ClassId:     id, Sel: &netlink.TcU32Sel{Flags: netlink.TC_U32_TERMINAL, Nkeys: uint8(len(keys)), Keys: keys},
	}
}

// classes reads the HTB classes by handle.
func (s *shaper) classes() (map[uint32]*netlink.HtbClass, error) {
	list, err := s.h.ClassList(s.link, 0)
	if err != nil {
		return nil, fmt.Errorf("read classes: %w", err)
	}
	all := map[uint32]*netlink.HtbClass{}
	for _, c := range list {
		if htb, ok := c.(*netlink.HtbClass); ok {
			all[htb.Handle] = htb
		}
	}
	return all, nil
}

// verify reads back whether a shape, or a stricter one, is in force.
func (s *shaper) verify(want scenario.Shape) error {
	classes, err := s.classes()
	if err != nil {
		return err
	}
	filters, err := s.h.FilterList(s.link, netlink.MakeHandle(rootMajor, 0))
	if err != nil {
		return fmt.Errorf("read filters: %w", err)
	}
	for _, c := range []struct{ class, priority uint16 }{{smallClass, filterSmall}, {bulkClass, filterBulk}} {
		id := classOf(c.class, want.Src)
		got := classes[id]
		if got == nil || got.Rate == 0 || got.Rate > uint64(want.Rate/8) || got.Ceil != got.Rate {
			return fmt.Errorf("read class %s back: %v, expected at most %d bytes per second", netlink.HandleStr(id), got, want.Rate/8)
		}
		// Clock ticks are shorter than a microsecond: what they round off is below a byte at these rates.
		for _, ticks := range []uint32{got.Buffer, got.Cbuffer} {
			if burst := int(netlink.Xmitsize(got.Rate, ticks)); burst < want.Burst-1 || burst > want.Burst+1 {
				return fmt.Errorf("read class %s back: a burst of %d bytes, expected %d", netlink.HandleStr(id), burst, want.Burst)
			}
		}
		keys, found := s.filter(id, c.priority, want.Src).Sel.Keys, 0
		for _, f := range filters {
			if u, ok := f.(*netlink.U32); ok && u.ClassId == id && u.Priority == c.priority && u.Sel != nil && sameKeys(u.Sel.Keys, keys) {
				found++
			}
		}
		if found != 1 {
			return fmt.Errorf("read filters back: %d to class %s, expected 1", found, netlink.HandleStr(id))
		}
	}
	return nil
}

func sameKeys(a, b []netlink.TcU32Key) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i].Mask != b[i].Mask || a[i].Val != b[i].Val || a[i].Off != b[i].Off || a[i].OffMask != b[i].OffMask {
			return false
		}
	}
	return true
}

// events tells of every throttled host what waits or was dropped.
func (s *shaper) events() ([]scenario.Event, error) {
	if s.link == nil {
		return nil, nil
	}
	classes, err := s.classes()
	if err != nil {
		return nil, err
	}
	var out []scenario.Event
	for _, h := range scenario.Hosts() {
		waiting, dropped := uint32(0), uint32(0)
		for _, kind := range []uint16{smallClass, bulkClass} {
			c := classes[classOf(kind, h.Addr)]
			if c == nil {
				continue
			}
			if c.Statistics == nil {
				return nil, errors.New("read classes: without statistics")
			}
			waiting += c.Statistics.Queue.Backlog
			dropped += c.Statistics.Queue.Drops
		}
		if waiting > 0 || dropped > 0 {
			out = append(out, scenario.Event{Kind: scenario.Throttled, Host: h.Name, Detail: fmt.Sprintf("%d bytes wait, %d packets dropped", waiting, dropped)})
		}
	}
	return out, nil
}

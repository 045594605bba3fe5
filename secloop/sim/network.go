package sim

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"trainerd/secloop/scenario"
	"trainerd/secloop/sensor"
)

// network is one episode's wire, packet filter, traffic control and SYN queues. Time
// does not pass on it: a full queue times out at once, so does whoever waits for a
// throttled host, and no limit ever refills.
type network struct {
	mu        sync.Mutex
	listeners map[netip.AddrPort]*listener
	rules     []scenario.Rule
	tools     []string // that made rule i
	used      []int    // new connections that rule i has let through
	refused   int      // connections that rules have turned away
	sysctls   map[string]string
	halfOpen  map[netip.AddrPort]int
	dropped   map[netip.AddrPort]int            // SYNs that found the queue full
	open      map[netip.Addr]map[netip.Addr]int // open connections by destination and source
	ports     map[endpoints]uint16              // next client port
	tap       *sensor.Engine                    // nil without a sensor
	log       *sensor.Engine                    // of refused connections
	shapes    map[netip.Addr]*shaped            // throttled hosts
}

// shaped is a throttled host: what of its bursts is left for small packets and
// for others, and what was held back. Nothing is added to a burst as time does
// not pass, so what exceeds it never arrives.
type shaped struct {
	shape       scenario.Shape
	small, bulk int
	held        int // bytes
}

type endpoints struct {
	src netip.Addr
	dst netip.AddrPort
}

func newNetwork() *network {
	return &network{
		log:       sensor.NewEngine(scenario.Network),
		listeners: map[netip.AddrPort]*listener{}, sysctls: map[string]string{"net.ipv4.tcp_syncookies": "0"},
		shapes:   map[netip.Addr]*shaped{},
		halfOpen: map[netip.AddrPort]int{}, dropped: map[netip.AddrPort]int{}, open: map[netip.Addr]map[netip.Addr]int{}, ports: map[endpoints]uint16{},
	}
}

// client is the address of the next connection between two endpoints; mu is held.
func (n *network) client(src netip.Addr, dst netip.AddrPort) netip.AddrPort {
	e := endpoints{src, dst}
	n.ports[e]++
	return netip.AddrPortFrom(src, 40000+n.ports[e])
}

func (n *network) addRule(r scenario.Rule, tool string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.tools = append(n.tools, tool)
	n.rules = append(n.rules, r)
	n.used = append(n.used, 0)
}

func (n *network) setSysctl(s scenario.Sysctl) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.sysctls[s.Key] = s.Value
}

// limit applies a shape; the lower rate of two holds.
func (n *network) limit(s scenario.Shape) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if old := n.shapes[s.Src]; old != nil && old.shape.Rate <= s.Rate {
		return
	}
	n.shapes[s.Src] = &shaped{shape: s, small: s.Burst, bulk: s.Burst}
}

// headers are the bytes of a packet's IP and TCP headers.
const headers = 40

// leaves says how many of a write's bytes get from one address to another.
func (n *network) leaves(from, to netip.Addr, bytes int) int {
	n.mu.Lock()
	defer n.mu.Unlock()
	s := n.shapes[from]
	if s == nil || !scenario.Outside(to) {
		return bytes
	}
	left := &s.bulk
	if bytes+headers < scenario.SmallPacket {
		left = &s.small
	}
	out := min(bytes, *left)
	*left -= out
	s.held += bytes - out
	return out
}

// passes says whether the filter lets a new connection through, and counts and
// logs those that it does not; mu is held. The filter stands at every host: it
// looks at what a host sends, then at what comes to a host, limits on open
// connections last, and, where a rule is not about new connections only, at the answers.
func (n *network) passes(src netip.Addr, dst netip.AddrPort) bool {
	toHost, fromHost := scenario.HostNet.Contains(dst.Addr()), scenario.HostNet.Contains(src)
	refused := func(i int) bool {
		n.refused++
		n.log.Refused(netip.AddrPortFrom(src, 0), dst, n.tools[i])
		return false
	}
	for i, r := range n.rules {
		if r.Out && fromHost && !n.accepts(i, r, src, dst) {
			return refused(i)
		}
	}
	for _, limit := range []bool{false, true} {
		for i, r := range n.rules {
			if !r.Out && toHost && r.PerSource > 0 == limit && !n.accepts(i, r, src, dst) {
				return refused(i)
			}
		}
	}
	for i, r := range n.rules {
		back := r.Established && (fromHost && !r.Out || toHost && r.Out)
		if back && !n.accepts(i, r, dst.Addr(), netip.AddrPortFrom(src, 0)) {
			return refused(i)
		}
	}
	return true
}

// accepts applies one rule to a packet; a client's port is given as 0.
func (n *network) accepts(i int, r scenario.Rule, from netip.Addr, to netip.AddrPort) bool {
	if r.Src.IsValid() && r.Src != from || r.Dst.IsValid() && r.Dst != to.Addr() || r.Port != 0 && r.Port != to.Port() {
		return true
	}
	switch {
	case r.PerHour > 0:
		if n.used[i] >= r.PerHour {
			return false
		}
		n.used[i]++
		return true
	case r.PerSource > 0:
		return n.listeners[to] == nil || n.open[to.Addr()][from] < r.PerSource
	}
	return false
}

// Dial implements scenario.Stand.
func (n *network) Dial(ctx context.Context, src netip.Addr, dst netip.AddrPort) (net.Conn, error) {
	n.mu.Lock()
	ok := n.passes(src, dst)
	ln := n.listeners[dst]
	local := n.client(src, dst)
	full := false // the SYN queue
	if n.tap != nil {
		n.tap.Begin(local, dst)
	}
	if ok && ln != nil && n.halfOpen[dst] >= scenario.Backlog && n.sysctls["net.ipv4.tcp_syncookies"] == "0" {
		n.dropped[dst]++
		full = true
	}
	if ok && !full && ln != nil {
		if n.open[dst.Addr()] == nil {
			n.open[dst.Addr()] = map[netip.Addr]int{}
		}
		n.open[dst.Addr()][src]++
	}
	n.mu.Unlock()
	if full {
		return nil, fmt.Errorf("dial %s: i/o timeout", dst)
	}
	if !ok || ln == nil {
		if n.tap != nil {
			n.tap.End(dst, local, true)
		}
		return nil, fmt.Errorf("dial %s: connection refused", dst)
	}
	near, far := net.Pipe()
	if n.tap != nil {
		n.tap.Complete(local, dst)
	}
	var once sync.Once
	closed := func() {
		once.Do(func() {
			n.mu.Lock()
			n.open[dst.Addr()][src]--
			n.mu.Unlock()
		})
	}
	client := &conn{Conn: near, network: n, local: local, remote: dst, closed: closed, tap: n.tap, gone: make(chan struct{})}
	server := &conn{Conn: far, network: n, local: dst, remote: local, closed: closed, tap: n.tap, gone: make(chan struct{})}
	client.other, server.other = server, client
	select {
	case ln.queue <- server:
		return client, nil
	case <-ln.done:
		closed()
		return nil, fmt.Errorf("dial %s: connection refused", dst)
	case <-ctx.Done():
		closed()
		return nil, ctx.Err()
	}
}

// Listen implements scenario.Stand.
func (n *network) Listen(at netip.AddrPort) (net.Listener, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.listeners[at] != nil {
		return nil, fmt.Errorf("listen %s: address in use", at)
	}
	ln := &listener{network: n, at: at, queue: make(chan *conn, scenario.Backlog), done: make(chan struct{})}
	n.listeners[at] = ln
	return ln, nil
}

// Flood implements scenario.Flooder.
func (n *network) Flood(ctx context.Context, dst netip.AddrPort, count int) (int, func(), error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for i := range count {
		src := n.client(scenario.Forged(i), dst)
		if n.tap != nil {
			n.tap.Begin(src, dst)
		}
		ok := n.passes(src.Addr(), dst)
		if ok && n.listeners[dst] != nil {
			if n.halfOpen[dst] < scenario.Backlog {
				n.halfOpen[dst]++
			} else {
				n.dropped[dst]++
			}
		}
	}
	stop := func() {
		n.mu.Lock()
		n.halfOpen[dst] = 0
		n.mu.Unlock()
	}
	return count, stop, ctx.Err()
}

// kernelEvents is what the kernel's counters would tell.
func (n *network) kernelEvents() []scenario.Event {
	n.mu.Lock()
	defer n.mu.Unlock()
	total := 0
	for _, c := range n.dropped {
		total += c
	}
	var out []scenario.Event
	if total > 0 {
		out = append(out, scenario.Event{Kind: scenario.SynOverflow, Detail: fmt.Sprint(total)})
	}
	if n.refused > 0 {
		out = append(out, scenario.Event{Kind: scenario.Refused, Detail: fmt.Sprint(n.refused)})
	}
	for _, h := range scenario.Hosts() {
		if s := n.shapes[h.Addr]; s != nil && s.held > 0 {
			out = append(out, scenario.Event{Kind: scenario.Throttled, Host: h.Name, Detail: fmt.Sprintf("%d bytes wait", s.held)})
		}
	}
	alerts, _ := n.log.Alerts()
	return append(out, scenario.BlockedEvents(alerts)...)
}

// conn is one end of a connection. Deadlines set by SetDeadline hold, as a guard;
// those of SetReadDeadline are patience, and time does not pass here.
type conn struct {
	net.Conn
	network       *network
	local, remote netip.AddrPort
	other         *conn
	closed        func()
	tap           *sensor.Engine
	once          sync.Once
	gone          chan struct{} // closed with the connection
	stalled       atomic.Bool   // what was written is waiting at the gateway
}

func (c *conn) LocalAddr() net.Addr  { return net.TCPAddrFromAddrPort(c.local) }
func (c *conn) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(c.remote) }

// SetDeadline implements net.Conn.
func (c *conn) SetDeadline(t time.Time) error {
	err := c.Conn.SetDeadline(t)
	if c.other.stalled.Load() {
		c.Conn.SetReadDeadline(past)
	}
	return err
}

var past = time.Unix(1, 0)

// SetReadDeadline implements net.Conn.
func (c *conn) SetReadDeadline(time.Time) error { return nil }

// Write implements net.Conn. A write of which something is held back ends when
// one of the sides gives up; meanwhile whoever reads has waited in vain.
func (c *conn) Write(b []byte) (int, error) {
	if c.tap != nil {
		c.tap.Bytes(c.local, c.remote, b)
	}
	n := 0
	if !c.stalled.Load() {
		n = c.network.leaves(c.local.Addr(), c.remote.Addr(), len(b))
	}
	written, err := c.Conn.Write(b[:n])
	if err != nil || written == len(b) {
		return written, err
	}
	c.stalled.Store(true)
	c.other.Conn.SetReadDeadline(past)
	select {
	case <-c.gone:
	case <-c.other.gone:
	}
	return written, io.ErrClosedPipe
}

// Close implements net.Conn.
func (c *conn) Close() error {
	c.once.Do(func() {
		if c.tap != nil {
			c.tap.End(c.local, c.remote, false)
		}
		close(c.gone)
	})
	c.closed()
	return c.Conn.Close()
}

type listener struct {
	network *network
	at      netip.AddrPort
	queue   chan *conn
	once    sync.Once
	done    chan struct{}
}

// Accept implements net.Listener.
func (l *listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.queue:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (l *listener) Close() error {
	l.once.Do(func() {
		close(l.done)
		l.network.mu.Lock()
		delete(l.network.listeners, l.at)
		l.network.mu.Unlock()
		for {
			select {
			case c := <-l.queue:
				c.Close()
			default:
				return
			}
		}
	})
	return nil
}

// Addr implements net.Listener.
func (l *listener) Addr() net.Addr { return net.TCPAddrFromAddrPort(l.at) }

package sensor

import (
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"time"
)

// Bounds of what the engine keeps.
const (
	maxFlows  = 8192
	maxBuffer = 8 << 10 // bytes that are searched of one direction of a connection
	maxAlerts = 10_000
)

// Network says which addresses are whose.
type Network struct {
	Host    func(netip.Addr) string // name of a blue host, "" for everybody else
	Trusted func(netip.Addr) bool   // clients that belong here, such as the office
}

// Engine raises alerts about the connections that it is told of. It is safe for
// concurrent use; the alerts do not depend on how bytes were cut into segments.
type Engine struct {
	net Network

	mu      sync.Mutex
	now     time.Duration
	flows   map[flowKey]*flow
	tries   map[pair]*tries
	halves  map[pair]int                             // connections begun and not completed, by source network
	made    map[pair]int                             // connections completed
	counts  map[counted]int                          // matches of signatures that count
	refused map[refusal]map[netip.Addr]time.Duration // when each source was refused first
	alerts  []Alert
	lost    int // flows or alerts beyond the bounds
}

type flowKey struct{ client, server netip.AddrPort }

type pair struct{ source, target netip.Addr }

type counted struct {
	signature int
	pair
}

// tries are the connections that one address began to another.
type tries struct {
	ports map[uint16]bool
	count int
}

type flow struct {
	completed bool
	ended     bool      // by one side
	said      [2][]byte // by client and by server, up to maxBuffer
	total     [2]int
	fired     map[int]int // matches of each signature so far
}

// NewEngine returns an engine that has seen nothing.
func NewEngine(n Network) *Engine {
	return &Engine{net: n, flows: map[flowKey]*flow{}, tries: map[pair]*tries{}, halves: map[pair]int{}, made: map[pair]int{}, counts: map[counted]int{}, refused: map[refusal]map[netip.Addr]time.Duration{}}
}

// At sets the time of what comes next.
func (e *Engine) At(t time.Duration) {
	e.mu.Lock()
	e.now = t
	e.mu.Unlock()
}

// Begin is a client's first packet (SYN).
func (e *Engine) Begin(client, server netip.AddrPort) {
	e.mu.Lock()
	defer e.mu.Unlock()
	k := flowKey{client, server}
	if e.flows[k] != nil {
		return // sent again
	}
	if len(e.flows) >= maxFlows {
		e.lost++
		return
	}
	f := &flow{fired: map[int]int{}}
	e.flows[k] = f
	p := pair{client.Addr(), server.Addr()}
	t := e.tries[p]
	if t == nil {
		t = &tries{ports: map[uint16]bool{}}
		e.tries[p] = t
	}
	t.ports[server.Port()] = true
	t.count++
	e.began(k, t)
	near := pair{network(client.Addr()), server.Addr()}
	e.halves[near]++
	e.half(k, e.halves[near])
}

// network is an IPv4 address's /24.
func network(a netip.Addr) netip.Addr {
	p, err := a.Prefix(24)
	if err != nil {
		return a
	}
	return p.Addr()
}

// Complete is the end of a handshake.
func (e *Engine) Complete(client, server netip.AddrPort) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if f := e.flows[flowKey{client, server}]; f != nil {
		e.complete(flowKey{client, server}, f)
	}
}

func (e *Engine) complete(k flowKey, f *flow) {
	if f.completed || f.ended {
		return
	}
	f.completed = true
	e.halves[pair{network(k.client.Addr()), k.server.Addr()}]--
	p := pair{k.client.Addr(), k.server.Addr()}
	e.made[p]++
	e.connected(k, e.made[p])
}

// Bytes are what one side of a connection said next.
func (e *Engine) Bytes(from, to netip.AddrPort, b []byte) {
	e.mu.Lock()
	defer e.mu.Unlock()
	k, side := flowKey{from, to}, 0
	f := e.flows[k]
	if f == nil {
		k, side = flowKey{to, from}, 1
		if f = e.flows[k]; f == nil {
			return // began before the capture
		}
	}
	e.complete(k, f)
	f.total[side] += len(b)
	f.said[side] = append(f.said[side], b[:min(len(b), maxBuffer-len(f.said[side]))]...)
	e.search(k, f, side)
}

// Denied is a failed login that a server's log tells of, for connections whose
// bytes say nothing.
func (e *Engine) Denied(client, server netip.AddrPort) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.count(&failedLogins, flowKey{client, server})
}

// count is one match of a signature that is raised at each so many.
func (e *Engine) count(s *Signature, k flowKey) {
	c := counted{s.ID, pair{k.client.Addr(), k.server.Addr()}}
	e.counts[c]++
	if e.counts[c]%s.every == 0 {
		e.raise(s, k)
	}
}

// End is the last packet of one side (FIN), or of both (RST).
func (e *Engine) End(from, to netip.AddrPort, both bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, k := range []flowKey{{from, to}, {to, from}} {
		f := e.flows[k]
		if f == nil {
			continue
		}
		if !f.ended && !f.completed {
			e.halves[pair{network(k.client.Addr()), k.server.Addr()}]--
		}
		if f.ended || both {
			delete(e.flows, k)
		}
		f.ended = true
		return
	}
}

// Alerts returns what was raised so far, in order, and how much was lost to the
// engine's bounds.
func (e *Engine) Alerts() (alerts []Alert, lost int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	out := append(e.refusals(), e.alerts...)
	Sort(out)
	return out, e.lost
}

// raise records an alert about a connection: where a blue host opened it, that
// host is the target and the other side the source.
func (e *Engine) raise(s *Signature, k flowKey) {
	if len(e.alerts) >= maxAlerts {
		e.lost++
		return
	}
	src, dst := k.client, k.server
	if e.net.Host(src.Addr()) != "" {
		src, dst = dst, src
	}
	source := src.Addr().String()
	if s == &synFlood {
		source += "/24"
	}
	e.alerts = append(e.alerts, Alert{
		At: e.now, Signature: s.ID, Name: s.Name, Category: s.Category, Severity: s.Severity, Proto: "TCP",
		Source: source, Target: dst.Addr().String(), SourcePort: int(src.Port()), TargetPort: int(dst.Port()), Host: e.net.Host(dst.Addr()),
	})
}

// decoded is text as an application would see it: with its URL escapes undone.
func decoded(b []byte) string {
	text := string(b)
	if !strings.ContainsAny(text, "%+") {
		return text
	}
	head, rest, _ := strings.Cut(text, "\r\n")
	if d, err := url.QueryUnescape(head); err == nil {
		head = d
	}
	return head + "\r\n" + rest
}

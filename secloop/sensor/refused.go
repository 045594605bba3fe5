package sensor

import (
	"maps"
	"net/netip"
	"slices"
	"time"
)

// Bounds of what is kept about refused packets.
const (
	maxRefusals = 1024
	maxNamed    = 8 // sources of one /24 network that are named; more of them are the network
)

// refusal is what refused packets have in common.
type refusal struct {
	rule                   string // the tool that made it
	near                   netip.Addr
	target                 netip.Addr
	sourcePort, targetPort uint16 // of the server's side, 0 for the client's
}

// Refused is a connection that a packet rule has turned away. Each source is
// told of once for each rule, target and port, however many packets came.
func (e *Engine) Refused(client, server netip.AddrPort, rule string) {
	k := refusal{rule: rule, near: network(client.Addr()), target: server.Addr(), targetPort: server.Port()}
	source := client.Addr()
	if e.net.Host(client.Addr()) != "" { // as raise has it: who opened the connection is its target
		k = refusal{rule: rule, near: network(server.Addr()), target: client.Addr(), sourcePort: server.Port()}
		source = server.Addr()
	}
	if e.net.Trusted(source) { // which of the users a limit turns away is chance
		source = k.near
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.refused[k] == nil {
		if len(e.refused) >= maxRefusals {
			e.lost++
			return
		}
		e.refused[k] = map[netip.Addr]time.Duration{}
	}
	if _, known := e.refused[k][source]; !known && len(e.refused[k]) <= maxNamed {
		e.refused[k][source] = e.now
	}
}

// refusals are the alerts about refused packets; mu is held. Many sources of one
// network, as in a flood with forged ones, are one alert.
func (e *Engine) refusals() []Alert {
	var out []Alert
	for k, sources := range e.refused {
		one := Alert{Signature: refusedByRule.ID, Name: refusedByRule.Name, Category: k.rule, Severity: refusedByRule.Severity, Proto: "TCP",
			Target: k.target.String(), SourcePort: int(k.sourcePort), TargetPort: int(k.targetPort), Host: e.net.Host(k.target)}
		if len(sources) > maxNamed {
			one.At, one.Source = slices.Min(slices.Collect(maps.Values(sources))), k.near.String()+"/24"
			out = append(out, one)
			continue
		}
		for source, at := range sources {
			one.At, one.Source = at, source.String()
			if e.net.Trusted(source) {
				one.Source += "/24"
			}
			out = append(out, one)
		}
	}
	return out
}

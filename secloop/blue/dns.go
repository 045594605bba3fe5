package blue

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"trainerd/secloop/scenario"
)

// opUpdate is the dynamic update of RFC 2136. Its zone, prerequisite and update
// sections take the places of question, answer and authority.
const opUpdate = 5

// serveDNS answers one message over TCP (RFC 1035, 4.2.2).
func (b *Blue) serveDNS(c net.Conn, h scenario.Host) {
	var size [2]byte
	if _, err := io.ReadFull(c, size[:]); err != nil {
		return
	}
	buf := make([]byte, binary.BigEndian.Uint16(size[:]))
	if _, err := io.ReadFull(c, buf); err != nil {
		return
	}
	var m dnsmessage.Message
	if m.Unpack(buf) != nil {
		return
	}
	r := dnsmessage.Message{Header: dnsmessage.Header{ID: m.ID, Response: true, OpCode: m.OpCode, Authoritative: true}, Questions: m.Questions}
	switch {
	case m.OpCode == opUpdate:
		b.log("dns_update", peer(c), h.Name, "dynamic update")
		if b.Is(h.Name, scenario.SignedUpdates) || len(m.Authorities) == 0 { // nobody in the field signs
			r.RCode = dnsmessage.RCodeRefused
			break
		}
		for _, a := range m.Authorities {
			if body, ok := a.Body.(*dnsmessage.AResource); ok {
				b.mu.Lock()
				if len(b.zone) < 64 {
					b.zone[a.Header.Name.String()] = netip.AddrFrom4(body.A).String()
				}
				b.mu.Unlock()
			}
		}
	case len(m.Questions) == 1 && b.ep.Resolver.IsValid() && !strings.HasSuffix(m.Questions[0].Name.String(), "corp.test."):
		at, err := b.forward(peer(c), h, m.Questions[0].Name.String())
		if err != nil {
			r.RCode = dnsmessage.RCodeServerFailure
			break
		}
		r.Answers = []dnsmessage.Resource{{
			Header: dnsmessage.ResourceHeader{Name: m.Questions[0].Name, Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET, TTL: 60},
			Body:   &dnsmessage.AResource{A: at.As4()},
		}}
	case len(m.Questions) == 1:
		b.mu.Lock()
		to, err := netip.ParseAddr(b.zone[m.Questions[0].Name.String()])
		b.mu.Unlock()
		if err != nil {
			r.RCode = dnsmessage.RCodeNameError
			break
		}
		r.Answers = []dnsmessage.Resource{{
			Header: dnsmessage.ResourceHeader{Name: m.Questions[0].Name, Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET, TTL: 60},
			Body:   &dnsmessage.AResource{A: to.As4()},
		}}
	default:
		r.RCode = dnsmessage.RCodeFormatError
	}
	if out, err := r.Pack(); err == nil {
		c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(out))), out...))
	}
}

// forward asks whoever is responsible outside; a host whose lookups are sunk gets a dead address.
func (b *Blue) forward(client string, h scenario.Host, name string) (netip.Addr, error) {
	b.log("dns_forward", client, h.Name, name)
	tell := func(out bool) {
		select {
		case b.forwarded <- out:
		default: // nobody waits for so many
		}
	}
	if a, err := netip.ParseAddr(client); err == nil {
		if from, ok := scenario.HostByAddr(a); ok && b.Is(from.Name, scenario.LookupsSunk) {
			tell(false)
			return scenario.Sinkhole, nil
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), serviceTimeout)
	defer cancel()
	c, err := b.call(ctx, h, b.ep.Resolver)
	tell(err == nil)
	if err != nil {
		return netip.Addr{}, err
	}
	if !b.track(c) {
		return netip.Addr{}, net.ErrClosed
	}
	defer b.done(c)
	c.SetDeadline(time.Now().Add(serviceTimeout))
	return resolve(c, name)
}

// resolve asks for one address over an open connection.
func resolve(c io.ReadWriter, name string) (netip.Addr, error) {
	n, err := dnsmessage.NewName(strings.TrimSuffix(name, ".") + ".")
	if err != nil {
		return netip.Addr{}, err
	}
	q := dnsmessage.Message{Header: dnsmessage.Header{ID: 9}, Questions: []dnsmessage.Question{{Name: n, Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}}}
	out, err := q.Pack()
	if err != nil {
		return netip.Addr{}, err
	}
	if _, err := c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(out))), out...)); err != nil {
		return netip.Addr{}, err
	}
	var size [2]byte
	if _, err := io.ReadFull(c, size[:]); err != nil {
		return netip.Addr{}, err
	}
	buf := make([]byte, binary.BigEndian.Uint16(size[:]))
	if _, err := io.ReadFull(c, buf); err != nil {
		return netip.Addr{}, err
	}
	var m dnsmessage.Message
	if err := m.Unpack(buf); err != nil {
		return netip.Addr{}, err
	}
	for _, a := range m.Answers {
		if body, ok := a.Body.(*dnsmessage.AResource); ok {
			return netip.AddrFrom4(body.A), nil
		}
	}
	return netip.Addr{}, fmt.Errorf("no address for %s", name)
}

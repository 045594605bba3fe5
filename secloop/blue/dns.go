package blue

import (
	"encoding/binary"
	"io"
	"net"
	"net/netip"

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

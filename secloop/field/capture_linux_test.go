package field

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"trainerd/secloop/scenario"
	"trainerd/secloop/sensor"
)

func deaf() *capture { // a capture without a socket
	return &capture{engine: sensor.NewEngine(scenario.Network), next: map[stream]uint32{}}
}

// segment is one packet of a conversation; forgedPacket makes the headers.
func segment(from, to netip.AddrPort, seq uint32, flags byte, body string) []byte {
	p := append(forgedPacket(from, to, seq, flags), body...)
	binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
	return p
}

// TestSegments: what is sent twice or begins before what was seen counts once,
// and a request is searched across segments.
func TestSegments(t *testing.T) {
	red, web := netip.MustParseAddrPort("198.18.0.9:40001"), netip.MustParseAddrPort("198.18.2.11:80")
	c := deaf()
	const ack = 0x10
	for _, p := range [][]byte{
		segment(red, web, 100, flagSYN, ""), segment(web, red, 900, flagSYN|ack, ""), segment(red, web, 101, ack, ""),
		segment(red, web, 101, ack, "GET /page?file=.."), segment(red, web, 101, ack, "GET /page?file=.."),
		segment(red, web, 115, ack, "=../etc/passwd HTTP/1.1\r\n\r\n"), // its first three bytes were seen
		segment(web, red, 901, ack, "HTTP/1.1 200 OK\r\n\r\nroot:x:0:0"), segment(web, red, 930, ack|1, ""), segment(red, web, 142, ack|1, ""),
	} {
		c.packet(p)
	}
	alerts, lost := c.engine.Alerts()
	var got []int
	for _, a := range alerts {
		got = append(got, a.Signature)
	}
	if len(got) != 2 || got[0] != 2010 || got[1] != 2019 || lost != 0 {
		t.Errorf("signatures %v, lost %d, expected 2010 and 2019", got, lost)
	}
}

// FuzzPacket feeds one packet after an open connection: nothing may crash.
func FuzzPacket(f *testing.F) {
	red, web := netip.MustParseAddrPort("198.18.0.9:40001"), netip.MustParseAddrPort("198.18.2.11:80")
	f.Add(segment(red, web, 101, 0x10, "GET / HTTP/1.1\r\n\r\n"))
	f.Add(segment(web, red, 901, 0x11, "x"))
	f.Add([]byte{0x45})
	f.Fuzz(func(t *testing.T, p []byte) {
		c := deaf()
		c.packet(segment(red, web, 100, flagSYN, ""))
		c.packet(segment(web, red, 900, flagSYN|0x10, ""))
		c.packet(p)
		c.packet(p)
		c.engine.Alerts()
	})
}

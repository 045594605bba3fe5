package field

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"trainerd/secloop/scenario"
)

// How long sides wait for an answer. On a veth an answer takes microseconds;
// the rest is room for a machine that is busy with other battle-fields.
const (
	redPatience  = 400 * time.Millisecond
	userPatience = 800 * time.Millisecond
)

// stand is a place in a network namespace: the kernel's sockets, behind a guard.
type stand struct{ patience time.Duration }

// Patience implements scenario.Stand.
func (s stand) Patience() time.Duration { return s.patience }

// Dial implements scenario.Stand.
func (s stand) Dial(ctx context.Context, src netip.Addr, dst netip.AddrPort) (net.Conn, error) {
	if !scenario.Inside(dst.Addr()) {
		return nil, fmt.Errorf("refused: %s is outside the battle-field", dst)
	}
	d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(src, 0)), Timeout: s.patience, KeepAlive: -1}
	d.SetMultipathTCP(false)
	return d.DialContext(ctx, "tcp4", dst.String())
}

// Listen implements scenario.Stand.
func (s stand) Listen(at netip.AddrPort) (net.Listener, error) {
	if !scenario.Inside(at.Addr()) {
		return nil, fmt.Errorf("refused: %s is outside the battle-field", at)
	}
	lc := net.ListenConfig{KeepAlive: -1}
	lc.SetMultipathTCP(false)
	return lc.Listen(context.Background(), "tcp4", at.String())
}

// Syn implements scenario.Flooder with a raw socket.
func (s stand) Syn(ctx context.Context, dst netip.AddrPort, n int) (int, error) {
	if !scenario.HostNet.Contains(dst.Addr()) {
		return 0, fmt.Errorf("refused: %s is outside the battle-field", dst)
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return 0, fmt.Errorf("open raw socket: %w", err)
	}
	defer unix.Close(fd)
	to := &unix.SockaddrInet4{Addr: dst.Addr().As4()}
	for i := range n {
		if ctx.Err() != nil {
			return i, ctx.Err()
		}
		p := synPacket(netip.AddrPortFrom(scenario.Forged(i), uint16(20000+i)), dst, uint32(i)*2654435761)
		if err := unix.Sendto(fd, p, 0, to); err != nil {
			return i, fmt.Errorf("send SYN %d: %w", i, err)
		}
	}
	return n, nil
}

// synPacket is an IPv4 header of 20 bytes and a TCP header of 20 bytes with SYN set.
func synPacket(src, dst netip.AddrPort, seq uint32) []byte {
	p := make([]byte, 40)
	s, d := src.Addr().As4(), dst.Addr().As4()
	p[0], p[8], p[9] = 0x45, 64, unix.IPPROTO_TCP // version and length, TTL, protocol; the kernel fills in the checksum
	binary.BigEndian.PutUint16(p[2:], 40)
	copy(p[12:], s[:])
	copy(p[16:], d[:])
	t := p[20:]
	binary.BigEndian.PutUint16(t, src.Port())
	binary.BigEndian.PutUint16(t[2:], dst.Port())
	binary.BigEndian.PutUint32(t[4:], seq)
	t[12], t[13] = 5<<4, 0x02 // length in words, SYN
	binary.BigEndian.PutUint16(t[14:], 64240)
	sum := uint32(unix.IPPROTO_TCP + 20) // pseudo-header (RFC 9293, 3.1)
	for _, b := range [][]byte{s[:], d[:], t} {
		for i := 0; i < len(b); i += 2 {
			sum += uint32(binary.BigEndian.Uint16(b[i:]))
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(t[16:], ^uint16(sum))
	return p
}

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

// How long to wait for an answer. A rule that is in the way answers with a
// reset, so patience is spent on a full SYN queue only: that is what users meet
// under pressure, and their first SYN is sent again after a second.
const (
	patience        = 10 * time.Second
	pressedPatience = 1500 * time.Millisecond
)

// stand is a place in a network namespace: the kernel's sockets, behind a guard.
type stand struct{ patience time.Duration }

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

const (
	floodPause  = 20 * time.Millisecond // between two rounds of a flood
	floodRounds = 500
)

// Flood implements scenario.Flooder with a raw socket. The same SYNs are sent
// round after round: what the kernel has given up is begun again. stop resets
// what is half-open.
func (s stand) Flood(ctx context.Context, dst netip.AddrPort, n int) (int, func(), error) {
	if !scenario.HostNet.Contains(dst.Addr()) {
		return 0, nil, fmt.Errorf("refused: %s is outside the battle-field", dst)
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return 0, nil, fmt.Errorf("open raw socket: %w", err)
	}
	round := func(flags byte, ahead uint32) (int, error) {
		to := &unix.SockaddrInet4{Addr: dst.Addr().As4()}
		for i := range n {
			p := forgedPacket(netip.AddrPortFrom(scenario.Forged(i), uint16(20000+i)), dst, uint32(i)*2654435761+ahead, flags)
			if err := unix.Sendto(fd, p, 0, to); err != nil {
				return i, fmt.Errorf("send packet %d: %w", i, err)
			}
		}
		return n, nil
	}
	sent, err := round(flagSYN, 0)
	if err != nil {
		unix.Close(fd)
		return sent, nil, err
	}
	ended, over := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(over)
		t := time.NewTicker(floodPause)
		defer t.Stop()
		for range floodRounds {
			select {
			case <-ended:
				return
			case <-t.C:
				round(flagSYN, 0) // a round that fails is made up for by the next
			}
		}
	}()
	return sent, func() {
		close(ended)
		<-over
		round(flagRST, 1)
		unix.Close(fd)
	}, nil
}

const flagSYN, flagRST, flagACK = 0x02, 0x04, 0x10

// forgedPacket is an IPv4 header of 20 bytes and a TCP header of 20 bytes.
func forgedPacket(src, dst netip.AddrPort, seq uint32, flags byte) []byte {
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
	t[12], t[13] = 5<<4, flags // length in words
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

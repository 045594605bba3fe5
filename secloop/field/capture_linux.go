package field

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"trainerd/secloop/scenario"
	"trainerd/secloop/sensor"
)

const (
	captureBuffer = 8 << 20  // bytes that the kernel keeps for the sensor
	maxFrame      = 64 << 10 // a veth hands over whole segments, before they are cut
)

// capture is the sensor's ear: a packet socket in blue's namespace on every link.
type capture struct {
	fd      int
	lo      int // index of lo, which shows each packet twice
	engine  *sensor.Engine
	start   time.Time
	skipped time.Duration

	mu   sync.Mutex // of buf, next and reading the socket
	buf  []byte
	next map[stream]uint32 // sequence number that each side's bytes go on at
}

type stream struct{ from, to netip.AddrPort }

func newCapture() (*capture, error) {
	lo, err := net.InterfaceByName("lo")
	if err != nil {
		return nil, fmt.Errorf("find lo: %w", err)
	}
	// A socket of one protocol would not be shown what blue sends.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(htons(unix.ETH_P_ALL)))
	if err != nil {
		return nil, fmt.Errorf("open packet socket: %w", err)
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, captureBuffer); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("set receive buffer: %w", err)
	}
	c := &capture{fd: fd, lo: lo.Index, engine: sensor.NewEngine(scenario.Network), start: time.Now(), buf: make([]byte, maxFrame), next: map[stream]uint32{}}
	go follow(c.fd, c.drain)
	return c, nil
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }

// follow reads a socket while others play, so that the kernel's buffer stays
// empty. It ends with the process: a sensor lives as long as its battle-field.
func follow(fd int, drain func() error) {
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		if _, err := unix.Poll(p, -1); err != nil && !errors.Is(err, unix.EINTR) {
			return
		}
		if drain() != nil {
			return
		}
	}
}

// drain reads everything that has arrived.
func (c *capture) drain() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		n, from, err := unix.Recvfrom(c.fd, c.buf, unix.MSG_DONTWAIT)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return nil
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return fmt.Errorf("read packets: %w", err)
		}
		ll, ok := from.(*unix.SockaddrLinklayer)
		if !ok || ll.Protocol != htons(unix.ETH_P_IP) || ll.Ifindex == c.lo && ll.Pkttype == unix.PACKET_OUTGOING {
			continue
		}
		c.engine.At(c.skipped + time.Since(c.start))
		c.packet(c.buf[:min(n, len(c.buf))])
	}
}

// packet takes one IPv4 packet apart and gives the engine what TCP says.
func (c *capture) packet(p []byte) {
	if len(p) < 20 || p[0]>>4 != 4 || p[9] != unix.IPPROTO_TCP {
		return
	}
	size := int(p[0]&15) * 4
	total := int(binary.BigEndian.Uint16(p[2:]))
	if size < 20 || total < size+20 || total > len(p) || binary.BigEndian.Uint16(p[6:])&0x1fff != 0 {
		return // cut short, or a later fragment
	}
	t := p[size:total]
	data := int(t[12]>>4) * 4
	if data < 20 || data > len(t) {
		return
	}
	from := netip.AddrPortFrom(netip.AddrFrom4([4]byte(p[12:16])), binary.BigEndian.Uint16(t))
	to := netip.AddrPortFrom(netip.AddrFrom4([4]byte(p[16:20])), binary.BigEndian.Uint16(t[2:]))
	seq, flags, body := binary.BigEndian.Uint32(t[4:]), t[13], t[data:]
	const fin, syn, rst, ack = 1, 2, 4, 16
	s := stream{from, to}
	switch {
	case flags&rst != 0:
		c.engine.End(from, to, true)
		delete(c.next, s)
		return
	case flags&syn != 0:
		if flags&ack == 0 {
			c.engine.Begin(from, to)
		}
		if len(c.next) < maxStreams {
			c.next[s] = seq + 1
		}
		return
	}
	next, known := c.next[s]
	if _, answered := c.next[stream{to, from}]; !known || !answered {
		return
	}
	c.engine.Complete(from, to)            // of the two directions only the client's is a connection
	if old := int32(next - seq); old > 0 { // sent again
		if int(old) >= len(body) {
			body = nil
		} else {
			body, seq = body[old:], next
		}
	}
	if len(body) > 0 {
		c.engine.Bytes(from, to, body)
		c.next[s] = seq + uint32(len(body))
	}
	if flags&fin != 0 {
		c.engine.End(from, to, false)
	}
}

const maxStreams = 16384

// skip moves the clock on, after what has arrived was read.
func (c *capture) skip(d time.Duration) error {
	err := c.drain()
	c.mu.Lock()
	c.skipped += d
	c.mu.Unlock()
	return err
}

// seen reads what has arrived and returns the alerts and how many packets the kernel or the engine lost.
func (c *capture) seen() (watched, error) {
	if err := c.drain(); err != nil {
		return watched{}, err
	}
	stats, err := unix.GetsockoptTpacketStats(c.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS)
	if err != nil {
		return watched{}, fmt.Errorf("read packet statistics: %w", err)
	}
	alerts, lost := c.engine.Alerts()
	return watched{alerts, lost + int(stats.Drops)}, nil
}

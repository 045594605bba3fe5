package field

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"trainerd/secloop/scenario"
	"trainerd/secloop/sensor"
)

const (
	logGroup  = 5  // NFLOG group of blue's namespace
	logCopy   = 64 // bytes of a packet that the kernel hands over: the IPv4 and TCP headers
	logBuffer = 4 << 20
	logRate   = 200 // packets a second that a tool's rules log of each /24 of sources
	logBurst  = 256

	logNetworks = 256 // that a tool's rules log; of more nothing is logged
)

// Of linux/netfilter/nfnetlink_log.h.
const (
	msgConfig       = unix.NFNL_SUBSYS_ULOG<<8 | 1
	msgPacket       = unix.NFNL_SUBSYS_ULOG << 8
	attrCommand     = 1
	attrMode        = 2
	attrThreshold   = 5
	attrPayload     = 9
	attrPrefix      = 10
	commandBind     = 1
	copyPacket      = 2
	sizeNetlink     = 16 // of a netlink message's header
	sizeNetfilter   = 4  // of the netfilter header behind it
	sizeAttribute   = 4
	maxNetlinkDepth = 64 << 10
)

// refusals reads what blue's rules log about the packets that they refuse, and
// tells an engine.
type refusals struct {
	fd     int
	engine *sensor.Engine
	start  time.Time

	mu   sync.Mutex // of buf, lost and reading the socket
	buf  []byte
	lost int // messages that the kernel could not keep or that could not be read
}

// newRefusals binds the group; a kernel without nfnetlink_log refuses.
func newRefusals() (*refusals, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, fmt.Errorf("open packet log: %w", err)
	}
	r := &refusals{fd: fd, engine: sensor.NewEngine(scenario.Network), start: time.Now(), buf: make([]byte, maxNetlinkDepth)}
	mode := append(binary.BigEndian.AppendUint32(nil, logCopy), copyPacket, 0)
	err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, logBuffer)
	for _, attrs := range [][]byte{
		attribute(attrCommand, []byte{commandBind}),
		append(attribute(attrMode, mode), attribute(attrThreshold, []byte{0, 0, 0, 1})...), // each packet at once
	} {
		if err == nil {
			err = r.configure(attrs)
		}
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("bind packet log: %w", err)
	}
	go follow(r.fd, r.drain)
	return r, nil
}

func attribute(kind uint16, value []byte) []byte {
	b := binary.NativeEndian.AppendUint16(nil, uint16(sizeAttribute+len(value)))
	b = append(binary.NativeEndian.AppendUint16(b, kind), value...)
	return append(b, make([]byte, -len(value)&3)...)
}

// configure sends one message about the group and reads the kernel's answer.
func (r *refusals) configure(attrs []byte) error {
	m := binary.NativeEndian.AppendUint32(nil, uint32(sizeNetlink+sizeNetfilter+len(attrs)))
	m = binary.NativeEndian.AppendUint16(m, msgConfig)
	m = binary.NativeEndian.AppendUint16(m, unix.NLM_F_REQUEST|unix.NLM_F_ACK)
	m = append(m, make([]byte, 8)...) // sequence number, port
	m = append(m, unix.AF_UNSPEC, unix.NFNETLINK_V0, 0, logGroup)
	if err := unix.Sendto(r.fd, append(m, attrs...), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	n, _, err := unix.Recvfrom(r.fd, r.buf, 0)
	if err != nil {
		return err
	}
	if n < sizeNetlink+4 || binary.NativeEndian.Uint16(r.buf[4:]) != unix.NLMSG_ERROR {
		return errors.New("the kernel's answer is no answer")
	}
	if code := int32(binary.NativeEndian.Uint32(r.buf[sizeNetlink:])); code != 0 {
		return unix.Errno(-code)
	}
	return nil
}

// drain reads everything that has arrived.
func (r *refusals) drain() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		n, from, err := unix.Recvfrom(r.fd, r.buf, unix.MSG_DONTWAIT)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return nil
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.ENOBUFS):
			r.lost++
			continue
		case err != nil:
			return fmt.Errorf("read packet log: %w", err)
		}
		if nl, ok := from.(*unix.SockaddrNetlink); !ok || nl.Pid != 0 {
			continue // not from the kernel
		}
		r.engine.At(time.Since(r.start))
		if !eachRefused(r.buf[:n], r.engine.Refused) {
			r.lost++
		}
	}
}

// events are what was refused so far.
func (r *refusals) events() ([]scenario.Event, error) {
	if err := r.drain(); err != nil {
		return nil, err
	}
	alerts, lost := r.engine.Alerts()
	r.mu.Lock()
	lost += r.lost
	r.mu.Unlock()
	out := scenario.BlockedEvents(alerts)
	if lost > 0 {
		out = append(out, scenario.Event{Kind: scenario.Blocked, Detail: fmt.Sprintf("%d lost", lost)})
	}
	return out, nil
}

// eachRefused walks through netlink messages and reports each logged TCP packet
// as the connection that it belongs to, with the prefix of the rule. False
// where a length does not fit.
func eachRefused(b []byte, report func(client, server netip.AddrPort, rule string)) bool {
	for len(b) >= sizeNetlink {
		size := binary.NativeEndian.Uint32(b)
		if size < sizeNetlink || uint64(size) > uint64(len(b)) {
			return false
		}
		if binary.NativeEndian.Uint16(b[4:]) == msgPacket {
			if size < sizeNetlink+sizeNetfilter || !oneRefused(b[sizeNetlink+sizeNetfilter:size], report) {
				return false
			}
		}
		b = b[min(int(size+3)&^3, len(b)):]
	}
	return len(b) == 0
}

func oneRefused(b []byte, report func(client, server netip.AddrPort, rule string)) bool {
	var payload, prefix []byte
	for len(b) >= sizeAttribute {
		size := int(binary.NativeEndian.Uint16(b))
		if size < sizeAttribute || size > len(b) {
			return false
		}
		switch binary.NativeEndian.Uint16(b[2:]) & 0x3fff { // without the flags
		case attrPayload:
			payload = b[sizeAttribute:size]
		case attrPrefix:
			prefix, _, _ = bytes.Cut(b[sizeAttribute:size], []byte{0})
		}
		b = b[min((size+3)&^3, len(b)):]
	}
	if len(b) != 0 {
		return false
	}
	if len(payload) < 20 || payload[0]>>4 != 4 || payload[9] != unix.IPPROTO_TCP {
		return true // not a packet of the battle-field's
	}
	head := int(payload[0]&15) * 4
	if head < 20 || len(payload) < head+14 {
		return false
	}
	t := payload[head:]
	from := netip.AddrPortFrom(netip.AddrFrom4([4]byte(payload[12:16])), binary.BigEndian.Uint16(t))
	to := netip.AddrPortFrom(netip.AddrFrom4([4]byte(payload[16:20])), binary.BigEndian.Uint16(t[2:]))
	if t[13]&(flagSYN|flagACK) == flagSYN|flagACK { // an answer
		from, to = to, from
	}
	report(from, to, string(prefix))
	return true
}

package field

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// logged is a message of nfnetlink_log about a packet.
func logged(prefix string, packet []byte) []byte {
	body := append(attribute(attrPrefix, append([]byte(prefix), 0)), attribute(attrPayload, packet)...)
	m := binary.NativeEndian.AppendUint32(nil, uint32(sizeNetlink+sizeNetfilter+len(body)))
	m = binary.NativeEndian.AppendUint16(m, msgPacket)
	return append(append(m, make([]byte, 10+sizeNetfilter)...), body...)
}

var (
	attacker = netip.MustParseAddrPort("198.18.0.37:40001")
	shell    = netip.MustParseAddrPort("198.18.2.16:22")
)

func TestEachRefused(t *testing.T) {
	first := logged("block_ip", forgedPacket(attacker, shell, 1, flagSYN))
	answer := logged("isolate_host", forgedPacket(shell, attacker, 1, flagSYN|flagACK))
	udp := forgedPacket(attacker, shell, 1, flagSYN)
	udp[9] = 17
	for _, c := range []struct {
		name string
		b    []byte
		want []string
		ok   bool
	}{
		{"two messages", append(append([]byte(nil), first...), answer...),
			[]string{"198.18.0.37:40001 to 198.18.2.16:22 by block_ip", "198.18.0.37:40001 to 198.18.2.16:22 by isolate_host"}, true},
		{"not TCP", logged("block_ip", udp), nil, true},
		{"nothing", nil, nil, true},
		{"cut message", first[:len(first)-4], nil, false},
		{"cut packet", logged("block_ip", forgedPacket(attacker, shell, 1, flagSYN)[:30]), nil, false},
		{"header longer than the packet", logged("block_ip", append([]byte{0x4f}, forgedPacket(attacker, shell, 1, flagSYN)[1:]...)), nil, false},
	} {
		var got []string
		ok := eachRefused(c.b, func(client, server netip.AddrPort, rule string) {
			got = append(got, fmt.Sprintf("%s to %s by %s", client, server, rule))
		})
		if d := cmp.Diff(c.want, got); d != "" || ok != c.ok {
			t.Errorf("%s: %v, expected %v; expected -, got +\n%s", c.name, ok, c.ok, d)
		}
	}
}

// FuzzEachRefused: whatever arrives is read to its end or refused, within its bounds.
func FuzzEachRefused(f *testing.F) {
	f.Add(logged("block_ip", forgedPacket(attacker, shell, 1, flagSYN)))
	f.Add(append(logged("a", forgedPacket(attacker, shell, 1, flagRST)), logged("", nil)...))
	f.Fuzz(func(t *testing.T, b []byte) {
		n := 0
		eachRefused(b, func(client, server netip.AddrPort, rule string) {
			if n++; !client.Addr().Is4() || !server.Addr().Is4() || len(rule) > len(b) {
				t.Errorf("%s to %s by %q", client, server, rule)
			}
		})
		if most := len(b) / (sizeNetlink + sizeNetfilter + sizeAttribute + 34); n > most {
			t.Errorf("%d packets in %d bytes", n, len(b))
		}
	})
}

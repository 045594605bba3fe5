package scenario

import (
	"context"
	"net"
	"net/netip"
	"slices"

	"trainerd/secloop/sensor"
)

// The addresses of every episode. 198.18.0.0/15 is reserved for benchmarks
// (RFC 2544) and never routed.
var (
	Space      = netip.MustParsePrefix("198.18.0.0/15") // everything that may be spoken to
	RedNet     = netip.MustParsePrefix("198.18.0.0/24") // attackers
	UserNet    = netip.MustParsePrefix("198.18.1.0/24") // legitimate clients
	HostNet    = netip.MustParsePrefix("198.18.2.0/24") // blue hosts
	SpoofNet   = netip.MustParsePrefix("198.18.4.0/24") // forged sources of floods
	RedGate    = netip.MustParseAddr("198.18.0.1")
	UserGate   = netip.MustParseAddr("198.18.1.1")
	loopback   = netip.MustParsePrefix("127.0.0.0/8")
	Metadata   = netip.MustParseAddrPort("127.0.0.1:9000") // the internal service that SSRF is after
	Sinkhole   = netip.MustParseAddr("198.18.2.250")       // where lookups go that are sunk; nobody lives there
	TrustedWWW = netip.MustParseAddr("198.18.2.11")        // what www.corp.test should resolve to
)

// FirstSource and LastSource bound the last byte of an attacker's address.
const FirstSource, LastSource = 10, 99

// Service kinds of blue hosts.
const (
	Web   = "web"   // HTTP application with deliberate flaws
	Store = "store" // key-value store that speaks RESP
	Shell = "shell" // remote login, SSH-like
	Share = "share" // file share, SMB-like
	DNS   = "dns"   // name server (RFC 1035 over TCP) with dynamic update
)

// Host is a machine of the blue team: an address with one service.
type Host struct {
	Name    string
	Addr    netip.Addr
	Service string
	Port    uint16
	Extra   uint16 // second port, 0 for none: the management port
}

// At is the address of the host's service.
func (h Host) At() netip.AddrPort { return netip.AddrPortFrom(h.Addr, h.Port) }

var hosts = []Host{
	{"web1", netip.MustParseAddr("198.18.2.11"), Web, 80, 0},
	{"web2", netip.MustParseAddr("198.18.2.12"), Web, 80, 0},
	{"app1", netip.MustParseAddr("198.18.2.13"), Web, 80, 8009},
	{"db1", netip.MustParseAddr("198.18.2.14"), Store, 6379, 0},
	{"db2", netip.MustParseAddr("198.18.2.15"), Store, 6379, 0},
	{"jump1", netip.MustParseAddr("198.18.2.16"), Shell, 22, 0},
	{"file1", netip.MustParseAddr("198.18.2.17"), Share, 445, 0},
	{"dns1", netip.MustParseAddr("198.18.2.18"), DNS, 53, 0},
}

// Account is who logs in where a real sshd answers.
const Account = "ops"

// Hosts lists the blue hosts.
func Hosts() []Host { return slices.Clone(hosts) }

// HostNames lists the blue hosts' names.
func HostNames() []string {
	names := make([]string, len(hosts))
	for i, h := range hosts {
		names[i] = h.Name
	}
	return names
}

// HostByName finds a blue host.
func HostByName(name string) (Host, bool) {
	i := slices.IndexFunc(hosts, func(h Host) bool { return h.Name == name })
	if i < 0 {
		return Host{}, false
	}
	return hosts[i], true
}

// HostByAddr finds a blue host.
func HostByAddr(a netip.Addr) (Host, bool) {
	i := slices.IndexFunc(hosts, func(h Host) bool { return h.Addr == a })
	if i < 0 {
		return Host{}, false
	}
	return hosts[i], true
}

// Inside reports whether an address belongs to the battle-field. Every stand
// refuses to speak to others; the namespaces have no way out either.
func Inside(a netip.Addr) bool { return Space.Contains(a) || loopback.Contains(a) }

// Stand is a place on the network: where red, a user or a blue service stands.
// Dial opens a TCP connection from one of the stand's own addresses; a
// connection that a rule refuses ends in an error at once.
type Stand interface {
	Dial(ctx context.Context, src netip.Addr, dst netip.AddrPort) (net.Conn, error)
	Listen(at netip.AddrPort) (net.Listener, error)
}

// Flooder is a Stand that can send TCP SYNs with n forged sources out of
// SpoofNet. What they fill stays full until stop, which also takes the
// half-open connections back, so that what follows does not depend on when a
// kernel gives them up.
type Flooder interface {
	Stand
	Flood(ctx context.Context, dst netip.AddrPort, n int) (sent int, stop func(), err error)
}

// Backlog is the length of every listener's SYN and accept queue.
const Backlog = 64

// SynOverflow is the kind of the event that counts SYNs which found the queue full.
const SynOverflow = "syn_overflow"

// Refused is the kind of the event that counts packets which rules turned away.
const Refused = "refused"

// Blocked is the kind of the events that say who was turned away by which rule.
const Blocked = "blocked"

// Forged is the i-th forged source of a flood.
func Forged(i int) netip.Addr { return netip.AddrFrom4([4]byte{198, 18, 4, byte(1 + i%250)}) }

// Network tells a sensor whose addresses are whose.
var Network = sensor.Network{
	Host: func(a netip.Addr) string {
		h, _ := HostByAddr(a)
		return h.Name
	},
	Trusted: UserNet.Contains,
}

// UserAddrs are the addresses of legitimate clients, who take turns.
func UserAddrs() []netip.Addr {
	var a []netip.Addr
	for i := range 5 {
		a = append(a, netip.AddrFrom4([4]byte{198, 18, 1, byte(10 + i)}))
	}
	return a
}

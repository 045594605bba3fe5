package server_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"trainerd/server/access"
	"trainerd/server/servertest"
)

// TestSlowAndOversizedHeaders: a client that dribbles its headers is dropped, and
// headers over the limit are refused before they are kept.
func TestSlowAndOversizedHeaders(t *testing.T) {
	g := guard(t, access.Options{}, servertest.Options{})
	hs := g.Server.HTTPServer()
	if hs.ReadHeaderTimeout <= 0 || hs.ReadHeaderTimeout > time.Minute || hs.IdleTimeout <= 0 || hs.MaxHeaderBytes <= 0 {
		t.Errorf("timeouts %v and %v, %d bytes of headers", hs.ReadHeaderTimeout, hs.IdleTimeout, hs.MaxHeaderBytes)
	}
	hs.ReadHeaderTimeout = 200 * time.Millisecond
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go hs.Serve(l)
	defer hs.Close()
	dial := func() net.Conn {
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(10 * time.Second))
		return c
	}
	var wg sync.WaitGroup
	for range 32 {
		c := dial()
		defer c.Close()
		wg.Go(func() {
			began := time.Now()
			for i := 0; ; i++ {
				if _, err := fmt.Fprintf(c, map[bool]string{true: "GET /healthz HTTP/1.1\r\n", false: "X-%d: a\r\n"}[i == 0], i); err != nil {
					break
				}
				if time.Since(began) > 5*time.Second {
					t.Error("a slow client was served for 5 s")
					return
				}
				time.Sleep(20 * time.Millisecond)
			}
		})
	}
	if res, err := http.Get("http://" + l.Addr().String() + "/healthz"); err != nil || res.StatusCode != http.StatusOK {
		t.Errorf("beside slow clients: %v, %v", res, err)
	} else {
		res.Body.Close()
	}
	wg.Wait()

	c := dial()
	defer c.Close()
	go func() { // the server may answer before it has read all of it
		io.WriteString(c, "GET /healthz HTTP/1.1\r\nHost: x\r\nX: "+strings.Repeat("a", 1<<20)+"\r\n\r\n")
	}()
	res, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	if res.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
		t.Errorf("headers of 1 MiB: %d", res.StatusCode)
	}
}

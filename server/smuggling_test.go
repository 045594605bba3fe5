//go:build attacks

package server_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"trainerd/client"
	"trainerd/server/servertest"
)

// raw sends bytes and reads answers until the server closes the connection, or
// is silent for a while after the first.
func (s *siege) raw(t *testing.T, text string) (statuses []int, closed bool) {
	t.Helper()
	conn, err := net.Dial("tcp", s.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	go func() { // the server may answer before it has read all of it
		io.WriteString(conn, text)
	}()
	in := bufio.NewReader(conn)
	for wait := patience; ; wait = 200 * time.Millisecond {
		conn.SetReadDeadline(time.Now().Add(wait))
		res, err := http.ReadResponse(in, nil)
		if err != nil {
			var slow net.Error
			return statuses, !asNetError(err, &slow) || !slow.Timeout()
		}
		io.Copy(io.Discard, res.Body)
		res.Body.Close()
		statuses = append(statuses, res.StatusCode)
	}
}

func asNetError(err error, to *net.Error) bool {
	e, ok := err.(net.Error)
	*to = e
	return ok
}

// TestSmuggling sends requests whose end is unclear. They are refused and the
// connection is closed, or read in the one way that RFC 9112 has; a request that
// hides in a body is never served.
func TestSmuggling(t *testing.T) {
	s := besiege(t, patience, 0, servertest.Options{})
	doc := fmt.Sprintf(`{"model":{"source":"dir:%s"},"objective":{"group_size":2}}`, s.ModelDir)
	hidden := fmt.Sprintf("POST /v1/jobs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", s.admin, len(doc), doc)
	post := func(headers, body string) string {
		return "POST /v1/jobs/" + s.job.ID + "/flush HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + s.admin + "\r\n" + headers + "\r\n" + body
	}
	get := func(line, headers string) string {
		return line + "\r\nHost: x\r\nAuthorization: Bearer " + s.admin + "\r\n" + headers + "\r\n"
	}
	length := func(n int) string { return fmt.Sprintf("Content-Length: %d\r\n", n) }
	chunked := "Transfer-Encoding: chunked\r\n"
	long := strings.Repeat("a", 1<<20)
	for _, tc := range []struct {
		name, text string
		status     int // of the only answer, after which the connection is closed
	}{
		{"two lengths", post(length(0)+length(len(hidden)), hidden), 400},
		{"two lengths in one", post("Content-Length: 0, 5\r\n", "hello"), 400},
		{"a length with a sign", post("Content-Length: +0\r\n", hidden), 400},
		{"a negative length", post("Content-Length: -1\r\n", hidden), 400},
		{"a hexadecimal length", post("Content-Length: 0x0\r\n", hidden), 400},
		{"an overflowing length", post("Content-Length: 18446744073709551616\r\n", hidden), 400},
		{"an empty length", post("Content-Length: \r\n", hidden), 400},
		{"an unknown coding", post("Transfer-Encoding: xchunked\r\n", "0\r\n\r\n"+hidden), 501},
		{"chunked twice", post(chunked+chunked, "0\r\n\r\n"+hidden), 501},
		{"chunked, identity", post("Transfer-Encoding: chunked, identity\r\n", "0\r\n\r\n"+hidden), 501},
		{"identity, chunked", post("Transfer-Encoding: identity, chunked\r\n", "0\r\n\r\n"+hidden), 501},
		{"a name with a space", post("Transfer-Encoding : chunked\r\n", "0\r\n\r\n"+hidden), 400},
		{"a folded line", post("X: a\r\n b\r\nContent-Length : 0\r\n", hidden), 400},
		{"a NUL in a header", post("X: a\x00b\r\n"+length(0), hidden), 400},
		{"a bare CR in a header", post("X: a\rContent-Length: 5\r\n", hidden), 400},
		{"no host", "GET /v1/jobs HTTP/1.1\r\n\r\n" + hidden, 400},
		{"two hosts", get("GET /v1/jobs HTTP/1.1", "Host: y\r\n") + hidden, 400},
		{"a strange host", "GET /v1/jobs HTTP/1.1\r\nHost: a b\r\n\r\n" + hidden, 400},
		{"version 9", get("GET /v1/jobs HTTP/9.1", "") + hidden, 505},
		{"no version", "GET /v1/jobs\r\n\r\n" + hidden, 400},
		{"a space in the path", get("GET /v1/jobs HTTP/1.1 HTTP/1.1", "") + hidden, 400},
		{"a method with a space", get(" GET /v1/jobs HTTP/1.1", "") + hidden, 400},
		{"an expectation", post("Expect: the worst\r\n"+length(0), hidden), 417},
		{"a long line", get("GET /"+long+" HTTP/1.1", ""), 431},
		{"many headers", get("GET /v1/jobs HTTP/1.1", strings.Repeat("X: aaaa\r\n", 20_000)), 431},
		{"HTTP/2 without TLS", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + hidden, 404},
		{"TLS", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400},
	} {
		statuses, closed := s.raw(t, tc.text)
		if len(statuses) != 1 || statuses[0] != tc.status || !closed {
			t.Errorf("%s: answers %v, closed %v, expected %d and closed", tc.name, statuses, closed, tc.status)
		}
	}
	// Both a length and chunks: the chunks count (RFC 9112 section 6.3), and what
	// follows them is the next request, which a token must let in on its own.
	statuses, _ := s.raw(t, post(length(4)+chunked, "0\r\n\r\nGET /v1/jobs HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"))
	if fmt.Sprint(statuses) != "[202 401]" && fmt.Sprint(statuses) != "[400]" && fmt.Sprint(statuses) != "[202]" {
		t.Errorf("a length and chunks: %v", statuses)
	}
	// What is inside a body stays there.
	statuses, _ = s.raw(t, post(length(len(hidden))+"Connection: close\r\n", hidden))
	if len(statuses) != 1 {
		t.Errorf("a request in a body: %v", statuses)
	}
	c, err := client.New(s.URL, client.Options{Token: s.admin})
	if err != nil {
		t.Fatal(err)
	}
	if jobs, err := c.Jobs(t.Context()); err != nil || len(jobs) != 1 {
		t.Errorf("%d jobs, %v: a hidden request was served", len(jobs), err)
	}
	if !strings.Contains(hidden, s.admin) { // it would have been let in
		t.Error("the hidden request has no token")
	}
}

package server_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"

	"trainerd/server/access"
	"trainerd/server/servertest"
)

// FuzzHTTP sends bytes as a request to a server with a job that somebody else
// may use: no answer is a 5xx, refusals are problem documents, and without a
// token nothing guarded is answered.
func FuzzHTTP(f *testing.F) {
	dir := f.TempDir()
	file := filepath.Join(dir, "tokens.json")
	_, own, err := access.CreateToken(file, access.Grant{Roles: access.Roles, Job: ownJob})
	if err != nil {
		f.Fatal(err)
	}
	_, admin, err := access.CreateToken(file, access.Grant{Roles: access.Roles})
	if err != nil {
		f.Fatal(err)
	}
	tokens, err := access.OpenTokens(file)
	if err != nil {
		f.Fatal(err)
	}
	none, err := access.NewSources(nil, nil)
	if err != nil {
		f.Fatal(err)
	}
	e := servertest.Start(f, servertest.Options{Guard: access.New(access.Options{Tokens: tokens}).Middleware, Sources: none.Resolve})
	for _, route := range e.Server.Routes() {
		method, path, _ := strings.Cut(route, " ")
		f.Add([]byte(method+" "+fill(path, ownJob)+"?wait=1s&after=1&limit=2 HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nIdempotency-Key: k\r\nRange: bytes=0-1\r\nContent-Length: 2\r\n\r\n{}"), byte(2))
	}
	doc := loadDescription(f)
	job, err := json.Marshal(e.JobDocument(2, nil))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(fmt.Appendf(nil, "POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", len(job), job), byte(2))
	f.Add([]byte("GET /v1/jobs/..%2f%00/events HTTP/1.0\r\nAccept: text/event-stream;q=0, */*\r\nX-Request-Id: \x7f\r\n\r\n"), byte(0))
	f.Fuzz(func(t *testing.T, raw []byte, who byte) {
		r, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(raw)))
		if err != nil {
			return
		}
		r.RemoteAddr = fmt.Sprintf("[2001:db8::%x]:1", rand.Uint32()) // each guesser from an address of its own
		switch who % 3 {
		case 1:
			r.Header.Set("Authorization", "Bearer "+own)
		case 2:
			r.Header.Set("Authorization", "Bearer "+admin)
		}
		w := httptest.NewRecorder()
		held(t.Errorf, doc, e.Server).ServeHTTP(w, r)
		open := r.URL.Path == "/healthz" || r.URL.Path == "/readyz" || r.URL.Path == "/openapi.json"
		switch {
		case w.Code >= 500:
			t.Errorf("%d %s", w.Code, w.Body)
		case w.Code >= 400 && (w.Header().Get("Content-Type") != "application/problem+json" || w.Body.Len() > 0 && !json.Valid(w.Body.Bytes())):
			t.Errorf("%d %v %s", w.Code, w.Header(), w.Body)
		case w.Code < 400 && who%3 == 0 && !open:
			t.Errorf("%d without a token: %s", w.Code, w.Body)
		}
	})
}

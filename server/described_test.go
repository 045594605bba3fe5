package server_test

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"sort"
	"strings"
	"testing"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"

	"trainerd/kernels/cpu"
	"trainerd/server"
	"trainerd/server/servertest"
	"trainerd/storage/disk"
	"trainerd/trainer"
)

func init() {
	servertest.DefaultWrap = described // every server of this package's tests is held to openapi.json
	raw := func(body io.Reader, _ http.Header, _ *openapi3.SchemaRef, _ openapi3filter.EncodingFn) (any, error) {
		data, err := io.ReadAll(body)
		return string(data), err
	}
	for _, kind := range []string{"application/vnd.apache.arrow.stream", "application/octet-stream", "multipart/byteranges", "application/vnd.trainerd.delta", "text/event-stream"} {
		openapi3filter.RegisterBodyDecoder(kind, raw)
	}
}

func loadDescription(t testing.TB) *openapi3.T {
	t.Helper()
	doc, err := openapi3.NewLoader().LoadFromData(server.OpenAPI())
	if err != nil {
		t.Fatal(err)
	}
	if err := doc.Validate(t.Context()); err != nil {
		t.Fatalf("openapi.json: %v", err)
	}
	return doc
}

// match finds the described path that a request's path, as sent, is an instance of. Fixed
// segments win over parameters, and a last parameter called name takes slashes.
func match(doc *openapi3.T, path string) (pattern string, params map[string]string) {
	patterns := doc.Paths.Keys()
	sort.Slice(patterns, func(i, k int) bool { return strings.Count(patterns[i], "{") < strings.Count(patterns[k], "{") })
	for _, pattern := range patterns {
		want, got := strings.Split(pattern, "/"), strings.Split(path, "/")
		if n := len(want); want[n-1] == "{name}" && len(got) > n {
			got = append(got[:n-1:n-1], strings.Join(got[n-1:], "/"))
		}
		if len(want) != len(got) {
			continue
		}
		params, ok := map[string]string{}, true
		for i := range want {
			if strings.HasPrefix(want[i], "{") {
				if name, err := url.PathUnescape(got[i]); err == nil {
					params[strings.Trim(want[i], "{}")] = name
				}
			} else {
				ok = ok && want[i] == got[i]
			}
		}
		if ok {
			return pattern, params
		}
	}
	return "", nil
}

// tee keeps a copy of an answer.
type tee struct {
	http.ResponseWriter
	status int
	body   bytes.Buffer
}

func (w *tee) WriteHeader(status int) {
	w.status = status
	w.ResponseWriter.WriteHeader(status)
}

func (w *tee) Write(p []byte) (int, error) {
	w.body.Write(p)
	return w.ResponseWriter.Write(p)
}

func (w *tee) Unwrap() http.ResponseWriter { return w.ResponseWriter }
func (w *tee) Flush()                      { http.NewResponseController(w.ResponseWriter).Flush() }

// described returns a wrapper that holds every exchange against openapi.json: an
// answer must be as described whatever the request was, and a request that was
// accepted must have been as described too.
func described(t testing.TB) func(http.Handler) http.Handler {
	doc := loadDescription(t)
	return func(next http.Handler) http.Handler { return held(t.Errorf, doc, next) }
}

// held is described with its failures reported to errorf.
func held(errorf func(string, ...any), doc *openapi3.T, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var sent bytes.Buffer
		got := &tee{ResponseWriter: w, status: http.StatusOK}
		request := r.Clone(r.Context())
		inner := r.WithContext(r.Context()) // net/http looks at what it handed out: whether a body that was not asked for is left
		inner.Body = struct {
			io.Reader
			io.Closer
		}{io.TeeReader(r.Body, &sent), r.Body}
		next.ServeHTTP(got, inner)

		id := got.Header().Get("X-Request-Id")
		if id == "" {
			errorf("%s %s answered %d without a request id", r.Method, r.URL.Path, got.status)
		}
		var p problem
		isProblem := got.Header().Get("Content-Type") == "application/problem+json"
		if isProblem && r.Method != http.MethodHead {
			if err := json.Unmarshal(got.body.Bytes(), &p); err != nil || p.RequestID != id || p.Status != got.status || p.Type != "urn:trainerd:problem:"+p.Code {
				errorf("%s %s answered %d with a problem that is not its own: %+v, %v", r.Method, r.URL.Path, got.status, p, err)
			}
		}
		pattern, params := match(doc, r.URL.EscapedPath())
		item := doc.Paths.Value(pattern)
		if item == nil || item.GetOperation(r.Method) == nil {
			if got.status != http.StatusNotFound && got.status != http.StatusMethodNotAllowed || !isProblem {
				errorf("%s %s answered %d (%s) and is not described", r.Method, r.URL.Path, got.status, got.Header().Get("Content-Type"))
			}
			return
		}
		if op := item.GetOperation(r.Method); got.status < 400 && op.Responses.Status(got.status) == nil {
			errorf("%s %s answered %d, which is not described", r.Method, r.URL.Path, got.status)
		}
		request.Body = io.NopCloser(&sent)
		in := &openapi3filter.RequestValidationInput{
			Request: request, PathParams: params,
			Route: &routers.Route{Spec: doc, Path: pattern, PathItem: item, Method: r.Method, Operation: item.GetOperation(r.Method)},
			// Who is let in is the guard's; see access_test.go.
			Options: &openapi3filter.Options{IncludeResponseStatus: true, MultiError: true, AuthenticationFunc: openapi3filter.NoopAuthenticationFunc},
		}
		ctx := context.Background() // the request's may have ended
		if got.status < 300 {
			if err := openapi3filter.ValidateRequest(ctx, in); err != nil {
				errorf("%s %s was accepted and is not as described: %v", r.Method, r.URL, err)
			}
		}
		out := &openapi3filter.ResponseValidationInput{RequestValidationInput: in, Status: got.status, Header: got.Header(), Options: in.Options}
		out.SetBodyBytes(got.body.Bytes())
		if err := openapi3filter.ValidateResponse(ctx, out); err != nil {
			errorf("%s %s answered %d, not as described: %v\n%.400s", r.Method, r.URL, got.status, err, got.body.String())
		}
	})
}

func TestRoutesAreDescribed(t *testing.T) {
	doc := loadDescription(t)
	described := map[string]bool{}
	for path, item := range doc.Paths.Map() {
		for method := range item.Operations() {
			described[method+" "+path] = true
		}
	}
	dev, err := cpu.New(1)
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	store, err := disk.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	m, err := trainer.NewManager(trainer.Options{Device: dev, DataDir: t.TempDir(), Store: store})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close(t.Context())
	s := server.New(server.Options{Manager: m})
	defer s.Close()
	routes := map[string]bool{}
	for _, r := range s.Routes() {
		routes[r] = true
		if !described[r] {
			t.Errorf("route %s is not described", r)
		}
	}
	for d := range described {
		if !routes[d] {
			t.Errorf("%s is described and is no route", d)
		}
	}
	if len(routes) < 20 {
		t.Errorf("only %d routes", len(routes))
	}
}

func TestOpenAPIIsServed(t *testing.T) {
	s := server.New(server.Options{Manager: &trainer.Manager{}})
	defer s.Close()
	w := httptest.NewRecorder()
	s.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/openapi.json", nil))
	if w.Code != http.StatusOK || !bytes.Equal(w.Body.Bytes(), server.OpenAPI()) {
		t.Errorf("status %d, %d bytes, expected %d", w.Code, w.Body.Len(), len(server.OpenAPI()))
	}
}

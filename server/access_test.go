package server_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"trainerd/client"
	"trainerd/server/access"
	"trainerd/server/servertest"
)

// mayUse says who may use each route, beside access.Table and openapi.json: a
// change of one of the three needs the others. s, r and a are the roles; + means
// that a token which is bound to a job may not.
var mayUse = map[string]string{
	"GET /healthz":                                        "open",
	"GET /readyz":                                         "open",
	"GET /openapi.json":                                   "open",
	"GET /metrics":                                        "ra+",
	"POST /v1/jobs":                                       "a+",
	"GET /v1/jobs":                                        "ra+",
	"GET /v1/jobs/{job}":                                  "sra",
	"DELETE /v1/jobs/{job}":                               "a",
	"POST /v1/jobs/{job}/pause":                           "a",
	"POST /v1/jobs/{job}/resume":                          "a",
	"POST /v1/jobs/{job}/flush":                           "sa",
	"POST /v1/jobs/{job}/rollouts":                        "sa",
	"GET /v1/jobs/{job}/batches/{batch}":                  "sra",
	"POST /v1/jobs/{job}/sample":                          "sa",
	"POST /v1/jobs/{job}/logprobs":                        "sa",
	"GET /v1/jobs/{job}/steps":                            "sra",
	"GET /v1/jobs/{job}/metrics":                          "ra",
	"GET /v1/jobs/{job}/events":                           "sra",
	"POST /v1/jobs/{job}/checkpoints":                     "a",
	"GET /v1/jobs/{job}/checkpoints":                      "ra",
	"GET /v1/jobs/{job}/checkpoints/latest":               "ra",
	"GET /v1/jobs/{job}/checkpoints/{step}":               "ra",
	"GET /v1/jobs/{job}/checkpoints/{step}/files/{name}":  "ra",
	"HEAD /v1/jobs/{job}/checkpoints/{step}/files/{name}": "ra",
}

const ownJob, otherJob = "job-00000000000000aa", "job-00000000000000bb"

// guarded is a server with tokens.
type guarded struct {
	*servertest.Env
	file  string
	audit string
	log   *bytes.Buffer // whole after Stop
	texts []string      // of all tokens made
}

// guard starts a server with tokens, whose log keeps everything.
func guard(t *testing.T, o access.Options, so servertest.Options) *guarded {
	t.Helper()
	dir := t.TempDir()
	g := &guarded{file: filepath.Join(dir, "tokens.json"), audit: filepath.Join(dir, "audit.jsonl"), log: &bytes.Buffer{}}
	g.token(t, access.Grant{Roles: []access.Role{access.Read}}) // so that the file is there
	var err error
	if o.Tokens, err = access.OpenTokens(g.file); err != nil {
		t.Fatal(err)
	}
	if o.Audit, err = access.OpenAudit(g.audit); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { o.Audit.Close() })
	o.Logger = slog.New(slog.NewJSONHandler(&locked{w: g.log}, &slog.HandlerOptions{Level: slog.LevelDebug}))
	so.Logger, so.Guard = o.Logger, access.New(o).Middleware
	g.Env = servertest.Start(t, so)
	return g
}

// locked makes a buffer safe for the handlers of requests.
type locked struct {
	mu sync.Mutex
	w  io.Writer
}

func (l *locked) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(p)
}

func (g *guarded) token(t *testing.T, grant access.Grant) string {
	t.Helper()
	_, text, err := access.CreateToken(g.file, grant)
	if err != nil {
		t.Fatal(err)
	}
	g.texts = append(g.texts, text)
	return text
}

// entries reads the audit log.
func (g *guarded) entries(t *testing.T) []access.Entry {
	t.Helper()
	f, err := os.Open(g.audit)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var out []access.Entry
	for s := bufio.NewScanner(f); s.Scan(); {
		var e access.Entry
		if err := json.Unmarshal(s.Bytes(), &e); err != nil {
			t.Fatalf("%v in %s", err, s.Bytes())
		}
		out = append(out, e)
	}
	return out
}

// fill makes a path of a route.
func fill(path, job string) string {
	return strings.NewReplacer("{job}", job, "{batch}", "1", "{step}", "1", "{name}", "hf/config.json").Replace(path)
}

// TestWhoMayUseWhat sends each route with each kind of token: every role alone,
// unbound, bound to the job of the path and bound to another one; and with none,
// an ended and a revoked one. The jobs do not exist, so what passes is answered
// by the handler with 404 or a complaint about the body, and changes nothing.
func TestWhoMayUseWhat(t *testing.T) {
	g := guard(t, access.Options{}, servertest.Options{Wrap: described(t)})
	type caller struct {
		name, header string
		role         access.Role
		job          string
	}
	callers := []caller{{name: "nobody"}, {name: "a stranger", header: "Bearer trainerd_0000000000000000_" + strings.Repeat("0", 64)}}
	for _, role := range access.Roles {
		for _, job := range []string{"", ownJob, otherJob} {
			text := g.token(t, access.Grant{Roles: []access.Role{role}, Job: job})
			callers = append(callers, caller{name: string(role) + " of " + job, header: "Bearer " + text, role: role, job: job})
		}
	}
	revoked := g.token(t, access.Grant{Roles: access.Roles})
	if _, err := access.RevokeToken(g.file, strings.Split(revoked, "_")[1]); err != nil {
		t.Fatal(err)
	}
	callers = append(callers, caller{name: "revoked", header: "Bearer " + revoked})

	counts := map[int]int{}
	for _, route := range g.Server.Routes() {
		may, ok := mayUse[route]
		if !ok {
			t.Errorf("%s: nothing says who may use it: add it here, to access.Table and to openapi.json", route)
			continue
		}
		method, pattern, _ := strings.Cut(route, " ")
		for _, who := range callers {
			want := http.StatusForbidden
			passes := may == "open"
			switch {
			case passes:
			case who.role == "":
				want = http.StatusUnauthorized
			default:
				passes = strings.Contains(may, string(who.role)[:1]) && (who.job == "" || who.job == ownJob && !strings.HasSuffix(may, "+"))
			}
			req, err := http.NewRequest(method, g.URL+fill(pattern, ownJob), strings.NewReader(""))
			if err != nil {
				t.Fatal(err)
			}
			if who.header != "" {
				req.Header.Set("Authorization", who.header)
			}
			res, err := http.DefaultClient.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			raw, _ := io.ReadAll(res.Body)
			res.Body.Close()
			refused := res.StatusCode == http.StatusUnauthorized || res.StatusCode == http.StatusForbidden
			if passes == refused || !passes && res.StatusCode != want || res.StatusCode >= 500 {
				t.Errorf("%s by %s: %d, expected to pass: %v (else %d)", route, who.name, res.StatusCode, passes, want)
			}
			if challenge := res.Header.Get("WWW-Authenticate"); (challenge != "") != (res.StatusCode == http.StatusUnauthorized) {
				t.Errorf("%s by %s: %d with WWW-Authenticate %q", route, who.name, res.StatusCode, challenge)
			}
			if refused && (method != http.MethodHead && !json.Valid(raw) || res.Header.Get("Content-Type") != "application/problem+json") {
				t.Errorf("%s by %s: %q", route, who.name, raw)
			}
			counts[res.StatusCode]++
		}
	}
	if len(mayUse) != len(g.Server.Routes()) {
		t.Errorf("%d routes here, the server has %d", len(mayUse), len(g.Server.Routes()))
	}
	t.Logf("answers by status: %v", counts)
}

// TestDescriptionSaysWhoMay holds the roles in openapi.json and access.Table against each other and mayUse.
func TestDescriptionSaysWhoMay(t *testing.T) {
	doc := loadDescription(t)
	table := map[string]string{}
	for _, r := range access.Table {
		parts := strings.Split(r.Route, "/")
		for i, p := range parts {
			if name, ok := strings.CutPrefix(p, ":"); ok {
				parts[i] = "{" + name + "}"
			} else if p == "*" {
				parts[i] = "{name}"
			}
		}
		may := ""
		for _, role := range r.May {
			may += string(role)[:1]
		}
		if r.Server {
			may += "+"
		}
		table[strings.Join(parts, "/")] = may
	}
	for path, item := range doc.Paths.Map() {
		for method, op := range item.Operations() {
			route, said := method+" "+path, ""
			roles, _ := op.Extensions["x-roles"].([]any)
			for _, r := range roles {
				said += fmt.Sprint(r)[:1]
			}
			if op.Extensions["x-scope"] == "server" {
				said += "+"
			}
			if op.Security == nil {
				said = "open"
			}
			if said != mayUse[route] || said != "open" && said != table[route] {
				t.Errorf("%s: openapi.json says %q, the table %q, the test %q", route, said, table[route], mayUse[route])
			}
		}
	}
}

// TestRefusalsAreUniform: a wrong token's answer does not say what is wrong with it.
func TestRefusalsAreUniform(t *testing.T) {
	g := guard(t, access.Options{}, servertest.Options{})
	good := g.token(t, access.Grant{Roles: access.Roles})
	id := strings.Split(good, "_")[1]
	expired := g.token(t, access.Grant{Roles: access.Roles, Expires: time.Now().Add(time.Second)})
	revoked := g.token(t, access.Grant{Roles: access.Roles})
	if _, err := access.RevokeToken(g.file, strings.Split(revoked, "_")[1]); err != nil {
		t.Fatal(err)
	}
	time.Sleep(1100 * time.Millisecond)
	answers := map[string]string{}
	for name, headers := range map[string][]string{
		"none":               nil,
		"unknown id":         {"Bearer trainerd_0000000000000000_" + strings.Repeat("0", 64)},
		"wrong secret":       {"Bearer trainerd_" + id + "_" + strings.Repeat("0", 64)},
		"expired":            {"Bearer " + expired},
		"revoked":            {"Bearer " + revoked},
		"basic":              {"Basic " + good},
		"no scheme":          {good},
		"two headers":        {"Bearer " + good, "Bearer " + good},
		"nonsense":           {"Bearer ../../etc/passwd"},
		"far too long":       {"Bearer " + strings.Repeat("a", 32<<10)},
		"scheme alone":       {"Bearer"},
		"upper case":         {"Bearer " + strings.ToUpper(good)},
		"with a second word": {"Bearer " + good + " x"},
	} {
		req, err := http.NewRequest(http.MethodGet, g.URL+"/v1/jobs", nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header["Authorization"] = headers
		req.Header.Set("X-Request-Id", "same")
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		raw, _ := io.ReadAll(res.Body)
		res.Body.Close()
		res.Header.Del("Date")
		if res.StatusCode != http.StatusUnauthorized {
			t.Errorf("%s: %d", name, res.StatusCode)
		}
		answers[fmt.Sprint(res.StatusCode, res.Header, string(raw))] = name
	}
	if len(answers) != 1 {
		t.Errorf("%d different answers: %q", len(answers), answers)
	}
	// The token in the query is none; the right one passes, whatever the scheme's case.
	if status, _ := exchange(t, http.MethodGet, g.URL+"/v1/jobs?access_token="+good, nil, nil); status != http.StatusUnauthorized {
		t.Errorf("a token in the query: %d", status)
	}
	if status, _ := exchange(t, http.MethodGet, g.URL+"/v1/jobs", nil, map[string]string{"Authorization": "bearer " + good}); status != http.StatusOK {
		t.Errorf("the right token: %d", status)
	}
}

// TestGuessingIsSlowedAndDoesNotFillTheLog: many wrong tokens from one address
// are told to wait, and a right one from there passes all the same.
func TestGuessingIsSlowedAndDoesNotFillTheLog(t *testing.T) {
	at := time.Unix(2e9, 0)
	g := guard(t, access.Options{Now: func() time.Time { return at }}, servertest.Options{})
	good := g.token(t, access.Grant{Roles: []access.Role{access.Read}})
	counts := map[int]int{}
	for i := range 150 {
		status, p := exchange(t, http.MethodGet, g.URL+"/v1/jobs", nil, map[string]string{"Authorization": fmt.Sprintf("Bearer trainerd_%016x_%064x", i, i)})
		if status == http.StatusTooManyRequests && (p.Code != "rate_limited" || p.retryAfter == "") {
			t.Fatalf("%+v", p)
		}
		counts[status]++
	}
	if counts[http.StatusUnauthorized] != 100 || counts[http.StatusTooManyRequests] != 50 {
		t.Errorf("answers: %v", counts)
	}
	if status, _ := exchange(t, http.MethodGet, g.URL+"/v1/jobs", nil, map[string]string{"Authorization": "Bearer " + good}); status != http.StatusOK {
		t.Errorf("the right token: %d", status)
	}
	if n := len(g.entries(t)); n != 101 {
		t.Errorf("%d audit entries, expected 101", n)
	}
}

func TestRateOfOneToken(t *testing.T) {
	at := time.Unix(2e9, 0)
	g := guard(t, access.Options{Rate: 2, Now: func() time.Time { return at }}, servertest.Options{Wrap: described(t)})
	a, b := g.token(t, access.Grant{Roles: []access.Role{access.Read}}), g.token(t, access.Grant{Roles: []access.Role{access.Read}})
	get := func(token string) (int, problem) {
		return exchange(t, http.MethodGet, g.URL+"/v1/jobs", nil, map[string]string{"Authorization": "Bearer " + token})
	}
	for range 4 {
		if status, _ := get(a); status != http.StatusOK {
			t.Fatalf("within the burst: %d", status)
		}
	}
	if status, p := get(a); status != http.StatusTooManyRequests || p.Code != "rate_limited" || p.retryAfter != "1" {
		t.Errorf("over it: %d %+v", status, p)
	}
	if status, _ := get(b); status != http.StatusOK {
		t.Errorf("another token: %d", status)
	}
	at = at.Add(500 * time.Millisecond)
	if status, _ := get(a); status != http.StatusOK {
		t.Errorf("after half a second: %d", status)
	}
}

// TestRequestsAtOnce: a stream takes a place until it ends; a probe needs none.
func TestRequestsAtOnce(t *testing.T) {
	g := guard(t, access.Options{Requests: 1}, servertest.Options{})
	admin := g.token(t, access.Grant{Roles: access.Roles})
	c, err := client.New(g.URL, client.Options{Token: admin, Retries: -1})
	if err != nil {
		t.Fatal(err)
	}
	j, err := c.CreateJob(t.Context(), g.JobDocument(2, nil), "")
	if err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, g.URL+"/v1/jobs/"+j.ID+"/events", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+admin)
	stream, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Jobs(t.Context()); client.Code(err) != "too_many_requests" {
		t.Errorf("beside a stream: %v", err)
	}
	if status, _ := exchange(t, http.MethodGet, g.URL+"/healthz", nil, nil); status != http.StatusOK {
		t.Errorf("a probe: %d", status)
	}
	stream.Body.Close()
	for until := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if _, err := c.Jobs(t.Context()); err == nil {
			break
		} else if time.Now().After(until) {
			t.Fatalf("the place of a stream that ended is not free: %v", err)
		}
	}
}

// TestPathTricks: names in paths reach nothing that the plain names do not, and
// a token that is bound to a job stays with it.
func TestPathTricks(t *testing.T) {
	g := guard(t, access.Options{}, servertest.Options{})
	admin := g.token(t, access.Grant{Roles: access.Roles})
	c, err := client.New(g.URL, client.Options{Token: admin})
	if err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	own, other := create(t, c, ctx, g.JobDocument(2, nil)), create(t, c, ctx, g.JobDocument(2, nil))
	for _, id := range []string{own.ID, other.ID} {
		await(t, c, ctx, id, "loaded", func(j client.Job) bool { return j.State != "loading" })
		if _, err := c.Publish(ctx, id, false); err != nil {
			t.Fatal(err)
		}
	}
	bound := g.token(t, access.Grant{Roles: access.Roles, Job: own.ID})
	// raw sends a path as it is, which a Go client would clean.
	raw := func(path, token string) (int, string) {
		conn, err := net.Dial("tcp", strings.TrimPrefix(g.URL, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer %s\r\n\r\n", path, token)
		res, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatalf("%q: %v", path, err)
		}
		defer res.Body.Close()
		body, _ := io.ReadAll(res.Body)
		return res.StatusCode, string(body)
	}
	if status, _ := raw("/v1/jobs/"+own.ID+"/checkpoints/0/files/hf/config.json", bound); status != http.StatusOK {
		t.Fatalf("the plain name: %d", status)
	}
	for _, trick := range []string{
		"../", "..%2f", "..%2F", "%2e%2e/", "%2e%2e%2f", ".%2e/", "..\\", "..%5c", "..%255c", "..%252f", "....//", "%00", "%2500", "..%00/", "..;/", "/", "//", ".", "./", "%2f", "%c0%ae%c0%ae/", "%u002e/",
	} {
		for _, path := range []string{
			"/v1/jobs/" + own.ID + "/" + trick + other.ID,
			"/v1/jobs/" + own.ID + trick + other.ID,
			"/v1/jobs/" + trick + other.ID,
			"/v1/jobs/" + other.ID + trick,
			"/v1/" + trick + "jobs/" + other.ID,
			"/v1/jobs/" + own.ID + "/checkpoints/0/files/" + trick + trick + trick + other.ID + "/config.json",
			"/v1/jobs/" + own.ID + "/checkpoints/0/files/hf/" + trick + trick + "manifest.json",
			"/v1/jobs/" + own.ID + "/checkpoints/" + trick + "/files/hf/config.json",
			"/v1/jobs/" + own.ID + "/" + trick + trick + trick + "metrics",
			"/" + trick + "metrics",
		} {
			status, body := raw(path, bound)
			if status < 400 || status >= 500 {
				t.Errorf("%q by a token of %s: %d\n%.200s", path, own.ID, status, body)
			}
		}
		// What an unbound token may do is no more either: files come from the manifest alone.
		for _, name := range []string{trick + trick + trick + "etc/passwd", "hf/" + trick + "manifest.json"} {
			if status, body := raw("/v1/jobs/"+own.ID+"/checkpoints/0/files/"+name, admin); status < 400 || status >= 500 {
				t.Errorf("file %q: %d\n%.200s", name, status, body)
			}
		}
	}
}

// TestSourcesOfJobs: a job names only what the server allows, also through links.
func TestSourcesOfJobs(t *testing.T) {
	root := t.TempDir()
	model := servertest.WriteModel(t, servertest.TinyConfig(), 1, "F32")
	if err := os.CopyFS(filepath.Join(root, "m"), os.DirFS(model)); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(model, filepath.Join(root, "link")); err != nil {
		t.Fatal(err)
	}
	sources, err := access.NewSources([]string{root}, nil)
	if err != nil {
		t.Fatal(err)
	}
	e := servertest.Start(t, servertest.Options{Wrap: described(t), ModelDir: model, Sources: sources.Resolve})
	c, ctx := connect(t, e)
	for _, source := range []string{"dir:" + model, "dir:" + root + "/link", "dir:" + root + "/m/../link", "dir:" + root + "/m/../../" + filepath.Base(model), "dir:/etc", "dir:/nowhere", "s3://bucket/x"} {
		_, err := c.CreateJob(ctx, e.JobDocument(2, map[string]any{"model": map[string]any{"source": source}}), "")
		var refusal *client.Error
		if !asRefusal(err, &refusal) || refusal.Status != http.StatusForbidden || refusal.Code != "source_not_allowed" || refusal.Errors[0].Name != "model.source" {
			t.Errorf("%q: %v", source, err)
		}
	}
	for _, source := range []string{"dir:" + root + "/m\x00", "s3://169.254.169.254:80/latest", "s3://key:secret@bucket/x", "s3://bucket/../x", "http://127.0.0.1/x", "file:///etc", "DIR:" + root} {
		_, err := c.CreateJob(ctx, e.JobDocument(2, map[string]any{"model": map[string]any{"source": source}}), "")
		if client.Code(err) != "invalid_job" || !strings.Contains(err.Error(), "model.source") {
			t.Errorf("%q: %v", source, err)
		}
	}
	j := create(t, c, ctx, e.JobDocument(2, map[string]any{"model": map[string]any{"source": "dir:" + root + "/m"}}))
	await(t, c, ctx, j.ID, "loaded", func(j client.Job) bool { return j.State != "loading" })
}

func asRefusal(err error, to **client.Error) bool {
	for ; err != nil; err = unwrap(err) {
		if e, ok := err.(*client.Error); ok {
			*to = e
			return len(e.Errors) > 0
		}
	}
	return false
}

func unwrap(err error) error {
	if u, ok := err.(interface{ Unwrap() error }); ok {
		return u.Unwrap()
	}
	return nil
}

// TestRestartLooksAtSourcesAgain: what was allowed when a job was made may not be
// when the server starts again. The job waits, loses nothing, and goes on once it may.
func TestRestartLooksAtSourcesAgain(t *testing.T) {
	var narrowed atomic.Bool
	none, err := access.NewSources(nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	e := servertest.Start(t, servertest.Options{Sources: func(source string) (string, error) {
		if narrowed.Load() {
			return none.Resolve(source)
		}
		return source, nil
	}})
	c, ctx := connect(t, e)
	j := create(t, c, ctx, e.JobDocument(2, nil))
	await(t, c, ctx, j.ID, "loaded", func(j client.Job) bool { return j.State != "loading" })
	if _, err := c.Submit(ctx, j.ID, servertest.Batch("g", 2, 2, -1, 1), ""); err != nil {
		t.Fatal(err)
	}
	await(t, c, ctx, j.ID, "step 1", func(j client.Job) bool { return j.PolicyStep == 1 })
	e.Stop()
	narrowed.Store(true)
	e.Boot(t)
	c, ctx = connect(t, e)
	for range 20 { // it tries again and again
		time.Sleep(20 * time.Millisecond)
		if got, err := c.Job(ctx, j.ID); err != nil || got.State != "loading" {
			t.Fatalf("with a source that is no longer allowed: %s, %v", got.State, err)
		}
	}
	narrowed.Store(false)
	await(t, c, ctx, j.ID, "loaded again", func(j client.Job) bool { return j.State == "waiting" && j.Step == 1 })
}

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
	doc, err := json.Marshal(e.JobDocument(2, nil))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(fmt.Appendf(nil, "POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", len(doc), doc), byte(2))
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
		e.Server.ServeHTTP(w, r)
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

// TestSecretsStayOut sends tokens where they belong and where they do not, and
// looks for them in everything that is written or answered.
func TestSecretsStayOut(t *testing.T) {
	g := guard(t, access.Options{}, servertest.Options{})
	admin := g.token(t, access.Grant{Roles: access.Roles})
	read := g.token(t, access.Grant{Roles: []access.Role{access.Read}})
	c, err := client.New(g.URL, client.Options{Token: admin})
	if err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	j := create(t, c, ctx, g.JobDocument(2, nil))
	await(t, c, ctx, j.ID, "loaded", func(j client.Job) bool { return j.State != "loading" })
	if _, err := c.Submit(ctx, j.ID, servertest.Batch("g", 2, 2, -1, 1), "key"); err != nil {
		t.Fatal(err)
	}
	await(t, c, ctx, j.ID, "step 1 published", func(j client.Job) bool { return j.PolicyStep == 1 })
	var seen bytes.Buffer
	_, err = c.CreateJob(ctx, g.JobDocument(2, map[string]any{"model": map[string]any{"source": "s3://key:hunter2hunter2@bucket/x"}}), "")
	if client.Code(err) != "invalid_job" || !strings.Contains(err.Error(), "model.source") {
		t.Errorf("a source with a password: %v", err)
	}
	fmt.Fprintln(&seen, err)
	for _, r := range []struct {
		method, path string
		header       map[string]string
	}{
		{"GET", "/v1/jobs/" + j.ID, map[string]string{"Authorization": "Bearer " + read}},
		{"DELETE", "/v1/jobs/" + j.ID, map[string]string{"Authorization": "Bearer " + read}},
		{"GET", "/v1/jobs/" + j.ID, map[string]string{"Authorization": "Bearer " + read[:len(read)-1] + "g"}},
		{"GET", "/v1/jobs/" + j.ID, map[string]string{"Authorization": "Basic " + read}},
		{"GET", "/v1/jobs/" + j.ID, map[string]string{"Authorization": "Bearer " + read, "X-Request-Id": read}},
		{"GET", "/v1/jobs?access_token=" + read, nil},
		{"GET", "/metrics", map[string]string{"Authorization": "Bearer " + admin}},
		{"POST", "/v1/jobs", map[string]string{"Authorization": "Bearer " + admin, "Content-Type": "text/plain"}},
	} {
		req := httptest.NewRequest(r.method, r.path, nil)
		for k, v := range r.header {
			req.Header.Set(k, v)
		}
		w := httptest.NewRecorder()
		g.Server.ServeHTTP(w, req)
		fmt.Fprintln(&seen, w.Code, w.Header(), w.Body)
	}
	job, err := c.Job(ctx, j.ID)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintln(&seen, string(job.Document))
	entries := g.entries(t)
	g.Stop()
	for _, path := range []string{g.audit, g.file, filepath.Join(g.DataDir, "trainerd.db")} {
		raw, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		seen.Write(raw)
	}
	if !strings.Contains(g.log.String(), `"msg":"request"`) {
		t.Error("the log has no requests, so it shows nothing")
	}
	seen.Write(g.log.Bytes())
	if bytes.Contains(seen.Bytes(), []byte("hunter2")) {
		t.Error("the password in a source was written or answered")
	}
	for _, text := range g.texts {
		secret := text[strings.LastIndex(text, "_")+1:]
		for _, part := range []string{secret, secret[:16], secret[24:40]} {
			if i := bytes.Index(seen.Bytes(), []byte(part)); i >= 0 {
				t.Errorf("a secret is in: %.200s", seen.Bytes()[max(0, i-100):])
			}
		}
	}
	// The log does say who did it, and what became of it.
	submitted := slices.ContainsFunc(entries, func(e access.Entry) bool {
		return e.Token == strings.Split(admin, "_")[1] && e.Route == "POST /v1/jobs/:job/rollouts" && e.Job == j.ID && e.Status == http.StatusAccepted && e.BytesIn > 0 && e.BytesOut > 0 && e.RequestID != ""
	})
	denied := slices.ContainsFunc(entries, func(e access.Entry) bool {
		return e.Token == strings.Split(read, "_")[1] && e.Route == "DELETE /v1/jobs/:job" && e.Status == http.StatusForbidden && e.Refused != ""
	})
	if !submitted || !denied {
		t.Errorf("entries: %+v", entries)
	}
}

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

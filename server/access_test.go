package server_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

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

	"POST /v1/jobs/{job}/checkpoints/{step}/leases":           "ra",
	"GET /v1/jobs/{job}/checkpoints/{step}/leases":            "ra",
	"PUT /v1/jobs/{job}/checkpoints/{step}/leases/{lease}":    "ra",
	"DELETE /v1/jobs/{job}/checkpoints/{step}/leases/{lease}": "ra",
	"GET /v1/jobs/{job}/checkpoints/{step}/delta":             "ra",
	"PUT /v1/jobs/{job}/nodes/{node}":                         "ra",
	"GET /v1/jobs/{job}/nodes":                                "ra",
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

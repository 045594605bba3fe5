package blue

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"path"
	"regexp"
	"strings"
	"time"

	"trainerd/secloop/scenario"
)

const maxBody = 16 << 10

// serveWeb answers one request and closes.
func (b *Blue) serveWeb(c net.Conn, h scenario.Host) { b.http(c, h, b.web) }

func (b *Blue) serveManagement(c net.Conn, h scenario.Host) { b.http(c, h, b.management) }

func (b *Blue) serveMetadata(c net.Conn, h scenario.Host) {
	b.http(c, h, func(r *http.Request, _ scenario.Host, _ string) (int, string) {
		if r.URL.Path == "/token" {
			return 200, "token " + b.ep.Secret
		}
		return 200, "metadata service"
	})
}

type handler func(r *http.Request, h scenario.Host, body string) (status int, text string)

func (b *Blue) http(c net.Conn, h scenario.Host, do handler) {
	r, err := http.ReadRequest(bufio.NewReader(io.LimitReader(c, 2*maxBody)))
	if err != nil {
		return
	}
	body, err := io.ReadAll(io.LimitReader(r.Body, maxBody))
	if err != nil {
		return
	}
	status, text := 0, ""
	b.log("http", peer(c), h.Name, requestLine(r, string(body)))
	if rule := b.blocked(h, r, string(body)); rule != "" {
		status, text = 403, "blocked by rule "+rule
	} else {
		status, text = do(r, h, string(body))
	}
	fmt.Fprintf(c, "HTTP/1.1 %d %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", status, http.StatusText(status), len(text), text)
}

// requestLine is what the access log keeps of a request.
func requestLine(r *http.Request, body string) string {
	q, _ := url.QueryUnescape(r.URL.RawQuery)
	line := r.Method + " " + r.URL.Path + "?" + q
	if r.Header.Get("X-Middleware-Subrequest") != "" {
		line += " x-middleware-subrequest"
	}
	return line + " " + body
}

// activeContent is what a browser would run.
var activeContent = regexp.MustCompile(`(?i)<script|onerror\s*=`)

// blocked is the web application firewall: the rule that refuses a request, or "".
func (b *Blue) blocked(h scenario.Host, r *http.Request, body string) string {
	q, _ := url.QueryUnescape(r.URL.RawQuery)
	q = strings.ToLower(q)
	writes := r.Method == http.MethodPut || r.Method == http.MethodPost && strings.HasPrefix(r.URL.Path, "/upload")
	expression := false
	for _, v := range r.Header {
		expression = expression || strings.Contains(strings.Join(v, " "), "${")
	}
	for rule, hit := range map[string]bool{
		"sqli":    strings.Contains(q, "'") && (strings.Contains(q, " or ") || strings.Contains(q, "union")),
		"xss":     activeContent.MatchString(body),
		"csrf":    strings.Contains(strings.ToLower(body), "<form"),
		"lfi":     strings.Contains(q, "..") || strings.HasPrefix(r.URL.Path, "/@fs/"),
		"rfi":     strings.Contains(q, "file=http"),
		"ssrf":    strings.Contains(q, "url=http") || strings.Contains(q, "link=http"),
		"upload":  writes,
		"header":  r.Header.Get("X-Middleware-Subrequest") != "" || expression,
		"wrapper": strings.Contains(q, "php://"),
	} {
		if hit && b.Is(h.Name, scenario.WAF+rule) {
			return rule
		}
	}
	return ""
}

// web is the application with its flaws.
func (b *Blue) web(r *http.Request, h scenario.Host, body string) (int, string) {
	patched := b.Is(h.Name, scenario.Patched)
	q := r.URL.Query()
	logged := b.lookupExpression(r, h, patched)
	switch p := r.URL.Path; {
	case p == "/":
		return 200, "shop of " + h.Name + logged + b.loadObject(r, h, patched)
	case p == "/products": // flaw: the query is pasted into the statement
		return b.search("SELECT name FROM products WHERE name = '" + q.Get("q") + "'")
	case p == "/orders": // the same in another place
		return b.search("SELECT name FROM products WHERE name = '" + q.Get("id") + "'")
	case p == "/page":
		return b.page(r.Context(), h, q.Get("file"))
	case strings.HasPrefix(p, "/@fs/"): // flaw: with ?raw?? the list of allowed folders is not asked
		if patched || !strings.HasSuffix(r.URL.RawQuery, "raw??") {
			return 403, "outside of the allow list"
		}
		return b.file(h, strings.TrimPrefix(p, "/@fs"))
	case p == "/fetch": // flaw: internal addresses are fetched for anybody
		return b.fetch(r.Context(), h, q.Get("url"))
	case p == "/preview":
		return b.fetch(r.Context(), h, q.Get("link"))
	case p == "/comments": // flaw: comments are shown as they came
		if r.Method == http.MethodPost {
			b.submitForm(h, body)
		}
		b.mu.Lock()
		defer b.mu.Unlock()
		if r.Method == http.MethodPost && len(b.comments[h.Name]) < 64 {
			b.comments[h.Name] = append(b.comments[h.Name], body)
		}
		return 200, strings.Join(b.comments[h.Name], "\n")
	case p == "/account/reset": // sends the link to the address on file, which a forged form can have changed
		b.mu.Lock()
		ok := b.mail[h.Name] != "" && b.mail[h.Name] == q.Get("to")
		b.mu.Unlock()
		if !ok {
			return 404, "no account with this address"
		}
		return 200, "reset link " + b.run(h, "cat /secret")
	case strings.HasPrefix(p, "/account"): // flaw: a session is good from anywhere
		c, err := r.Cookie("session")
		if err != nil || c.Value != b.ep.Session || b.Is(h.Name, scenario.SessionsRevoked) {
			return 401, "log in first"
		}
		if p == "/account/export" {
			return 200, b.run(h, "cat /secret")
		}
		return 200, "signed in as office"
	case strings.HasPrefix(p, "/upload/") && (r.Method == http.MethodPut || r.Method == http.MethodPost): // flaw: any type is stored and executed
		return b.store(h, path.Base(p), patched)
	case strings.HasPrefix(p, "/files/") && r.Method == http.MethodPut: // flaw: a part of a file becomes a session object
		if patched || r.Header.Get("Content-Range") == "" {
			return 403, "read only"
		}
		b.mu.Lock()
		defer b.mu.Unlock()
		if len(b.objects) < 64 {
			b.objects[h.Name+"/"+strings.TrimSuffix(path.Base(p), ".session")] = body
		}
		return 201, "stored a partial file"
	case strings.HasPrefix(p, "/uploads/"):
		b.mu.Lock()
		ok := b.uploads[h.Name+"/"+path.Base(p)]
		b.mu.Unlock()
		if !ok {
			return 404, "no such upload"
		}
		return 200, b.run(h, q.Get("c"))
	case strings.HasPrefix(p, "/admin"): // flaw: a header that the middleware sets for itself skips the login
		if patched || r.Header.Get("X-Middleware-Subrequest") == "" {
			return 401, "log in first"
		}
		return 200, "admin panel\n" + b.run(h, "cat /secret")
	default:
		return 404, "not found"
	}
}

func (b *Blue) search(statement string) (int, string) {
	rows, err := b.query(statement)
	if err != nil {
		return 500, err.Error()
	}
	return 200, strings.Join(rows, "\n")
}

// store keeps an upload.
func (b *Blue) store(h scenario.Host, name string, patched bool) (int, string) {
	if patched && path.Ext(name) != ".png" {
		return 415, "images only"
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.uploads) < 64 {
		b.uploads[h.Name+"/"+name] = true
	}
	return 200, "stored " + name
}

// file reads one of the files that there are.
func (b *Blue) file(h scenario.Host, name string) (int, string) {
	text, ok := map[string]string{
		"/www/about": "about us", "/etc/passwd": "root:x:0:0", "/secret": b.run(h, "cat /secret"),
	}[name]
	if !ok {
		return 404, "no such page"
	}
	return 200, text
}

var (
	filterChain = regexp.MustCompile(`^(?i:php)://filter/(.*)/resource=(.*)$`)
	runCall     = regexp.MustCompile(`run\(([a-z/ ]*)\)`)
)

// page shows a file. Flaws: the path is not confined to /www, a remote file is
// included and run, and a converter in a filter chain can be made to overflow.
func (b *Blue) page(ctx context.Context, h scenario.Host, name string) (int, string) {
	if m := filterChain.FindStringSubmatch(name); m != nil {
		if call := runCall.FindStringSubmatch(m[2]); call != nil && strings.Contains(m[1], "ISO-2022-CN-EXT") {
			if b.Is(h.Name, scenario.AppAllowlist) {
				return 500, "worker ended"
			}
			return 200, b.run(h, call[1])
		}
		return b.file(h, m[2])
	}
	if strings.HasPrefix(name, "http://") {
		status, text := b.fetch(ctx, h, name)
		if call := runCall.FindStringSubmatch(text); call != nil && status == 200 {
			text = b.run(h, call[1])
		}
		return status, text
	}
	return b.file(h, path.Join("/www", name))
}

// submitForm is the administrator's browser, which sends every form that it is
// shown, with the session that it has.
func (b *Blue) submitForm(h scenario.Host, comment string) {
	_, rest, ok := strings.Cut(comment, "<form action=/account/email?to=")
	to, _, ok2 := strings.Cut(rest, ">")
	if ok && ok2 {
		b.mu.Lock()
		b.mail[h.Name] = to
		b.mu.Unlock()
	}
}

// loadObject restores the session that a cookie names; flaw: from a file that anybody wrote, and runs it.
func (b *Blue) loadObject(r *http.Request, h scenario.Host, patched bool) string {
	c, err := r.Cookie("JSESSIONID")
	if err != nil || patched {
		return ""
	}
	b.mu.Lock()
	object := b.objects[h.Name+"/"+strings.TrimPrefix(c.Value, ".")]
	b.mu.Unlock()
	if call, ok := strings.CutPrefix(object, "serialized:"); ok {
		return "\n" + b.run(h, call)
	}
	return ""
}

var lookupCall = regexp.MustCompile(`\$\{jndi:[a-z]+://([0-9.:]+)/`)

// lookupExpression is the logger; flaw: an expression in a header makes it ask
// another server and run the answer.
func (b *Blue) lookupExpression(r *http.Request, h scenario.Host, patched bool) string {
	m := lookupCall.FindStringSubmatch(r.Header.Get("User-Agent"))
	if m == nil || patched {
		return ""
	}
	_, text := b.fetch(r.Context(), h, "http://"+m[1]+"/a")
	if call := runCall.FindStringSubmatch(text); call != nil && !b.Is(h.Name, scenario.AppAllowlist) {
		return "\n" + b.run(h, call[1])
	}
	return ""
}

// management is the second port of an application server. Flaws: it decodes any
// object and runs it, and reads files that a command's arguments name.
func (b *Blue) management(r *http.Request, h scenario.Host, body string) (int, string) {
	if r.URL.Path == "/cli" && r.Method == http.MethodPost {
		_, name, ok := strings.Cut(body, " @")
		if !ok || b.Is(h.Name, scenario.Patched) {
			return 400, "usage: command arguments"
		}
		text := h.Name
		if name != "/etc/hostname" {
			_, text = b.file(h, name)
		}
		return 200, "no such command: " + text
	}
	if r.URL.Path != "/session" || r.Method != http.MethodPost {
		return 200, "management console"
	}
	_, call, ok := strings.Cut(body, `"@type":"runtime","call":"`)
	if !ok || b.Is(h.Name, scenario.Patched) {
		return 400, "not a session"
	}
	call, _, _ = strings.Cut(call, `"`)
	return 200, b.run(h, call)
}

// fetch gets a page inside the battle-field.
func (b *Blue) fetch(ctx context.Context, h scenario.Host, to string) (int, string) {
	u, err := url.Parse(to)
	if err != nil || u.Scheme != "http" { // url.Parse has lowered it
		return 400, "http only"
	}
	at, err := netip.ParseAddrPort(u.Host)
	if err != nil || !scenario.Inside(at.Addr()) {
		return 502, "not reachable"
	}
	src := h.Addr
	if at.Addr().IsLoopback() {
		src = at.Addr()
	}
	c, err := b.stand.Dial(ctx, src, at)
	if err != nil {
		return 502, "not reachable"
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(serviceTimeout))
	fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: %s\r\n\r\n", u.EscapedPath(), at)
	text, _ := io.ReadAll(io.LimitReader(c, maxBody))
	return 200, string(text)
}

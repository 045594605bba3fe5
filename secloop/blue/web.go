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

// blocked is the web application firewall: the rule that refuses a request, or "".
func (b *Blue) blocked(h scenario.Host, r *http.Request, body string) string {
	q, _ := url.QueryUnescape(r.URL.RawQuery)
	q = strings.ToLower(q)
	for rule, hit := range map[string]bool{
		"sqli":   strings.Contains(q, "'") && (strings.Contains(q, " or ") || strings.Contains(q, "union")),
		"xss":    strings.Contains(strings.ToLower(body), "<script"),
		"lfi":    strings.Contains(q, ".."),
		"ssrf":   strings.Contains(q, "url=http"),
		"upload": r.Method == http.MethodPut,
		"header": r.Header.Get("X-Middleware-Subrequest") != "",
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
	switch p := r.URL.Path; {
	case p == "/":
		return 200, "shop of " + h.Name
	case p == "/products": // flaw: the query is pasted into the statement
		rows, err := b.query("SELECT name FROM products WHERE name = '" + q.Get("q") + "'")
		if err != nil {
			return 500, err.Error()
		}
		return 200, strings.Join(rows, "\n")
	case p == "/page": // flaw: the path is not confined to /www
		text, ok := map[string]string{
			"/www/about": "about us", "/etc/passwd": "root:x:0:0", "/secret": b.run(h, "cat /secret"),
		}[path.Join("/www", q.Get("file"))]
		if !ok {
			return 404, "no such page"
		}
		return 200, text
	case p == "/fetch": // flaw: internal addresses are fetched for anybody
		return b.fetch(r.Context(), h, q.Get("url"))
	case p == "/comments": // flaw: comments are shown as they came
		b.mu.Lock()
		defer b.mu.Unlock()
		if r.Method == http.MethodPost && len(b.comments[h.Name]) < 64 {
			b.comments[h.Name] = append(b.comments[h.Name], body)
		}
		return 200, strings.Join(b.comments[h.Name], "\n")
	case strings.HasPrefix(p, "/upload/") && r.Method == http.MethodPut: // flaw: any type is stored and executed
		name := path.Base(p)
		if patched && path.Ext(name) != ".png" {
			return 415, "images only"
		}
		b.mu.Lock()
		defer b.mu.Unlock()
		if len(b.uploads) < 64 {
			b.uploads[h.Name+"/"+name] = true
		}
		return 200, "stored " + name
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

// management is the second port of an application server; flaw: it decodes any object and runs it.
func (b *Blue) management(r *http.Request, h scenario.Host, body string) (int, string) {
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
	if err != nil || u.Scheme != "http" {
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

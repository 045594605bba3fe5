package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"trainerd/client"
	"trainerd/server/access"
)

// authority signs certificates for a test.
type authority struct {
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	file string
	next int64
}

func newAuthority(t *testing.T, name string) *authority {
	t.Helper()
	a := &authority{dir: t.TempDir()}
	a.file, _ = a.issue(t, name, true)
	return a
}

// issue writes a certificate for loopback and its key as PEM files; the first is the authority's own.
func (a *authority) issue(t *testing.T, name string, isCA bool) (certFile, keyFile string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	a.next++
	c := &x509.Certificate{SerialNumber: big.NewInt(a.next), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	parent, signer := a.cert, a.key
	if isCA {
		c.IsCA, c.BasicConstraintsValid, c.KeyUsage = true, true, x509.KeyUsageCertSign
		parent, signer = c, key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, &key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	if isCA {
		if a.cert, err = x509.ParseCertificate(der); err != nil {
			t.Fatal(err)
		}
		a.key = key
	}
	raw, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	certFile, keyFile = filepath.Join(a.dir, name+".pem"), filepath.Join(a.dir, name+".key")
	for path, block := range map[string]*pem.Block{certFile: {Type: "CERTIFICATE", Bytes: der}, keyFile: {Type: "PRIVATE KEY", Bytes: raw}} {
		if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return certFile, keyFile
}

// serveWith starts a program that ends with the test, and its log.
func serveWith(t *testing.T, change func(*Config)) (*Program, *bytes.Buffer) {
	t.Helper()
	c, dir, log := DefaultConfig(), t.TempDir(), &bytes.Buffer{}
	c.Listen, c.Device, c.Workers, c.Data, c.Store = "127.0.0.1:0", "cpu", 1, filepath.Join(dir, "data"), "dir:"+filepath.Join(dir, "store")
	change(&c)
	p := &Program{Config: c, Log: slog.New(slog.NewTextHandler(log, nil))}
	if err := p.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		if err := p.Close(ctx); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return p, log
}

func dialTo(t *testing.T, p *Program, o client.Options) *client.Client {
	t.Helper()
	o.Retries = -1
	c, err := client.New(p.URL(), o)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// TestTLS: real handshakes with a server of a private authority.
func TestTLS(t *testing.T) {
	ca, stranger := newAuthority(t, "ca"), newAuthority(t, "stranger")
	cert, key := ca.issue(t, "server", false)
	p, _ := serveWith(t, func(c *Config) { c.TLSCert, c.TLSKey = cert, key })
	if !strings.HasPrefix(p.URL(), "https://") {
		t.Errorf("URL %s", p.URL())
	}
	if _, err := dialTo(t, p, client.Options{TLS: client.TLS{CA: ca.file}}).Jobs(t.Context()); err != nil {
		t.Errorf("with its authority: %v", err)
	}
	for name, o := range map[string]client.Options{"without its authority": {}, "with another authority": {TLS: client.TLS{CA: stranger.file}}} {
		if _, err := dialTo(t, p, o).Jobs(t.Context()); err == nil || !strings.Contains(err.Error(), "certificate") {
			t.Errorf("%s: %v", name, err)
		}
	}
	for version, want := range map[uint16]bool{tls.VersionTLS11: false, tls.VersionTLS12: true, tls.VersionTLS13: true} {
		conn, err := tls.Dial("tcp", p.addr.String(), &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS10, MaxVersion: version})
		if (err == nil) != want {
			t.Errorf("%s: %v", tls.VersionName(version), err)
		}
		if err == nil {
			conn.Close()
		}
	}
	if res, err := http.Get("http://" + p.addr.String() + "/healthz"); err == nil {
		if res.Body.Close(); res.StatusCode != http.StatusBadRequest {
			t.Errorf("plain HTTP: %d", res.StatusCode)
		}
	}

	// A renewed certificate is used from the next handshake on, a torn one is not.
	serial := func() string {
		conn, err := tls.Dial("tcp", p.addr.String(), &tls.Config{InsecureSkipVerify: true})
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		return conn.ConnectionState().PeerCertificates[0].SerialNumber.String()
	}
	before := serial()
	later := time.Now().Add(time.Minute) // a clock's tick must not hide the change
	ca.issue(t, "server", false)
	os.Chtimes(cert, later, later)
	if after := serial(); after == before {
		t.Errorf("serial %s before and after", after)
	}
	renewed := serial()
	if err := os.WriteFile(cert, []byte("torn"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := serial(); got != renewed {
		t.Errorf("serial %s with a torn file, expected %s", got, renewed)
	}
}

// TestMutualTLS: who has no certificate of the authority does not get as far as HTTP.
func TestMutualTLS(t *testing.T) {
	ca, stranger := newAuthority(t, "ca"), newAuthority(t, "stranger")
	cert, key := ca.issue(t, "server", false)
	nodeCert, nodeKey := ca.issue(t, "node-7", false)
	badCert, badKey := stranger.issue(t, "node-7", false)
	p, _ := serveWith(t, func(c *Config) {
		c.TLSCert, c.TLSKey, c.TLSClientCA, c.Tokens = cert, key, ca.file, filepath.Join(t.TempDir(), "tokens.json")
		if _, _, err := access.CreateToken(c.Tokens, access.Grant{Roles: []access.Role{access.Read}}); err != nil {
			t.Fatal(err)
		}
	})
	_, token, err := access.CreateToken(p.Config.Tokens, access.Grant{Roles: []access.Role{access.Read}})
	if err != nil {
		t.Fatal(err)
	}
	good := client.TLS{CA: ca.file, Cert: nodeCert, Key: nodeKey}
	if _, err := dialTo(t, p, client.Options{TLS: good, Token: token}).Jobs(t.Context()); err != nil {
		t.Errorf("certificate and token: %v", err)
	}
	if _, err := dialTo(t, p, client.Options{TLS: good}).Jobs(t.Context()); client.Code(err) != "unauthenticated" {
		t.Errorf("certificate without a token: %v", err)
	}
	for name, files := range map[string]client.TLS{"no certificate": {CA: ca.file}, "another authority's": {CA: ca.file, Cert: badCert, Key: badKey}} {
		if _, err := dialTo(t, p, client.Options{TLS: files, Token: token}).Jobs(t.Context()); err == nil || client.Code(err) != "" {
			t.Errorf("%s: %v, expected a connection that ends before HTTP", name, err)
		}
		// In TLS 1.3 the refusal follows the client's own handshake: one that writes
		// may see a broken pipe first, one that only reads sees the alert.
		config := &tls.Config{InsecureSkipVerify: true}
		if files.Cert != "" {
			pair, err := tls.LoadX509KeyPair(files.Cert, files.Key)
			if err != nil {
				t.Fatal(err)
			}
			config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil }
		}
		conn, err := tls.Dial("tcp", p.addr.String(), config)
		if err == nil {
			_, err = conn.Read(make([]byte, 1))
			conn.Close()
		}
		if err == nil || !strings.Contains(err.Error(), "certificate") {
			t.Errorf("%s: %v, expected an alert about the certificate", name, err)
		}
	}
	raw, err := os.ReadFile(filepath.Join(p.Config.Data, "audit.jsonl"))
	if err != nil || strings.Count(string(raw), `"subject":"CN=node-7"`) != 2 {
		t.Errorf("audit: %s, %v", raw, err)
	}
}

// TestTokensAreFoundAndKept goes the whole way: the command makes tokens, a
// server started on the directory asks for them, and the log stays clean.
func TestTokensAreFoundAndKept(t *testing.T) {
	data := filepath.Join(t.TempDir(), "data")
	run := func(args ...string) (string, string) {
		var out, log bytes.Buffer
		root := newRoot()
		root.SetArgs(append(args, "--data", data))
		root.SetOut(&out)
		root.SetErr(&log)
		if err := root.ExecuteContext(t.Context()); err != nil {
			t.Fatalf("%q: %v", args, err)
		}
		return out.String(), log.String()
	}
	admin, said := run("token", "create", "--role", "admin", "--note", "me")
	admin = strings.TrimSpace(admin)
	worker, _ := run("token", "create", "--role", "submit,read", "--job", "job-1", "--expires", "30d")
	worker = strings.TrimSpace(worker)
	list, _ := run("token", "list")
	for _, text := range []string{admin, worker} {
		secret := text[strings.LastIndex(text, "_")+1:]
		if len(secret) != 64 || strings.Contains(list+said, secret) {
			t.Errorf("secret of %d digits in %s%s", len(secret), list, said)
		}
	}
	if !strings.Contains(list, "job-1") || !strings.Contains(list, "submit,read") || strings.Count(list, "never") != 1 {
		t.Errorf("list:\n%s", list)
	}
	cfg := Config{Data: data}
	cfg.settleTokens()
	if cfg.Tokens != filepath.Join(data, "tokens.json") {
		t.Fatalf("tokens %q", cfg.Tokens)
	}
	p, log := serveWith(t, func(c *Config) { c.Data, c.Tokens = data, cfg.Tokens })
	if _, err := dialTo(t, p, client.Options{}).Jobs(t.Context()); client.Code(err) != "unauthenticated" {
		t.Errorf("without a token: %v", err)
	}
	if _, err := dialTo(t, p, client.Options{Token: admin}).Jobs(t.Context()); err != nil {
		t.Errorf("admin: %v", err)
	}
	if _, err := dialTo(t, p, client.Options{Token: worker}).Jobs(t.Context()); client.Code(err) != "denied" {
		t.Errorf("a job's token on all jobs: %v", err)
	}
	// With tokens a job names only configured roots, and there are none.
	_, err := dialTo(t, p, client.Options{Token: admin}).CreateJob(t.Context(), map[string]any{"model": map[string]any{"source": "dir:" + data}}, "")
	if client.Code(err) != "source_not_allowed" || !strings.Contains(err.Error(), "model.source") {
		t.Errorf("any directory: %v", err)
	}
	run("token", "revoke", strings.Split(admin, "_")[1])
	if _, err := dialTo(t, p, client.Options{Token: admin}).Jobs(t.Context()); client.Code(err) != "unauthenticated" {
		t.Errorf("revoked: %v", err)
	}
	list, _ = run("token", "list", "--as-json")
	var first access.Token
	if err := json.Unmarshal([]byte(strings.SplitN(list, "\n", 2)[0]), &first); err != nil || first.Revoked.IsZero() {
		t.Errorf("list: %s, %v", list, err)
	}
	for _, text := range []string{admin, worker} {
		if strings.Contains(log.String(), text[strings.LastIndex(text, "_")+1:]) {
			t.Errorf("a secret is in the log")
		}
	}
}

func TestGateRefusesToOpen(t *testing.T) {
	ca := newAuthority(t, "ca")
	cert, key := ca.issue(t, "server", false)
	_, otherKey := ca.issue(t, "other", false)
	broken := filepath.Join(t.TempDir(), "tokens.json")
	if err := os.WriteFile(broken, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		change func(*Config)
		want   string
	}{
		"certificate without key":  {func(c *Config) { c.TLSCert = cert }, "tls_key"},
		"client CA without either": {func(c *Config) { c.TLSClientCA = ca.file }, "tls_cert"},
		"another's key":            {func(c *Config) { c.TLSCert, c.TLSKey = cert, otherKey }, "tls_cert"},
		"client CA that is a key":  {func(c *Config) { c.TLSCert, c.TLSKey, c.TLSClientCA = cert, key, key }, "tls_client_ca"},
		"no token file":            {func(c *Config) { c.Tokens = broken + "x" }, "tokens"},
		"broken token file":        {func(c *Config) { c.Tokens = broken }, "tokens"},
		"no such root":             {func(c *Config) { c.ModelRoot = "/nowhere/at/all" }, "model_root"},
		"bucket with a prefix":     {func(c *Config) { c.ModelBucket = "a/b" }, "model_bucket"},
		"audit log that is none":   {func(c *Config) { c.Audit = t.TempDir() }, "audit"},
	} {
		c := DefaultConfig()
		c.Data = t.TempDir()
		tc.change(&c)
		if g, err := openGate(c, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, expected to name %s", name, err, tc.want)
			g.close()
		}
	}
}

// TestStrangersNeedTokens: the address decides what a configuration must have.
func TestStrangersNeedTokens(t *testing.T) {
	data := t.TempDir()
	for _, tc := range []struct {
		name  string
		flags []string
		env   map[string]string
		ok    bool
	}{
		{"loopback", nil, nil, true},
		{"everywhere", []string{"--listen", "0.0.0.0:0"}, nil, false},
		{"everywhere, insecure", []string{"--listen", "0.0.0.0:0", "--insecure"}, nil, true},
		{"everywhere, tokens", []string{"--listen", "0.0.0.0:0", "--tokens", "t.json"}, nil, true},
		{"everywhere, tokens by environment", []string{"--listen", "[::]:0"}, map[string]string{"TRAINERD_TOKENS": "t.json"}, true},
		{"everywhere, a certificate is no token", []string{"--listen", ":0", "--tls-cert", "c", "--tls-key", "k", "--tls-client-ca", "ca"}, nil, false},
		{"mapped loopback", []string{"--listen", "[::ffff:127.0.0.1]:0"}, nil, true},
		{"negative rate", []string{"--rate-limit", "-1"}, nil, false},
		{"negative requests", []string{"--max-requests", "-1"}, nil, false},
		{"negative connections", []string{"--max-connections", "-1"}, nil, false},
	} {
		if _, err := load(t, "", tc.env, append(tc.flags, "--data", data)...); (err == nil) != tc.ok {
			t.Errorf("%s: %v", tc.name, err)
		}
	}
	c, err := load(t, "", nil, "--data", data, "--model-root", "/a", "--model-root", "/b")
	if err != nil || strings.Join(c.ModelRoot.values(), " ") != "/a /b" {
		t.Errorf("roots %q, %v", c.ModelRoot, err)
	}
	if _, _, err := access.CreateToken(tokenFileIn(data), access.Grant{Roles: access.Roles}); err != nil {
		t.Fatal(err)
	}
	if c, err := load(t, "", nil, "--data", data, "--listen", "0.0.0.0:0"); err != nil || c.Tokens != tokenFileIn(data) {
		t.Errorf("with a token file in the data directory: %q, %v", c.Tokens, err)
	}
}

func TestExpiry(t *testing.T) {
	now := time.Date(2030, 1, 31, 12, 0, 0, 0, time.UTC)
	for text, want := range map[string]time.Time{
		"": {}, "30d": time.Date(2030, 3, 2, 12, 0, 0, 0, time.UTC), "12h": time.Date(2030, 2, 1, 0, 0, 0, 0, time.UTC), "2031-01-01T00:00:00Z": time.Date(2031, 1, 1, 0, 0, 0, 0, time.UTC),
	} {
		if got, err := parseExpiry(text, now); err != nil || !got.Equal(want) {
			t.Errorf("%q: %v, %v", text, got, err)
		}
	}
	for _, text := range []string{"soon", "-1h", "0d", "-3d", "3dd", "1.5d", "2031-01-01", "0s"} {
		if got, err := parseExpiry(text, now); err == nil {
			t.Errorf("%q: %v", text, got)
		}
	}
}

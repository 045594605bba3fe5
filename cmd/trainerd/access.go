package main

import (
	"crypto/tls"
	"errors"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"trainerd/client"
	"trainerd/internal/fault"
	"trainerd/server/access"
)

// Access is who is let in, how fast, and what jobs may name.
type Access struct {
	Tokens           string `json:"tokens" help:"file of trainerd token; clients must show one of its tokens; empty: DATA/tokens.json if there is one"`
	TLSCert          string `json:"tls_cert" help:"PEM file of the server's certificate chain; with tls_key: serve HTTPS"`
	TLSKey           string `json:"tls_key" help:"PEM file of the certificate's key"`
	TLSClientCA      string `json:"tls_client_ca" help:"PEM file of authorities; every client must show a certificate that one of them signed"`
	RateLimit        int    `json:"rate_limit" help:"requests a second of one token, twice as many at once; 0: no limit"`
	MaxRequests      int    `json:"max_requests" help:"requests answered at once, streams included; 0: no limit"`
	MaxTokenRequests int    `json:"max_token_requests" help:"requests of one token answered at once, so that none takes all places; 0: no limit"`
	MaxConnections   int    `json:"max_connections" help:"open connections; more wait; 0: no limit"`
	Audit            string `json:"audit" help:"file of the audit log, JSON lines; empty: DATA/audit.jsonl if there are tokens"`
	ModelRoot        List   `json:"model_root" help:"directory that dir: model sources must lie below; may be given several times; with none, any on loopback without tokens, else no dir: source"`
	ModelBucket      List   `json:"model_bucket" help:"bucket that s3:// model sources may name; may be given several times; with none, as model-root"`
}

func defaultAccess() Access {
	return Access{RateLimit: 200, MaxRequests: 512, MaxTokenRequests: 256, MaxConnections: 4096}
}

// List is a setting of several values: separated by commas in a file and in the
// environment, a flag for each on the command line.
type List string

func (l List) values() []string {
	if l == "" {
		return nil
	}
	var out []string
	for _, v := range strings.Split(string(l), ",") {
		out = append(out, strings.TrimSpace(v))
	}
	return out
}

// listFlag is a flag that may be given several times.
type listFlag struct{ List }

func (f *listFlag) String() string { return string(f.List) }
func (f *listFlag) Type() string   { return "list" }
func (f *listFlag) Set(v string) error {
	if f.List != "" {
		v = string(f.List) + "," + v
	}
	f.List = List(v)
	return nil
}

var _ pflag.Value = (*listFlag)(nil)

// tokenFileIn is where the tokens of a data directory lie unless said otherwise.
func tokenFileIn(data string) string { return filepath.Join(data, "tokens.json") }

// settleTokens turns authentication on when the data directory has tokens.
func (c *Config) settleTokens() {
	if c.Tokens != "" {
		return
	}
	// A file that cannot be looked at counts: the server then says why and does not start.
	if _, err := os.Lstat(tokenFileIn(c.Data)); err == nil || !errors.Is(err, fs.ErrNotExist) {
		c.Tokens = tokenFileIn(c.Data)
	}
}

// loopback says whether an address of a listener is this machine's alone.
func loopback(listen string) bool {
	host, _, err := net.SplitHostPort(listen)
	ip := net.ParseIP(host)
	return err == nil && (host == "localhost" || ip != nil && ip.IsLoopback())
}

// validateAccess refuses to serve strangers unless told to.
func (c Config) validateAccess() error {
	switch {
	case !loopback(c.Listen) && c.Tokens == "" && !c.Insecure:
		return fault.BadField("listen", c.Listen, "a loopback address, tokens (trainerd token create), or --insecure")
	case c.RateLimit < 0:
		return fault.BadField("rate_limit", c.RateLimit, "0 or more")
	case c.MaxRequests < 0:
		return fault.BadField("max_requests", c.MaxRequests, "0 or more")
	case c.MaxTokenRequests < 0:
		return fault.BadField("max_token_requests", c.MaxTokenRequests, "0 or more")
	case c.MaxConnections < 0:
		return fault.BadField("max_connections", c.MaxConnections, "0 or more")
	}
	return nil
}

// gate is what stands between a listener and the API.
type gate struct {
	guard   *access.Guard
	sources *access.Sources
	tls     *tls.Config // nil: none
	audit   *access.Audit
}

// openGate makes the gate of a configuration. The caller closes it.
func openGate(c Config, log *slog.Logger) (g *gate, err error) {
	g = &gate{sources: access.AnySource()}
	defer func() {
		if err != nil {
			g.close()
		}
	}()
	o := access.Options{Logger: log, Rate: c.RateLimit, Requests: c.MaxRequests, TokenRequests: c.MaxTokenRequests}
	if c.Tokens != "" {
		if o.Tokens, err = access.OpenTokens(c.Tokens); err != nil {
			return nil, err
		}
	}
	if c.Tokens != "" || !loopback(c.Listen) || c.ModelRoot != "" || c.ModelBucket != "" {
		if g.sources, err = access.NewSources(c.ModelRoot.values(), c.ModelBucket.values()); err != nil {
			return nil, err
		}
	}
	if c.TLSCert != "" || c.TLSKey != "" || c.TLSClientCA != "" {
		if g.tls, err = (access.TLS{Cert: c.TLSCert, Key: c.TLSKey, ClientCA: c.TLSClientCA}).Config(); err != nil {
			return nil, err
		}
	}
	if path := c.auditFile(); path != "" {
		if err = os.MkdirAll(filepath.Dir(path), 0o750); err != nil {
			return nil, err
		}
		if g.audit, err = access.OpenAudit(path); err != nil {
			return nil, err
		}
		o.Audit = g.audit
	}
	switch {
	case c.Tokens == "" && !loopback(c.Listen):
		log.Warn("everybody who reaches this address may do everything: --insecure", "listen", c.Listen)
	case c.Tokens != "" && g.tls == nil && !loopback(c.Listen):
		log.Warn("tokens cross the network in clear unless a proxy adds TLS", "listen", c.Listen)
	}
	g.guard = access.New(o)
	return g, nil
}

// auditFile is where the audit log goes: with tokens always somewhere.
func (c Config) auditFile() string {
	if c.Audit == "" && c.Tokens != "" {
		return filepath.Join(c.Data, "audit.jsonl")
	}
	return c.Audit
}

// serve serves until the server is shut down.
func (g *gate) serve(s *http.Server, l net.Listener, maxConnections int) error {
	l = access.LimitListener(l, maxConnections)
	if g.tls == nil {
		return s.Serve(l)
	}
	s.TLSConfig = g.tls
	return s.ServeTLS(l, "", "")
}

// scheme is what a client's address of the server begins with.
func (g *gate) scheme() string {
	if g.tls == nil {
		return "http"
	}
	return "https"
}

func (g *gate) close() error {
	if g == nil || g.audit == nil {
		return nil
	}
	return g.audit.Close()
}

// dial are the flags of a command that talks to a server. The token comes from
// the environment or a file: a command line is for everybody to see.
type dial struct {
	tls       client.TLS
	tokenFile string
}

func (d *dial) bind(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&d.tokenFile, "token-file", "", "file with the bearer token; default: TRAINERD_TOKEN of the environment")
	f.StringVar(&d.tls.CA, "ca", "", "PEM file of the authorities that the server's certificate must be signed by")
	f.StringVar(&d.tls.Cert, "cert", "", "PEM file of the certificate to show (mTLS)")
	f.StringVar(&d.tls.Key, "key", "", "PEM file of its key")
}

// options returns what the flags say.
func (d *dial) options(getenv func(string) string) (client.Options, error) {
	o := client.Options{TLS: d.tls, Token: getenv("TRAINERD_TOKEN")}
	if d.tokenFile != "" {
		raw, err := os.ReadFile(d.tokenFile)
		if err != nil {
			return o, err
		}
		o.Token = strings.TrimSpace(string(raw))
	}
	return o, nil
}

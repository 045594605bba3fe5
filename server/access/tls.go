package access

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"sync"
	"time"

	"trainerd/internal/fault"
)

// TLS are the PEM files of a server's TLS. Cert and Key go together; with
// ClientCA every client must show a certificate that one of its authorities signed.
type TLS struct {
	Cert, Key, ClientCA string
}

// Config returns the server's settings: TLS 1.2 or newer. A certificate that is
// renewed in place is used from the next handshake on; a broken one is not, and
// the one before it stays.
func (t TLS) Config() (*tls.Config, error) {
	if t.Cert == "" || t.Key == "" {
		return nil, fault.BadField("tls_cert", fmt.Sprintf("%q and %q", t.Cert, t.Key), "tls_cert and tls_key, both or neither")
	}
	p := &pair{cert: t.Cert, key: t.Key}
	if _, err := p.get(); err != nil {
		return nil, err
	}
	c := &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return p.get() }}
	if t.ClientCA != "" {
		pool, err := readPool(t.ClientCA)
		if err != nil {
			return nil, fmt.Errorf("tls_client_ca: %w", err)
		}
		c.ClientCAs, c.ClientAuth = pool, tls.RequireAndVerifyClientCert
	}
	return c, nil
}

func readPool(path string) (*x509.CertPool, error) {
	pem, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s: no certificate in PEM", path)
	}
	return pool, nil
}

// pair is a certificate and its key, read again when one of the files changes.
type pair struct {
	cert, key string

	mu     sync.Mutex
	seen   [2]time.Time
	loaded *tls.Certificate
}

func (p *pair) get() (*tls.Certificate, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var now [2]time.Time
	for i, path := range []string{p.cert, p.key} {
		if st, err := os.Stat(path); err == nil {
			now[i] = st.ModTime()
		}
	}
	if p.loaded != nil && now == p.seen {
		return p.loaded, nil
	}
	c, err := tls.LoadX509KeyPair(p.cert, p.key)
	if err != nil {
		if p.loaded != nil {
			return p.loaded, nil // half of a renewal: the next handshake tries again
		}
		return nil, fmt.Errorf("load tls_cert and tls_key: %w", err)
	}
	p.loaded, p.seen = &c, now
	return p.loaded, nil
}

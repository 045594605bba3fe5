package client

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net/http"
	"os"
)

// TLS are the PEM files of a connection over HTTPS. Zero: the system's
// authorities, and no certificate of one's own.
type TLS struct {
	CA        string // authorities that the server's certificate must be signed by, instead of the system's
	Cert, Key string // certificate that the client shows (mTLS); both or neither
}

// transport returns the default transport with these files.
func (t TLS) transport() (*http.Transport, error) {
	tr := http.DefaultTransport.(*http.Transport).Clone()
	c := &tls.Config{MinVersion: tls.VersionTLS12}
	if t.CA != "" {
		pem, err := os.ReadFile(t.CA)
		if err != nil {
			return nil, fmt.Errorf("read certificate authorities: %w", err)
		}
		c.RootCAs = x509.NewCertPool()
		if !c.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("read certificate authorities: %s: no certificate in PEM", t.CA)
		}
	}
	if t.Cert != "" || t.Key != "" {
		if t.Cert == "" || t.Key == "" {
			return nil, fmt.Errorf("client certificate %q and key %q: expected both or neither", t.Cert, t.Key)
		}
		pair, err := tls.LoadX509KeyPair(t.Cert, t.Key)
		if err != nil {
			return nil, fmt.Errorf("load client certificate: %w", err)
		}
		c.Certificates = []tls.Certificate{pair}
	}
	tr.TLSClientConfig = c
	return tr, nil
}

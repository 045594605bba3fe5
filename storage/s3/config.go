package s3

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"

	"trainerd/internal/fault"
	"trainerd/storage"
)

// Config says where a store is and who asks. It must not be printed with %v of
// its fields by hand: String leaves the secrets out.
type Config struct {
	Endpoint  string // "host:port" or "http(s)://host:port"; a scheme overrides Secure
	Bucket    string
	Prefix    string // of every key, without slashes at its ends; may be empty
	Region    string // "" asks the service
	AccessKey string // both empty: anonymous
	SecretKey string
	Secure    bool   // TLS
	PathStyle bool   // http://host/bucket/key always; else as the endpoint is known to want it
	CAFile    string // PEM certificates trusted besides the system's; needs TLS

	// Proxy chooses a proxy for a request; nil: none. A command may pass http.ProxyFromEnvironment.
	Proxy func(*http.Request) (*url.URL, error)

	// MaxRetries bounds the tries of one request (0: 10, with growing pauses of at
	// most a second). The context ends them earlier.
	MaxRetries int

	// Stall bounds how long a request may go without a byte moving (0: 30 s). An
	// operation in which nothing moves for twice as long fails.
	Stall time.Duration
}

// String names the place and no secret.
func (c Config) String() string {
	return fmt.Sprintf("s3 bucket %s at %s", c.Bucket, hostOnly(c.Endpoint))
}

// GoString keeps %#v from printing the keys.
func (c Config) GoString() string { return c.String() }

// hostOnly drops a user and password that someone put into an endpoint.
func hostOnly(endpoint string) string {
	return endpoint[strings.LastIndexByte(endpoint, '@')+1:]
}

// normal checks c and fills in what follows from it. The endpoint it returns is host[:port].
func (c Config) normal() (Config, error) {
	bad := func(name, got, expected string) (Config, error) {
		return Config{}, fault.BadField("s3."+name, fmt.Sprintf("%q", got), expected)
	}
	if strings.Contains(c.Endpoint, "@") {
		return bad("endpoint", "an endpoint with @", "credentials in access key and secret key, not in the endpoint")
	}
	if scheme, host, ok := strings.Cut(c.Endpoint, "://"); ok {
		if scheme != "http" && scheme != "https" {
			return bad("endpoint", c.Endpoint, "http:// or https://")
		}
		c.Endpoint, c.Secure = host, scheme == "https"
	}
	c.Endpoint = strings.TrimSuffix(c.Endpoint, "/")
	if u, err := url.Parse("//" + c.Endpoint); err != nil || u.Host == "" || u.Host != c.Endpoint {
		return bad("endpoint", c.Endpoint, "host:port, with or without http:// or https://, and no path")
	}
	address := "s3://" + c.Bucket
	if c.Prefix != "" {
		address += "/" + c.Prefix
	}
	at, err := storage.ParseURL(address)
	if err != nil || strings.Contains(c.Bucket, "/") {
		return bad("bucket", c.Bucket+" with prefix "+c.Prefix, "a bucket of 3 to 63 lower-case letters, digits, dots and hyphens, and a clean prefix")
	}
	c.Prefix = at.Prefix
	if len(c.Prefix) > 1024-storage.MaxKey-1 {
		return bad("prefix", c.Prefix, fmt.Sprintf("at most %d bytes", 1024-storage.MaxKey-1))
	}
	if (c.AccessKey == "") != (c.SecretKey == "") {
		return Config{}, fault.BadField("s3.access_key", "one of access key and secret key", "both or neither")
	}
	if c.CAFile != "" && !c.Secure {
		return bad("ca_file", c.CAFile, "an https endpoint to use it with")
	}
	if c.Stall < 0 {
		return Config{}, fault.BadField("s3.stall", c.Stall, "0 or more")
	}
	if c.Stall == 0 {
		c.Stall = defaultStall
	}
	if c.MaxRetries < 0 {
		return Config{}, fault.BadField("s3.max_retries", c.MaxRetries, "0 or more")
	}
	return c, nil
}

// client makes the library's client. Nothing is sent yet.
func (c Config) client() (*minio.Core, error) {
	transport := &http.Transport{
		Proxy:               c.Proxy,
		DialContext:         (&net.Dialer{Timeout: 10 * time.Second, KeepAlive: 30 * time.Second}).DialContext,
		MaxIdleConnsPerHost: 16,
		IdleConnTimeout:     time.Minute,
		TLSHandshakeTimeout: 10 * time.Second,
		DisableCompression:  true, // lengths and ranges are of the bytes as stored
	}
	if c.Secure {
		transport.TLSClientConfig = &tls.Config{MinVersion: tls.VersionTLS12}
		if c.CAFile != "" {
			pool, err := x509.SystemCertPool()
			if err != nil {
				pool = x509.NewCertPool()
			}
			pem, err := os.ReadFile(c.CAFile)
			if err != nil {
				return nil, fault.New(fault.Invalid, "bad_ca_file", "read s3.ca_file: %w", err)
			}
			if !pool.AppendCertsFromPEM(pem) {
				return nil, fault.BadField("s3.ca_file", c.CAFile, "a file with PEM certificates")
			}
			transport.TLSClientConfig.RootCAs = pool
		}
	}
	lookup := minio.BucketLookupAuto
	if c.PathStyle {
		lookup = minio.BucketLookupPath
	}
	core, err := minio.NewCore(c.Endpoint, &minio.Options{
		Creds:        credentials.NewStaticV4(c.AccessKey, c.SecretKey, ""),
		Secure:       c.Secure,
		Transport:    patience{next: transport, stall: c.Stall},
		Region:       c.Region,
		BucketLookup: lookup,
		MaxRetries:   c.MaxRetries,
		// Lets the client accept checksums; upload.go sends them as plain headers.
		TrailingHeaders: true,
	})
	if err != nil {
		return nil, fault.New(fault.Invalid, "bad_endpoint", "configure %s: %s", c, scrub(err.Error(), c))
	}
	return core, nil
}

// scrub removes the keys from a text that a service or library wrote.
func scrub(text string, c Config) string {
	for _, secret := range []string{c.SecretKey, c.AccessKey} {
		if secret != "" {
			text = strings.ReplaceAll(text, secret, "[redacted]")
		}
	}
	return text
}

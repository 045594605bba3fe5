package client

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"mime"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"go.opentelemetry.io/otel/propagation"
)

// Options change how a Client works. Zero values mean the defaults.
type Options struct {
	HTTP    *http.Client  // default: a new one without a timeout, since contexts bound the calls
	TLS     TLS           // of the default HTTP client; not together with HTTP
	Token   string        // sent as a bearer token; "": none
	Retries int           // most repetitions of one call; default 8, negative for none
	MaxWait time.Duration // longest pause between repetitions, whatever Retry-After says; default 30 s
}

// Client talks to one server. It is safe for concurrent use.
type Client struct {
	base string
	opts Options
}

// New returns a client of the server at a base URL such as "http://127.0.0.1:8080".
func New(baseURL string, o Options) (*Client, error) {
	u, err := url.Parse(baseURL)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return nil, fmt.Errorf("parse server address %q: expected http://HOST:PORT or https://HOST:PORT", baseURL)
	}
	switch {
	case o.TLS == (TLS{}):
		if o.HTTP == nil {
			o.HTTP = &http.Client{}
		}
	case o.HTTP != nil:
		return nil, errors.New("client options TLS and HTTP: expected one of them")
	default:
		tr, err := o.TLS.transport()
		if err != nil {
			return nil, err
		}
		o.HTTP = &http.Client{Transport: tr}
	}
	if o.Retries == 0 {
		o.Retries = 8
	}
	if o.MaxWait <= 0 {
		o.MaxWait = 30 * time.Second
	}
	return &Client{base: strings.TrimSuffix(baseURL, "/"), opts: o}, nil
}

// Field names one thing that a refusal is about.
type Field struct {
	Name     string `json:"name"`
	Row      *int   `json:"row"` // zero-based row of a batch; nil when there is none
	Got      string `json:"got"`
	Expected string `json:"expected"`
}

// Error is a refusal by the server (RFC 9457).
type Error struct {
	Status     int           `json:"status"`
	Title      string        `json:"title"`
	Detail     string        `json:"detail"`
	Code       string        `json:"code"` // stable, as "queue_full"
	Errors     []Field       `json:"errors"`
	RequestID  string        `json:"request_id"`
	RetryAfter time.Duration `json:"-"` // 0 when the server did not say
}

// Error implements error.
func (e *Error) Error() string {
	text := e.Detail
	if text == "" {
		text = e.Title
	}
	return fmt.Sprintf("%d %s: %s (request %s)", e.Status, e.Code, text, e.RequestID)
}

// Code returns the problem code of a refusal in err's chain, "" when there is none.
func Code(err error) string {
	var e *Error
	if errors.As(err, &e) {
		return e.Code
	}
	return ""
}

// call is one request that may be sent several times.
type call struct {
	method, path string
	query        url.Values
	body         []byte
	contentType  string
	header       http.Header
	key          string // Idempotency-Key
	elsewhere    bool   // a redirect leads to a store, which gets no token
}

// safe says whether sending the call again cannot do anything twice.
func (c call) safe() bool {
	return c.method == http.MethodGet || c.method == http.MethodHead || c.method == http.MethodDelete || c.method == http.MethodPut || c.key != ""
}

// NewKey returns a fresh idempotency key.
func NewKey() string {
	var b [16]byte
	if _, err := rand.Read(b[:]); err != nil {
		panic(err) // the system has no entropy
	}
	return hex.EncodeToString(b[:])
}

// do sends a call until it is answered for good. The caller closes the body of a
// response; its status is 2xx or 304.
func (c *Client) do(ctx context.Context, k call) (*http.Response, error) {
	for try := 0; ; try++ {
		res, err := c.send(ctx, k)
		if err == nil {
			return res, nil
		}
		wait, again := c.pause(err, k, try)
		if !again || ctx.Err() != nil {
			return nil, fmt.Errorf("%s %s: %w", k.method, k.path, err)
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return nil, fmt.Errorf("%s %s: %w (last error: %v)", k.method, k.path, ctx.Err(), err)
		}
	}
}

// pause says whether a failed call is worth repeating, and when.
func (c *Client) pause(err error, k call, try int) (time.Duration, bool) {
	if try >= c.opts.Retries {
		return 0, false
	}
	// Full jitter: clients that were refused together do not come back together.
	backoff := time.Duration(mathrand.Int64N(int64(100*time.Millisecond)<<min(try, 8)) + 1)
	var refusal *Error
	if errors.As(err, &refusal) {
		switch refusal.Status {
		case http.StatusTooManyRequests, http.StatusServiceUnavailable:
			return min(max(backoff, refusal.RetryAfter), c.opts.MaxWait), true
		case http.StatusBadGateway, http.StatusGatewayTimeout:
			return min(backoff, c.opts.MaxWait), k.safe()
		}
		return 0, false
	}
	return min(backoff, c.opts.MaxWait), k.safe()
}

// send sends a call once.
func (c *Client) send(ctx context.Context, k call) (*http.Response, error) {
	u := c.base + k.path
	if len(k.query) > 0 {
		u += "?" + k.query.Encode()
	}
	var body io.Reader
	if k.body != nil {
		body = bytes.NewReader(k.body)
	}
	req, err := http.NewRequestWithContext(ctx, k.method, u, body)
	if err != nil {
		return nil, err
	}
	for name, values := range k.header {
		req.Header[name] = values
	}
	if k.contentType != "" {
		req.Header.Set("Content-Type", k.contentType)
	}
	if k.key != "" {
		req.Header.Set("Idempotency-Key", k.key)
	}
	propagation.TraceContext{}.Inject(ctx, propagation.HeaderCarrier(req.Header)) // of a caller that traces
	if c.opts.Token != "" {
		req.Header.Set("Authorization", "Bearer "+c.opts.Token)
	}
	client := c.opts.HTTP
	if k.elsewhere {
		stay := *client
		stay.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
		client = &stay
	}
	res, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	if k.elsewhere && res.StatusCode == http.StatusTemporaryRedirect {
		res.Body.Close()
		return c.sendElsewhere(ctx, res.Header.Get("Location"), k)
	}
	if res.StatusCode < 300 || res.StatusCode == http.StatusNotModified {
		return res, nil
	}
	defer res.Body.Close()
	return nil, refusal(res)
}

// elsewhere is the client for addresses that a server hands out. They say themselves
// who may read; neither tokens nor certificates go there.
var elsewhere = &http.Client{}

func (c *Client) sendElsewhere(ctx context.Context, address string, k call) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return nil, fmt.Errorf("follow the server to its store: %w", withoutQuery(err))
	}
	for name, values := range k.header {
		req.Header[name] = values
	}
	res, err := elsewhere.Do(req)
	if err != nil {
		return nil, fmt.Errorf("follow the server to its store: %w", withoutQuery(err))
	}
	if res.StatusCode < 300 {
		return res, nil
	}
	defer res.Body.Close()
	return nil, refusal(res)
}

// withoutQuery keeps a signed address out of errors: whoever has it may read.
func withoutQuery(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		u.URL, _, _ = strings.Cut(u.URL, "?")
	}
	return err
}

// once is the client without repetitions, for calls that may as well fail.
func (c *Client) once() *Client {
	o := c.opts
	o.Retries = -1
	return &Client{base: c.base, opts: o}
}

// maxProblem bounds what is read of a refusal.
const maxProblem = 1 << 20

func refusal(res *http.Response) error {
	e := &Error{Title: http.StatusText(res.StatusCode)}
	raw, err := io.ReadAll(io.LimitReader(res.Body, maxProblem))
	kind, _, _ := mime.ParseMediaType(res.Header.Get("Content-Type"))
	if err == nil && (kind == "application/problem+json" || kind == "application/json") {
		err = json.Unmarshal(raw, e)
	}
	if err != nil || e.Code == "" {
		e.Code = "http_" + strconv.Itoa(res.StatusCode)
		e.Detail = strings.TrimSpace(string(raw[:min(len(raw), 200)]))
	}
	e.Status = res.StatusCode
	if seconds, err := strconv.Atoi(res.Header.Get("Retry-After")); err == nil && seconds > 0 {
		e.RetryAfter = time.Duration(seconds) * time.Second
	}
	return e
}

// json sends a call and decodes its answer into out, which may be nil.
func (c *Client) json(ctx context.Context, k call, out any) error {
	res, err := c.do(ctx, k)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if out == nil {
		_, err := io.Copy(io.Discard, res.Body)
		return err
	}
	if err := json.NewDecoder(res.Body).Decode(out); err != nil {
		return fmt.Errorf("%s %s: read answer: %w", k.method, k.path, err)
	}
	return nil
}

func get(path string, query url.Values) call {
	return call{method: http.MethodGet, path: path, query: query}
}

// post makes a call with a JSON body; nil for none.
func post(path string, body any) (call, error) {
	k := call{method: http.MethodPost, path: path}
	if body == nil {
		return k, nil
	}
	raw, err := json.Marshal(body)
	if err != nil {
		return k, fmt.Errorf("encode body of POST %s: %w", path, err)
	}
	k.body, k.contentType = raw, "application/json"
	return k, nil
}

func jobPath(job string, rest ...string) string {
	p := "/v1/jobs/" + url.PathEscape(job)
	for _, r := range rest {
		p += "/" + r
	}
	return p
}

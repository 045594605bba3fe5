package loop

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strings"
	"time"

	"trainerd/internal/fault"
)

// endpoint is an OpenAI-compatible server, spoken to with time-outs and repetitions.
type endpoint struct {
	base    string // such as http://127.0.0.1:8000/v1
	key     string // sent as a bearer token; "": none
	timeout time.Duration
	retries int
	most    int64 // bytes of an answer
	http    *http.Client
}

// newEndpoint checks an address. A secret in the address is refused: addresses are printed.
func newEndpoint(setting, base, key string, timeout time.Duration, retries int, most int64) (endpoint, error) {
	u, err := url.Parse(base)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.User != nil || u.RawQuery != "" {
		return endpoint{}, fault.BadField(setting, "an address that is not of this form", "http://HOST:PORT/v1 or https://HOST/v1, without credentials or query")
	}
	return endpoint{strings.TrimSuffix(base, "/"), key, timeout, retries, most, &http.Client{
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }, // the key goes nowhere else
	}}, nil
}

// post sends a document and decodes the answer into out. What may pass by itself
// (no connection, a time-out, 408, 429, 5xx) is repeated, then Unavailable.
func (e endpoint) post(ctx context.Context, path string, in, out any) (http.Header, error) {
	body, err := json.Marshal(in)
	if err != nil {
		return nil, fmt.Errorf("encode request to %s%s: %w", e.base, path, err)
	}
	for try := 0; ; try++ {
		header, again, err := e.once(ctx, path, body, out)
		if err == nil {
			return header, nil
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if !again {
			return nil, err
		}
		if try >= e.retries {
			return nil, fault.New(fault.Unavailable, "endpoint_unavailable", "ask %s%s: %d times without success: %w", e.base, path, try+1, err)
		}
		// Full jitter, as the client of the server does.
		pause := time.Duration(rand.Int64N(int64(200*time.Millisecond)<<min(try, 6)) + 1)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func (e endpoint) once(ctx context.Context, path string, body []byte, out any) (header http.Header, again bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, e.timeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, e.base+path, bytes.NewReader(body))
	if err != nil {
		return nil, false, err
	}
	req.Header.Set("Content-Type", "application/json")
	if e.key != "" {
		req.Header.Set("Authorization", "Bearer "+e.key)
	}
	res, err := e.http.Do(req)
	if err != nil {
		return nil, true, err
	}
	defer res.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(res.Body, e.most+1))
	switch {
	case err != nil:
		return nil, true, fmt.Errorf("read answer: %w", err)
	case res.StatusCode != http.StatusOK:
		again = res.StatusCode == http.StatusRequestTimeout || res.StatusCode == http.StatusTooManyRequests || res.StatusCode >= 500
		return nil, again, fault.New(fault.Unavailable, "endpoint_refused", "ask %s%s: status %d: %.300s", e.base, path, res.StatusCode, raw)
	case int64(len(raw)) > e.most:
		return nil, false, fault.New(fault.TooLarge, "endpoint_answer", "ask %s%s: the answer is larger than %d bytes", e.base, path, e.most)
	}
	if err := json.Unmarshal(raw, out); err != nil {
		return nil, false, fault.New(fault.Malformed, "endpoint_answer", "ask %s%s: the answer is no JSON of the expected form: %v", e.base, path, err)
	}
	return res.Header, false, nil
}

// unavailable reports whether an error is about somebody who does not answer.
func unavailable(err error) bool {
	var f *fault.Error
	return asFault(err, &f) && f.Kind == fault.Unavailable
}

// asFault finds a fault in an error's chain.
func asFault(err error, f **fault.Error) bool { return errors.As(err, f) }

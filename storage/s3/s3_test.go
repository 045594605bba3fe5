package s3

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"trainerd/internal/fault"
	"trainerd/storage"
)

// The service itself is tested on a real server (minio_test.go, tag minio). The
// servers here only fail in ways that a real one will not do on demand.

const fakeSecret = "fake-secret-9d1e"

// fake answers requests by a function; it counts them.
func fake(t *testing.T, answer func(n int, w http.ResponseWriter, r *http.Request)) *Store {
	t.Helper()
	return fakeStalling(t, 0, answer)
}

// fakeStalling has a stall of its own (0: the default).
func fakeStalling(t *testing.T, stall time.Duration, answer func(n int, w http.ResponseWriter, r *http.Request)) *Store {
	t.Helper()
	var mu sync.Mutex
	n := 0
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		if _, ok := r.URL.Query()["list-type"]; ok { // Open's look at the bucket
			fmt.Fprint(w, `<ListBucketResult><Name>bucket</Name><KeyCount>0</KeyCount></ListBucketResult>`)
			return
		}
		mu.Lock()
		n++
		at := n
		mu.Unlock()
		answer(at, w, r)
	}))
	t.Cleanup(srv.Close)
	s, err := Open(t.Context(), Config{Endpoint: srv.URL, Bucket: "bucket", Region: "us-east-1", AccessKey: "fake-access", SecretKey: fakeSecret, PathStyle: true, MaxRetries: 3, Stall: stall})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func refuse(w http.ResponseWriter, status int, code string) {
	w.WriteHeader(status)
	fmt.Fprintf(w, `<Error><Code>%s</Code><Message>refused, key %s</Message></Error>`, code, fakeSecret)
}

func found(w http.ResponseWriter, etag string, size int) {
	w.Header().Set("ETag", `"`+etag+`"`)
	w.Header().Set("Last-Modified", time.Now().UTC().Format(http.TimeFormat))
	w.Header().Set("Content-Length", strconv.Itoa(size))
}

func TestConflictIsReadAndTriedAgain(t *testing.T) {
	var methods []string
	s := fake(t, func(n int, w http.ResponseWriter, r *http.Request) {
		methods = append(methods, r.Method)
		switch {
		case r.Method == http.MethodPut && r.Header.Get("If-None-Match") != "*":
			t.Errorf("request %d has no condition", n)
		case n == 1, n == 3:
			refuse(w, http.StatusConflict, "ConditionalRequestConflict")
		case r.Method == http.MethodHead:
			w.WriteHeader(http.StatusNotFound)
		default:
			found(w, "new", 0)
		}
	})
	info, err := s.Put(t.Context(), "k", strings.NewReader("x"), 1, storage.Condition{IfAbsent: true})
	if err != nil || info.ETag != "new" {
		t.Errorf("put: %+v, %v", info, err)
	}
	if got := strings.Join(methods, " "); got != "PUT HEAD PUT HEAD PUT" {
		t.Errorf("requests were %s", got)
	}
}

func TestConflictThatIsLost(t *testing.T) {
	for _, test := range []struct {
		c    storage.Condition
		head func(w http.ResponseWriter)
	}{
		{storage.Condition{IfAbsent: true}, func(w http.ResponseWriter) { found(w, "other", 1) }},
		{storage.Condition{IfMatch: "mine"}, func(w http.ResponseWriter) { found(w, "other", 1) }},
		{storage.Condition{IfMatch: "mine"}, func(w http.ResponseWriter) { w.WriteHeader(http.StatusNotFound) }},
	} {
		s := fake(t, func(n int, w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodHead {
				test.head(w)
				return
			}
			refuse(w, http.StatusConflict, "ConditionalRequestConflict")
		})
		if _, err := s.Put(t.Context(), "k", strings.NewReader("x"), 1, test.c); !errors.Is(err, storage.ErrPrecondition) {
			t.Errorf("%+v: %v, expected %v", test.c, err, storage.ErrPrecondition)
		}
	}
}

// TestPutIsSentAgain checks that a repeated body is the same, checksum included.
func TestPutIsSentAgain(t *testing.T) {
	var sums, bodies []string
	var mu sync.Mutex
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		if r.Method != http.MethodPut {
			fmt.Fprint(w, `<ListBucketResult><Name>bucket</Name></ListBucketResult>`)
			return
		}
		mu.Lock()
		defer mu.Unlock()
		sums, bodies = append(sums, r.Header.Get("x-amz-checksum-crc64nvme")+r.Header.Get("x-amz-content-sha256")), append(bodies, string(body))
		if len(sums) == 1 {
			refuse(w, http.StatusServiceUnavailable, "SlowDown")
			return
		}
		found(w, "e", 0)
	}))
	defer srv.Close()
	s, err := Open(t.Context(), Config{Endpoint: srv.URL, Bucket: "bucket", Region: "us-east-1", AccessKey: "a", SecretKey: "b", PathStyle: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Put(t.Context(), "k", strings.NewReader("hello"), -1, storage.Condition{}); err != nil {
		t.Fatal(err)
	}
	// CRC64NVME of "hello" in base64 is checked by the real server; here it must not change.
	digest := fmt.Sprintf("%x", sha256.Sum256([]byte("hello")))
	if len(sums) != 2 || sums[0] != sums[1] || !strings.HasSuffix(sums[0], digest) || bodies[1] != "hello" {
		t.Errorf("requests carried %q with bodies %q", sums, bodies)
	}
}

// TestReadGoesOn breaks the connection after every few bytes.
func TestReadGoesOn(t *testing.T) {
	data := []byte(strings.Repeat("0123456789", 10))
	var ranges, matches []string
	s := fake(t, func(n int, w http.ResponseWriter, r *http.Request) {
		from, total := 0, len(data)
		if _, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &from); err == nil {
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, total-1, total))
		}
		ranges, matches = append(ranges, r.Header.Get("Range")), append(matches, r.Header.Get("If-Match"))
		found(w, "v1", total-from)
		if from > 0 {
			w.WriteHeader(http.StatusPartialContent)
		}
		w.Write(data[from:min(from+30, total)])
		w.(http.Flusher).Flush()
		if from+30 < total {
			panic(http.ErrAbortHandler)
		}
	})
	r, info, err := s.Get(t.Context(), "k", 0, -1)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	got, err := io.ReadAll(r)
	if err != nil || !bytes.Equal(got, data) || info.Size != 100 {
		t.Errorf("read %q, %v", got, err)
	}
	if want := "[ bytes=30-99 bytes=60-99 bytes=90-99]"; fmt.Sprint(ranges) != want {
		t.Errorf("ranges were %v, expected %s", ranges, want)
	}
	if fmt.Sprint(matches) != `[ "v1" "v1" "v1"]` {
		t.Errorf("conditions were %v", matches)
	}
}

func TestReadGivesUp(t *testing.T) {
	for name, test := range map[string]struct {
		answer func(n int, w http.ResponseWriter)
		says   string
	}{
		"never a byte more": {func(n int, w http.ResponseWriter) {
			if n > 1 {
				w.Header().Set("Content-Range", "bytes 4-9/10")
				found(w, "v1", 6)
				w.WriteHeader(http.StatusPartialContent)
			} else {
				found(w, "v1", 10)
				w.Write([]byte("half"))
			}
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		}, "unexpected EOF"},
		"replaced": {func(n int, w http.ResponseWriter) {
			if n > 1 {
				refuse(w, http.StatusPreconditionFailed, "PreconditionFailed")
				return
			}
			found(w, "v1", 10)
			w.Write([]byte("half"))
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		}, "replaced while it was read"},
	} {
		s := fake(t, func(n int, w http.ResponseWriter, r *http.Request) { test.answer(n, w) })
		r, _, err := s.Get(t.Context(), "k", 0, -1)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(r)
		r.Close()
		if string(got) != "half" || fault.KindOf(err) != fault.Unavailable || err == nil || !strings.Contains(err.Error(), test.says) {
			t.Errorf("%s: read %q, %v", name, got, err)
		}
	}
}

// TestFaults maps answers of a service to kinds; the texts name the place and no secret.
func TestFaults(t *testing.T) {
	for _, test := range []struct {
		status int
		code   string
		kind   fault.Kind
		is     error
	}{
		{404, "NoSuchKey", fault.NotFound, storage.ErrNotFound},
		{404, "NoSuchBucket", fault.Unavailable, nil},
		{412, "PreconditionFailed", fault.Conflict, storage.ErrPrecondition},
		{403, "AccessDenied", fault.Unavailable, nil},
		{403, "InvalidAccessKeyId", fault.Unavailable, nil},
		{400, "BadDigest", fault.Unavailable, nil},
		{503, "SlowDown", fault.Unavailable, nil},
		{500, "InternalError", fault.Unavailable, nil},
		{507, "XMinioStorageFull", fault.Unavailable, nil},
	} {
		s := fake(t, func(n int, w http.ResponseWriter, r *http.Request) { refuse(w, test.status, test.code) })
		_, _, err := s.Get(t.Context(), "the/key", 0, -1)
		if err == nil || fault.KindOf(err) != test.kind || test.is != nil && !errors.Is(err, test.is) {
			t.Errorf("%s: %v of kind %v", test.code, err, fault.KindOf(err))
			continue
		}
		if !strings.Contains(err.Error(), "the/key") || strings.Contains(err.Error(), fakeSecret) {
			t.Errorf("%s: text is %q", test.code, err)
		}
		if test.is == nil && (!strings.Contains(err.Error(), "bucket bucket at 127.0.0.1:") || errors.Is(err, storage.ErrNotFound)) {
			t.Errorf("%s: text %q does not name the place", test.code, err)
		}
	}
}

func TestUnreachable(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	l.Close()
	c := Config{Endpoint: address, Bucket: "bucket", Region: "us-east-1", AccessKey: "fake-access", SecretKey: fakeSecret, MaxRetries: 1}
	_, err = Open(t.Context(), c)
	if fault.KindOf(err) != fault.Unavailable || err == nil || !strings.Contains(err.Error(), address) || !strings.Contains(err.Error(), "bucket bucket") {
		t.Errorf("nobody listens: %v", err)
	}
	// The tries end with the context, however many are allowed.
	c.MaxRetries = 1000
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	began := time.Now()
	if _, err := Open(ctx, c); !errors.Is(err, context.DeadlineExceeded) || time.Since(began) > 5*time.Second {
		t.Errorf("after %v: %v, expected %v", time.Since(began), err, context.DeadlineExceeded)
	}
}

func TestCAFile(t *testing.T) {
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, `<ListBucketResult><Name>bucket</Name></ListBucketResult>`)
	}))
	defer srv.Close()
	srv.Config.ErrorLog = nil
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}), 0o644); err != nil {
		t.Fatal(err)
	}
	c := Config{Endpoint: srv.URL, Bucket: "bucket", Region: "us-east-1", CAFile: ca, PathStyle: true, MaxRetries: 1}
	if _, err := Open(t.Context(), c); err != nil {
		t.Errorf("with the certificate: %v", err)
	}
	c.CAFile = ""
	if _, err := Open(t.Context(), c); err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("without it: %v, expected a certificate error", err)
	}
	c.CAFile = filepath.Join(t.TempDir(), "none")
	if _, err := Open(t.Context(), c); fault.KindOf(err) != fault.Invalid || err == nil {
		t.Errorf("missing file: %v", err)
	}
}

func TestConfig(t *testing.T) {
	good := Config{Endpoint: "https://host:9000/", Bucket: "bucket", Prefix: "/a/b/", AccessKey: "key-id-1", SecretKey: fakeSecret}
	c, err := good.normal()
	if err != nil || c.Endpoint != "host:9000" || !c.Secure || c.Prefix != "a/b" {
		t.Errorf("%+v, %v", c.Endpoint, err)
	}
	if text := fmt.Sprintf("%v %+v %#v %s", good, good, good, good); strings.Contains(text, fakeSecret) || strings.Contains(text, "key-id-1") {
		t.Errorf("printed configuration holds a secret: %s", text)
	}
	for name, change := range map[string]func(*Config){
		"endpoint":   func(c *Config) { c.Endpoint = "" },
		"endpoint ":  func(c *Config) { c.Endpoint = "ftp://host" },
		"endpoint  ": func(c *Config) { c.Endpoint = "http://host/path" },
		"endpoint @": func(c *Config) { c.Endpoint = "http://me:" + fakeSecret + "@host" },
		"bucket":     func(c *Config) { c.Bucket = "" },
		"bucket ":    func(c *Config) { c.Bucket = "Upper" },
		"bucket  ":   func(c *Config) { c.Prefix = "a/../b" },
		"bucket   ":  func(c *Config) { c.Bucket = "bucket/x" },
		"prefix":     func(c *Config) { c.Prefix = strings.Repeat("p/", 130) + "p" },
		"access_key": func(c *Config) { c.SecretKey = "" },
		"ca_file":    func(c *Config) { c.Endpoint, c.CAFile = "http://host", "x" },
		"max":        func(c *Config) { c.MaxRetries = -1 },
	} {
		c := good
		change(&c)
		_, err := c.normal()
		if fault.KindOf(err) != fault.Invalid || err == nil || !strings.Contains(err.Error(), "s3."+strings.Trim(name, " @")) {
			t.Errorf("%s: %v", name, err)
		} else if strings.Contains(err.Error(), fakeSecret) {
			t.Errorf("%s: error %q holds a secret", name, err)
		}
	}
}

// TestSilentServiceIsToldSoon connects to a service that takes connections and
// says nothing, as a paused one does.
func TestSilentServiceIsToldSoon(t *testing.T) {
	silent := make(chan struct{})
	s := fakeStalling(t, 50*time.Millisecond, func(n int, w http.ResponseWriter, r *http.Request) { <-silent })
	defer close(silent)
	for name, call := range map[string]func() error{
		"stat": func() error { _, err := s.Stat(t.Context(), "k"); return err },
		"get":  func() error { _, _, err := s.Get(t.Context(), "k", 0, -1); return err },
		"put": func() error {
			_, err := s.Put(t.Context(), "k", strings.NewReader("x"), 1, storage.Condition{})
			return err
		},
		"delete": func() error { return s.Delete(t.Context(), "k") },
	} {
		began := time.Now()
		err := call()
		if f, ok := fault.As(err); !ok || f.Kind != fault.Unavailable || f.Code != "s3_stalled" {
			t.Errorf("%s: %v, expected the code s3_stalled", name, err)
		}
		// Two stalls, and the pauses of at most a second between the repetitions that are left.
		if took := time.Since(began); took > 20*time.Second {
			t.Errorf("%s took %v", name, took)
		}
	}
}

// TestSlowIsNotSilent reads and writes bytes that trickle for longer than the stall,
// and takes its time between two reads.
func TestSlowIsNotSilent(t *testing.T) {
	const stall = 200 * time.Millisecond
	s := fakeStalling(t, stall, func(n int, w http.ResponseWriter, r *http.Request) {
		found(w, "e", 10)
		if r.Method != http.MethodGet {
			return
		}
		for range 10 {
			w.Write([]byte("x"))
			w.(http.Flusher).Flush()
			time.Sleep(stall / 4)
		}
	})
	r, _, err := s.Get(t.Context(), "k", 0, -1)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	got := make([]byte, 10)
	if _, err := io.ReadFull(r, got[:2]); err != nil {
		t.Fatal(err)
	}
	time.Sleep(2 * stall) // the reader's own pause
	if _, err := io.ReadFull(r, got[2:]); err != nil || string(got) != "xxxxxxxxxx" {
		t.Errorf("read %q, %v", got, err)
	}
	// A source that takes long is no fault of the service.
	if _, err := s.Put(t.Context(), "k", slowSource{strings.NewReader("data"), 3 * stall}, -1, storage.Condition{}); err != nil {
		t.Errorf("put of a slow source: %v", err)
	}
}

type slowSource struct {
	io.Reader
	wait time.Duration
}

func (s slowSource) Read(p []byte) (int, error) {
	time.Sleep(s.wait)
	return s.Reader.Read(p)
}

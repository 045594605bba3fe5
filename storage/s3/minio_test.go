//go:build minio

package s3

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"

	"trainerd/internal/fault"
	"trainerd/storage"
	"trainerd/storage/storagetest"
)

const (
	testAccessKey = "trainerd-test-access"
	testSecretKey = "trainerd-test-secret-3f9c"
)

var (
	endpoint string // of the server that TestMain started
	buckets  atomic.Int32
)

// TestMain starts one real MinIO server on a loopback port with a temporary
// directory and ends it by its process handle.
func TestMain(m *testing.M) {
	code, err := withServer(m.Run)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func binary() (string, error) {
	path := os.Getenv("TRAINERD_MINIO")
	if path == "" {
		cache := os.Getenv("XDG_CACHE_HOME")
		if cache == "" {
			home, err := os.UserHomeDir()
			if err != nil {
				return "", err
			}
			cache = filepath.Join(home, ".cache")
		}
		path = filepath.Join(cache, "trainerd", "bin", "minio")
	}
	if _, err := os.Stat(path); err != nil {
		return "", fmt.Errorf("find the MinIO server: %w\nbuild it with\n\tGOBIN=%s go install github.com/minio/minio@latest\nor name one in TRAINERD_MINIO", err, filepath.Dir(path))
	}
	return path, nil
}

func withServer(run func() int) (int, error) {
	path, err := binary()
	if err != nil {
		return 0, err
	}
	dir, err := os.MkdirTemp("", "trainerd-minio-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	api, console, err := freePorts()
	if err != nil {
		return 0, err
	}
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		return 0, err
	}
	defer log.Close()
	server := exec.Command(path, "server", "--quiet", "--address", api, "--console-address", console, filepath.Join(dir, "data"))
	server.Env = append(os.Environ(), "MINIO_ROOT_USER="+testAccessKey, "MINIO_ROOT_PASSWORD="+testSecretKey, "MINIO_BROWSER=off", "HOME="+dir)
	server.Stdout, server.Stderr = log, log
	if err := server.Start(); err != nil {
		return 0, fmt.Errorf("start %s: %w", path, err)
	}
	ended := make(chan error, 1)
	go func() { ended <- server.Wait() }()
	defer func() {
		server.Process.Kill()
		<-ended
	}()
	for deadline := time.Now().Add(60 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		select {
		case err := <-ended:
			ended <- err
			text, _ := os.ReadFile(log.Name())
			return 0, fmt.Errorf("MinIO ended at once: %v\n%s", err, text)
		default:
		}
		resp, err := http.Get("http://" + api + "/minio/health/cluster")
		if err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				break
			}
		}
		if time.Now().After(deadline) {
			return 0, errors.New("MinIO is not ready after 60 s")
		}
	}
	endpoint = "http://" + api
	return run(), nil
}

// freePorts are two loopback addresses nobody listens on now.
func freePorts() (string, string, error) {
	var got [2]string
	for i := range got {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return "", "", err
		}
		defer l.Close()
		got[i] = l.Addr().String()
	}
	return got[0], got[1], nil
}

// config is a bucket of its own for every test.
func config(t *testing.T) Config {
	t.Helper()
	c := Config{Endpoint: endpoint, Bucket: fmt.Sprintf("test-%d", buckets.Add(1)), Prefix: "some/prefix",
		AccessKey: testAccessKey, SecretKey: testSecretKey, PathStyle: true}
	normal, err := c.normal()
	if err != nil {
		t.Fatal(err)
	}
	core, err := normal.client()
	if err != nil {
		t.Fatal(err)
	}
	if err := core.MakeBucket(t.Context(), c.Bucket, minio.MakeBucketOptions{}); err != nil {
		t.Fatal(err)
	}
	return c
}

func open(t *testing.T, c Config) *Store {
	t.Helper()
	s, err := Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestMinIOSuite(t *testing.T) {
	storagetest.Run(t, storagetest.Config{
		Open:    func(t *testing.T) storage.Blob { return open(t, config(t)) },
		Again:   func(t *testing.T, b storage.Blob) storage.Blob { return open(t, b.(*Store).Config()) },
		Secrets: []string{testSecretKey, testAccessKey},
	})
}

func TestMinIOPrefixesAreApart(t *testing.T) {
	c := config(t)
	other := c
	other.Prefix = "some/prefix-2"
	bare := c
	bare.Prefix = ""
	a, b, all := open(t, c), open(t, other), open(t, bare)
	for _, s := range []*Store{a, b} {
		if _, err := s.Put(t.Context(), "k", strings.NewReader(s.prefix), -1, storage.Condition{IfAbsent: true}); err != nil {
			t.Fatal(err)
		}
	}
	var got []string
	if err := all.List(t.Context(), "", func(o storage.Info) error { got = append(got, o.Key); return nil }); err != nil {
		t.Fatal(err)
	}
	if strings.Join(got, " ") != "some/prefix-2/k some/prefix/k" {
		t.Errorf("bucket holds %q", got)
	}
}

func TestMinIOPresign(t *testing.T) {
	s := open(t, config(t))
	if _, err := s.Put(t.Context(), "a b/ü", strings.NewReader("hello"), 5, storage.Condition{}); err != nil {
		t.Fatal(err)
	}
	url, err := s.Presign(t.Context(), "a b/ü", time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Range", "bytes=1-3")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if body, err := io.ReadAll(resp.Body); err != nil || resp.StatusCode != http.StatusPartialContent || string(body) != "ell" {
		t.Errorf("presigned range: status %d, %q, %v", resp.StatusCode, body, err)
	}
	if strings.Contains(url, testSecretKey) {
		t.Error("URL holds the secret key")
	}
}

// TestMinIOSweep leaves uploads as a killed process does and sweeps only those
// under the store's own prefix that are old.
func TestMinIOSweep(t *testing.T) {
	c := config(t)
	s := open(t, c)
	begin := func(object string) {
		id, err := s.core.NewMultipartUpload(t.Context(), c.Bucket, object, minio.PutObjectOptions{})
		if err != nil {
			t.Fatal(err)
		}
		data := strings.NewReader("part")
		if _, err := s.core.PutObjectPart(t.Context(), c.Bucket, object, id, 1, data, data.Size(), minio.PutObjectPartOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	begin("some/prefix/jobs/a/model")
	begin("some/prefix/jobs/a/model")
	begin("some/prefix/jobs/b/model")
	begin("some/prefix-2/model")
	if n, err := s.Sweep(t.Context(), time.Hour); err != nil || n != 0 {
		t.Errorf("swept %d young uploads, %v", n, err)
	}
	if n, err := s.Sweep(t.Context(), -time.Hour); err != nil || n != 3 {
		t.Errorf("swept %d uploads (%v), expected 3", n, err)
	}
	if n, err := s.Sweep(t.Context(), -time.Hour); err != nil || n != 0 {
		t.Errorf("swept %d uploads again, %v", n, err)
	}
	left := 0
	for range s.core.ListIncompleteUploads(t.Context(), c.Bucket, "some/prefix-2/model", true) {
		left++
	}
	if left != 1 {
		t.Errorf("the other prefix has %d uploads, expected its own 1", left)
	}
	// A Put that fails leaves no parts behind.
	large := io.MultiReader(strings.NewReader(strings.Repeat("x", 40<<20)), errReader{})
	if _, err := s.Put(t.Context(), "failed", large, -1, storage.Condition{}); err == nil {
		t.Error("put of a failing source succeeded")
	}
	if n, err := s.Sweep(t.Context(), -time.Hour); err != nil || n != 0 {
		t.Errorf("a failed Put left %d uploads, %v", n, err)
	}
}

type errReader struct{}

func (errReader) Read([]byte) (int, error) { return 0, errors.New("broken source") }

func TestMinIORefusals(t *testing.T) {
	good := config(t)
	for _, test := range []struct {
		name   string
		change func(*Config)
		says   string
	}{
		{"wrong secret", func(c *Config) { c.SecretKey = "wrong-secret-key" }, "denied"},
		{"wrong user", func(c *Config) { c.AccessKey = "nobody-access" }, "denied"},
		{"anonymous", func(c *Config) { c.AccessKey, c.SecretKey = "", "" }, "denied"},
		{"no bucket", func(c *Config) { c.Bucket = "no-such-bucket" }, "bucket does not exist"},
		{"TLS to a plain port", func(c *Config) { c.Endpoint = strings.Replace(c.Endpoint, "http", "https", 1); c.MaxRetries = 1 }, "HTTP response to HTTPS client"},
	} {
		c := good
		test.change(&c)
		_, err := Open(t.Context(), c)
		if err == nil || fault.KindOf(err) != fault.Unavailable || errors.Is(err, storage.ErrNotFound) {
			t.Errorf("%s: %v", test.name, err)
			continue
		}
		for _, part := range []string{test.says, c.Bucket, strings.SplitAfter(c.Endpoint, "://")[1], "open"} {
			if !strings.Contains(err.Error(), part) {
				t.Errorf("%s: error %q does not name %q", test.name, err, part)
			}
		}
		for _, secret := range []string{c.SecretKey, c.AccessKey} {
			if secret != "" && strings.Contains(err.Error(), secret) {
				t.Errorf("%s: error %q holds a secret", test.name, err)
			}
		}
	}
	// A bucket that goes away later is no missing object.
	s := open(t, good)
	if err := s.core.RemoveBucket(t.Context(), good.Bucket); err != nil {
		t.Fatal(err)
	}
	c := storage.Checkpoints{Blob: s}
	if _, err := c.Latest(context.WithoutCancel(t.Context()), "job"); err == nil || errors.Is(err, storage.ErrNotFound) {
		t.Errorf("latest without a bucket: %v, expected an error that is not %v", err, storage.ErrNotFound)
	}
}

//go:build faults

package faulttest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
)

// keys are credentials of an object store.
type keys struct{ access, secret string }

var rightKeys = keys{"faulttest-access", "faulttest-secret-5b1e"}

const (
	bucket = "faults"
	prefix = "some/prefix"
)

// minioServer is a MinIO process that a test starts, stops and starts again on
// the same address and directory.
type minioServer struct {
	t    *testing.T
	addr string
	dir  string // of its data
	home string
	cmd  *exec.Cmd
	done chan struct{}
}

func minioBinary(t *testing.T) string {
	t.Helper()
	path := os.Getenv("TRAINERD_MINIO")
	if path == "" {
		cache, err := os.UserCacheDir()
		if err != nil {
			t.Fatal(err)
		}
		path = filepath.Join(cache, "trainerd", "bin", "minio")
	}
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("find the MinIO server: %v; `make faults` builds it, TRAINERD_MINIO names one", err)
	}
	return path
}

// startMinIO starts a server with an empty bucket on dir.
func startMinIO(t *testing.T, dir string) *minioServer {
	t.Helper()
	m := &minioServer{t: t, addr: freeAddress(t), dir: dir, home: t.TempDir()}
	t.Cleanup(m.kill)
	m.start(rightKeys)
	if err := m.client(rightKeys).MakeBucket(t.Context(), bucket, minio.MakeBucketOptions{}); err != nil {
		t.Fatal(err)
	}
	return m
}

// freeAddress is a loopback address that nobody listens on now.
func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func (m *minioServer) start(root keys) {
	m.t.Helper()
	log, err := os.OpenFile(filepath.Join(m.home, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		m.t.Fatal(err)
	}
	defer log.Close()
	m.cmd = exec.Command(minioBinary(m.t), "server", "--quiet", "--address", m.addr, "--console-address", freeAddress(m.t), m.dir)
	m.cmd.Env = append(os.Environ(), "MINIO_ROOT_USER="+root.access, "MINIO_ROOT_PASSWORD="+root.secret, "MINIO_BROWSER=off", "HOME="+m.home)
	m.cmd.Stdout, m.cmd.Stderr = log, log
	m.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := m.cmd.Start(); err != nil {
		m.t.Fatal(err)
	}
	cmd, done := m.cmd, make(chan struct{})
	m.done = done
	go func() { cmd.Wait(); close(done) }()
	for deadline := time.Now().Add(60 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		resp, err := http.Get("http://" + m.addr + "/minio/health/cluster")
		if err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return
			}
		}
		select {
		case <-done:
			text, _ := os.ReadFile(log.Name())
			m.t.Fatalf("MinIO ended at once:\n%s", text)
		default:
		}
		if time.Now().After(deadline) {
			m.t.Fatal("MinIO is not ready after 60 s")
		}
	}
}

// kill is kill -9. It may be called again.
func (m *minioServer) kill() {
	if m.cmd == nil {
		return
	}
	m.cmd.Process.Signal(syscall.SIGKILL)
	<-m.done
	m.cmd = nil
}

func (m *minioServer) pause()  { m.signal(syscall.SIGSTOP) }
func (m *minioServer) resume() { m.signal(syscall.SIGCONT) }

func (m *minioServer) signal(s syscall.Signal) {
	m.t.Helper()
	if err := m.cmd.Process.Signal(s); err != nil {
		m.t.Fatal(err)
	}
}

// client is a plain S3 client, past the code under test and past every proxy.
func (m *minioServer) client(k keys) *minio.Client {
	m.t.Helper()
	c, err := minio.New(m.addr, &minio.Options{Creds: credentials.NewStaticV4(k.access, k.secret, ""), BucketLookup: minio.BucketLookupPath})
	if err != nil {
		m.t.Fatal(err)
	}
	return c
}

// manifest is what is read here of a checkpoint's manifest.json.
type manifest struct {
	Job      string `json:"job"`
	Step     int64  `json:"step"`
	Prefix   string `json:"prefix"`
	Snapshot bool   `json:"snapshot"`
	Files    []struct {
		Name   string `json:"name"`
		Size   int64  `json:"size"`
		SHA256 string `json:"sha256"`
	} `json:"files"`
}

// digests is the function of that name, of what was found.
func (m manifest) digests() map[string]string {
	out := map[string]string{}
	for _, f := range m.Files {
		if f.Name != "state/queue.bin" {
			out[f.Name] = f.SHA256
		}
	}
	return out
}

// whole reads every checkpoint of the bucket and hashes every file. It returns
// them by step, and the step that latest.json names.
func (m *minioServer) whole(job string) (found map[int64]manifest, latest int64, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	c := m.client(rightKeys)
	read := func(key string) ([]byte, error) {
		o, err := c.GetObject(ctx, bucket, key, minio.GetObjectOptions{})
		if err != nil {
			return nil, err
		}
		defer o.Close()
		return io.ReadAll(o)
	}
	root := prefix + "/jobs/" + job + "/"
	found = map[int64]manifest{}
	for o := range c.ListObjects(ctx, bucket, minio.ListObjectsOptions{Prefix: root, Recursive: true}) {
		if o.Err != nil {
			return nil, 0, o.Err
		}
		if !strings.HasSuffix(o.Key, "/manifest.json") {
			continue
		}
		raw, err := read(o.Key)
		if err != nil {
			return nil, 0, err
		}
		var man manifest
		if err := json.Unmarshal(raw, &man); err != nil {
			return nil, 0, fmt.Errorf("torn manifest %s: %w", o.Key, err)
		}
		found[man.Step] = man
		for _, f := range man.Files {
			data, err := read(prefix + "/" + man.Prefix + "/" + f.Name)
			if err != nil {
				if _, gone := c.StatObject(ctx, bucket, o.Key, minio.StatObjectOptions{}); minio.ToErrorResponse(gone).Code == minio.NoSuchKey {
					delete(found, man.Step) // retention was faster; it takes the manifest first
					break
				}
				return nil, 0, fmt.Errorf("torn checkpoint %s: read %s: %w", man.Prefix, f.Name, err)
			}
			if sum := sha256.Sum256(data); int64(len(data)) != f.Size || hex.EncodeToString(sum[:]) != f.SHA256 {
				return nil, 0, fmt.Errorf("torn checkpoint %s: %s is not as the manifest says", man.Prefix, f.Name)
			}
		}
	}
	raw, err := read(root + "latest.json")
	if err != nil {
		return nil, 0, fmt.Errorf("read latest.json: %w", err)
	}
	var named struct {
		Step   int64  `json:"step"`
		SHA256 string `json:"manifest_sha256"`
		Prefix string `json:"prefix"`
	}
	if err := json.Unmarshal(raw, &named); err != nil {
		return nil, 0, fmt.Errorf("torn latest.json: %w", err)
	}
	if raw, err = read(prefix + "/" + named.Prefix + "/manifest.json"); err != nil {
		return nil, 0, fmt.Errorf("latest.json names %s: %w", named.Prefix, err)
	}
	if sum := sha256.Sum256(raw); hex.EncodeToString(sum[:]) != named.SHA256 {
		return nil, 0, fmt.Errorf("latest.json names another manifest than %s has", named.Prefix)
	}
	return found, named.Step, nil
}

// wholeDirectory hashes every file of every checkpoint in a directory store.
func wholeDirectory(t *testing.T, dir string) {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(dir, "jobs", "*", "checkpoints", "*", "manifest.json"))
	if err != nil || len(found) == 0 {
		t.Fatalf("the store has %d checkpoints: %v", len(found), err)
	}
	for _, path := range found {
		raw, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		var man manifest
		if err := json.Unmarshal(raw, &man); err != nil {
			t.Fatalf("torn manifest %s: %v", path, err)
		}
		for _, f := range man.Files {
			data, err := os.ReadFile(filepath.Join(filepath.Dir(path), filepath.FromSlash(f.Name)))
			if sum := sha256.Sum256(data); err != nil || hex.EncodeToString(sum[:]) != f.SHA256 {
				t.Errorf("torn checkpoint: %s of %s is not as the manifest says (%v)", f.Name, man.Prefix, err)
			}
		}
	}
}

// unfinished counts multipart uploads that nobody completed or aborted.
func (m *minioServer) unfinished() (n int, err error) {
	for u := range m.client(rightKeys).ListIncompleteUploads(m.t.Context(), bucket, "", true) {
		if u.Err != nil {
			return n, u.Err
		}
		n++
	}
	return n, nil
}

// fillDisk writes files into dir until no block is left, and returns what frees them.
func fillDisk(t *testing.T, dir string) (free func()) {
	t.Helper()
	path := filepath.Join(dir, "filler")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for size := 1 << 20; size >= 1; {
		if _, err := f.Write(bytes.Repeat([]byte{1}, size)); err != nil {
			size /= 2
		}
	}
	return func() {
		if err := os.Remove(path); err != nil {
			t.Errorf("free the disk: %v", err)
		}
	}
}

// smallDisk mounts a file system of a few MiB, gone with the test. Where
// mounting is not allowed the test fails: what it is for was not tested.
func smallDisk(t *testing.T, mib int) string {
	t.Helper()
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%dm,mode=755", mib)); err != nil {
		t.Fatalf("mount a small tmpfs (the test needs root, or CAP_SYS_ADMIN): %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	return dir
}

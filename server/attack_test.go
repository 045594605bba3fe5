//go:build attacks

package server_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"runtime/metrics"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"trainerd/client"
	"trainerd/rollout"
	"trainerd/rollout/arrowio"
	"trainerd/server"
	"trainerd/server/access"
	"trainerd/server/servertest"
	"trainerd/storage"
	"trainerd/trainer"
)

// siege is a server with tokens that is attacked while a good client works.
type siege struct {
	*guarded
	addr  string // of a listener with short timeouts
	admin string
	job   client.Job
}

// besiege starts one. headers is how long a client may take for its headers.
func besiege(t *testing.T, headers time.Duration, connections int, so servertest.Options) *siege {
	t.Helper()
	s := &siege{guarded: guard(t, access.Options{Requests: 256, TokenRequests: 192}, so)}
	s.admin = s.token(t, access.Grant{Roles: access.Roles})
	hs := s.Server.HTTPServer()
	hs.Handler, hs.ReadHeaderTimeout, hs.IdleTimeout, hs.ErrorLog = s.Handler, headers, headers, nil
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.addr = l.Addr().String()
	go hs.Serve(access.LimitListener(l, connections))
	t.Cleanup(func() { hs.Close() })
	c, err := client.New("http://"+s.addr, client.Options{Token: s.admin, Retries: -1})
	if err != nil {
		t.Fatal(err)
	}
	s.job = create(t, c, t.Context(), s.JobDocument(3, nil))
	return s
}

// patience is what a good client waits on a machine that does twenty things at once.
const patience = 20 * time.Second

// meanwhile runs an attack beside a good client that hands rollouts in and asks
// for the job, and fails unless every request of its is served.
func (s *siege) meanwhile(t *testing.T, attack func()) {
	t.Helper()
	c, err := client.New("http://"+s.addr, client.Options{Token: s.admin, Retries: -1, HTTP: &http.Client{Timeout: patience}})
	if err != nil {
		t.Fatal(err)
	}
	over := make(chan struct{})
	var served, slowest int64
	var good sync.WaitGroup
	good.Go(func() {
		for i := 0; ; i++ {
			began := time.Now()
			_, err := c.Job(t.Context(), s.job.ID)
			if err == nil {
				_, err = c.Submit(t.Context(), s.job.ID, servertest.Batch(fmt.Sprintf("good-%d", i), 1, 3, -1, uint64(i)), "")
			}
			if err != nil {
				t.Errorf("the good client, at its request %d: %v", i, err)
				return
			}
			served++
			slowest = max(slowest, int64(time.Since(began)))
			select {
			case <-over:
				return
			case <-time.After(10 * time.Millisecond):
			}
		}
	})
	attack()
	close(over)
	good.Wait()
	t.Logf("the good client was served %d times, in at most %v", served, time.Duration(slowest).Round(time.Millisecond))
}

// peak runs f and returns by how much the live and not yet collected heap grew at most.
func peak(f func()) int64 {
	heap := func() int64 {
		s := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}}
		metrics.Read(s)
		return int64(s[0].Value.Uint64())
	}
	runtime.GC()
	base := heap()
	var most atomic.Int64
	over, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for {
			most.Store(max(most.Load(), heap()))
			select {
			case <-over:
				return
			case <-time.After(time.Millisecond):
			}
		}
	}()
	f()
	close(over)
	<-ended
	return most.Load() - base
}

// TestSlowBodies: bodies that come a byte at a time are dropped when their time
// is over, those that nobody wants to read too, and what was reserved for them is
// free again.
func TestSlowBodies(t *testing.T) {
	const clients, declared = 48, 64 << 10
	s := besiege(t, patience, 0, servertest.Options{ServerLimits: server.Limits{BodyTimeout: 400 * time.Millisecond, MaxUploadBytes: clients*declared + 64<<10}})
	s.meanwhile(t, func() {
		var wg sync.WaitGroup
		for i := range clients {
			route, token := "/v1/jobs/"+s.job.ID+"/rollouts", s.admin
			switch i % 4 {
			case 1:
				token = "none" // refused before the body is read
			case 2:
				route = "/nowhere"
			}
			wg.Go(func() {
				conn, err := net.Dial("tcp", s.addr)
				if err != nil {
					t.Error(err)
					return
				}
				defer conn.Close()
				began := time.Now()
				fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n", route, token, arrowio.ContentType, declared)
				for time.Since(began) < patience {
					if _, err := conn.Write([]byte{0}); err != nil {
						return // dropped
					}
					time.Sleep(20 * time.Millisecond)
				}
				t.Errorf("a body was received for %v", patience)
			})
		}
		wg.Wait()
	})
	// One body of all that may be under way is taken: nothing is reserved any more.
	big := make([]byte, clients*declared)
	status, p := exchange(t, http.MethodPost, "http://"+s.addr+"/v1/jobs/"+s.job.ID+"/rollouts", big, map[string]string{"Authorization": "Bearer " + s.admin, "Content-Type": arrowio.ContentType})
	if status != http.StatusBadRequest || p.Code != "malformed_arrow" {
		t.Errorf("after the slow ones: %d %+v", status, p)
	}
}

// TestManyConnections: connections that say nothing are dropped, so that those
// of others come in although there are more than the limit.
func TestManyConnections(t *testing.T) {
	s := besiege(t, 200*time.Millisecond, 16, servertest.Options{})
	s.meanwhile(t, func() {
		var conns []net.Conn
		for range 200 {
			c, err := net.Dial("tcp", s.addr)
			if err != nil {
				t.Error(err)
				break
			}
			conns = append(conns, c)
		}
		for _, c := range conns {
			c.SetReadDeadline(time.Now().Add(2 * patience))
			if _, err := io.Copy(io.Discard, c); err != nil {
				t.Errorf("a silent connection was not closed: %v", err)
				break
			}
			c.Close()
		}
	})
	if res, err := http.Get("http://" + s.addr + "/healthz"); err != nil || res.StatusCode != http.StatusOK {
		t.Errorf("a new client afterwards: %v", err)
	} else {
		res.Body.Close()
	}
}

// TestDecompressionBombs: small bodies that would unpack to much are refused at
// the limit, not after it.
func TestDecompressionBombs(t *testing.T) {
	const limit = 1 << 20
	s := besiege(t, patience, 0, servertest.Options{Limits: trainer.Limits{MaxBatchBytes: limit}})
	zeros := &rollout.Batch{HasReward: true}
	for i := range 4 { // 64 MiB of tokens
		zeros.Rollouts = append(zeros.Rollouts, rollout.Rollout{GroupID: fmt.Sprint(i), Prompt: []int32{2}, Completion: make([]int32, 4<<20)})
	}
	var packed bytes.Buffer
	w := gzip.NewWriter(&packed)
	if _, err := w.Write(make([]byte, 64<<20)); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	head := map[string]string{"Authorization": "Bearer " + s.admin, "Content-Type": arrowio.ContentType}
	encoded := func(enc string) map[string]string {
		return map[string]string{"Authorization": head["Authorization"], "Content-Type": arrowio.ContentType, "Content-Encoding": enc}
	}
	bombs := []struct {
		name   string
		body   []byte
		header map[string]string
		status int
		code   string
	}{
		{"lz4", encode(t, zeros, "lz4"), head, 413, "body_too_large"},
		{"zstd", encode(t, zeros, "zstd"), head, 413, "body_too_large"},
		{"gzip", packed.Bytes(), encoded("gzip"), 415, "unsupported_media_type"},
		{"gzip twice", packed.Bytes(), encoded("gzip, gzip"), 415, "unsupported_media_type"},
		{"deflate", packed.Bytes(), encoded("deflate"), 415, "unsupported_media_type"},
		{"zstd as an encoding", packed.Bytes(), encoded("zstd"), 415, "unsupported_media_type"},
	}
	zeros = nil
	// The bodies themselves, the limit's worth of unpacked buffers, and a zstd
	// window of at most 8 MiB for each of the four decoders; the rest is slack for
	// the good client and for garbage. Unpacked once, a bomb is 64 MiB.
	const most = 48 << 20
	grew := peak(func() {
		s.meanwhile(t, func() {
			for range 3 {
				for _, b := range bombs {
					if len(b.body) > limit {
						t.Fatalf("%s: the bomb has %d bytes", b.name, len(b.body))
					}
					status, p := exchange(t, http.MethodPost, "http://"+s.addr+"/v1/jobs/"+s.job.ID+"/rollouts", b.body, b.header)
					if status != b.status || p.Code != b.code {
						t.Errorf("%s: %d %+v", b.name, status, p)
					}
				}
			}
		})
	})
	if grew > most {
		t.Errorf("the heap grew by %d MiB, expected at most %d", grew>>20, most>>20)
	}
	t.Logf("the heap grew by %d KiB", grew>>10)
}

// TestHostileJSON sends what is bad for parsers to every route that takes JSON.
func TestHostileJSON(t *testing.T) {
	s := besiege(t, patience, 0, servertest.Options{})
	deep := func(open, inner, close string, n int) string {
		return strings.Repeat(open, n) + inner + strings.Repeat(close, n)
	}
	var members strings.Builder
	for i := range 50_000 {
		fmt.Fprintf(&members, `"m%d":0,`, i)
	}
	bodies := map[string]string{
		"arrays without end":   strings.Repeat("[", 1<<19),
		"arrays 100000 deep":   deep("[", "", "]", 100_000),
		"objects 100000 deep":  deep(`{"a":`, "1", "}", 100_000),
		"deep where one fits":  `{"model":{"source":` + deep("[", "", "]", 9_000) + `}}`,
		"50000 members":        "{" + members.String() + `"m":0}`,
		"a member twice":       `{"model":{"source":"dir:/a"},"model":{"source":"dir:/b"}}`,
		"a huge exponent":      `{"seed":1e999999999,"max_steps":1e400}`,
		"a number of 100 kB":   `{"seed":` + strings.Repeat("9", 100_000) + `}`,
		"invalid UTF-8":        "{\"name\":\"\xff\xfe\"}",
		"a lone surrogate":     `{"name":"\ud800"}`,
		"NUL":                  "{\"name\":\"\x00\"}",
		"a byte order mark":    "\xef\xbb\xbf{}",
		"UTF-16":               "\xff\xfe{\x00}\x00",
		"a prototype":          `{"__proto__":{"admin":true},"constructor":1}`,
		"white space":          strings.Repeat(" ", 1<<19),
		"a string without end": `{"name":"` + strings.Repeat("a", 1<<19),
	}
	routes := []string{"/v1/jobs", "/v1/jobs/" + s.job.ID + "/sample", "/v1/jobs/" + s.job.ID + "/checkpoints"}
	s.meanwhile(t, func() {
		for name, body := range bodies {
			for _, route := range routes {
				began := time.Now()
				status, p := exchange(t, http.MethodPost, "http://"+s.addr+route, []byte(body), map[string]string{"Authorization": "Bearer " + s.admin, "Content-Type": "application/json"})
				if status != http.StatusBadRequest && status != http.StatusUnprocessableEntity && status != http.StatusRequestEntityTooLarge {
					t.Errorf("%s to %s: %d %.200s", name, route, status, p.Detail)
				}
				if len(p.Errors) > 100 || len(p.Detail) > 20<<10 {
					t.Errorf("%s to %s: %d errors and a detail of %d bytes", name, route, len(p.Errors), len(p.Detail))
				}
				if took := time.Since(began); took > patience {
					t.Errorf("%s to %s took %v", name, route, took)
				}
			}
		}
	})
	c, err := client.New(s.URL, client.Options{Token: s.admin})
	if err != nil {
		t.Fatal(err)
	}
	if jobs, err := c.Jobs(t.Context()); err != nil || len(jobs) != 1 {
		t.Errorf("%d jobs, %v", len(jobs), err)
	}
}

// TestIdempotencyKeysOfRefusals: keys are remembered for what was accepted only,
// so refused bodies with ever new keys leave nothing behind.
func TestIdempotencyKeysOfRefusals(t *testing.T) {
	s := besiege(t, patience, 0, servertest.Options{})
	url := "http://" + s.addr + "/v1/jobs/" + s.job.ID + "/rollouts"
	with := func(key string) map[string]string {
		return map[string]string{"Authorization": "Bearer " + s.admin, "Content-Type": arrowio.ContentType, "Idempotency-Key": key}
	}
	size := func() (total int64) {
		filepath.WalkDir(filepath.Join(s.DataDir, "jobs"), func(_ string, d os.DirEntry, err error) error {
			if info, ierr := d.Info(); err == nil && ierr == nil {
				total += info.Size()
			}
			return nil
		})
		return total
	}
	before := size()
	key := func(i int) string { return fmt.Sprintf("%0255d", i) }
	for i := range 500 {
		if status, p := exchange(t, http.MethodPost, url, []byte("no arrow"), with(key(i))); p.Code != "malformed_arrow" {
			t.Fatalf("%d %+v", status, p)
		}
	}
	if after := size(); after != before {
		t.Errorf("refused bodies took %d bytes of disk", after-before)
	}
	for _, bad := range []string{"", strings.Repeat("k", 256), "a b", "a\tb", "ä"} {
		if status, p := exchange(t, http.MethodPost, url, nil, with(bad)); status != http.StatusUnprocessableEntity || p.Errors[0].Name != "Idempotency-Key" {
			t.Errorf("key %q: %d %+v", bad, status, p)
		}
	}
	// The key of a refused body is as good as new, and another job's keys are its own.
	good := encode(t, servertest.Batch("late", 1, 3, -1, 9), "")
	if status, p := exchange(t, http.MethodPost, url, good, with(key(3))); status != http.StatusAccepted {
		t.Errorf("%d %+v", status, p)
	}
	if status, p := exchange(t, http.MethodPost, url, encode(t, servertest.Batch("x", 1, 3, -1, 1), ""), with(key(3))); p.Code != "idempotency_key_reused" {
		t.Errorf("%d %+v", status, p)
	}
	c, err := client.New(s.URL, client.Options{Token: s.admin})
	if err != nil {
		t.Fatal(err)
	}
	other := create(t, c, t.Context(), s.JobDocument(3, nil))
	if r, err := c.SubmitArrow(t.Context(), other.ID, good, key(3)); err != nil || r.Rows != 3 {
		t.Errorf("another job: %+v, %v", r, err)
	}
}

// counted counts what is opened in a store.
type counted struct {
	storage.Blob
	opened atomic.Int64
}

func (c *counted) Get(ctx context.Context, key string, off, n int64) (io.ReadCloser, storage.Info, error) {
	c.opened.Add(1)
	return c.Blob.Get(ctx, key, off, n)
}

// TestRangeAbuse: a request opens the store a bounded number of times whatever
// its Range says, and answers no more than the file and the frames of its parts.
func TestRangeAbuse(t *testing.T) {
	store := &counted{}
	s := besiege(t, patience, 0, servertest.Options{WrapStore: func(b storage.Blob) storage.Blob { store.Blob = b; return store }})
	url := "http://" + s.addr + "/v1/jobs/" + s.job.ID + "/checkpoints/0/files/hf/model.safetensors"
	get := func(ranges ...string) (int, int64, int64) {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer "+s.admin)
		req.Header["Range"] = ranges
		before := store.opened.Load()
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		n, err := io.Copy(io.Discard, res.Body)
		if err != nil {
			t.Fatal(err)
		}
		return res.StatusCode, n, store.opened.Load() - before
	}
	_, whole, one := get()
	for _, tc := range []struct {
		name   string
		ranges []string
		status int
	}{
		{"one", []string{"bytes=0-0"}, 206},
		{"sixteen", []string{"bytes=0-0" + strings.Repeat(",8-9", 15)}, 206},
		{"seventeen", []string{"bytes=0-0" + strings.Repeat(",8-9", 16)}, 422},
		{"ten thousand", []string{"bytes=0-0" + strings.Repeat(",0-0", 9_999)}, 422},
		{"in many headers", strings.Split(strings.Repeat("bytes=0-0 ", 17), " ")[:17], 422},
		{"the whole, many times", []string{"bytes=0-,0-,0-,0-"}, 200}, // more than the file: the file
		{"beyond the end", []string{"bytes=99999999999-"}, 416},
		{"beyond numbers", []string{"bytes=99999999999999999999-"}, 416},
		{"backwards", []string{"bytes=9-5"}, 416},
		{"minus", []string{"bytes=--5"}, 416},
		{"nothing", []string{"bytes="}, 200},
		{"another unit", []string{"rows=0-1"}, 416},
		{"words", []string{"bytes=a-b"}, 416},
	} {
		status, n, opened := get(tc.ranges...)
		// A part has a frame of less than 300 bytes: boundary, two headers, blank lines.
		if status != tc.status || n > whole+16*300 || opened > 16*max(one, 1) {
			t.Errorf("%s: %d with %d bytes and %d openings, expected %d", tc.name, status, n, opened, tc.status)
		}
	}
}

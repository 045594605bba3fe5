package server_test

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"trainerd/client"
	"trainerd/server/servertest"
	"trainerd/storage"
)

func sameFile(t *testing.T, a, b string) {
	t.Helper()
	x, err := os.ReadFile(a)
	if err != nil {
		t.Fatal(err)
	}
	y, err := os.ReadFile(b)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(x, y) {
		t.Errorf("%s and %s differ", a, b)
	}
}

// TestPullDelta goes from step to step by deltas, forwards and back, and gets
// what a whole pull gets with fewer bytes; without a base, or with a damaged
// one, it gets the same with more.
func TestPullDelta(t *testing.T) {
	const n = 2
	for _, dtype := range []string{"BF16", "F32"} {
		t.Run(dtype, func(t *testing.T) {
			e := servertest.Start(t, servertest.Options{Wrap: described(t), DType: dtype})
			c, ctx := connect(t, e)
			j := create(t, c, ctx, e.JobDocument(n, map[string]any{"checkpoint": map[string]any{"keep_last": 0}, "optimizer": map[string]any{"lr": 1e-5}}))
			step(t, c, e, j.ID, n, 1)
			step(t, c, e, j.ID, n, 2)
			dir, whole := filepath.Join(t.TempDir(), "d"), filepath.Join(t.TempDir(), "w")
			var notes []error
			pull := func(step int64) storage.PullStats {
				t.Helper()
				notes = nil
				_, stats, err := c.PullWith(ctx, j.ID, step, dir, client.PullOptions{Delta: true, Note: func(err error) { notes = append(notes, err) }})
				if err != nil {
					t.Fatal(err)
				}
				if _, err := c.Pull(ctx, j.ID, step, whole); err != nil {
					t.Fatal(err)
				}
				for _, f := range []string{"model.safetensors", "config.json", storage.PulledName} {
					sameFile(t, filepath.Join(dir, f), filepath.Join(whole, f))
				}
				return stats
			}
			if s := pull(0); s.Delta != 0 || s.Fetched != s.Bytes {
				t.Errorf("without a base: %+v", s)
			}
			for _, to := range []int64{2, 1, 2} {
				s := pull(to)
				if s.Fetched != 0 || s.Delta == 0 || s.Kept == 0 || len(notes) > 0 {
					t.Errorf("to step %d: %+v, %v", to, s, notes)
				}
				if dtype == "BF16" && s.Delta >= s.Bytes*3/4 {
					t.Errorf("to step %d: a delta of %d bytes saves little of %d", to, s.Delta, s.Bytes)
				}
			}
			if s := pull(2); s.Delta == 0 || s.Delta > 100 || s.Kept != s.Bytes {
				t.Errorf("to itself: %+v", s)
			}
			weights := filepath.Join(dir, "model.safetensors")
			raw, err := os.ReadFile(weights)
			if err != nil {
				t.Fatal(err)
			}
			// Its last value, which the step may have changed: that change alone would hide the damage.
			for _, at := range []int{100, len(raw) / 2} {
				damaged := bytes.Clone(raw)
				damaged[at] ^= 0xff
				if err := os.WriteFile(weights, damaged, 0o644); err != nil {
					t.Fatal(err)
				}
				if s := pull(1); s.Fetched == 0 && dtype == "BF16" && at == 100 || s.Fetched > 0 && len(notes) == 0 {
					t.Errorf("damaged base: %+v, %v", s, notes)
				}
				pull(2)
			}
		})
	}
}

// cutting breaks or bends the answers of the delta route.
func cutting(next http.Handler, how func([]byte) []byte) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !strings.HasSuffix(r.URL.Path, "/delta") {
			next.ServeHTTP(w, r)
			return
		}
		rec := &bent{header: http.Header{}}
		next.ServeHTTP(rec, r)
		for k, v := range rec.header {
			w.Header()[k] = v
		}
		w.WriteHeader(rec.status)
		w.Write(how(rec.body.Bytes()))
	})
}

type bent struct {
	header http.Header
	status int
	body   bytes.Buffer
}

func (b *bent) Header() http.Header         { return b.header }
func (b *bent) WriteHeader(status int)      { b.status = status }
func (b *bent) Write(p []byte) (int, error) { return b.body.Write(p) }

// TestPullDeltaFallsBack: whatever comes in the place of a delta, the pull gives
// the checkpoint.
func TestPullDeltaFallsBack(t *testing.T) {
	const n = 2
	var how atomic.Value
	e := servertest.Start(t, servertest.Options{DType: "BF16", Wrap: func(h http.Handler) http.Handler {
		return cutting(h, func(raw []byte) []byte { return how.Load().(func([]byte) []byte)(raw) })
	}})
	c, ctx := connect(t, e)
	j := create(t, c, ctx, e.JobDocument(n, map[string]any{"checkpoint": map[string]any{"keep_last": 0}, "optimizer": map[string]any{"lr": 1e-4}}))
	step(t, c, e, j.ID, n, 1)
	dir, whole := filepath.Join(t.TempDir(), "d"), filepath.Join(t.TempDir(), "w")
	if _, err := c.Pull(ctx, j.ID, 1, whole); err != nil {
		t.Fatal(err)
	}
	for name, bend := range map[string]func([]byte) []byte{
		"cut":        func(raw []byte) []byte { return raw[:len(raw)/2] },
		"no end":     func(raw []byte) []byte { return raw[:len(raw)-2] },
		"a bit":      func(raw []byte) []byte { raw[len(raw)/2] ^= 1; return raw },
		"nothing":    func([]byte) []byte { return nil },
		"other file": func(raw []byte) []byte { return bytes.Replace(raw, []byte("model.safe"), []byte("../../safe"), 1) },
		"HTML":       func([]byte) []byte { return []byte("<html>proxy</html>") },
	} {
		how.Store(bend)
		if _, err := c.Pull(ctx, j.ID, 0, dir); err != nil {
			t.Fatal(err)
		}
		notes := 0
		_, s, err := c.PullWith(ctx, j.ID, 1, dir, client.PullOptions{Delta: true, Note: func(error) { notes++ }})
		if err != nil || notes != 1 || s.Fetched == 0 && name != "no end" {
			t.Errorf("%s: %+v, %d notes, %v", name, s, notes, err)
		}
		sameFile(t, filepath.Join(dir, "model.safetensors"), filepath.Join(whole, "model.safetensors"))
	}
}

func TestDeltaRefusals(t *testing.T) {
	e := servertest.Start(t, servertest.Options{Wrap: described(t)})
	c, ctx := connect(t, e)
	j := create(t, c, ctx, e.JobDocument(2, nil))
	base := e.URL + "/v1/jobs/" + j.ID + "/checkpoints/"
	for path, want := range map[string]string{
		"0/delta": "from", "0/delta?from=x": "from", "0/delta?from=-1": "from", "0/delta?from=7": "step", "7/delta?from=0": "step",
	} {
		status, p := exchange(t, http.MethodGet, base+path, nil, nil)
		if status != 422 && status != 404 || len(p.Errors) != 1 || p.Errors[0].Name != want {
			t.Errorf("%s: %d, %+v", path, status, p)
		}
	}
	r, err := c.Delta(ctx, j.ID, 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if raw, err := io.ReadAll(r); err != nil || len(raw) == 0 || len(raw) > 20 {
		t.Errorf("delta of a step to itself: %d bytes, %v", len(raw), err)
	}
}

// TestLatestAsEvents reads the stream of GET latest: the newest first, then each newer one.
func TestLatestAsEvents(t *testing.T) {
	const n = 2
	e := servertest.Start(t, servertest.Options{Wrap: described(t)})
	c, ctx := connect(t, e)
	j := create(t, c, ctx, e.JobDocument(n, nil))
	open := func(after string) (*bufio.Scanner, context.CancelFunc) {
		t.Helper()
		ctx, cancel := context.WithCancel(ctx)
		req, _ := http.NewRequestWithContext(ctx, http.MethodGet, e.URL+"/v1/jobs/"+j.ID+"/checkpoints/latest", nil)
		req.Header.Set("Accept", "text/event-stream")
		if after != "" {
			req.Header.Set("Last-Event-ID", after)
		}
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { cancel(); res.Body.Close() })
		if res.StatusCode != 200 || res.Header.Get("Content-Type") != "text/event-stream" {
			t.Fatalf("status %d, %v", res.StatusCode, res.Header)
		}
		return bufio.NewScanner(res.Body), cancel
	}
	next := func(s *bufio.Scanner) (id, data string) {
		t.Helper()
		for s.Scan() {
			switch line := s.Text(); {
			case strings.HasPrefix(line, "id: "):
				id = line[4:]
			case strings.HasPrefix(line, "data: "):
				return id, line[6:]
			}
		}
		t.Fatal(s.Err())
		return
	}
	s, leave := open("")
	if id, data := next(s); id != "0" || !strings.Contains(data, `"step":0,`) {
		t.Errorf("first event %s: %s", id, data)
	}
	step(t, c, e, j.ID, n, 1)
	if id, _ := next(s); id != "1" {
		t.Errorf("second event %s", id)
	}
	leave()
	step(t, c, e, j.ID, n, 2)
	s, leave = open("1")
	defer leave()
	if id, data := next(s); id != "2" || !strings.Contains(data, `"step":2,`) {
		t.Errorf("resumed: event %s: %s", id, data)
	}
	if status, p := exchange(t, http.MethodGet, e.URL+"/v1/jobs/"+j.ID+"/checkpoints/latest", nil, map[string]string{"Accept": "text/event-stream", "Last-Event-ID": "x"}); status != 422 {
		t.Errorf("a bad Last-Event-ID: %d, %+v", status, p)
	}
	if status, _ := exchange(t, http.MethodGet, e.URL+"/v1/jobs/"+j.ID+"/checkpoints/latest", nil, map[string]string{"Accept": "text/plain"}); status != 406 {
		t.Errorf("a type that is not offered: %d", status)
	}
}

// holdGet lets a test hold reads of weights.
type holdGet struct {
	storage.Blob
	hold    atomic.Pointer[chan struct{}]
	waiting atomic.Int32
}

func (h *holdGet) Get(ctx context.Context, key string, off, n int64) (io.ReadCloser, storage.Info, error) {
	if hold := h.hold.Load(); hold != nil && strings.HasSuffix(key, "hf/model.safetensors") {
		h.waiting.Add(1)
		<-*hold
	}
	return h.Blob.Get(ctx, key, off, n)
}

// TestDeltasAreBounded: two deltas at once, and a third is told to come again.
func TestDeltasAreBounded(t *testing.T) {
	const n = 2
	blob := &holdGet{}
	e := servertest.Start(t, servertest.Options{WrapStore: func(b storage.Blob) storage.Blob { blob.Blob = b; return blob }})
	c, ctx := connect(t, e)
	j := create(t, c, ctx, e.JobDocument(n, nil))
	step(t, c, e, j.ID, n, 1)
	hold := make(chan struct{})
	blob.hold.Store(&hold)
	got := make(chan error, 2)
	for range 2 {
		go func() {
			r, err := c.Delta(ctx, j.ID, 0, 1)
			if err == nil {
				_, err = io.Copy(io.Discard, r)
				r.Close()
			}
			got <- err
		}()
	}
	await(t, c, ctx, j.ID, "two deltas", func(client.Job) bool { return blob.waiting.Load() == 2 })
	status, p := exchange(t, http.MethodGet, e.URL+"/v1/jobs/"+j.ID+"/checkpoints/1/delta?from=0", nil, nil)
	if status != http.StatusTooManyRequests || p.Code != "too_many_deltas" || p.retryAfter == "" {
		t.Errorf("a third delta: %d, %+v", status, p)
	}
	blob.hold.Store(nil)
	close(hold)
	for range 2 {
		if err := <-got; err != nil {
			t.Error(err)
		}
	}
}

// TestPullHoldsALease: retention does not take away what is being pulled.
func TestPullHoldsALease(t *testing.T) {
	const n = 2
	blob := &holdGet{}
	e := servertest.Start(t, servertest.Options{WrapStore: func(b storage.Blob) storage.Blob { blob.Blob = b; return blob }})
	c, ctx := connect(t, e)
	j := create(t, c, ctx, e.JobDocument(n, map[string]any{"checkpoint": map[string]any{"keep_last": 1, "keep_every": 0, "snapshot_every_steps": 0}}))
	step(t, c, e, j.ID, n, 1)
	hold := make(chan struct{})
	blob.hold.Store(&hold)
	got := make(chan error, 1)
	go func() {
		_, err := c.Pull(ctx, j.ID, 1, filepath.Join(t.TempDir(), "d"))
		got <- err
	}()
	await(t, c, ctx, j.ID, "the pull", func(client.Job) bool { return blob.waiting.Load() == 1 })
	if held, err := c.Leases(ctx, j.ID, 1); err != nil || len(held) != 1 || held[0].Holder != "pull" {
		t.Errorf("leases during a pull: %+v, %v", held, err)
	}
	step(t, c, e, j.ID, n, 2)
	step(t, c, e, j.ID, n, 3)
	await(t, c, ctx, j.ID, "retention", func(client.Job) bool { return !has(t, c, e, j.ID, 2) })
	blob.hold.Store(nil)
	close(hold)
	if err := <-got; err != nil {
		t.Error(err)
	}
	await(t, c, ctx, j.ID, "the end of the lease", func(client.Job) bool { return !has(t, c, e, j.ID, 1) })
}

package client_test

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"trainerd/client"
	"trainerd/server/servertest"
	"trainerd/storage"
)

// gateway is an address that outlives the servers behind it. Without one it
// breaks connections, as a machine does whose server restarts.
type gateway struct {
	*httptest.Server
	mu   sync.Mutex
	next http.Handler
}

func newGateway(t *testing.T) *gateway {
	g := &gateway{}
	g.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		g.mu.Lock()
		next := g.next
		g.mu.Unlock()
		if next == nil {
			panic(http.ErrAbortHandler)
		}
		next.ServeHTTP(w, r)
	}))
	t.Cleanup(g.Server.Close)
	return g
}

func (g *gateway) lead(h http.Handler) {
	g.mu.Lock()
	g.next = h
	g.mu.Unlock()
}

// eventually waits for a condition under any load.
func eventually(t *testing.T, ctx context.Context, what string, cond func() bool) {
	t.Helper()
	for !cond() {
		select {
		case <-ctx.Done():
			t.Fatalf("%s: not in time", what)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// TestFollow: an engine that refuses a step keeps the old one and is asked
// again; a server that goes away and comes back is waited for; each state is
// reported; the end is clean.
func TestFollow(t *testing.T) {
	const n = 2
	e := servertest.Start(t, servertest.Options{DType: "BF16"})
	g := newGateway(t)
	g.lead(e.Server)
	c, _ := connect(t, g.URL, client.Options{})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	j, err := c.CreateJob(ctx, e.JobDocument(n, map[string]any{"checkpoint": map[string]any{"keep_last": 1, "keep_every": 0}, "optimizer": map[string]any{"lr": 1e-5}}), "")
	if err != nil {
		t.Fatal(err)
	}
	train := func(to int64) {
		t.Helper()
		eventually(t, ctx, "batch accepted", func() bool {
			_, err := c.Submit(ctx, j.ID, servertest.Batch("s"+string(rune('a'+to)), 2, n, to-1, uint64(to)), "key"+string(rune('a'+to)))
			return err == nil
		})
		if _, err := c.Wait(ctx, j.ID, 0, func(j client.Job) bool { return j.PolicyStep >= to }); err != nil {
			t.Fatal(err)
		}
	}
	dir := filepath.Join(t.TempDir(), "policy")
	var mu sync.Mutex
	refuse := map[int64]int{1: 2} // step -> times
	var seen []client.Checkpoint
	apply := func(_ context.Context, at client.Checkpoint) error {
		mu.Lock()
		defer mu.Unlock()
		p, err := storage.ReadPulled(dir)
		if err != nil || p.Step != at.Step || p.SHA256 != at.Digest {
			t.Errorf("applied %+v, the directory holds %+v, %v", at, p, err)
		}
		seen = append(seen, at)
		if refuse[at.Step] > 0 {
			refuse[at.Step]--
			return errors.New("engine: out of memory")
		}
		return nil
	}
	follow, stop := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() {
		ended <- c.Follow(follow, client.FollowOptions{Job: j.ID, Dir: dir, Node: "n1", Apply: apply, Report: 100 * time.Millisecond, Pull: client.PullOptions{Delta: true}})
	}()
	node := func() client.Node {
		all, err := c.Nodes(ctx, j.ID)
		if err != nil || len(all) == 0 {
			return client.Node{Step: -2}
		}
		return all[0]
	}
	eventually(t, ctx, "step 0 served", func() bool { n := node(); return n.Step == 0 && n.State == "serving" })
	train(1)
	eventually(t, ctx, "a refusal reported", func() bool {
		n := node()
		return n.State == "failed" && n.Step == 0 && strings.Contains(n.Message, "out of memory")
	})
	eventually(t, ctx, "step 1 served", func() bool { n := node(); return n.Step == 1 && n.State == "serving" && n.Message == "" })
	if n := node(); n.Matches == nil || !*n.Matches || n.LagSteps != 0 {
		t.Errorf("%+v", n)
	}
	// Its base is kept for the next delta, beyond keep_last.
	train(2)
	eventually(t, ctx, "step 2 served", func() bool { return node().Step == 2 })

	g.lead(nil)
	e.Stop()
	time.Sleep(300 * time.Millisecond)
	e.Boot(t)
	g.lead(e.Server)
	train(3)
	eventually(t, ctx, "step 3 served after a restart", func() bool { n := node(); return n.Step == 3 && n.State == "serving" })
	stop()
	if err := <-ended; err != nil {
		t.Errorf("the end of its context is an error: %v", err)
	}
	if n := node(); n.State != "stopped" || n.Step != 3 {
		t.Errorf("after the end: %+v", n)
	}
	mu.Lock()
	var steps []int64
	for _, at := range seen {
		steps = append(steps, at.Step)
	}
	mu.Unlock()
	if len(steps) < 6 || steps[0] != 0 || steps[len(steps)-1] != 3 {
		t.Errorf("applied %v", steps)
	}
	for at := range int64(4) {
		ls, err := c.Leases(ctx, j.ID, at)
		if err != nil || len(ls) > 0 {
			t.Errorf("leases of step %d that nobody ended: %+v, %v", at, ls, err)
		}
	}

	// A new start serves what is there although the server is away.
	g.lead(nil)
	follow, stop = context.WithCancel(ctx)
	first := make(chan int64, 1)
	go func() {
		ended <- c.Follow(follow, client.FollowOptions{Job: j.ID, Dir: dir, Apply: func(_ context.Context, at client.Checkpoint) error {
			first <- at.Step
			return nil
		}})
	}()
	select {
	case at := <-first:
		if at != 3 {
			t.Errorf("served step %d", at)
		}
	case <-ctx.Done():
		t.Fatal("nothing was served without the server")
	}
	stop()
	<-ended
}

// TestFollowEnds with what waiting does not mend.
func TestFollowEnds(t *testing.T) {
	e := servertest.Start(t, servertest.Options{})
	c, ctx := connect(t, e.URL, client.Options{})
	if err := c.Follow(ctx, client.FollowOptions{Job: "job-0123456789abcdef", Dir: filepath.Join(t.TempDir(), "d"), Node: "n"}); client.Code(err) != "job_not_found" {
		t.Errorf("no such job: %v", err)
	}
	j, err := c.CreateJob(ctx, e.JobDocument(2, nil), "")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "mine"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := c.Follow(ctx, client.FollowOptions{Job: j.ID, Dir: dir, Node: "n"}); err == nil || !strings.Contains(err.Error(), "other files") {
		t.Errorf("a directory of others: %v", err)
	}
}

// TestDirect reads files where the server says they are, and takes neither the
// token nor the server's word there.
func TestDirect(t *testing.T) {
	var e *servertest.Env
	got := make(chan *http.Request, 100)
	s3 := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		got <- r
		http.ServeFile(w, r, filepath.Join(e.StoreDir, filepath.FromSlash(r.URL.Path)))
	}))
	defer s3.Close()
	_, port, err := net.SplitHostPort(s3.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	e = servertest.Start(t, servertest.Options{WrapStore: func(b storage.Blob) storage.Blob { return signing{b, "http://127.0.0.1:" + port} }})
	c, ctx := connect(t, e.URL, client.Options{Token: "secret", Retries: 1})
	j, err := c.CreateJob(ctx, e.JobDocument(2, nil), "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Wait(ctx, j.ID, 0, func(j client.Job) bool { return j.PolicyStep == 0 }); err != nil {
		t.Fatal(err)
	}
	m, _, err := c.PullWith(ctx, j.ID, 0, filepath.Join(t.TempDir(), "d"), client.PullOptions{Direct: true})
	if err != nil {
		t.Fatal(err)
	}
	close(got)
	n := 0
	for r := range got {
		n++
		if r.Header.Get("Authorization") != "" || r.URL.Query().Get("signature") != "s" {
			t.Errorf("%s with %v", r.URL, r.Header)
		}
	}
	if n != len(m.Files) {
		t.Errorf("%d files came from the store, expected %d", n, len(m.Files))
	}
	s3.Close()
	if _, _, err := c.PullWith(ctx, j.ID, 0, filepath.Join(t.TempDir(), "d"), client.PullOptions{Direct: true}); err == nil || strings.Contains(err.Error(), "signature") {
		t.Errorf("a store that is away: %v", err)
	}
}

type signing struct {
	storage.Blob
	base string
}

func (s signing) Presign(_ context.Context, key string, _ time.Duration) (string, error) {
	return s.base + "/" + key + "?signature=s", nil
}

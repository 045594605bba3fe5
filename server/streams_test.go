package server_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/apache/arrow/go/v17/arrow/ipc"
	"github.com/labstack/echo/v4"

	"trainerd/client"
	"trainerd/server"
	"trainerd/server/servertest"
	"trainerd/trainer"
)

var errEnough = errors.New("enough")

func TestEvents(t *testing.T) {
	const n = 2
	e := servertest.Start(t, servertest.Options{Limits: trainer.Limits{EventRing: 4}, ServerLimits: server.Limits{Heartbeat: 5 * time.Millisecond}})
	c, ctx := connect(t, e)
	j := create(t, c, ctx, e.JobDocument(n, nil))
	await(t, c, ctx, j.ID, "waiting", func(j client.Job) bool { return j.State == "waiting" })

	seen := make(chan client.Event, 64)
	ended := make(chan error, 1)
	follow, stop := context.WithCancel(ctx)
	defer stop()
	go func() {
		ended <- c.Events(follow, j.ID, "", func(e client.Event) error { seen <- e; return nil })
	}()
	// The stream is known to be open once a submitted step arrives on it.
	next := func(kind string) client.Event {
		t.Helper()
		for {
			select {
			case ev := <-seen:
				if ev.Type == kind {
					return ev
				}
			case <-ctx.Done():
				t.Fatalf("no %s event", kind)
			}
		}
	}
	var first client.Event
	for i := uint64(0); first.ID == ""; i++ {
		if _, err := c.Submit(ctx, j.ID, servertest.Batch("a"+string(rune('a'+i)), 2, n, -1, i), ""); err != nil {
			t.Fatal(err)
		}
		select {
		case ev := <-seen:
			first = ev
		case <-time.After(100 * time.Millisecond):
		}
	}
	next("checkpoint")
	if _, err := c.Pause(ctx, j.ID); err != nil {
		t.Fatal(err)
	}
	if ev := next("state"); !strings.Contains(string(ev.Data), `"state":"`) {
		t.Errorf("state event %s", ev.Data)
	}
	stop()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("events ended with %v", err)
	}

	// What happened after an event comes again; past the ring's end there is a gap.
	if _, err := c.Resume(ctx, j.ID); err != nil {
		t.Fatal(err)
	}
	for i := range uint64(3) {
		if _, err := c.Submit(ctx, j.ID, servertest.Batch("b"+string(rune('a'+i)), 2, n, -1, i), ""); err != nil {
			t.Fatal(err)
		}
	}
	await(t, c, ctx, j.ID, "more steps", func(j client.Job) bool { return j.Step >= 4 && j.PolicyStep == j.Step })
	var kinds []string
	var last string
	err := c.Events(ctx, j.ID, first.ID, func(e client.Event) error {
		kinds = append(kinds, e.Type)
		if e.ID <= last {
			t.Errorf("id %s after %s", e.ID, last)
		}
		last = e.ID
		if len(kinds) == 5 {
			return errEnough
		}
		return nil
	})
	if !errors.Is(err, errEnough) || kinds[0] != "gap" {
		t.Errorf("resumed: %v, kinds %v, expected a gap and then four events", err, kinds)
	}

	// A server that closes ends its streams.
	go func() {
		ended <- c.Events(ctx, j.ID, "", func(client.Event) error { return nil })
	}()
	time.Sleep(20 * time.Millisecond)
	began := time.Now()
	e.Stop()
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("stop took %v with an open stream", took)
	}
}

func TestLongPoll(t *testing.T) {
	const n = 2
	e := servertest.Start(t, servertest.Options{Wrap: described(t), ServerLimits: server.Limits{MaxWait: 2 * time.Second}})
	c, ctx := connect(t, e)
	j := create(t, c, ctx, e.JobDocument(n, nil))

	if _, ok, err := c.Newer(ctx, j.ID, 0, time.Millisecond); ok || err != nil {
		t.Errorf("newer than the newest: %v, %v", ok, err)
	}
	type result struct {
		step int64
		ok   bool
		err  error
	}
	got := make(chan result)
	go func() {
		m, ok, err := c.Newer(ctx, j.ID, 0, time.Hour) // capped by the server
		got <- result{m.Step, ok, err}
	}()
	if _, err := c.Submit(ctx, j.ID, servertest.Batch("a", 2, n, 0, 1), ""); err != nil {
		t.Fatal(err)
	}
	if r := <-got; r.err != nil || !r.ok || r.step != 1 {
		t.Errorf("long poll: %+v, expected step 1", r)
	}
	res, err := http.Get(e.URL + "/v1/jobs/" + j.ID + "/checkpoints/latest")
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	tag := res.Header.Get("ETag")
	if status, _ := exchange(t, http.MethodGet, e.URL+"/v1/jobs/"+j.ID+"/checkpoints/latest", nil, map[string]string{"If-None-Match": tag}); tag == "" || status != 304 {
		t.Errorf("status %d with the ETag %s, expected 304", status, tag)
	}
}

func TestCheckpointFiles(t *testing.T) {
	e := servertest.Start(t, servertest.Options{Wrap: described(t)})
	c, ctx := connect(t, e)
	j := create(t, c, ctx, e.JobDocument(2, nil))
	m, err := c.Publish(ctx, j.ID, true) // step 0 again, now with state
	if err != nil || !m.Snapshot || m.Step != 0 {
		t.Fatalf("publish: %v, %+v", err, m)
	}
	if again, err := c.Publish(ctx, j.ID, true); err != nil || again.Attempt != m.Attempt {
		t.Errorf("publish without a new step: attempt %d after %d, %v", again.Attempt, m.Attempt, err)
	}
	all, err := c.Checkpoints(ctx, j.ID)
	if err != nil || len(all) != 2 {
		t.Fatalf("%d checkpoints, %v", len(all), err)
	}
	f, ok := m.File("hf/model.safetensors")
	if !ok {
		t.Fatalf("files %+v", m.Files)
	}
	url := e.URL + "/v1/jobs/" + j.ID + "/checkpoints/0/files/" + f.Name
	read := func(method string, header map[string]string) (*http.Response, []byte) {
		t.Helper()
		req, err := http.NewRequestWithContext(ctx, method, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		for k, v := range header {
			req.Header.Set(k, v)
		}
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		body, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		return res, body
	}
	res, whole := read(http.MethodGet, nil)
	sum := sha256.Sum256(whole)
	if res.StatusCode != 200 || hex.EncodeToString(sum[:]) != f.SHA256 || int64(len(whole)) != f.Size {
		t.Fatalf("status %d, %d bytes", res.StatusCode, len(whole))
	}
	if want := "sha-256=:" + base64.StdEncoding.EncodeToString(sum[:]) + ":"; res.Header.Get("Repr-Digest") != want {
		t.Errorf("Repr-Digest %q, expected %q", res.Header.Get("Repr-Digest"), want)
	}
	tag := res.Header.Get("ETag")
	for _, tc := range []struct {
		header map[string]string
		status int
		body   []byte
	}{
		{map[string]string{"Range": "bytes=8-99"}, 206, whole[8:100]},
		{map[string]string{"Range": "bytes=-5"}, 206, whole[len(whole)-5:]},
		{map[string]string{"Range": "bytes=8-99", "If-Range": tag}, 206, whole[8:100]},
		{map[string]string{"Range": "bytes=8-99", "If-Range": `"other"`}, 200, whole},
		{map[string]string{"Range": "bytes=99999999-"}, 416, nil},
		{map[string]string{"If-None-Match": tag}, 304, nil},
	} {
		res, body := read(http.MethodGet, tc.header)
		if res.StatusCode != tc.status || tc.body != nil && !bytes.Equal(body, tc.body) {
			t.Errorf("%v: status %d with %d bytes, expected %d with %d", tc.header, res.StatusCode, len(body), tc.status, len(tc.body))
		}
	}
	if res, body := read(http.MethodHead, nil); res.StatusCode != 200 || len(body) != 0 || res.ContentLength != f.Size {
		t.Errorf("HEAD: status %d, length %d, expected %d", res.StatusCode, res.ContentLength, f.Size)
	}
}

func TestMetricsAndProbes(t *testing.T) {
	const n = 2
	e := servertest.Start(t, servertest.Options{Wrap: described(t)})
	c, ctx := connect(t, e)
	j := create(t, c, ctx, e.JobDocument(n, nil))
	if _, err := c.Submit(ctx, j.ID, servertest.Batch("a", 4, n, 0, 1), ""); err != nil {
		t.Fatal(err)
	}
	await(t, c, ctx, j.ID, "step 2", func(j client.Job) bool { return j.PolicyStep == 2 })

	body := func(path string, header map[string]string) []byte {
		t.Helper()
		req, _ := http.NewRequestWithContext(ctx, http.MethodGet, e.URL+path, nil)
		for k, v := range header {
			req.Header.Set(k, v)
		}
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		raw, err := io.ReadAll(res.Body)
		if err != nil || res.StatusCode != 200 {
			t.Fatalf("GET %s: status %d, %v: %s", path, res.StatusCode, err, raw)
		}
		return raw
	}
	for _, path := range []string{"/healthz", "/readyz", "/v1/jobs", "/v1/jobs/" + j.ID + "/metrics", "/v1/jobs/" + j.ID + "/steps?limit=1"} {
		body(path, nil)
	}
	text := string(body("/metrics", nil))
	for _, line := range []string{
		`trainerd_steps_total{job="` + j.ID + `"} 2`,
		`trainerd_groups_trained_total{job="` + j.ID + `"} 4`,
		`trainerd_policy_step{job="` + j.ID + `"} 2`,
		`trainerd_rollouts_total{job="` + j.ID + `"} 8`,
		`trainerd_build_info{version="test"} 1`,
		`trainerd_http_requests_total{method="POST",route="/v1/jobs",status="201"} 1`,
	} {
		if !strings.Contains(text, line+"\n") {
			t.Errorf("/metrics has no line %s", line)
		}
	}
	r, err := ipc.NewReader(bytes.NewReader(body("/v1/jobs/"+j.ID+"/metrics", map[string]string{"Accept": "application/json;q=0.5, application/vnd.apache.arrow.stream"})))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Release()
	if !r.Next() || r.Record().NumRows() != 2 || len(r.Schema().FieldIndices("reward/mean")) != 1 {
		t.Errorf("Arrow metrics: schema %v", r.Schema())
	}
}

func TestPanicIsAProblem(t *testing.T) {
	s := server.New(server.Options{Manager: &trainer.Manager{}, Guard: func(echo.HandlerFunc) echo.HandlerFunc {
		return func(echo.Context) error { panic("a secret") }
	}})
	defer s.Close()
	w := httptest.NewRecorder()
	r := httptest.NewRequest(http.MethodGet, "/v1/jobs", nil)
	r.Header.Set("X-Request-Id", "mine-1")
	s.ServeHTTP(w, r)
	if w.Code != 500 || w.Header().Get("Content-Type") != "application/problem+json" || strings.Contains(w.Body.String(), "secret") ||
		!strings.Contains(w.Body.String(), `"request_id":"mine-1"`) {
		t.Errorf("status %d: %s", w.Code, w.Body)
	}
}

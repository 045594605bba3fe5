package server_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptrace"
	"sync/atomic"
	"testing"
	"time"

	"trainerd/client"
	"trainerd/rollout/arrowio"
	"trainerd/server/servertest"
	"trainerd/trainer"
)

// countedBody is a body that knows how much of it was read.
type countedBody struct {
	io.Reader
	n atomic.Int64
}

func (c *countedBody) Read(p []byte) (int, error) {
	n, err := c.Reader.Read(p)
	c.n.Add(int64(n))
	return n, err
}

// early is one post whose body may be refused unread.
type early struct {
	size   int  // of a body that is no Arrow stream: whoever decodes it says malformed_arrow
	expect bool // 100-continue
	header map[string]string

	status int
	code   string
	field  string // that is named first; "" is not looked at
	read   int64  // bytes of the body that left the client, -1: all
}

// TestRefusedBeforeTheBody: what the job's state and its full queue decide costs
// neither the transfer, where the client asks, nor a decoder.
func TestRefusedBeforeTheBody(t *testing.T) {
	const n, mib = 2, 1 << 20
	e := servertest.Start(t, servertest.Options{Limits: trainer.Limits{MaxQueuedRollouts: 8 * n, MaxBatchBytes: 4 * mib}})
	c, ctx := connect(t, e)
	j := create(t, c, ctx, e.JobDocument(n, nil))
	await(t, c, ctx, j.ID, "step 0", func(j client.Job) bool { return j.PolicyStep >= 0 })
	if _, err := c.Pause(ctx, j.ID); err != nil {
		t.Fatal(err)
	}
	url := e.URL + "/v1/jobs/" + j.ID + "/rollouts"
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.ExpectContinueTimeout = time.Minute // the server decides, however slow the machine is
	defer transport.CloseIdleConnections()
	post := func(t *testing.T, x early) {
		t.Helper()
		body := &countedBody{Reader: bytes.NewReader(make([]byte, x.size))}
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, body)
		if err != nil {
			t.Fatal(err)
		}
		req.ContentLength = int64(x.size)
		req.Header.Set("Content-Type", arrowio.ContentType)
		if x.expect {
			req.Header.Set("Expect", "100-continue")
		}
		for name, v := range x.header {
			req.Header.Set(name, v)
		}
		res, err := transport.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		var p problem
		if err := json.NewDecoder(res.Body).Decode(&p); err != nil {
			t.Fatal(err)
		}
		field := ""
		if len(p.Errors) > 0 {
			field = p.Errors[0].Name
		}
		if res.StatusCode != x.status || p.Code != x.code || x.field != "" && field != x.field {
			t.Errorf("%d %s %q, expected %d %s %q", res.StatusCode, p.Code, field, x.status, x.code, x.field)
		}
		if res.StatusCode == http.StatusTooManyRequests && res.Header.Get("Retry-After") == "" {
			t.Error("429 without Retry-After")
		}
		want := x.read
		if want < 0 {
			want = int64(x.size)
		}
		if got := body.n.Load(); got != want {
			t.Errorf("%d bytes of the body were sent, expected %d", got, want)
		}
	}
	said := func(rows, tokens int) map[string]string {
		return map[string]string{"Trainerd-Rows": fmt.Sprint(rows), "Trainerd-Tokens": fmt.Sprint(tokens)}
	}
	check := func(name string, x early) {
		t.Helper()
		t.Run(name, func(t *testing.T) { post(t, x) })
	}

	check("room: the body is wanted", early{size: mib, expect: true, status: 400, code: "malformed_arrow", read: -1})
	check("room for what is announced", early{size: mib, expect: true, header: said(8*n, 100), status: 400, code: "malformed_arrow", read: -1})
	check("announced is more than fits ever", early{size: mib, expect: true, header: said(8*n+1, 100), status: 413, code: "batch_too_large", field: "limits.max_queued_rollouts"})
	check("no number", early{size: 10, header: map[string]string{"Trainerd-Rows": "many"}, status: 422, code: "invalid_field", field: "Trainerd-Rows", read: -1})
	check("no count", early{size: mib, expect: true, header: map[string]string{"Trainerd-Tokens": "0"}, status: 422, code: "invalid_field", field: "Trainerd-Tokens"})

	kept := encode(t, servertest.Batch("kept", 7, n, 0, 1), "")
	first, err := c.SubmitArrow(ctx, j.ID, kept, "kept")
	if err != nil {
		t.Fatal(err)
	}
	check("announced is more than fits now", early{size: mib, expect: true, header: said(n+1, 100), status: 429, code: "queue_full", field: "limits.max_queued_rollouts"})
	check("what is announced fits now", early{size: mib, expect: true, header: said(n, 100), status: 400, code: "malformed_arrow", read: -1})
	if _, err := c.Submit(ctx, j.ID, servertest.Batch("last", 1, n, 0, 2), ""); err != nil {
		t.Fatal(err)
	}
	check("full, asked before", early{size: mib, expect: true, status: 429, code: "queue_full", field: "limits.max_queued_rollouts"})
	check("full, sent at once", early{size: mib, status: 429, code: "queue_full", read: -1})
	check("over the limit of a body", early{size: 4*mib + 1, expect: true, status: 413, code: "body_too_large"})
	check("a small body is looked at", early{size: 100, status: 400, code: "malformed_arrow", read: -1})
	check("a key that was used", early{size: mib, expect: true, header: map[string]string{"Idempotency-Key": "kept"}, status: 422, code: "idempotency_key_reused", read: -1})
	if again, err := c.SubmitArrow(ctx, j.ID, kept, "kept"); err != nil || again != first {
		t.Errorf("the key of an accepted batch on a full queue: %+v, %v", again, err)
	}

	t.Run("the connection outlives an answer to a body sent at once", func(t *testing.T) {
		post(t, early{size: 3 * mib, status: 429, code: "queue_full", read: -1})
		reused := false
		traced := httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(i httptrace.GotConnInfo) { reused = i.Reused }})
		req, err := http.NewRequestWithContext(traced, http.MethodGet, e.URL+"/healthz", nil)
		if err != nil {
			t.Fatal(err)
		}
		res, err := transport.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if !reused {
			t.Error("a new connection was needed")
		}
	})

	if _, err := c.Cancel(context.WithoutCancel(ctx), j.ID); err != nil {
		t.Fatal(err)
	}
	check("cancelled", early{size: mib, expect: true, status: 409, code: "job_cancelled"})
}

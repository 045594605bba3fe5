package client_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"trainerd/client"
	"trainerd/server/servertest"
	"trainerd/storage"
)

func connect(t *testing.T, url string, o client.Options) (*client.Client, context.Context) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	c, err := client.New(url, o)
	if err != nil {
		t.Fatal(err)
	}
	return c, ctx
}

func TestNewRefusesAddresses(t *testing.T) {
	for _, url := range []string{"", "localhost:8080", "ftp://x", "http://"} {
		if _, err := client.New(url, client.Options{}); err == nil {
			t.Errorf("address %q was accepted", url)
		}
	}
}

// flaky answers the first calls by breaking the connection or with a status, then passes on.
func flaky(next http.Handler, breaks int32, status int) (http.Handler, *atomic.Int32) {
	var calls atomic.Int32
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if calls.Add(1) > breaks {
			next.ServeHTTP(w, r)
			return
		}
		io.Copy(io.Discard, r.Body)
		if status == 0 {
			// The request is carried out and its answer is lost: what keys are for.
			next.ServeHTTP(httptest.NewRecorder(), r)
			panic(http.ErrAbortHandler)
		}
		w.Header().Set("Content-Type", "application/problem+json")
		w.Header().Set("Retry-After", "1")
		w.WriteHeader(status)
		fmt.Fprintf(w, `{"code":"queue_full","status":%d,"title":"full","request_id":"r"}`, status)
	}), &calls
}

func TestRepetition(t *testing.T) {
	ok := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, `{"groups":3}`) })
	for _, tc := range []struct {
		name   string
		status int
		post   bool // a call without a key that changes something
		calls  int32
		code   string
	}{
		{"429 is repeated", 429, true, 3, ""},
		{"503 is repeated", 503, true, 3, ""},
		{"422 is not", 422, false, 1, "queue_full"},
		{"500 is not", 500, false, 1, "queue_full"},
		{"502 of a read is", 502, false, 3, ""},
		{"502 of a change is not", 502, true, 1, "queue_full"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			h, calls := flaky(ok, 2, tc.status)
			s := httptest.NewServer(h)
			defer s.Close()
			c, ctx := connect(t, s.URL, client.Options{MaxWait: 5 * time.Millisecond})
			var err error
			if tc.post {
				_, err = c.Flush(ctx, "j")
			} else {
				_, err = c.Job(ctx, "j")
			}
			if calls.Load() != tc.calls || client.Code(err) != tc.code {
				t.Errorf("%d calls, %v; expected %d, code %q", calls.Load(), err, tc.calls, tc.code)
			}
			var refusal *client.Error
			if tc.code != "" && (!errors.As(err, &refusal) || refusal.Status != tc.status || refusal.RetryAfter != time.Second) {
				t.Errorf("refusal %+v", refusal)
			}
		})
	}
	t.Run("gives up", func(t *testing.T) {
		h, calls := flaky(ok, 1000, 429)
		s := httptest.NewServer(h)
		defer s.Close()
		c, ctx := connect(t, s.URL, client.Options{MaxWait: time.Millisecond, Retries: 2})
		if _, err := c.Flush(ctx, "j"); client.Code(err) != "queue_full" || calls.Load() != 3 {
			t.Errorf("%d calls, %v", calls.Load(), err)
		}
	})
	t.Run("ends with the context", func(t *testing.T) {
		h, _ := flaky(ok, 1000, 429)
		s := httptest.NewServer(h)
		defer s.Close()
		c, _ := connect(t, s.URL, client.Options{})
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		defer cancel()
		if _, err := c.Flush(ctx, "j"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("error %v", err)
		}
	})
}

// TestLostAnswers breaks the connection after the server has done its work: the
// repetition with the same key must not do it again.
func TestLostAnswers(t *testing.T) {
	var armed atomic.Bool
	e := servertest.Start(t, servertest.Options{Wrap: func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodPost && armed.CompareAndSwap(true, false) {
				next.ServeHTTP(httptest.NewRecorder(), r)
				panic(http.ErrAbortHandler)
			}
			next.ServeHTTP(w, r)
		})
	}})
	c, ctx := connect(t, e.URL, client.Options{MaxWait: 10 * time.Millisecond})
	armed.Store(true)
	j, err := c.CreateJob(ctx, e.JobDocument(2, nil), "")
	if err != nil {
		t.Fatal(err)
	}
	armed.Store(true)
	if r, err := c.Submit(ctx, j.ID, servertest.Batch("a", 1, 2, -1, 1), ""); err != nil || r.Rows != 2 || r.Duplicates != 0 {
		t.Errorf("receipt %+v, %v", r, err)
	}
	jobs, err := c.Jobs(ctx)
	if err != nil || len(jobs) != 1 || jobs[0].Counts.Batches != 1 {
		t.Errorf("jobs %+v, %v", jobs, err)
	}
}

// TestPullVerifies flips one byte of a weight file on its way: nothing of the
// pull may be seen, and what was there before stays.
func TestPullVerifies(t *testing.T) {
	var corrupt atomic.Bool
	e := servertest.Start(t, servertest.Options{Wrap: func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if !corrupt.Load() || !strings.HasSuffix(r.URL.Path, ".safetensors") {
				next.ServeHTTP(w, r)
				return
			}
			rec := httptest.NewRecorder()
			next.ServeHTTP(rec, r)
			body := bytes.Clone(rec.Body.Bytes())
			body[len(body)/2] ^= 1
			w.Write(body)
		})
	}})
	c, ctx := connect(t, e.URL, client.Options{})
	j, err := c.CreateJob(ctx, e.JobDocument(2, nil), "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Wait(ctx, j.ID, 0, func(j client.Job) bool { return j.PolicyStep == 0 || j.Final() }); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "policy")
	if m, err := c.Pull(ctx, j.ID, 0, dir); err != nil || m.Step != 0 {
		t.Fatalf("pull: %v", err)
	}
	before, err := os.ReadFile(filepath.Join(dir, "model.safetensors"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Submit(ctx, j.ID, servertest.Batch("a", 2, 2, 0, 1), ""); err != nil {
		t.Fatal(err)
	}
	m, ok, err := c.Newer(ctx, j.ID, 0, 10*time.Second)
	if err != nil || !ok || m.Step != 1 {
		t.Fatalf("newer checkpoint: step %d, %v, %v", m.Step, ok, err)
	}
	corrupt.Store(true)
	if _, err := c.Pull(ctx, j.ID, client.Latest, dir); err == nil || !strings.Contains(err.Error(), "model.safetensors") {
		t.Errorf("pull of a corrupt file: %v", err)
	}
	corrupt.Store(false)
	after, err := os.ReadFile(filepath.Join(dir, "model.safetensors"))
	if err != nil || !bytes.Equal(before, after) {
		t.Errorf("a failed pull changed the directory (%v)", err)
	}
	if _, err := c.Pull(ctx, j.ID, client.Latest, dir); err != nil {
		t.Fatal(err)
	}
	if p, err := storage.ReadPulled(dir); err != nil || p.Step != 1 {
		t.Errorf("pulled %+v, %v", p, err)
	}
	r, err := c.File(ctx, j.ID, 1, "hf/model.safetensors", 8, 16)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	part, err := io.ReadAll(r)
	whole, werr := os.ReadFile(filepath.Join(dir, "model.safetensors"))
	if err != nil || werr != nil || !bytes.Equal(part, whole[8:24]) {
		t.Errorf("part of a file: %d bytes, %v, %v", len(part), err, werr)
	}
}

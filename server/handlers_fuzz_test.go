package server_test

import (
	"bytes"
	"context"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"trainerd/client"
	"trainerd/rollout/arrowio"
	"trainerd/server"
	"trainerd/server/servertest"
	"trainerd/trainer"
)

// FuzzHandlers sends requests of any method, path, query, header and body to the
// routes of a job that is loaded and has a checkpoint: no panic, no 5xx but a
// 503 that says so, and every answer as openapi.json describes it.
func FuzzHandlers(f *testing.F) {
	doc := loadDescription(f)
	e := servertest.Start(f, servertest.Options{ServerLimits: server.Limits{MaxWait: 5 * time.Millisecond, MaxDocumentBytes: 64 << 10},
		Limits: trainer.Limits{MaxBatchBytes: 64 << 10, MaxBatchRows: 64, MaxQueuedRollouts: 256, MaxJobs: 4, MaxSampleRows: 4}})
	c, err := client.New(e.URL, client.Options{})
	if err != nil {
		f.Fatal(err)
	}
	job, err := c.CreateJob(context.Background(), e.JobDocument(3, map[string]any{"sampling": map[string]any{"max_sequences": 2, "max_tokens": 64}}), "")
	if err != nil {
		f.Fatal(err)
	}
	if job, err = c.Wait(context.Background(), job.ID, time.Millisecond, func(j client.Job) bool { return j.PolicyStep == 0 || j.Final() }); err != nil || job.Final() {
		f.Fatal(job.State, err)
	}
	var batch bytes.Buffer
	if err := arrowio.Encode(&batch, servertest.Batch("f", 1, 3, 0, 1), ""); err != nil {
		f.Fatal(err)
	}
	for _, route := range e.Server.Routes() {
		method, path, _ := strings.Cut(route, " ")
		path = strings.NewReplacer("{job}", "JOB", "{step}", "0", "{batch}", "1", "{name}", "hf/config.json", "{lease}", "l", "{node}", "n").Replace(path)
		f.Add(method, path, "after=0&limit=3&wait=1ms&base=0", "Range", "bytes=0-1", "application/json", []byte(`{"prompts":[[1,2]],"max_tokens":2,"ttl":"1m","step":0}`))
	}
	f.Add("POST", "/v1/jobs/JOB/rollouts", "", "Idempotency-Key", "k", "application/vnd.apache.arrow.stream", batch.Bytes())
	f.Add("GET", "/v1/jobs/JOB/checkpoints/0/files/hf/model.safetensors", "redirect=true", "If-None-Match", "*", "", []byte(nil))
	f.Add("GET", "/v1/jobs/JOB/events", "", "Last-Event-ID", "18446744073709551615", "", []byte(nil))
	f.Fuzz(func(t *testing.T, method, path, query, name, value, kind string, body []byte) {
		if method == http.MethodDelete { // the job must live
			path = strings.ReplaceAll(path, "JOB", "job-0000000000000000")
		}
		if !strings.HasPrefix(path, "/") || strings.Trim(method, "ABCDEFGHIJKLMNOPQRSTUVWXYZ") != "" || method == "" || len(body) > 32<<10 {
			return
		}
		u, err := url.ParseRequestURI(strings.ReplaceAll(path, "JOB", job.ID))
		if err != nil {
			return
		}
		u.RawQuery = query
		ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond) // ends streams
		defer cancel()
		r, err := http.NewRequestWithContext(ctx, method, u.String(), bytes.NewReader(body))
		if err != nil {
			return
		}
		r.Header.Set(name, value)
		if kind != "" {
			r.Header.Set("Content-Type", kind)
		}
		w := httptest.NewRecorder()
		held(t.Errorf, doc, e.Server).ServeHTTP(w, r)
		if w.Code >= 500 && (w.Code != http.StatusServiceUnavailable || w.Header().Get("Content-Type") != "application/problem+json") {
			t.Errorf("%s %s: %d %s", method, u, w.Code, w.Body)
		}
	})
}

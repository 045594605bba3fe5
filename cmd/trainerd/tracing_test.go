package main

import (
	"bytes"
	"context"
	"encoding/hex"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.opentelemetry.io/otel/trace"
	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	common "go.opentelemetry.io/proto/otlp/common/v1"
	spans "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"trainerd/client"
)

// receiver is an OTLP/HTTP collector that keeps spans.
type receiver struct {
	*httptest.Server
	mu    sync.Mutex
	raw   bytes.Buffer // all bodies
	spans []*spans.Span
	from  map[string]bool // service names
}

func newReceiver(t *testing.T) *receiver {
	r := &receiver{from: map[string]bool{}}
	r.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		body, err := io.ReadAll(q.Body)
		var in collector.ExportTraceServiceRequest
		if err == nil {
			err = proto.Unmarshal(body, &in)
		}
		if err != nil || q.Method != http.MethodPost || q.URL.Path != "/v1/traces" || q.Header.Get("Content-Type") != "application/x-protobuf" {
			t.Errorf("%s %s %s: %v", q.Method, q.URL, q.Header.Get("Content-Type"), err)
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		r.raw.Write(body)
		for _, rs := range in.ResourceSpans {
			for _, a := range rs.Resource.Attributes {
				if a.Key == "service.name" {
					r.from[a.Value.GetStringValue()] = true
				}
			}
			for _, ss := range rs.ScopeSpans {
				r.spans = append(r.spans, ss.Spans...)
			}
		}
	}))
	t.Cleanup(r.Close)
	return r
}

func attr(s *spans.Span, key string) *common.AnyValue {
	for _, a := range s.Attributes {
		if a.Key == key {
			return a.Value
		}
	}
	return nil
}

// named returns the spans of a name.
func (r *receiver) named(name string) (out []*spans.Span) {
	for _, s := range r.spans {
		if s.Name == name {
			out = append(out, s)
		}
	}
	return out
}

// TestTracesArrive sends a batch with a caller's trace to a server that traces,
// and reads at a collector what became of it.
func TestTracesArrive(t *testing.T) {
	r := newReceiver(t)
	p, c := boot(t, func(cfg *Config) { cfg.TraceEndpoint = r.URL })
	j := newJob(t, c)
	caller := trace.NewSpanContext(trace.SpanContextConfig{TraceID: trace.TraceID{1, 2, 3}, SpanID: trace.SpanID{4, 5}, TraceFlags: trace.FlagsSampled})
	ctx := trace.ContextWithSpanContext(t.Context(), caller)
	receipt, err := c.Submit(ctx, j.ID, pairs("g", 1), "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Wait(t.Context(), j.ID, time.Millisecond, func(j client.Job) bool { return j.PolicyStep >= 1 || j.Final() }); err != nil {
		t.Fatal(err)
	}
	// A refused batch ends its span with the kind of its error.
	if _, err := c.SubmitArrow(ctx, j.ID, []byte("not arrow"), ""); client.Code(err) != "malformed_arrow" {
		t.Fatalf("%v", err)
	}
	stop, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := p.Close(stop); err != nil { // sends the last spans
		t.Fatal(err)
	}
	p.api = nil

	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.from["trainerd"] || len(r.from) != 1 {
		t.Errorf("services %v", r.from)
	}
	var of []*spans.Span // the caller's trace
	for _, s := range r.spans {
		if hex.EncodeToString(s.TraceId) == caller.TraceID().String() {
			of = append(of, s)
		}
	}
	one := func(name string, ok bool) *spans.Span {
		t.Helper()
		for _, s := range of {
			if s.Name == name && (s.Status.GetCode() != spans.Status_STATUS_CODE_ERROR) == ok {
				if s.EndTimeUnixNano < s.StartTimeUnixNano || s.StartTimeUnixNano == 0 {
					t.Errorf("%s runs from %d to %d", name, s.StartTimeUnixNano, s.EndTimeUnixNano)
				}
				return s
			}
		}
		t.Fatalf("the caller's trace has no %s (without error: %v): %v", name, ok, of)
		return nil
	}
	id := func(s *spans.Span) string { return hex.EncodeToString(s.SpanId) }
	parent := func(s *spans.Span) string { return hex.EncodeToString(s.ParentSpanId) }
	request, accept := one("POST /v1/jobs/:job/rollouts", true), one("accept", true)
	if parent(request) != caller.SpanID().String() || request.Kind != spans.Span_SPAN_KIND_SERVER {
		t.Errorf("the request's span is below %s, of kind %s", parent(request), request.Kind)
	}
	if got := attr(request, "http.response.status_code").GetIntValue(); got != http.StatusAccepted {
		t.Errorf("status %d", got)
	}
	if attr(request, "trainerd.request_id").GetStringValue() == "" {
		t.Error("the request's span has no request id")
	}
	if parent(accept) != id(request) {
		t.Error("accept is not below the request")
	}
	for _, name := range []string{"accept.decode", "accept.check", "spool.append"} {
		if s := one(name, true); parent(s) != id(accept) {
			t.Errorf("%s is not below accept", name)
		}
	}
	if got := attr(one("spool.append", true), "trainerd.batch").GetIntValue(); got != int64(receipt.Batch) {
		t.Errorf("spool.append is of batch %d, expected %d", got, receipt.Batch)
	}
	if s := one("accept.decode", false); s.Status.Message != "malformed" {
		t.Errorf("the refused batch ended with %q", s.Status.Message)
	}
	steps, published := r.named("step"), r.named("publish")
	if len(steps) != 1 || attr(steps[0], "trainerd.step").GetIntValue() != 1 {
		t.Errorf("steps: %v", steps)
	}
	if len(published) < 2 { // of step 0 and step 1
		t.Errorf("published: %v", published)
	}
	for _, s := range slices.Concat(of, steps, published) {
		if got := attr(s, "trainerd.job").GetStringValue(); got != j.ID {
			t.Errorf("%s has job %q, expected %s", s.Name, got, j.ID)
		}
	}
}

// TestTracesAreOptional: without a collector nothing is sent and the server makes
// no spans; with a sample of 0 only a caller's traces are kept; a collector that
// is not there delays nobody and is in the log.
func TestTracesAreOptional(t *testing.T) {
	r := newReceiver(t)
	p, c := boot(t, func(cfg *Config) { cfg.TraceEndpoint, cfg.TraceSample = r.URL, 0 })
	newJob(t, c)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := p.Close(ctx); err != nil {
		t.Fatal(err)
	}
	p.api = nil
	r.mu.Lock()
	if len(r.spans) != 0 {
		t.Errorf("%d spans with a sample of 0", len(r.spans))
	}
	r.mu.Unlock()

	gone := httptest.NewServer(nil)
	gone.Close()
	var log bytes.Buffer
	q := &Program{Config: p.Config, Log: slog.New(slog.NewTextHandler(&log, nil))}
	q.Config.TraceEndpoint, q.Config.TraceSample = gone.URL, 1
	if err := q.Start(ctx); err != nil {
		t.Fatal(err)
	}
	c, err := client.New(q.URL(), client.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Jobs(ctx); err != nil {
		t.Error(err)
	}
	short, end := context.WithTimeout(t.Context(), 3*time.Second)
	defer end()
	if err := q.Close(short); err != nil {
		t.Errorf("spans that nobody took fail the stop: %v", err)
	}
	if !strings.Contains(log.String(), "spans were not delivered") {
		t.Errorf("the log does not say so: %s", log.String())
	}
}

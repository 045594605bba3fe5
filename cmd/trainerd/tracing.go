package main

import (
	"context"
	"log/slog"

	"go.opentelemetry.io/otel/trace"

	"trainerd/internal/tracing"
)

// Tracing says where a command's spans go.
type Tracing struct {
	TraceEndpoint string  `json:"trace_endpoint" help:"OTLP/HTTP collector of traces, http(s)://HOST:PORT; empty: no traces"`
	TraceSample   float64 `json:"trace_sample" help:"share of the traces that begin here which are kept, 0 to 1; a caller's traceparent decides for its own"`
}

func defaultTracing() Tracing { return Tracing{TraceSample: 1} }

func (t Tracing) validate() error {
	if t.TraceEndpoint == "" {
		return tracing.Check("http://unused", t.TraceSample)
	}
	return tracing.Check(t.TraceEndpoint, t.TraceSample)
}

// start returns a tracer and what sends its last spans; nil for both when there
// is no collector.
func (t Tracing) start(ctx context.Context, service string, log *slog.Logger) (trace.Tracer, *tracing.Provider, error) {
	if t.TraceEndpoint == "" {
		return nil, nil, nil
	}
	p, err := tracing.Start(ctx, tracing.Options{Endpoint: t.TraceEndpoint, Sample: t.TraceSample, Service: service, Version: engineVersion(), Logger: log})
	return p.Tracer(), p, err
}

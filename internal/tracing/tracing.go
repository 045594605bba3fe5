package tracing

import (
	"context"
	"fmt"
	"log/slog"
	"net/url"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/sdk/resource"
	sdk "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"

	"trainerd/internal/fault"
)

// Options say where spans go. The collector's credentials, if it wants any, come
// from OTEL_EXPORTER_OTLP_HEADERS, which the exporter reads itself.
type Options struct {
	Endpoint string  // http(s)://HOST:PORT; a path replaces /v1/traces
	Sample   float64 // share of traces that begin here; a caller's decision is followed
	Service  string
	Version  string
	Logger   *slog.Logger
}

// Provider makes tracers and owns the goroutine that sends.
type Provider struct{ sdk *sdk.TracerProvider }

// Start returns a provider that sends in the background: nothing waits for the
// collector, and spans that it does not take are dropped past a bound.
func Start(ctx context.Context, o Options) (*Provider, error) {
	if err := Check(o.Endpoint, o.Sample); err != nil {
		return nil, err
	}
	u, err := url.Parse(o.Endpoint)
	if err != nil {
		return nil, err
	}
	if u.Path == "" || u.Path == "/" {
		u.Path = "/v1/traces"
	}
	exporter, err := otlptracehttp.New(ctx, otlptracehttp.WithEndpointURL(u.String()), otlptracehttp.WithTimeout(5*time.Second),
		otlptracehttp.WithRetry(otlptracehttp.RetryConfig{Enabled: true, InitialInterval: time.Second, MaxInterval: 5 * time.Second, MaxElapsedTime: 15 * time.Second}))
	if err != nil {
		return nil, fmt.Errorf("start the trace exporter: %w", err)
	}
	return &Provider{sdk.NewTracerProvider(
		sdk.WithBatcher(reporting{exporter, o.Logger}, sdk.WithBatchTimeout(time.Second)),
		sdk.WithSampler(sdk.ParentBased(sdk.TraceIDRatioBased(o.Sample))),
		sdk.WithResource(resource.NewSchemaless(attribute.String("service.name", o.Service), attribute.String("service.version", o.Version))),
	)}, nil
}

// Check says what is wrong with the settings.
func Check(endpoint string, sample float64) error {
	u, err := url.Parse(endpoint)
	switch {
	case err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.RawQuery != "" || u.Fragment != "":
		return fault.BadField("trace_endpoint", shown(u), "http://HOST:PORT or https://HOST:PORT, nothing after it but a path")
	case u.User != nil: // it would be in the log of the configuration
		return fault.BadField("trace_endpoint", shown(u), "no password in it: set OTEL_EXPORTER_OTLP_HEADERS")
	case !(sample >= 0 && sample <= 1):
		return fault.BadField("trace_sample", sample, "a number from 0 to 1")
	}
	return nil
}

// shown is an address without what may be secret.
func shown(u *url.URL) string {
	if u == nil {
		return "(not an address)"
	}
	v := *u
	v.RawQuery, v.Fragment = "", ""
	return v.Redacted()
}

// Tracer returns the tracer of trainerd's spans; of a nil provider, nil.
func (p *Provider) Tracer() trace.Tracer {
	if p == nil {
		return nil
	}
	return p.sdk.Tracer("trainerd")
}

// Close sends what is left until ctx ends.
func (p *Provider) Close(ctx context.Context) error {
	if p == nil {
		return nil
	}
	if err := p.sdk.Shutdown(ctx); err != nil {
		return fmt.Errorf("send the last spans: %w", err)
	}
	return nil
}

// reporting logs what was not delivered; the SDK would tell a global handler.
type reporting struct {
	sdk.SpanExporter
	log *slog.Logger
}

// ExportSpans implements the SDK's SpanExporter.
func (r reporting) ExportSpans(ctx context.Context, spans []sdk.ReadOnlySpan) error {
	if err := r.SpanExporter.ExportSpans(ctx, spans); err != nil {
		r.log.Warn("spans were not delivered", "spans", len(spans), "err", err)
	}
	return nil
}

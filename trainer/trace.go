package trainer

import (
	"context"
	"errors"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"

	"trainerd/internal/fault"
)

// span begins a span of the job's work below the one that ctx carries. end ends
// it with what *err then is: its kind only, since texts may name paths and URLs.
func (j *Job) span(ctx context.Context, name string, attrs ...attribute.KeyValue) (_ context.Context, end func(err *error)) {
	t := j.m.opts.Tracer
	if t == nil {
		return ctx, func(*error) {}
	}
	ctx, s := t.Start(ctx, name, trace.WithAttributes(attribute.String("trainerd.job", string(j.ID))), trace.WithAttributes(attrs...))
	return ctx, func(err *error) {
		switch {
		case *err == nil:
		case errors.Is(*err, context.Canceled):
			s.SetStatus(codes.Error, "cancelled")
		default:
			s.SetStatus(codes.Error, fault.KindOf(*err).String())
		}
		s.End()
	}
}

// annotate adds to the span that ctx carries what was not known when it began.
func annotate(ctx context.Context, attrs ...attribute.KeyValue) {
	trace.SpanFromContext(ctx).SetAttributes(attrs...)
}

package s3

import (
	"context"
	"io"
	"net/http"
	"sync/atomic"
	"time"

	"trainerd/internal/fault"
)

const (
	// defaultStall is how long a request may go without a byte moving.
	defaultStall = 30 * time.Second
	// joinStall is for CompleteMultipartUpload: some services join the parts before
	// the answer begins.
	joinStall = 2 * time.Minute
)

// outage is since when nothing moves in one operation of a Store, in all the
// requests and repetitions that it takes: 0 while something does. It begins with
// the first request that stalls, so that time spent elsewhere does not count.
type outage struct{ since atomic.Int64 }

func (o *outage) over() { o.since.Store(0) }

func (o *outage) goesOn(stalledFor time.Duration) {
	o.since.CompareAndSwap(0, time.Now().Add(-stalledFor).UnixNano())
}

func (o *outage) lasts() time.Duration {
	if since := o.since.Load(); since != 0 {
		return time.Since(time.Unix(0, since))
	}
	return 0
}

type outageKey struct{}

// watch marks a context as one operation: where nothing moves for twice the
// stall, its repetitions end. Without that a paused service is asked ten times
// over before anybody is told.
func watch(ctx context.Context) context.Context {
	if _, ok := ctx.Value(outageKey{}).(*outage); ok {
		return ctx
	}
	return context.WithValue(ctx, outageKey{}, &outage{})
}

// patience ends requests that stall: a service that is paused, or a network that
// drops everything, keeps a connection open and silent for ever. Slow is not
// stalled: each byte that moves counts.
type patience struct {
	next  http.RoundTripper
	stall time.Duration
}

// RoundTrip implements http.RoundTripper.
func (p patience) RoundTrip(req *http.Request) (*http.Response, error) {
	out, ok := req.Context().Value(outageKey{}).(*outage)
	if !ok {
		out = &outage{}
	}
	if d := out.lasts(); d >= 2*p.stall {
		return nil, stalled(req, d)
	}
	limit := p.stall
	if req.Method == http.MethodPost && req.URL.Query().Has("uploadId") {
		limit = max(limit, joinStall)
	}
	ctx, cancel := context.WithCancelCause(req.Context())
	w := &watched{ctx: ctx, out: out, limit: limit, cancel: cancel}
	w.timer = time.AfterFunc(limit, func() { out.goesOn(limit); cancel(stalled(req, limit)) })
	sent := req.Clone(ctx)
	if sent.Body != nil && sent.Body != http.NoBody {
		sent.Body = sending{w, sent.Body}
	}
	res, err := p.next.RoundTrip(sent)
	if err != nil {
		if cause, ok := fault.As(context.Cause(ctx)); ok {
			err = cause
		}
		w.end()
		return nil, err
	}
	w.answered.Store(true)
	w.rest()
	res.Body = receiving{w, res.Body}
	return res, nil
}

func stalled(req *http.Request, after time.Duration) error {
	return fault.New(fault.Unavailable, "s3_stalled", "%s %s%s: nothing moved for %v", req.Method, req.URL.Host, req.URL.Path, after.Round(time.Second))
}

// watched is a request under way.
type watched struct {
	ctx      context.Context // the request's own; its cause says that it stalled
	out      *outage
	limit    time.Duration
	timer    *time.Timer
	cancel   context.CancelCauseFunc
	answered atomic.Bool
}

// rest stops the clock while nobody waits for the service.
func (w *watched) rest() {
	w.out.over()
	w.timer.Stop()
}

func (w *watched) end() {
	w.timer.Stop()
	w.cancel(nil)
}

// sending is a request's body: what the connection takes has moved.
type sending struct {
	w *watched
	io.ReadCloser
}

// Read implements io.Reader.
func (b sending) Read(p []byte) (int, error) {
	if !b.w.answered.Load() {
		b.w.out.over()
		b.w.timer.Reset(b.w.limit)
	}
	return b.ReadCloser.Read(p)
}

// receiving is an answer's body; its end is the request's.
type receiving struct {
	w *watched
	io.ReadCloser
}

// Read implements io.Reader.
func (b receiving) Read(p []byte) (int, error) {
	b.w.timer.Reset(b.w.limit)
	n, err := b.ReadCloser.Read(p)
	b.w.timer.Stop()
	if n > 0 {
		b.w.out.over()
	}
	if cause := context.Cause(b.w.ctx); err != nil && err != io.EOF && cause != nil {
		err = cause
	}
	return n, err
}

// Close implements io.Closer.
func (b receiving) Close() error {
	defer b.w.end()
	return b.ReadCloser.Close()
}

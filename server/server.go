package server

import (
	"context"
	_ "embed"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/labstack/echo/v4"
	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel/trace"

	"trainerd/internal/fault"
	"trainerd/trainer"
)

// Limits bound one request. Zero values mean the defaults.
type Limits struct {
	MaxDocumentBytes int64         // of a JSON body; default 16 MiB (a sampling request carries prompts)
	MaxUploadBytes   int64         // of all bodies being received or worked on; default 1 GiB
	BodyTimeout      time.Duration // to receive a body; default 5 min
	RequestTimeout   time.Duration // to answer, streams and files excepted; default 15 min
	MaxWait          time.Duration // of a long poll; default 60 s
	Heartbeat        time.Duration // between comments of an event stream; default 15 s
}

func (l Limits) withDefaults() Limits {
	if l.MaxDocumentBytes <= 0 {
		l.MaxDocumentBytes = 16 << 20
	}
	if l.MaxUploadBytes <= 0 {
		l.MaxUploadBytes = 1 << 30
	}
	def := func(d *time.Duration, v time.Duration) {
		if *d <= 0 {
			*d = v
		}
	}
	def(&l.BodyTimeout, 5*time.Minute)
	def(&l.RequestTimeout, 15*time.Minute)
	def(&l.MaxWait, time.Minute)
	def(&l.Heartbeat, 15*time.Second)
	return l
}

// Options are what a Server is made of. Manager is required.
type Options struct {
	Manager *trainer.Manager
	Logger  *slog.Logger // nil: none
	Tracer  trace.Tracer // nil: none
	Version string
	Limits  Limits
	// Guard wraps /v1 and /metrics: the place of authentication. nil: none.
	Guard echo.MiddlewareFunc
}

// Server is the API as an http.Handler. It owns no listener.
type Server struct {
	echo    *echo.Echo
	jobs    *trainer.Manager
	log     *slog.Logger
	tracer  trace.Tracer
	limits  Limits
	version string
	metrics *meters
	leaving atomic.Bool     // since Drain
	uploads atomic.Int64    // bytes of bodies, by their declared length or their limit
	bodies  bodies          // memory for those of rollouts
	life    context.Context // of streams and long polls; ended by Close
	end     context.CancelFunc
}

//go:embed openapi.json
var openAPI []byte

// OpenAPI returns the API's description.
func OpenAPI() []byte { return openAPI }

// New returns the API of a manager.
func New(o Options) *Server {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	o.Logger = slog.New(WithRequestIDs(o.Logger.Handler()))
	s := &Server{echo: echo.New(), jobs: o.Manager, log: o.Logger, tracer: o.Tracer, limits: o.Limits.withDefaults(), version: o.Version}
	s.life, s.end = context.WithCancel(context.Background())
	s.metrics = newMeters(o.Manager, o.Version)
	s.echo.HideBanner, s.echo.HidePort = true, true
	s.echo.HTTPErrorHandler = s.answerError
	s.echo.Use(s.identify, s.observe)
	if s.tracer != nil {
		s.echo.Use(s.traced)
	}
	s.echo.Use(s.recover)
	s.probes(o.Guard)
	s.routes(o.Guard)
	return s
}

// ServeHTTP implements http.Handler.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) { s.echo.ServeHTTP(w, r) }

// Drain makes /readyz answer 503, so that no new clients are sent here; requests
// are answered as before. Call it when a stop begins.
func (s *Server) Drain() { s.leaving.Store(true) }

// Close ends event streams and long polls, so that an http.Server can shut down.
// Call it before http.Server.Shutdown, and Manager.Close after both.
func (s *Server) Close() { s.end() }

// Registry returns the metrics that /metrics shows, for more to be added.
func (s *Server) Registry() *prometheus.Registry { return s.metrics.registry }

// HTTPServer returns a net/http server for this API with the timeouts that fit
// it: headers are bounded, bodies have BodyTimeout, answers may stream.
func (s *Server) HTTPServer() *http.Server {
	return &http.Server{Handler: s, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 64 << 10,
		ErrorLog: slog.NewLogLogger(s.log.Handler(), slog.LevelWarn)}
}

// probes registers what has no version. /metrics names every job, so it is guarded.
func (s *Server) probes(guard echo.MiddlewareFunc) {
	e := s.echo
	e.GET("/healthz", func(c echo.Context) error {
		if err := s.jobs.Alive(); err != nil {
			return err
		}
		return c.JSON(http.StatusOK, map[string]string{"status": "ok", "version": s.version})
	})
	e.GET("/readyz", s.ready)
	var guards []echo.MiddlewareFunc
	if guard != nil {
		guards = append(guards, guard)
	}
	e.GET("/metrics", echo.WrapHandler(s.metrics.handler()), guards...)
	e.GET("/openapi.json", func(c echo.Context) error { return c.JSONBlob(http.StatusOK, openAPI) })
}

// routes registers /v1. Middleware goes to each route rather than to a group,
// whose catch-all would answer 404 where 405 is true.
func (s *Server) routes(guard echo.MiddlewareFunc) {
	add := func(method, path string, h echo.HandlerFunc, more ...echo.MiddlewareFunc) {
		more = append([]echo.MiddlewareFunc{knownQuery(method + " " + path)}, more...)
		if guard != nil {
			more = append([]echo.MiddlewareFunc{guard}, more...)
		}
		s.echo.Add(method, "/v1"+path, h, more...)
	}
	const get, post, del, head = http.MethodGet, http.MethodPost, http.MethodDelete, http.MethodHead
	add(post, "/jobs", s.createJob, s.timed)
	add(get, "/jobs", s.listJobs, s.timed)
	add(get, "/jobs/:job", s.getJob, s.timed)
	add(del, "/jobs/:job", s.cancelJob, s.timed)
	add(post, "/jobs/:job/pause", s.pauseJob, s.timed)
	add(post, "/jobs/:job/resume", s.resumeJob, s.timed)
	add(post, "/jobs/:job/flush", s.flushJob, s.timed)
	add(post, "/jobs/:job/rollouts", s.postRollouts, s.timed)
	add(get, "/jobs/:job/batches/:batch", s.getBatch, s.timed)
	add(post, "/jobs/:job/sample", s.sample, s.timed)
	add(post, "/jobs/:job/logprobs", s.logProbs, s.timed)
	add(get, "/jobs/:job/steps", s.steps, s.timed)
	add(get, "/jobs/:job/metrics", s.stepMetrics, s.timed)
	add(get, "/jobs/:job/events", s.events)
	add(post, "/jobs/:job/checkpoints", s.publish, s.timed)
	add(get, "/jobs/:job/checkpoints", s.listCheckpoints, s.timed)
	add(get, "/jobs/:job/checkpoints/latest", s.latestCheckpoint) // bounded by wait, or a stream
	add(get, "/jobs/:job/checkpoints/:step", s.getCheckpoint, s.timed)
	add(get, "/jobs/:job/checkpoints/:step/files/*", s.checkpointFile)
	add(head, "/jobs/:job/checkpoints/:step/files/*", s.checkpointFile)
	add(post, "/jobs/:job/checkpoints/:step/leases", s.takeLease, s.timed)
	add(get, "/jobs/:job/checkpoints/:step/leases", s.listLeases, s.timed)
	add(http.MethodPut, "/jobs/:job/checkpoints/:step/leases/:lease", s.renewLease, s.timed)
	add(del, "/jobs/:job/checkpoints/:step/leases/:lease", s.endLease, s.timed)

	add(get, "/jobs/:job/checkpoints/:step/delta", s.checkpointDelta)
	add(http.MethodPut, "/jobs/:job/nodes/:node", s.reportNode, s.timed)
	add(get, "/jobs/:job/nodes", s.listNodes, s.timed)
}

func (s *Server) ready(c echo.Context) error {
	ctx, cancel := context.WithTimeout(c.Request().Context(), 5*time.Second)
	defer cancel()
	if s.leaving.Load() {
		return fault.New(fault.Unavailable, "shutting_down", "the server is shutting down")
	}
	if err := s.jobs.Ready(ctx); err != nil {
		return err
	}
	return c.JSON(http.StatusOK, map[string]string{"status": "ready"})
}

// job finds the job that a path names.
func (s *Server) job(c echo.Context) (*trainer.Job, error) {
	return s.jobs.Job(trainer.JobID(c.Param("job")))
}

// Routes lists the routes as "METHOD /path/{parameter}", as openapi.json names them.
func (s *Server) Routes() []string {
	var out []string
	for _, r := range s.echo.Routes() {
		if r.Method == echo.RouteNotFound {
			continue
		}
		parts := strings.Split(r.Path, "/")
		for i, p := range parts {
			if name, ok := strings.CutPrefix(p, ":"); ok {
				parts[i] = "{" + name + "}"
			} else if p == "*" {
				parts[i] = "{name}"
			}
		}
		out = append(out, r.Method+" "+strings.Join(parts, "/"))
	}
	slices.Sort(out)
	return out
}

package server

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"log/slog"
	"net/http"
	"runtime/debug"
	"strconv"
	"time"

	"github.com/labstack/echo/v4"

	"trainerd/internal/fault"
)

const headerRequestID = "X-Request-Id"

// identify gives every request an id: the client's if it is well formed, else a new one.
func (s *Server) identify(next echo.HandlerFunc) echo.HandlerFunc {
	return func(c echo.Context) error {
		id := c.Request().Header.Get(headerRequestID)
		if !validRequestID(id) {
			var b [8]byte
			if _, err := rand.Read(b[:]); err != nil {
				return fmt.Errorf("draw a request id: %w", err)
			}
			id = hex.EncodeToString(b[:])
		}
		c.Response().Header().Set(headerRequestID, id)
		c.Response().Header().Set("X-Content-Type-Options", "nosniff")
		c.SetRequest(c.Request().WithContext(context.WithValue(c.Request().Context(), requestIDKey{}, id)))
		return next(c)
	}
}

func requestID(c echo.Context) string { return c.Response().Header().Get(headerRequestID) }

func validRequestID(id string) bool {
	if len(id) == 0 || len(id) > 64 {
		return false
	}
	for i := range len(id) {
		b := id[i]
		if !(b >= 'a' && b <= 'z' || b >= 'A' && b <= 'Z' || b >= '0' && b <= '9' || b == '-' || b == '_' || b == '.') {
			return false
		}
	}
	return true
}

// leftoverTime is how long a client has for the rest of a body that nobody reads.
const leftoverTime = 2 * time.Second

// observe logs and counts a request when it has been answered.
func (s *Server) observe(next echo.HandlerFunc) echo.HandlerFunc {
	return func(c echo.Context) error {
		began := time.Now()
		s.metrics.inFlight.Inc()
		defer s.metrics.inFlight.Dec()
		if err := next(c); err != nil {
			c.Error(err) // answers; the status is known from here on
		}
		if c.Request().ContentLength != 0 {
			// net/http reads what is left of a body before it answers, without a bound
			// on time: a client that dribbles would keep its connection for ever.
			http.NewResponseController(c.Response().Writer).SetReadDeadline(time.Now().Add(leftoverTime))
		}
		if n, ok := c.Get(keyUpload).(int64); ok {
			s.uploads.Add(-n)
		}
		route := c.Path() // the pattern, so that ids do not become labels
		if route == "" || route == "/*" {
			route = "none"
		}
		took, status, method := time.Since(began), c.Response().Status, c.Request().Method
		s.metrics.requests.WithLabelValues(route, methodLabel(method), strconv.Itoa(status)).Inc()
		s.metrics.seconds.WithLabelValues(route, methodLabel(method)).Observe(took.Seconds())
		if n := c.Request().ContentLength; n > 0 {
			s.metrics.received.WithLabelValues(route).Add(float64(n))
		}
		s.metrics.sent.WithLabelValues(route).Add(float64(c.Response().Size))
		attrs := []slog.Attr{slog.String("method", method), slog.String("path", c.Request().URL.Path), slog.Int("status", status),
			slog.Float64("seconds", took.Seconds()), slog.Int64("bytes", c.Response().Size)}
		if job := c.Param("job"); job != "" {
			attrs = append(attrs, slog.String("job", clip(job)))
		}
		s.log.LogAttrs(c.Request().Context(), slog.LevelDebug, "request", attrs...)
		return nil
	}
}

// methodLabel is a method as a label: strangers may send any word, and each would
// be a time series for ever.
func methodLabel(method string) string {
	switch method {
	case http.MethodGet, http.MethodHead, http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete, http.MethodOptions:
		return method
	}
	return "other"
}

// recover turns a panic into an Internal fault. The stack goes to the log.
func (s *Server) recover(next echo.HandlerFunc) echo.HandlerFunc {
	return func(c echo.Context) (err error) {
		defer func() {
			p := recover()
			if p == nil {
				return
			}
			if p == http.ErrAbortHandler {
				panic(p) // net/http's own way to drop a connection
			}
			err = fault.New(fault.Internal, "panic", "handler panicked: %v\n%s", p, debug.Stack())
		}()
		return next(c)
	}
}

// timed bounds how long an answer may take, and ends it with the server.
func (s *Server) timed(next echo.HandlerFunc) echo.HandlerFunc {
	return func(c echo.Context) error {
		ctx, cancel := context.WithTimeout(c.Request().Context(), s.limits.RequestTimeout)
		defer cancel()
		c.SetRequest(c.Request().WithContext(ctx))
		return next(c)
	}
}

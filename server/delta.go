package server

import (
	"net/http"

	"github.com/labstack/echo/v4"

	"trainerd/internal/fault"
)

// deltaType is the media type of a delta (package storage/delta).
const deltaType = "application/vnd.trainerd.delta"

// checkpointDelta streams what turns the newest checkpoint of the step "from"
// into that of the path. It is computed while it is sent; a delta that breaks
// off lacks its end, and its reader fetches the files whole instead.
func (s *Server) checkpointDelta(c echo.Context) error {
	job, to, err := s.checkpoint(c)
	if err != nil {
		return err
	}
	if c.QueryParam("from") == "" {
		return fault.BadField("from", "nothing", "the step that the reader has")
	}
	step, err := queryInt(c, "from", 0, 0, 1<<53)
	if err != nil {
		return err
	}
	from, err := job.Checkpoint(c.Request().Context(), step)
	if err != nil {
		return err
	}
	w := &lateWriter{c: c, header: func(h http.Header) {
		h.Set("Content-Type", deltaType)
		h.Set("Cache-Control", "no-cache")
	}}
	ctx, cancel := s.untilClose(c.Request().Context())
	defer cancel()
	err = job.Delta(ctx, w, from, to)
	if err != nil && w.begun {
		s.log.Warn("delta broke off", "request_id", requestID(c), "job", job.ID, "from", from.Prefix, "to", to.Prefix, "err", err)
		return nil
	}
	return err
}

// lateWriter sends the header with the first byte, so that an error before it is
// still a problem document.
type lateWriter struct {
	c      echo.Context
	header func(http.Header)
	begun  bool
}

func (w *lateWriter) Write(p []byte) (int, error) {
	if !w.begun {
		w.begun = true
		w.header(w.c.Response().Header())
		w.c.Response().WriteHeader(http.StatusOK)
	}
	return w.c.Response().Write(p)
}

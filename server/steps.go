package server

import (
	"bytes"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/labstack/echo/v4"

	"trainerd/internal/fault"
	"trainerd/rollout/arrowio"
	"trainerd/trainer"
)

// Pages of steps.
const (
	defaultPage = 100
	maxPage     = 10_000
)

type stepPage struct {
	Steps []trainer.StepRecord `json:"steps"`
	Next  *int64               `json:"next"` // "after" of the next page; null at the end
}

type metricRow struct {
	Step    int64           `json:"step"`
	Time    time.Time       `json:"time"`
	Metrics trainer.Metrics `json:"metrics"`
}

type metricPage struct {
	Metrics []metricRow `json:"metrics"`
	Next    *int64      `json:"next"`
}

func (s *Server) steps(c echo.Context) error {
	page, next, err := s.page(c)
	if err != nil {
		return err
	}
	return answerSteps(c, page, stepPage{Steps: page, Next: next})
}

func (s *Server) stepMetrics(c echo.Context) error {
	page, next, err := s.page(c)
	if err != nil {
		return err
	}
	out := metricPage{Metrics: []metricRow{}, Next: next}
	for _, r := range page {
		out.Metrics = append(out.Metrics, metricRow{Step: r.Step, Time: r.Time, Metrics: r.Metrics})
	}
	return answerSteps(c, page, out)
}

// page reads the step records that a query asks for.
func (s *Server) page(c echo.Context) ([]trainer.StepRecord, *int64, error) {
	job, err := s.job(c)
	if err != nil {
		return nil, nil, err
	}
	after, err := queryInt(c, "after", 0, 0, 1<<53)
	if err != nil {
		return nil, nil, err
	}
	limit, err := queryInt(c, "limit", defaultPage, 1, maxPage)
	if err != nil {
		return nil, nil, err
	}
	page, err := job.Steps(after, int(limit)+1)
	if err != nil {
		return nil, nil, err
	}
	if len(page) <= int(limit) {
		return page, nil, nil
	}
	page = page[:limit]
	next := page[limit-1].Step
	return page, &next, nil
}

// answerSteps writes a page as JSON, or its numbers as an Arrow stream.
func answerSteps(c echo.Context, page []trainer.StepRecord, doc any) error {
	c.Response().Header().Set("Vary", "Accept")
	kind, err := negotiate(c, "application/json", arrowio.ContentType)
	if err != nil {
		return err
	}
	if kind == "application/json" {
		return c.JSON(http.StatusOK, doc)
	}
	steps, metrics := make([]int64, len(page)), make([]map[string]float64, len(page))
	for i, r := range page {
		steps[i], metrics[i] = r.Step, r.Metrics
	}
	var out bytes.Buffer
	if err := arrowio.EncodeMetrics(&out, steps, metrics); err != nil {
		return err
	}
	return c.Blob(http.StatusOK, arrowio.ContentType, out.Bytes())
}

// events streams a job's events (Server-Sent Events, WHATWG HTML section 9.2).
// Last-Event-ID resumes after an event; a "gap" event says that some are lost.
func (s *Server) events(c echo.Context) error {
	job, err := s.job(c)
	if err != nil {
		return err
	}
	if _, err := negotiate(c, "text/event-stream"); err != nil {
		return err
	}
	after := job.LastEvent()
	if raw := c.Request().Header.Get("Last-Event-ID"); raw != "" {
		if after, err = strconv.ParseUint(raw, 10, 64); err != nil {
			return fault.BadField("Last-Event-ID", strconv.Quote(raw), "an id of this stream")
		}
	}
	startEvents(c)
	w := c.Response()

	ctx, cancel := s.untilClose(c.Request().Context())
	defer cancel()
	lines := make(chan string)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		job.Events(ctx, after, func(e trainer.Event) error {
			select {
			case lines <- frame(e):
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		})
	}()
	defer func() { cancel(); <-ended }()
	beat := time.NewTicker(s.limits.Heartbeat)
	defer beat.Stop()
	for {
		text := ": beat\n\n"
		select {
		case text = <-lines:
		case <-beat.C:
		case <-ended:
			return nil
		case <-ctx.Done():
			return nil
		}
		if _, err := w.Write([]byte(text)); err != nil {
			return nil // the reader left
		}
		w.Flush()
	}
}

// frame writes an event in the stream's format. JSON has no line breaks of its own.
func frame(e trainer.Event) string {
	var b strings.Builder
	fmt.Fprintf(&b, "id: %d\nevent: %s\ndata: %s\n\n", e.ID, e.Type, e.Data)
	return b.String()
}

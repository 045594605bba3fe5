package client

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"
)

// Event is one thing that happened to a job.
type Event struct {
	ID   string
	Type string          // state, step, checkpoint, or gap when the server no longer has what was missed
	Data json.RawMessage // a state, a Step or a manifest
}

// Events calls f for each event of a job as it happens, after the event with
// lastID ("": from now on). It reconnects where it was when the connection
// breaks, and returns when f fails (with its error) or ctx ends.
func (c *Client) Events(ctx context.Context, job, lastID string, f func(Event) error) error {
	for fails := 0; ; {
		got, err := c.stream(ctx, job, &lastID, f)
		var stop *stopped
		switch {
		case errors.As(err, &stop):
			return stop.err
		case ctx.Err() != nil:
			return ctx.Err()
		}
		var refused *Error
		if errors.As(err, &refused) && refused.Status < 500 {
			return err
		}
		if got {
			fails = 0
		}
		if fails++; fails > c.opts.Retries {
			return fmt.Errorf("follow events of job %s: %w", job, err)
		}
		select {
		case <-time.After(min(time.Duration(fails)*200*time.Millisecond, c.opts.MaxWait)):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// stopped carries the error of the caller's function past the reconnection.
type stopped struct{ err error }

func (s *stopped) Error() string { return s.err.Error() }

// stream reads one connection's events; got says whether there were any.
func (c *Client) stream(ctx context.Context, job string, lastID *string, f func(Event) error) (got bool, err error) {
	h := http.Header{"Accept": {"text/event-stream"}}
	if *lastID != "" {
		h.Set("Last-Event-ID", *lastID)
	}
	res, err := c.do(ctx, call{method: http.MethodGet, path: jobPath(job, "events"), header: h})
	if err != nil {
		return false, err
	}
	defer res.Body.Close()
	lines := bufio.NewReaderSize(res.Body, 64<<10)
	var e Event
	var data strings.Builder
	for {
		line, err := lines.ReadString('\n')
		if err != nil {
			if err == io.EOF {
				err = errors.New("the server ended the stream")
			}
			return got, err
		}
		line = strings.TrimRight(line, "\r\n")
		name, value, _ := strings.Cut(line, ":")
		value = strings.TrimPrefix(value, " ")
		switch {
		case line == "" && data.Len() > 0:
			e.Data = json.RawMessage(data.String())
			got = true
			if err := f(e); err != nil {
				return got, &stopped{err}
			}
			*lastID = e.ID
			e = Event{ID: e.ID}
			data.Reset()
		case name == "id":
			e.ID = value
		case name == "event":
			e.Type = value
		case name == "data":
			data.WriteString(value)
		}
	}
}

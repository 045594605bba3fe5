package server

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/http"
	"strconv"
	"strings"

	"github.com/labstack/echo/v4"

	"trainerd/internal/fault"
)

// statusOf is the one table from error kinds to statuses and titles.
var statusOf = map[fault.Kind]struct {
	status int
	title  string
}{
	fault.Malformed:       {http.StatusBadRequest, "The body cannot be decoded"},
	fault.Invalid:         {http.StatusUnprocessableEntity, "The request is not acceptable"},
	fault.Conflict:        {http.StatusConflict, "The request contradicts the present state"},
	fault.NotFound:        {http.StatusNotFound, "There is no such thing"},
	fault.TooLarge:        {http.StatusRequestEntityTooLarge, "The request is over a limit"},
	fault.Busy:            {http.StatusTooManyRequests, "A queue is full"},
	fault.Unavailable:     {http.StatusServiceUnavailable, "Not possible now"},
	fault.Denied:          {http.StatusForbidden, "Not allowed"},
	fault.Unauthenticated: {http.StatusUnauthorized, "Not authenticated"},
	fault.Internal:        {http.StatusInternalServerError, "Internal error"},
}

const problemType = "application/problem+json"

// problem is an RFC 9457 document.
type problem struct {
	Type      string         `json:"type"`
	Title     string         `json:"title"`
	Status    int            `json:"status"`
	Detail    string         `json:"detail,omitempty"`
	Instance  string         `json:"instance,omitempty"`
	Code      string         `json:"code"`
	Errors    []problemField `json:"errors,omitempty"`
	RequestID string         `json:"request_id"`
}

type problemField struct {
	Name     string `json:"name"`
	Row      *int   `json:"row,omitempty"` // zero-based
	Got      string `json:"got,omitempty"`
	Expected string `json:"expected,omitempty"`
}

// protocolError is a refusal that has no fault kind, since it is about HTTP itself.
type protocolError struct {
	status int
	code   string
	detail string
}

func (e *protocolError) Error() string { return e.detail }

func unsupportedMedia(format string, args ...any) error {
	return &protocolError{http.StatusUnsupportedMediaType, "unsupported_media_type", fmt.Sprintf(format, args...)}
}

// What a problem says at most: a small body can be wrong in very many places.
const maxErrors, maxDetail = 100, 16 << 10

// bounded cuts a detail that is too long.
func bounded(text string) string {
	if len(text) <= maxDetail {
		return text
	}
	return strings.ToValidUTF8(text[:maxDetail], "") + "..."
}

// problemOf turns an error into its document. Internal errors keep their text
// from the client.
func problemOf(err error) (p problem, retryAfter int) {
	var pe *protocolError
	var he *echo.HTTPError
	f, isFault := fault.As(err)
	switch {
	case errors.As(err, &pe):
		p = problem{Status: pe.status, Title: http.StatusText(pe.status), Code: pe.code, Detail: pe.detail}
	case isFault:
		row := statusOf[f.Kind]
		p = problem{Status: row.status, Title: row.title, Code: f.Code, Detail: bounded(err.Error())}
		if p.Code == "" {
			p.Code = f.Kind.String()
		}
		for _, field := range f.Fields[:min(len(f.Fields), maxErrors)] {
			pf := problemField{Name: field.Name, Got: field.Got, Expected: field.Expected}
			if field.Row >= 0 {
				pf.Row = &field.Row
			}
			p.Errors = append(p.Errors, pf)
		}
		if f.RetryAfter > 0 {
			retryAfter = int(math.Ceil(f.RetryAfter.Seconds()))
		} else if f.Kind == fault.Busy {
			retryAfter = 1
		}
		if f.Kind == fault.Internal {
			p.Detail = ""
		}
	case errors.As(err, &he):
		p = problem{Status: he.Code, Title: http.StatusText(he.Code), Code: codeOf(he.Code), Detail: fmt.Sprint(he.Message)}
	case errors.Is(err, context.DeadlineExceeded):
		p = problem{Status: http.StatusServiceUnavailable, Title: statusOf[fault.Unavailable].title, Code: "timeout", Detail: "the request took longer than the server allows"}
	case errors.Is(err, context.Canceled):
		p = problem{Status: http.StatusServiceUnavailable, Title: statusOf[fault.Unavailable].title, Code: "cancelled", Detail: "the request was cancelled"}
	default:
		p = problem{Status: http.StatusInternalServerError, Title: statusOf[fault.Internal].title, Code: "internal"}
	}
	p.Type = "urn:trainerd:problem:" + p.Code
	return p, retryAfter
}

func codeOf(status int) string {
	switch status {
	case http.StatusNotFound:
		return "route_not_found"
	case http.StatusMethodNotAllowed:
		return "method_not_allowed"
	}
	return "http_" + strconv.Itoa(status)
}

// answerError is echo's error handler: every error ends here, once.
func (s *Server) answerError(err error, c echo.Context) {
	p, retryAfter := problemOf(err)
	p.RequestID = requestID(c)
	p.Instance = c.Request().URL.Path
	if p.Status >= 500 && !errors.Is(err, context.Canceled) {
		s.log.ErrorContext(c.Request().Context(), "request failed", "job", clip(c.Param("job")), "method", c.Request().Method, "path", p.Instance, "status", p.Status, "err", err)
	}
	if c.Response().Committed {
		return // a stream that broke off; its reader sees that it is short
	}
	h := c.Response().Header()
	if retryAfter > 0 {
		h.Set("Retry-After", strconv.Itoa(retryAfter))
	}
	for _, name := range []string{"ETag", "Repr-Digest", "Accept-Ranges", "Cache-Control"} {
		h.Del(name) // they were meant for the answer that did not come
	}
	h.Set("Content-Type", problemType)
	if c.Request().Method == http.MethodHead {
		c.Response().WriteHeader(p.Status)
		return
	}
	if err := c.JSON(p.Status, p); err != nil {
		s.log.DebugContext(c.Request().Context(), "write a problem", "err", err)
	}
}

package server

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"reflect"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/labstack/echo/v4"

	"trainerd/internal/fault"
	"trainerd/rollout/arrowio"
	"trainerd/trainer"
)

// readBody reads a whole body of at most limit bytes into the memory of into,
// nil for fresh memory. A declared length over the limit is refused before
// anything is read.
func (s *Server) readBody(c echo.Context, limit int64, into []byte) ([]byte, error) {
	r := c.Request()
	if enc := r.Header.Get("Content-Encoding"); enc != "" && enc != "identity" {
		return nil, unsupportedMedia("Content-Encoding %q is not supported: compress the Arrow buffers (LZ4 or ZSTD) instead", enc)
	}
	tooLarge := func(got string) error {
		return &fault.Error{Kind: fault.TooLarge, Code: "body_too_large", Msg: "the body is over the limit",
			Fields: []fault.Field{{Name: "body", Row: -1, Got: got, Expected: fmt.Sprintf("at most %d bytes", limit)}}}
	}
	if r.ContentLength > limit {
		return nil, tooLarge(strconv.FormatInt(r.ContentLength, 10) + " bytes")
	}
	if err := s.reserve(c, limit); err != nil {
		return nil, err
	}
	control := http.NewResponseController(c.Response().Writer)
	if control.SetReadDeadline(time.Now().Add(s.limits.BodyTimeout)) == nil {
		defer control.SetReadDeadline(time.Time{}) // else the deadline would end the answer too
	}
	body, err := readAll(into, http.MaxBytesReader(c.Response().Writer, r.Body, limit), min(r.ContentLength, limit))
	var over *http.MaxBytesError
	switch {
	case errors.As(err, &over):
		return nil, tooLarge(fmt.Sprintf("more than %d bytes", limit))
	case err != nil:
		return nil, fault.New(fault.Malformed, "body_unreadable", "read the body: %w", err)
	}
	return body, nil
}

// firstBuffer is how much is allocated on the word of a Content-Length alone.
// Most bodies fit, and are read to where they stay.
const firstBuffer = 4 << 20

// readAll reads r to its end into the memory of into, which it may replace. It
// allocates no more than firstBuffer or twice what has arrived. declared is how
// much will come, negative when nobody said.
func readAll(into []byte, r io.Reader, declared int64) ([]byte, error) {
	b := into[:0]
	for {
		if len(b) == cap(b) {
			want := max(2*len(b), 4<<10)
			if declared >= int64(len(b)) { // one byte more, so that the end is seen
				want = int(min(declared+1, max(firstBuffer, 2*int64(len(b)))))
			}
			grown := make([]byte, len(b), max(want, len(b)+1))
			copy(grown, b)
			b = grown
		}
		n, err := r.Read(b[len(b):cap(b)])
		b = b[:len(b)+n]
		if err == io.EOF {
			return b, nil
		}
		if err != nil {
			return nil, err
		}
	}
}

// bodies keeps the memory of bodies that have been worked on, and in which no
// queued row lies, for those that follow: a body is large, and fresh memory costs
// as much as receiving it.
type bodies struct{ pool sync.Pool }

func (p *bodies) take() []byte {
	if b, ok := p.pool.Get().(*[]byte); ok {
		return *b
	}
	return nil
}

// give takes a body back that nobody refers to any more. One in much larger
// memory than it needed is left to the garbage collector.
func (p *bodies) give(b []byte) {
	if cap(b) <= 4*len(b) {
		p.pool.Put(&b)
	}
}

// keyUpload is where a request keeps the bytes it has reserved.
const keyUpload = "upload"

// reserve counts a body in before it is read, so that many at once cannot take
// all memory. A body that is alone always passes; observe counts it out.
func (s *Server) reserve(c echo.Context, limit int64) error {
	n := limit
	if l := c.Request().ContentLength; l >= 0 {
		n = l
	}
	if total := s.uploads.Add(n); total > s.limits.MaxUploadBytes && total > n {
		s.uploads.Add(-n)
		return &fault.Error{Kind: fault.Busy, Code: "uploads_full", RetryAfter: time.Second,
			Msg: fmt.Sprintf("bodies of %d bytes are under way, and %d more would be over the limit of %d", total-n, n, s.limits.MaxUploadBytes)}
	}
	c.Set(keyUpload, n)
	return nil
}

// What a producer may say of a batch in its headers, so that one that the queue
// has no room for is refused before it is sent.
const (
	headerRows   = "Trainerd-Rows"
	headerTokens = "Trainerd-Tokens"
)

// earlyBody is from how many bytes on a body is refused unread where that can be.
// A smaller one is looked at: that costs little, and the answer is exact.
const earlyBody = 64 << 10

// admit refuses rollouts by what is known before their body. A client that
// expects 100 (Continue) is answered at once and sends nothing. The body of
// others is received, or they might see a broken connection instead of the
// answer, but neither kept nor decoded.
func (s *Server) admit(c echo.Context, job *trainer.Job, key string) error {
	var said trainer.Announced
	for name, to := range map[string]*int64{headerRows: &said.Rows, headerTokens: &said.Tokens} {
		raw := c.Request().Header.Get(name)
		if raw == "" {
			continue
		}
		n, err := strconv.ParseInt(raw, 10, 64)
		if err != nil || n < 1 || n > maxAnnounced {
			return fault.BadField(name, strconv.Quote(raw), fmt.Sprintf("a whole number in [1, %d]", int64(maxAnnounced)))
		}
		*to = n
	}
	if n := c.Request().ContentLength; n >= 0 && n < earlyBody || n > s.jobs.Limits().MaxBatchBytes {
		return nil
	}
	err := job.Admit(key, said)
	if err != nil {
		s.discard(c)
	}
	return err
}

// maxAnnounced keeps what is computed from announced numbers within an int64.
const maxAnnounced = 1 << 50

// discard receives a body and forgets it, for as long as leftoverTime.
func (s *Server) discard(c echo.Context) {
	r := c.Request()
	if r.ProtoMajor != 1 || strings.EqualFold(r.Header.Get("Expect"), "100-continue") {
		return // the answer gets there by itself
	}
	control := http.NewResponseController(c.Response().Writer)
	if control.SetReadDeadline(time.Now().Add(leftoverTime)) != nil {
		return
	}
	defer control.SetReadDeadline(time.Time{})
	io.CopyBuffer(onlyWriter{io.Discard}, io.LimitReader(r.Body, s.jobs.Limits().MaxBatchBytes), make([]byte, 64<<10)) // an error is the client's
}

// onlyWriter hides that a writer could read for itself, in smaller pieces.
type onlyWriter struct{ io.Writer }

// wantArrow refuses a body that does not declare itself an Arrow stream.
func wantArrow(c echo.Context) error {
	raw := c.Request().Header.Get("Content-Type")
	kind, params, err := mime.ParseMediaType(raw)
	if err != nil || kind != arrowio.ContentType {
		return unsupportedMedia("Content-Type is %q, expected %s", raw, arrowio.ContentType)
	}
	for name, value := range params {
		if name != "codecs" {
			continue // parameters that we do not know do not change the format
		}
		for _, codec := range strings.Split(value, ",") {
			switch strings.TrimSpace(codec) {
			case "", "lz4", "zstd":
			default:
				return unsupportedMedia("Arrow codec %q is not supported, expected lz4 or zstd", strings.TrimSpace(codec))
			}
		}
	}
	return nil
}

// wantJSON refuses a body that declares itself something else than JSON.
func wantJSON(c echo.Context) error {
	raw := c.Request().Header.Get("Content-Type")
	kind, _, err := mime.ParseMediaType(raw)
	if err != nil || kind != "application/json" {
		return unsupportedMedia("Content-Type is %q, expected application/json", raw)
	}
	return nil
}

// decodeJSON reads a JSON body strictly into v: no unknown fields, nothing after it.
func (s *Server) decodeJSON(c echo.Context, v any) error {
	if err := wantJSON(c); err != nil {
		return err
	}
	body, err := s.readBody(c, s.limits.MaxDocumentBytes, nil)
	if err != nil {
		return err
	}
	return decodeStrict(body, v)
}

func decodeStrict(body []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(body))
	d.DisallowUnknownFields()
	err := d.Decode(v)
	if err == nil {
		if _, err := d.Token(); err != io.EOF {
			return fault.New(fault.Malformed, "malformed_json", "decode body: data after the end of the document")
		}
		return nil
	}
	var wrong *json.UnmarshalTypeError
	if errors.As(err, &wrong) {
		name := wrong.Field
		if name == "" {
			name = "body"
		}
		return &fault.Error{Kind: fault.Invalid, Code: "invalid_request", Msg: "request",
			Fields: []fault.Field{{Name: name, Row: -1, Got: wrong.Value, Expected: "a value of type " + wrong.Type.String()}}}
	}
	if name, ok := strings.CutPrefix(err.Error(), "json: unknown field "); ok {
		if unquoted, err := strconv.Unquote(name); err == nil {
			name = unquoted
		}
		return &fault.Error{Kind: fault.Invalid, Code: "invalid_request", Msg: "request",
			Fields: []fault.Field{{Name: name, Row: -1, Got: "an unknown field", Expected: "one of " + strings.Join(fieldNames(v), ", ")}}}
	}
	return fault.New(fault.Malformed, "malformed_json", "decode body: %w", err)
}

// fieldNames are the members of the JSON object that v, a pointer to a struct, is read from.
func fieldNames(v any) []string {
	t := reflect.TypeOf(v).Elem()
	var names []string
	for i := range t.NumField() {
		name, _, _ := strings.Cut(t.Field(i).Tag.Get("json"), ",")
		names = append(names, name)
	}
	return names
}

// idempotencyKey reads the Idempotency-Key header, "" when there is none.
func idempotencyKey(c echo.Context) (string, error) {
	values := c.Request().Header.Values("Idempotency-Key")
	if len(values) == 0 {
		return "", nil
	}
	key := values[0]
	ok := len(values) == 1 && len(key) >= 1 && len(key) <= 255
	for i := 0; ok && i < len(key); i++ {
		ok = key[i] > ' ' && key[i] < 0x7f
	}
	if !ok {
		return "", fault.BadField("Idempotency-Key", strconv.Quote(key), "1 to 255 printable ASCII characters without spaces, once")
	}
	return key, nil
}

// queryInt reads a whole number of the query in [low, high].
func queryInt(c echo.Context, name string, def, low, high int64) (int64, error) {
	raw := c.QueryParam(name)
	if raw == "" {
		return def, nil
	}
	v, err := strconv.ParseInt(raw, 10, 64)
	if err != nil || v < low || v > high {
		return 0, fault.BadField(name, strconv.Quote(raw), fmt.Sprintf("a whole number in [%d, %d]", low, high))
	}
	return v, nil
}

// pathInt reads a whole number, 0 or more, of the path.
func pathInt(c echo.Context, name string) (int64, error) {
	v, err := strconv.ParseInt(c.Param(name), 10, 64)
	if err != nil || v < 0 {
		return 0, &fault.Error{Kind: fault.NotFound, Code: name + "_not_found", Msg: "no such " + name,
			Fields: []fault.Field{{Name: name, Row: -1, Got: strconv.Quote(c.Param(name)), Expected: "a whole number"}}}
	}
	return v, nil
}

// negotiate picks the first of the offered media types that has the greatest
// weight in Accept; 406 when none is acceptable.
func negotiate(c echo.Context, offered ...string) (string, error) {
	accept := strings.Join(c.Request().Header.Values("Accept"), ",")
	if strings.TrimSpace(accept) == "" {
		return offered[0], nil
	}
	best, weight := "", 0.0
	for _, offer := range offered {
		if q := quality(accept, offer); q > weight {
			best, weight = offer, q
		}
	}
	if best == "" {
		return "", &protocolError{http.StatusNotAcceptable, "not_acceptable", fmt.Sprintf("Accept is %q, offered are %s", accept, strings.Join(offered, " and "))}
	}
	return best, nil
}

// quality is the weight that an Accept header gives to a media type; the most
// specific range that matches counts.
func quality(accept, offer string) float64 {
	major, _, _ := strings.Cut(offer, "/")
	q, specific := 0.0, -1
	for _, part := range strings.Split(accept, ",") {
		kind, params, err := mime.ParseMediaType(strings.TrimSpace(part))
		if err != nil {
			continue
		}
		level := -1
		switch kind {
		case offer:
			level = 2
		case major + "/*":
			level = 1
		case "*/*":
			level = 0
		}
		if level <= specific {
			continue
		}
		specific, q = level, 1
		if raw, ok := params["q"]; ok {
			if q, err = strconv.ParseFloat(raw, 64); err != nil || q < 0 || q > 1 {
				q = 0
			}
		}
	}
	return q
}

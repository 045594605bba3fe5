package server

import (
	"context"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"path"
	"strconv"
	"time"

	"github.com/labstack/echo/v4"

	"trainerd/internal/fault"
	"trainerd/storage"
	"trainerd/trainer"
)

type publishRequest struct {
	Snapshot bool `json:"snapshot"` // with optimizer state
}

func (s *Server) publish(c echo.Context) error {
	job, err := s.job(c)
	if err != nil {
		return err
	}
	var in publishRequest
	if c.Request().ContentLength != 0 {
		if err := s.decodeJSON(c, &in); err != nil {
			return err
		}
	}
	man, created, err := job.Publish(c.Request().Context(), in.Snapshot)
	if err != nil {
		return err
	}
	status := http.StatusOK
	if created {
		status = http.StatusCreated
	}
	c.Response().Header().Set("Location", fmt.Sprintf("/v1/jobs/%s/checkpoints/%d", job.ID, man.Step))
	return c.JSON(status, man)
}

type checkpointList struct {
	Checkpoints []storage.Manifest `json:"checkpoints"`
}

func (s *Server) listCheckpoints(c echo.Context) error {
	job, err := s.job(c)
	if err != nil {
		return err
	}
	all, err := job.Checkpoints(c.Request().Context())
	if err != nil {
		return err
	}
	if all == nil {
		all = []storage.Manifest{}
	}
	return c.JSON(http.StatusOK, checkpointList{Checkpoints: all})
}

// checkpoint finds the checkpoint that a path names, and its job.
func (s *Server) checkpoint(c echo.Context) (*trainer.Job, storage.Manifest, error) {
	job, err := s.job(c)
	if err != nil {
		return nil, storage.Manifest{}, err
	}
	step, err := pathInt(c, "step")
	if err != nil {
		return nil, storage.Manifest{}, err
	}
	man, err := job.Checkpoint(c.Request().Context(), step)
	return job, man, err
}

func (s *Server) getCheckpoint(c echo.Context) error {
	_, man, err := s.checkpoint(c)
	if err != nil {
		return err
	}
	c.Response().Header().Set("ETag", manifestTag(man))
	return c.JSON(http.StatusOK, man)
}

func manifestTag(m storage.Manifest) string { return fmt.Sprintf(`"%d-%d"`, m.Step, m.Attempt) }

// latestCheckpoint answers the newest checkpoint. With after, or with the ETag
// of what the client has, it waits up to wait for a newer one and answers 304
// when none came. As text/event-stream it answers every newer one.
func (s *Server) latestCheckpoint(c echo.Context) error {
	job, err := s.job(c)
	if err != nil {
		return err
	}
	after, err := queryInt(c, "after", trainer.AnyStep, -1, 1<<53)
	if err != nil {
		return err
	}
	wait, err := s.queryWait(c)
	if err != nil {
		return err
	}
	c.Response().Header().Set("Vary", "Accept")
	kind, err := negotiate(c, "application/json", "text/event-stream")
	if err != nil {
		return err
	}
	if kind != "application/json" {
		return s.latestEvents(c, job, after)
	}
	has := c.Request().Header.Get("If-None-Match")
	ctx, cancel := s.untilClose(c.Request().Context())
	defer cancel()
	ctx, cancel = context.WithTimeout(ctx, wait)
	defer cancel()
	for {
		man, ok, err := job.Latest(ctx, after)
		if err != nil {
			return err
		}
		tag := manifestTag(man)
		if ok && has == tag && man.Step > after { // newer than after, and the client has it all the same
			after = man.Step
			c.Response().Header().Set("ETag", tag)
			continue
		}
		c.Response().Header().Set("Cache-Control", "no-cache")
		switch {
		case ok:
			c.Response().Header().Set("ETag", tag)
			return c.JSON(http.StatusOK, man)
		case after == trainer.AnyStep:
			return &fault.Error{Kind: fault.NotFound, Code: "checkpoint_not_found", Msg: "the job has published no checkpoint yet"}
		}
		return c.NoContent(http.StatusNotModified)
	}
}

// latestEvents streams the newest checkpoint and then each newer one, as events
// of type checkpoint whose id is the step: Last-Event-ID goes on after it. A
// reader that is slow misses steps, never the newest.
func (s *Server) latestEvents(c echo.Context, job *trainer.Job, after int64) error {
	if raw := c.Request().Header.Get("Last-Event-ID"); raw != "" {
		step, err := strconv.ParseInt(raw, 10, 64)
		if err != nil || step < 0 {
			return fault.BadField("Last-Event-ID", strconv.Quote(raw), "an id of this stream")
		}
		after = max(after, step)
	}
	startEvents(c)
	ctx, cancel := s.untilClose(c.Request().Context())
	defer cancel()
	for ctx.Err() == nil {
		beat, stop := context.WithTimeout(ctx, s.limits.Heartbeat)
		man, ok, err := job.Latest(beat, after)
		text := ": beat\n\n"
		if ok && err == nil {
			data, err := json.Marshal(man)
			if err != nil {
				stop()
				return err
			}
			text = fmt.Sprintf("id: %d\nevent: checkpoint\ndata: %s\n\n", man.Step, data)
			after = man.Step
		} else {
			<-beat.Done() // an ended job answers at once
		}
		stop()
		if _, err := c.Response().Write([]byte(text)); err != nil {
			return nil // the reader left
		}
		c.Response().Flush()
	}
	return nil
}

// startEvents sends the head of an event stream.
func startEvents(c echo.Context) {
	w := c.Response()
	h := w.Header()
	h.Set("Content-Type", "text/event-stream")
	h.Set("Cache-Control", "no-store")
	h.Set("X-Accel-Buffering", "no")
	w.WriteHeader(http.StatusOK)
	fmt.Fprint(w, ": connected\n\n")
	w.Flush()
}

// queryWait reads wait: a Go duration ("30s") or seconds, capped by MaxWait.
func (s *Server) queryWait(c echo.Context) (time.Duration, error) {
	raw := c.QueryParam("wait")
	if raw == "" {
		return 0, nil
	}
	d, err := time.ParseDuration(raw)
	if err != nil {
		seconds, serr := strconv.ParseUint(raw, 10, 31)
		d, err = time.Duration(seconds)*time.Second, serr
	}
	if err != nil || d < 0 {
		return 0, fault.BadField("wait", strconv.Quote(raw), `a duration such as "30s"`)
	}
	return min(d, s.limits.MaxWait), nil
}

// untilClose ends a context with the server's streams.
func (s *Server) untilClose(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(s.life, cancel)
	return ctx, func() { stop(); cancel() }
}

// checkpointFile serves one file with ranges and conditions (RFC 9110) and its
// digest (RFC 9530). A file of a checkpoint never changes under its ETag. With
// ?redirect=true a store that can hands the client to itself.
func (s *Server) checkpointFile(c echo.Context) error {
	if err := fewRanges(c.Request()); err != nil {
		return err
	}
	job, man, err := s.checkpoint(c)
	if err != nil {
		return err
	}
	name := c.Param("*")
	f, ok := man.File(name)
	if !ok {
		return &fault.Error{Kind: fault.NotFound, Code: "file_not_found", Msg: "no such file in the checkpoint",
			Fields: []fault.Field{{Name: "name", Row: -1, Got: strconv.Quote(name), Expected: "a name of the manifest's files"}}}
	}
	digest, err := hex.DecodeString(f.SHA256)
	if err != nil {
		return fmt.Errorf("read digest of %s: %w", name, err)
	}
	switch redirect := c.QueryParam("redirect"); redirect {
	case "true":
		url, ok, err := job.FileURL(c.Request().Context(), man, name)
		if err != nil {
			return err
		}
		if ok {
			c.Response().Header().Set("Cache-Control", "no-store") // the URL ends soon
			return c.Redirect(http.StatusTemporaryRedirect, url)
		}
	case "", "false":
	default:
		return fault.BadField("redirect", strconv.Quote(redirect), "true or false")
	}
	h := c.Response().Header()
	h.Set("ETag", `"`+f.SHA256+`"`)
	h.Set("Repr-Digest", "sha-256=:"+base64.StdEncoding.EncodeToString(digest)+":")
	h.Set("Cache-Control", "no-cache") // the step may be published again by another attempt; the ETag tells
	h.Set("Content-Type", "application/octet-stream")
	if path.Ext(name) == ".json" {
		h.Set("Content-Type", "application/json")
	}
	r := &fileReader{ctx: c.Request().Context(), job: job, man: man, file: f}
	defer r.Close()
	http.ServeContent(c.Response(), c.Request(), name, man.Created, r)
	if r.err != nil {
		s.log.WarnContext(c.Request().Context(), "checkpoint file broke off", "job", job.ID, "file", name, "err", r.err)
	}
	return nil
}

// fileReader reads a stored file from any offset. It opens the store where the
// reader stands, and only when something is read.
type fileReader struct {
	ctx  context.Context // the request's: a reader lives no longer
	job  *trainer.Job
	man  storage.Manifest
	file storage.File
	at   int64
	open io.ReadCloser // at offset at; nil: not open
	err  error
}

func (r *fileReader) Seek(offset int64, whence int) (int64, error) {
	switch whence {
	case io.SeekCurrent:
		offset += r.at
	case io.SeekEnd:
		offset += r.file.Size
	}
	if offset < 0 {
		return 0, errors.New("seek before the start")
	}
	if offset != r.at {
		r.Close()
		r.at = offset
	}
	return offset, nil
}

func (r *fileReader) Read(p []byte) (int, error) {
	if r.at >= r.file.Size {
		return 0, io.EOF
	}
	if r.open == nil {
		var err error
		if r.open, err = r.job.OpenFile(r.ctx, r.man, r.file.Name, r.at, -1); err != nil {
			r.open, r.err = nil, err
			return 0, err
		}
	}
	n, err := r.open.Read(p)
	r.at += int64(n)
	if err != nil && err != io.EOF {
		r.err = err
	}
	return n, err
}

// Close closes what is open; the reader may be used again.
func (r *fileReader) Close() error {
	if r.open == nil {
		return nil
	}
	err := r.open.Close()
	r.open = nil
	return err
}

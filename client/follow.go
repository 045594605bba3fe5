package client

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"trainerd/internal/fault"
	"trainerd/storage"
)

// Checkpoint names what lies in a pulled directory.
type Checkpoint struct {
	Job    string
	Step   int64
	Prefix string
	Digest string // SHA-256 of the manifest
	Dir    string // absolute
}

// FollowOptions say what Follow does. Job and Dir are required.
type FollowOptions struct {
	Job, Dir string
	// Apply makes the engine load what lies in Dir now. It is called for every
	// checkpoint taken, and once at the start for what is there already, since the
	// engine may have been away; after an error it is called again, with growing
	// pauses, until it succeeds or a newer checkpoint comes. nil: nothing to do.
	Apply func(context.Context, Checkpoint) error
	// Node is the name under which the server hears what is served: the newest
	// checkpoint that Apply took. "": no reports.
	Node     string
	Report   time.Duration // between two reports; default 15 s
	Interval time.Duration // at least between two checkpoints taken; 0: take each one that is seen
	Pull     PullOptions
	Log      *slog.Logger // nil: none
}

// Pauses of a follower after a failure.
const (
	pauseFirst = 500 * time.Millisecond
	pauseMost  = 30 * time.Second
	followWait = 30 * time.Second // of one long poll
)

// Follow keeps Dir at a job's newest checkpoint until ctx ends, which is no
// error. It outlives the server: whatever passes by itself is waited for, and
// what does not (a token that is refused, a job that does not exist, a directory
// that is not Pull's) is returned.
func (c *Client) Follow(ctx context.Context, o FollowOptions) error {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Report <= 0 {
		o.Report = 15 * time.Second
	}
	dir, err := filepath.Abs(o.Dir)
	if err != nil {
		return err
	}
	o.Dir = dir
	if o.Pull.Note == nil {
		o.Pull.Note = func(err error) { o.Log.Debug("pull", "job", o.Job, "err", err) }
	}
	if o.Pull.Holder == "" {
		o.Pull.Holder = o.Node
	}
	f := &follower{c: c, o: o, have: Checkpoint{Step: -1}, state: "loading", moved: make(chan struct{}, 1)}
	f.serving.Step = -1
	if was, err := storage.ReadPulled(dir); err == nil && was.Job == o.Job && was.Files == "hf/" && was.SHA256 != "" {
		f.have = Checkpoint{Job: was.Job, Step: was.Step, Prefix: was.Prefix, Digest: was.SHA256, Dir: dir}
	}
	reports, stop := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		f.reports(reports)
	}()
	err = f.run(ctx)
	stop()
	<-ended
	f.leave(err)
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// follower is one Follow. have, applied, seen and pin are of its goroutine.
type follower struct {
	c       *Client
	o       FollowOptions
	have    Checkpoint // that lies in Dir, step -1: none
	applied bool       // Apply took it
	tries   int        // times that Apply refused it
	taken   time.Time  // when it was pulled

	mu      sync.Mutex // guards what is reported
	serving Checkpoint
	state   string
	message string
	pin     *Lease // of the checkpoint that the next delta begins with
	moved   chan struct{}
}

func (f *follower) run(ctx context.Context) error {
	for fails := 0; ; {
		err := f.round(ctx)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err == nil:
			fails = 0
			continue
		case f.final(err):
			return err
		}
		f.say("failed", err.Error())
		if errors.Is(err, errApply) { // the next round waits, for a newer checkpoint
			f.o.Log.Warn("follow: the engine did not load the checkpoint", "job", f.o.Job, "step", f.have.Step, "tries", f.tries, "err", err)
			continue
		}
		wait := pause(err, fails)
		fails++
		f.o.Log.Warn("follow: trying again", "job", f.o.Job, "in", wait, "err", err)
		if err := rest(ctx, wait); err != nil {
			return err
		}
	}
}

// errApply marks an error of Apply.
var errApply = errors.New("the engine refused")

func pause(err error, fails int) time.Duration {
	most := min(pauseFirst<<min(fails, 10), pauseMost)
	wait := most/2 + mathrand.N(most/2) // nodes that lost a server together do not come back together
	var refused *Error
	if errors.As(err, &refused) {
		wait = max(wait, min(refused.RetryAfter, 2*pauseMost))
	}
	return wait
}

// final says that waiting does not mend an error.
func (f *follower) final(err error) bool {
	var refused *Error
	if errors.As(err, &refused) {
		switch refused.Status {
		case http.StatusRequestTimeout, http.StatusTooManyRequests:
			return false
		case http.StatusNotFound, http.StatusConflict: // retention was faster than the pull; the next round takes a newer one
			return refused.Code != "checkpoint_not_found" && refused.Code != "checkpoint_going" && refused.Code != "file_not_found"
		}
		return refused.Status < 500
	}
	kind, ok := fault.As(err)
	return ok && (kind.Kind == fault.Conflict || kind.Kind == fault.Invalid)
}

// round waits for one newer checkpoint and takes it, or applies again what Apply refused.
func (f *follower) round(ctx context.Context) error {
	wait := followWait
	switch {
	case !f.taken.IsZero() && f.applied:
		if err := rest(ctx, f.o.Interval-time.Since(f.taken)); err != nil {
			return err
		}
	case f.have.Step < 0 || f.applied:
	case f.tries == 0:
		wait = 0
	default:
		wait = pause(nil, f.tries)
	}
	began := time.Now()
	m, ok, err := f.c.once().Newer(ctx, f.o.Job, f.have.Step, wait)
	idle := f.have.Step < 0 || f.applied
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil && (idle || f.final(err)):
		return err
	case err != nil: // the server is away, what lies here can be served all the same
		f.o.Log.Warn("follow: the server is away", "job", f.o.Job, "err", err)
	case ok:
		if err := f.pull(ctx, m.Step); err != nil {
			return err
		}
		return f.apply(ctx)
	}
	if time.Since(began) < min(wait, time.Second)/2 { // an ended job is answered at once: do not ask again at once
		if err := rest(ctx, min(wait, 5*time.Second)); err != nil {
			return err
		}
	}
	if !idle {
		return f.apply(ctx)
	}
	if f.applied {
		f.say("serving", "")
	}
	return nil
}

func (f *follower) pull(ctx context.Context, step int64) error {
	f.say("loading", fmt.Sprintf("pulling step %d", step))
	began := time.Now()
	m, stats, err := f.c.PullWith(ctx, f.o.Job, step, f.o.Dir, f.o.Pull)
	if err != nil {
		return fmt.Errorf("pull step %d: %w", step, err)
	}
	digest, err := m.Digest()
	if err != nil {
		return err
	}
	f.have = Checkpoint{Job: m.Job, Step: m.Step, Prefix: m.Prefix, Digest: digest, Dir: f.o.Dir}
	f.applied, f.tries, f.taken = false, 0, time.Now()
	f.o.Log.Info("checkpoint pulled", "job", m.Job, "step", m.Step, "dir", f.o.Dir, "seconds", time.Since(began).Seconds(),
		"bytes", stats.Bytes, "fetched", stats.Fetched, "delta", stats.Delta, "kept", stats.Kept)
	f.keepBase(ctx)
	return nil
}

func (f *follower) apply(ctx context.Context) error {
	if f.o.Apply != nil {
		f.say("loading", fmt.Sprintf("loading step %d", f.have.Step))
		began := time.Now()
		if err := f.o.Apply(ctx, f.have); err != nil {
			f.tries++
			return fmt.Errorf("load step %d: %w: %w", f.have.Step, errApply, err)
		}
		f.o.Log.Info("checkpoint loaded", "job", f.o.Job, "step", f.have.Step, "seconds", time.Since(began).Seconds())
	}
	f.applied = true
	f.mu.Lock()
	f.serving = f.have
	f.mu.Unlock()
	f.say("serving", "")
	return nil
}

// say changes what is reported and reports it soon.
func (f *follower) say(state, message string) {
	f.mu.Lock()
	message = clipMessage(message)
	same := f.state == state && f.message == message
	f.state, f.message = state, message
	f.mu.Unlock()
	if same {
		return
	}
	select {
	case f.moved <- struct{}{}:
	default:
	}
}

func clipMessage(text string) string {
	const most = 1000
	if len(text) > most {
		text = text[:most]
	}
	return strings.ToValidUTF8(text, "?")
}

// reports sends what the node serves, and keeps the lease of the next delta's base.
func (f *follower) reports(ctx context.Context) {
	for {
		if f.o.Node != "" {
			if err := f.report(ctx); err != nil && ctx.Err() == nil {
				f.o.Log.Debug("report what the node serves", "job", f.o.Job, "node", f.o.Node, "err", err)
			}
		}
		f.mu.Lock()
		pin := f.pin
		f.mu.Unlock()
		if pin != nil {
			if renewed, err := f.c.once().Renew(ctx, f.o.Job, *pin, f.pinTTL()); err == nil {
				f.mu.Lock()
				if f.pin == pin {
					f.pin = &renewed
				}
				f.mu.Unlock()
			}
		}
		select {
		case <-f.moved:
		case <-time.After(f.o.Report):
		case <-ctx.Done():
			return
		}
	}
}

func (f *follower) pinTTL() time.Duration { return max(4*f.o.Report, 2*time.Minute) }

func (f *follower) report(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	f.mu.Lock()
	r := NodeReport{Step: f.serving.Step, Digest: f.serving.Digest, State: f.state, Message: f.message, TTL: min(max(4*f.o.Report, time.Second), time.Hour)}
	f.mu.Unlock()
	return f.c.once().ReportNode(ctx, f.o.Job, f.o.Node, r)
}

// keepBase moves the follower's lease to what lies in Dir, so that the next
// delta can begin there however late it comes. Without the lease the next pull
// may be whole, which is all.
func (f *follower) keepBase(ctx context.Context) {
	if !f.o.Pull.Delta {
		return
	}
	f.dropBase(ctx)
	l, err := f.c.once().Lease(ctx, f.o.Job, f.have.Step, f.o.Pull.Holder, f.pinTTL())
	if err != nil {
		f.o.Pull.Note(fmt.Errorf("keep the base of the next delta: %w", err))
		return
	}
	f.mu.Lock()
	f.pin = &l
	f.mu.Unlock()
}

func (f *follower) dropBase(ctx context.Context) {
	f.mu.Lock()
	pin := f.pin
	f.pin = nil
	f.mu.Unlock()
	if pin == nil {
		return
	}
	if err := f.c.once().Release(ctx, f.o.Job, *pin); err != nil {
		f.o.Pull.Note(fmt.Errorf("release the base of a delta: %w", err))
	}
}

// leave says good-bye, if the server hears it.
func (f *follower) leave(err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	f.dropBase(ctx)
	if f.o.Node == "" {
		return
	}
	why := "the follower was stopped"
	if err != nil && !errors.Is(err, context.Canceled) {
		why = err.Error()
	}
	f.say("stopped", why)
	if err := f.report(ctx); err != nil {
		f.o.Log.Debug("report the end", "job", f.o.Job, "node", f.o.Node, "err", err)
	}
}

// rest waits for d, or for the context's end, which it returns.
func rest(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return ctx.Err()
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

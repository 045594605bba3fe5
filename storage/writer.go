package storage

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"trainerd/internal/crashpoint"
	"trainerd/internal/fault"
)

// Writer collects the files of one checkpoint under a prefix never used before.
// Files may be written concurrently; Commit and Abort come after them.
type Writer struct {
	c       Checkpoints
	job     string
	step    int64
	attempt int

	mu        sync.Mutex
	claim     heldClaim
	files     map[string]File // written whole
	writing   map[string]bool // being written
	manifest  Manifest        // of the first Commit
	raw       []byte          // its bytes; nil until then
	committed bool            // the manifest is in the store
	done      bool            // and latest.json is at or past it
	aborted   bool
}

// Create starts a checkpoint. Its attempt is one above every attempt of this
// step that any object was ever written under: claims stay for ever, so that a
// prefix is never reused, not even after Abort, Sweep or Delete.
func (c Checkpoints) Create(ctx context.Context, job string, step int64) (*Writer, error) {
	if err := CheckJob(job); err != nil {
		return nil, err
	}
	if step < 0 {
		return nil, fault.BadField("step", step, "0 or more")
	}
	attempt := 0
	prefix := stepPrefix(job, step)
	err := c.Blob.List(ctx, prefix, func(o Info) error {
		number, _, _ := strings.Cut(strings.TrimPrefix(o.Key, prefix), "/")
		if used, err := strconv.Atoi(number); err == nil && used >= attempt {
			attempt = used + 1
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("create checkpoint %d of job %s: %w", step, job, err)
	}
	for {
		held, err := c.take(ctx, prefixOf(job, step, attempt))
		if err == nil {
			return &Writer{c: c, job: job, step: step, attempt: attempt, claim: held,
				files: map[string]File{}, writing: map[string]bool{}}, nil
		}
		if !errors.Is(err, ErrPrecondition) {
			return nil, fmt.Errorf("create checkpoint %d of job %s: %w", step, job, err)
		}
		attempt++
	}
}

// Prefix is where the checkpoint's files go.
func (w *Writer) Prefix() string { return prefixOf(w.job, w.step, w.attempt) }

// File streams one file; the callback writes its bytes. Digest and size are taken on the way.
// After an error the file does not exist and may be written again.
func (w *Writer) File(ctx context.Context, name string, write func(io.Writer) error) error {
	if err := checkFileName(name); err != nil {
		return fault.BadField("file", fmt.Sprintf("%.80q", name), "a clean relative file name: "+err.Error())
	}
	if err := w.begin(name); err != nil {
		return err
	}
	f, err := w.stream(ctx, name, write)
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.writing, name)
	if err != nil {
		return fmt.Errorf("write file %q of checkpoint %s: %w", name, w.Prefix(), err)
	}
	w.files[name] = f
	return nil
}

func (w *Writer) begin(name string) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch _, exists := w.files[name]; {
	case w.aborted || w.raw != nil:
		return fault.New(fault.Conflict, "checkpoint_closed", "write file %q: checkpoint %s is already committed or aborted", name, w.Prefix())
	case exists || w.writing[name]:
		return fault.New(fault.Conflict, "file_exists", "write file %q: checkpoint %s already has it", name, w.Prefix())
	}
	w.writing[name] = true
	return nil
}

// stream runs the callback on this goroutine and the Put on another, which has
// ended when stream returns or panics.
func (w *Writer) stream(ctx context.Context, name string, write func(io.Writer) error) (File, error) {
	type result struct {
		info Info
		err  error
	}
	pipe := newConduit()
	stored := make(chan result, 1)
	go func() {
		info, err := w.c.Blob.Put(ctx, w.Prefix()+"/"+name, pipe, -1, Condition{})
		pipe.leave() // wakes a callback that still writes; after success nobody does
		stored <- result{info, err}
	}()
	ended := false
	defer func() {
		if !ended { // the callback panicked: the store must not take what came for the whole file
			pipe.end(errors.New("callback panicked"))
			<-stored
		}
	}()

	// Every Write is handed over synchronously, so that many small ones would crawl.
	buf := bufio.NewWriterSize(pipe, smallWrites)
	werr := write(buf)
	if werr == nil {
		werr = buf.Flush()
	}
	ended = true
	if werr != nil {
		pipe.end(&callbackError{werr})
	} else {
		pipe.end(nil)
	}
	res := <-stored
	switch {
	case werr != nil && !errors.Is(werr, errPutEnded):
		return File{}, werr
	case res.err != nil:
		return File{}, res.err
	case werr != nil || res.info.Size != pipe.n:
		return File{}, fault.New(fault.Internal, "short_put", "store kept %d of %d bytes", res.info.Size, pipe.n)
	}
	return File{Name: name, Size: pipe.n, SHA256: pipe.Digest()}, nil
}

// smallWrites is the size in bytes up to which writes of a callback are collected.
const smallWrites = 64 << 10

// errPutEnded is what a callback's writes get once the store has given up.
var errPutEnded = errors.New("store ended the upload")

// callbackError keeps a callback's io.EOF from ending the stream as if it were whole.
type callbackError struct{ err error }

func (e *callbackError) Error() string { return e.err.Error() }

// Commit writes the manifest if absent and moves latest.json by compare-and-swap,
// unless latest already names a newer step. It fills in everything of m that the
// writer knows (Version to Prefix, Snapshot, Files; Created when zero).
//
// After an error the checkpoint may exist or not, as after a crash. Commit may
// then be called again: it goes on with the manifest of the first call.
func (w *Writer) Commit(ctx context.Context, m Manifest) (Manifest, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.prepare(m); err != nil {
		return Manifest{}, err
	}
	if w.done {
		return w.manifest, nil
	}
	defer crashpoint.Enter(crashpoint.Commit)()
	if !w.committed {
		crashpoint.Reach("checkpoint.before_manifest")
		if err := w.commit(ctx); err != nil {
			return Manifest{}, fmt.Errorf("commit checkpoint %s: %w", w.Prefix(), err)
		}
		w.committed = true
	}
	crashpoint.Reach("checkpoint.before_latest")
	if err := w.c.moveLatest(ctx, w.manifest, w.raw); err != nil {
		return Manifest{}, fmt.Errorf("commit checkpoint %s: %w", w.Prefix(), err)
	}
	w.done = true
	return w.manifest, nil
}

// prepare settles the manifest and its bytes once. The caller holds mu.
func (w *Writer) prepare(m Manifest) error {
	switch {
	case w.aborted:
		return fault.New(fault.Conflict, "checkpoint_closed", "commit checkpoint %s: it was aborted", w.Prefix())
	case len(w.writing) > 0:
		return fault.New(fault.Conflict, "file_open", "commit checkpoint %s: %d files are still being written", w.Prefix(), len(w.writing))
	case w.raw != nil:
		return nil
	case m.Job != "" && m.Job != w.job, m.Step != 0 && m.Step != w.step:
		return fault.New(fault.Invalid, "other_checkpoint", "commit checkpoint %s: got a manifest of job %q step %d", w.Prefix(), m.Job, m.Step)
	}
	m.Version, m.Job, m.Step, m.Attempt, m.Prefix = ManifestVersion, w.job, w.step, w.attempt, w.Prefix()
	if m.Created.IsZero() {
		m.Created = time.Now()
	}
	m.Created = m.Created.UTC().Truncate(time.Microsecond)
	m.Files, m.Snapshot = nil, false
	for _, f := range w.files {
		m.Files = append(m.Files, f)
		m.Snapshot = m.Snapshot || strings.HasPrefix(f.Name, "state/")
	}
	slices.SortFunc(m.Files, func(a, b File) int { return strings.Compare(a.Name, b.Name) })
	raw, err := EncodeManifest(m)
	if err != nil {
		return err
	}
	w.manifest, w.raw = m, raw
	return nil
}

// commit takes the last hurdle before the manifest (no sweeper may have sealed
// the prefix) and writes it.
func (w *Writer) commit(ctx context.Context) error {
	if err := w.c.mark(ctx, &w.claim, claimCommitting); err != nil {
		return err
	}
	key := w.Prefix() + "/" + manifestName
	_, err := w.c.Blob.Put(ctx, key, bytes.NewReader(w.raw), int64(len(w.raw)), Condition{IfAbsent: true})
	if !errors.Is(err, ErrPrecondition) {
		return err
	}
	// A lost reply makes one's own manifest look like somebody else's.
	there, _, rerr := readSmall(ctx, w.c.Blob, key, MaxManifest)
	if rerr != nil {
		return rerr
	}
	if !bytes.Equal(there, w.raw) {
		return err
	}
	return nil
}

// Abort removes what was written; the claim stays and keeps the prefix from
// reuse. Once a Commit was tried the outcome may be in flight, so that Abort
// refuses: call Commit again, or leave the rest to Sweep.
func (w *Writer) Abort(ctx context.Context) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.raw != nil:
		return fault.New(fault.Conflict, "checkpoint_closed", "abort checkpoint %s: its commit has begun", w.Prefix())
	case len(w.writing) > 0:
		return fault.New(fault.Conflict, "file_open", "abort checkpoint %s: %d files are still being written", w.Prefix(), len(w.writing))
	}
	w.aborted = true
	if err := w.c.mark(ctx, &w.claim, claimAborted); err != nil {
		return fmt.Errorf("abort checkpoint %s: %w", w.Prefix(), err)
	}
	if err := w.c.removeData(ctx, w.Prefix()); err != nil {
		return fmt.Errorf("abort checkpoint %s: %w", w.Prefix(), err)
	}
	return nil
}

// States of a claim. Only "writing" and "committing" let a writer go on.
const (
	claimWriting    = "writing"
	claimCommitting = "committing"
	claimAborted    = "aborted"
	claimSwept      = "swept"
	claimDeleted    = "deleted"
)

// claim is the content of claim.json. Owner is a nonce of whoever wrote it last.
type claim struct {
	Owner string    `json:"owner"`
	State string    `json:"state"`
	Time  time.Time `json:"time"`
}

// heldClaim is a claim as its owner last wrote it.
type heldClaim struct{ key, owner, etag string }

const maxClaim = 4 << 10

func (c Checkpoints) putClaim(ctx context.Context, h *heldClaim, state string, cond Condition) error {
	data, err := json.Marshal(claim{Owner: h.owner, State: state, Time: time.Now().UTC().Truncate(time.Millisecond)})
	if err != nil {
		return fmt.Errorf("encode claim: %w", err)
	}
	info, err := c.Blob.Put(ctx, h.key, bytes.NewReader(data), int64(len(data)), cond)
	if errors.Is(err, ErrPrecondition) {
		now, etag, rerr := c.readClaim(ctx, h.key)
		if rerr == nil && now.Owner == h.owner && now.State == state {
			h.etag = etag // it was our own write, whose reply was lost
			return nil
		}
		return err
	}
	h.etag = info.ETag
	return err
}

func (c Checkpoints) readClaim(ctx context.Context, key string) (claim, string, error) {
	data, info, err := readSmall(ctx, c.Blob, key, maxClaim)
	if err != nil {
		return claim{}, "", err
	}
	var now claim
	if err := decodeStrict(data, maxClaim, "claim", &now); err != nil {
		return claim{}, info.ETag, fmt.Errorf("read %s: %w", key, err)
	}
	return now, info.ETag, nil
}

// take makes the claim of a prefix that nobody has; ErrPrecondition when somebody has.
func (c Checkpoints) take(ctx context.Context, prefix string) (heldClaim, error) {
	h := heldClaim{key: prefix + "/" + claimName, owner: nonce()}
	err := c.putClaim(ctx, &h, claimWriting, Condition{IfAbsent: true})
	return h, err
}

// mark moves a claim that its owner still holds to another state.
func (c Checkpoints) mark(ctx context.Context, h *heldClaim, state string) error {
	err := c.putClaim(ctx, h, state, Condition{IfMatch: h.etag})
	if errors.Is(err, ErrPrecondition) {
		return fault.New(fault.Conflict, "claim_lost", "prefix was swept or deleted meanwhile: %w", err)
	}
	return err
}

func nonce() string {
	var b [16]byte
	rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

//go:build crashpoints

package crashtest

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"trainerd/client"
	"trainerd/storage"
	"trainerd/storage/disk"
)

// witness watches a server while it is killed, and remembers the first thing
// that was not as promised.
type witness struct {
	ref     *outcome // nil while the reference itself is made
	url     string
	store   string // directory
	data    string // directory
	scratch string
	power   bool // power is cut: what was seen in the store before its sync may be gone again

	quiet sync.RWMutex // held for writing while the directory is exchanged

	mu    sync.Mutex
	job   string
	step  int64 // newest that the server told
	first error
	pulls int
}

func (w *witness) blame(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.first == nil {
		w.first = fmt.Errorf(format, args...)
	}
}

func (w *witness) fault() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.first
}

func (w *witness) name(job string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.job = job
}

func (w *witness) reached() int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.step
}

func (w *witness) known() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.job
}

// impatient is a client that does not repeat calls.
func impatient(url string) *client.Client {
	c, err := client.New(url, client.Options{Retries: -1})
	if err != nil {
		panic(err) // the address is ours
	}
	return c
}

// left is the names in the job's directory.
func (w *witness) left() (names []string, err error) {
	w.quiet.RLock() // it may be exchanged
	defer w.quiet.RUnlock()
	entries, err := os.ReadDir(filepath.Join(w.data, "jobs", w.known()))
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names, err
}

// watchStatus asks for the job's status: what it has once said stays true.
func (w *witness) watchStatus(ctx context.Context) {
	c := impatient(w.url)
	step, policy, trained := int64(0), int64(-1), int64(0)
	for ; ctx.Err() == nil; time.Sleep(5 * time.Millisecond) {
		id := w.known()
		if id == "" {
			continue
		}
		w.quiet.RLock()
		j, err := c.Job(ctx, id)
		w.quiet.RUnlock()
		var refusal *client.Error
		switch {
		case errors.As(err, &refusal) && refusal.Status < 500:
			w.blame("status of the job that was created: %v", err)
		case err != nil:
			continue // it is being killed
		case j.State == "failed", j.LastError != nil && j.LastError.Code == "restore_failed":
			w.blame("the job failed: %+v", j.LastError)
		case j.Step < step:
			w.blame("the job went from step %d back to %d", step, j.Step)
		}
		step = max(step, j.Step)
		w.mu.Lock()
		w.step = step
		w.mu.Unlock()
		if j.State == "loading" {
			continue // counts and the newest policy are being rebuilt
		}
		if j.PolicyStep < policy || j.Counts.GroupsTrained < trained {
			w.blame("policy step and groups trained went from %d and %d back to %d and %d", policy, trained, j.PolicyStep, j.Counts.GroupsTrained)
		}
		policy, trained = max(policy, j.PolicyStep), max(trained, j.Counts.GroupsTrained)
	}
}

// watchCheckpoints pulls the newest checkpoint, from the server and from the
// store directly, and compares every byte with the policy of that step.
func (w *witness) watchCheckpoints(ctx context.Context) {
	c := impatient(w.url)
	seen, served := int64(-1), int64(-1) // in the store, which is ahead of what is announced; over HTTP
	for ; ctx.Err() == nil; time.Sleep(6 * time.Millisecond) {
		id := w.known()
		if id == "" {
			continue
		}
		w.quiet.RLock()
		if m, err := c.Pull(ctx, id, client.Latest, filepath.Join(w.scratch, "http")); err == nil {
			w.check("over HTTP", m)
			if m.Step < served {
				w.blame("the newest checkpoint over HTTP went from step %d back to %d", served, m.Step)
			}
			served, seen = max(served, m.Step), max(seen, m.Step)
		}
		if step, ok := w.pull(ctx, id); ok {
			if step < seen && !w.power {
				w.blame("the newest checkpoint in the store is of step %d, and one of step %d was seen", step, seen)
			}
			seen = max(seen, step)
		}
		w.quiet.RUnlock()
	}
}

func (w *witness) latest(ctx context.Context, id string) (storage.Manifest, error) {
	blob, err := disk.Open(w.store)
	if err != nil {
		return storage.Manifest{}, err
	}
	defer blob.Close()
	return storage.Checkpoints{Blob: blob}.Latest(ctx, id)
}

// pull brings the newest checkpoint from the directory store.
func (w *witness) pull(ctx context.Context, id string) (step int64, ok bool) {
	if _, err := os.Stat(filepath.Join(w.store, "jobs")); err != nil {
		return 0, false // the server has not made it; opening it would
	}
	blob, err := disk.Open(w.store)
	if err != nil {
		w.blame("open the store: %v", err)
		return 0, false
	}
	defer blob.Close()
	c := storage.Checkpoints{Blob: blob}
	m, err := c.Latest(ctx, id)
	if err != nil {
		if !errors.Is(err, storage.ErrNotFound) && ctx.Err() == nil {
			w.blame("read the latest checkpoint: %v", err)
		}
		return 0, false
	}
	err = c.Pull(ctx, m, "hf/", filepath.Join(w.scratch, "store"))
	if err != nil {
		// One that is being deleted has lost its manifest first.
		if all, lerr := c.List(ctx, id); ctx.Err() == nil && (lerr != nil || contains(all, m)) {
			w.blame("a torn checkpoint: %v (list: %v)", err, lerr)
		}
		return 0, false
	}
	w.check("in the store", m)
	return m.Step, true
}

func contains(all []storage.Manifest, m storage.Manifest) bool {
	for _, x := range all {
		if x.Prefix == m.Prefix {
			return true
		}
	}
	return false
}

// audit looks at every checkpoint that a dead server left, without the code
// under test: a manifest's files are there, with the bytes that it promises.
func (w *witness) audit() {
	found, err := filepath.Glob(filepath.Join(w.store, "jobs", "*", "checkpoints", "*", "manifest.json"))
	if err != nil {
		w.blame("%w", err)
	}
	for _, path := range found {
		raw, err := os.ReadFile(path)
		if err != nil {
			w.blame("read a manifest: %w", err)
			continue
		}
		var m storage.Manifest
		if err := json.Unmarshal(raw, &m); err != nil {
			w.blame("a torn manifest %s: %w", path, err)
			continue
		}
		for _, f := range m.Files {
			data, err := os.ReadFile(filepath.Join(filepath.Dir(path), filepath.FromSlash(f.Name)))
			if sum := sha256.Sum256(data); err != nil || hex.EncodeToString(sum[:]) != f.SHA256 {
				w.blame("a torn checkpoint: file %s of %s is not as its manifest says (%v)", f.Name, m.Prefix, err)
			}
		}
		w.check("in the store", m)
	}
}

// check holds what a manifest promises, and Pull has verified, against the reference.
func (w *witness) check(where string, m storage.Manifest) {
	w.mu.Lock()
	w.pulls++
	w.mu.Unlock()
	if w.ref == nil {
		return
	}
	want, ok := w.ref.policies[m.Step]
	if got := digest(m, "hf/"); !ok || got != want {
		w.blame("checkpoint %s %s is not the undisturbed run's policy of step %d", m.Prefix, where, m.Step)
	}
}

package storage

import (
	"context"
	"io"
	"time"
)

// Manifest describes one whole checkpoint. It is the last object written.
type Manifest struct {
	Version  int            `json:"version"` // 1
	Job      string         `json:"job"`
	Step     int64          `json:"step"`
	Attempt  int            `json:"attempt"`
	Prefix   string         `json:"prefix"` // "jobs/{job}/checkpoints/{step:08d}-{attempt}"
	Parent   *int64         `json:"parent,omitempty"`
	Engine   string         `json:"engine"` // trainerd version that wrote it
	Created  time.Time      `json:"created"`
	Snapshot bool           `json:"snapshot"` // state/ is present
	Files    []File         `json:"files"`    // sorted by name
	Extra    map[string]any `json:"extra,omitempty"`
}

// File is one file of a checkpoint, named relative to its prefix ("hf/config.json").
type File struct {
	Name   string `json:"name"`
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256"` // lower-case hex
}

// Checkpoints reads and writes the checkpoints of all jobs in one Blob.
type Checkpoints struct{ Blob Blob }

// Writer collects the files of one checkpoint under a prefix never used before.
type Writer struct{}

// Create starts a checkpoint; the attempt is the lowest one that no object uses yet.
func (c Checkpoints) Create(ctx context.Context, job string, step int64) (*Writer, error) {
	panic("not built yet")
}

// File streams one file; the callback writes its bytes. Digest and size are taken on the way.
func (w *Writer) File(ctx context.Context, name string, write func(io.Writer) error) error {
	panic("not built yet")
}

// Commit writes the manifest if absent and moves latest.json by compare-and-swap,
// unless latest already names a newer step.
func (w *Writer) Commit(ctx context.Context, m Manifest) (Manifest, error) { panic("not built yet") }

// Abort removes what was written.
func (w *Writer) Abort(ctx context.Context) error { panic("not built yet") }

// Latest returns the manifest that latest.json names; ErrNotFound when there is none.
func (c Checkpoints) Latest(ctx context.Context, job string) (Manifest, error) {
	panic("not built yet")
}

// At returns the newest whole checkpoint of a step.
func (c Checkpoints) At(ctx context.Context, job string, step int64) (Manifest, error) {
	panic("not built yet")
}

// List returns all whole checkpoints of a job by step.
func (c Checkpoints) List(ctx context.Context, job string) ([]Manifest, error) {
	panic("not built yet")
}

// Open reads n bytes of a checkpoint's file from off (n < 0: to the end).
func (c Checkpoints) Open(ctx context.Context, m Manifest, name string, off, n int64) (io.ReadCloser, error) {
	panic("not built yet")
}

// Pull copies the files of a checkpoint whose name has the given prefix ("hf/"
// is stripped) into dir, verifies every digest, and swaps dir in atomically.
func (c Checkpoints) Pull(ctx context.Context, m Manifest, prefix, dir string) error {
	panic("not built yet")
}

package storage

import (
	"context"
	"errors"
	"io"
	"time"
)

var (
	// ErrNotFound is returned for a key that does not exist.
	ErrNotFound = errors.New("no such object")
	// ErrPrecondition is returned when IfAbsent or IfMatch does not hold.
	ErrPrecondition = errors.New("precondition does not hold")
)

// Info describes an object. ETag is opaque and changes with the content.
type Info struct {
	Key      string
	Size     int64
	ETag     string
	Modified time.Time
}

// Condition guards a Put. The zero value writes unconditionally.
type Condition struct {
	IfAbsent bool   // only if the key does not exist
	IfMatch  string // only if the object still has this ETag
}

// Blob is an object store: whole objects, written atomically. Keys are
// slash-separated, relative, without "." or ".." elements.
type Blob interface {
	// Put writes size bytes of r (-1: until EOF) and returns once they are durable.
	// A reader sees the old object or the new one, never a part.
	Put(ctx context.Context, key string, r io.Reader, size int64, c Condition) (Info, error)
	// Get opens n bytes from offset off; n < 0 means to the end.
	Get(ctx context.Context, key string, off, n int64) (io.ReadCloser, Info, error)
	Stat(ctx context.Context, key string) (Info, error)
	// List calls f for every object under the prefix, in key order, until f returns an error.
	List(ctx context.Context, prefix string, f func(Info) error) error
	// Delete removes an object; a missing one is no error.
	Delete(ctx context.Context, key string) error
}

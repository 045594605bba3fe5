package storage

import (
	"context"
	"errors"
	"io"
	"time"

	"trainerd/internal/fault"
)

var (
	// ErrNotFound is returned for a key that does not exist.
	ErrNotFound = errors.New("no such object")
	// ErrPrecondition is returned when IfAbsent or IfMatch does not hold.
	ErrPrecondition = errors.New("precondition does not hold")
)

// Info describes an object. ETag is opaque and changes with the content; it
// may be the same again when the same content is written again. Modified is
// the store's clock, and may be zero in the Info that Put returns.
type Info struct {
	Key      string
	Size     int64 // of the whole object, also when a range was asked for
	ETag     string
	Modified time.Time
}

// Condition guards a Put. The zero value writes unconditionally; at most one of
// the two may be set.
type Condition struct {
	IfAbsent bool   // only if the key does not exist
	IfMatch  string // only if the object exists and still has this ETag
}

// Check refuses a condition that no Put can hold.
func (c Condition) Check() error {
	if c.IfAbsent && c.IfMatch != "" {
		return fault.BadField("condition", "if_absent and if_match", "at most one of them")
	}
	return nil
}

// Blob is an object store: whole objects, written atomically. Keys are
// slash-separated, relative, without "." or ".." elements (CheckKey), and no
// key may continue another one with a slash ("a" and "a/b").
//
// Errors carry a fault kind and name operation and key: ErrNotFound and
// ErrPrecondition are reachable by errors.Is, and so is the context's error.
// All methods may be called from several goroutines and several processes.
type Blob interface {
	// Put writes size bytes of r (-1: until EOF) and returns once they are durable.
	// A reader sees the old object or the new one, never a part: a source that
	// fails or has another size leaves the old object.
	//
	// Over a network a reply can be lost and the write sent again, so that
	// ErrPrecondition may be caused by the caller's own earlier success. Callers
	// that must know compare the content.
	Put(ctx context.Context, key string, r io.Reader, size int64, c Condition) (Info, error)
	// Get opens n bytes from offset off; n < 0 means to the end, and fewer bytes
	// come when the object ends before. An offset past the end is refused. ctx
	// stays in use until the reader is closed.
	Get(ctx context.Context, key string, off, n int64) (io.ReadCloser, Info, error)
	Stat(ctx context.Context, key string) (Info, error)
	// List calls f for every object whose key begins with prefix (any string, not
	// only whole elements), in byte order of the keys, until f returns an error;
	// that error is returned as it is.
	List(ctx context.Context, prefix string, f func(Info) error) error
	// Delete removes an object; a missing one is no error.
	Delete(ctx context.Context, key string) error
}

// NotFound is the error of a Blob for a key that does not exist.
func NotFound(op, key string) error {
	return fault.New(fault.NotFound, "no_such_object", "%s %q: %w", op, key, ErrNotFound)
}

// Precondition is the error of a Blob whose condition does not hold.
func Precondition(op, key string) error {
	return fault.New(fault.Conflict, "precondition", "%s %q: %w", op, key, ErrPrecondition)
}

// CheckRange refuses offsets outside an object of the given size and returns
// how many bytes a Get of n bytes from off yields.
func CheckRange(key string, size, off, n int64) (int64, error) {
	if off < 0 || off > size {
		return 0, &fault.Error{Kind: fault.Invalid, Code: "range", Fields: []fault.Field{
			{Name: key, Row: -1, Got: "offset " + itoa(off), Expected: "0 to " + itoa(size)}}}
	}
	if n < 0 || n > size-off {
		return size - off, nil
	}
	return n, nil
}

package s3

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/minio/minio-go/v7"

	"trainerd/internal/fault"
	"trainerd/storage"
)

// Store is a storage.Blob over one prefix of one bucket.
type Store struct {
	core   *minio.Core
	config Config
	prefix string // "" or with a slash at its end
}

var _ storage.Blob = (*Store)(nil)

// Open checks the configuration and, with one listing of one key, that the
// bucket answers: endpoint, credentials and bucket are right or the error says
// which is not.
func Open(ctx context.Context, config Config) (*Store, error) {
	config, err := config.normal()
	if err != nil {
		return nil, err
	}
	core, err := config.client()
	if err != nil {
		return nil, err
	}
	s := &Store{core: core, config: config}
	if config.Prefix != "" {
		s.prefix = config.Prefix + "/"
	}
	for o := range core.ListObjectsIter(watch(ctx), config.Bucket, minio.ListObjectsOptions{Prefix: s.prefix, MaxKeys: 1, Recursive: true}) {
		if o.Err != nil {
			return nil, s.fault(ctx, "open", "", o.Err)
		}
		break
	}
	if err := ctx.Err(); err != nil {
		return nil, s.fault(ctx, "open", "", err)
	}
	return s, nil
}

// Config returns the configuration with its defaults, keys included.
func (s *Store) Config() Config { return s.config }

// object is the full name of a key in the bucket.
func (s *Store) object(key string) string { return s.prefix + key }

// fault turns an error of the library into one of ours: kind and code by cause;
// operation, key, bucket and endpoint in the text; no credential.
func (s *Store) fault(ctx context.Context, op, key string, err error) error {
	if f, ok := fault.As(err); ok {
		return f
	}
	what := op
	if key != "" {
		what = fmt.Sprintf("%s %q", op, key)
	}
	where := s.config.String()
	cause := ctx.Err()
	if cause == nil && (errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)) {
		cause = context.DeadlineExceeded
	}
	if cause != nil {
		return fault.New(fault.Unavailable, "cancelled", "%s in %s: %w", what, where, cause)
	}
	var resp minio.ErrorResponse
	if !errors.As(err, &resp) || resp.StatusCode == 0 && resp.Code == "" {
		return fault.New(fault.Unavailable, "s3_unreachable", "%s in %s: %s", what, where, scrub(err.Error(), s.config))
	}
	text := scrub(fmt.Sprintf("%s (%s, status %d)", resp.Error(), resp.Code, resp.StatusCode), s.config)
	switch {
	case resp.Code == minio.NoSuchBucket:
		return fault.New(fault.Unavailable, "no_such_bucket", "%s in %s: bucket does not exist", what, where)
	case resp.Code == minio.NoSuchKey, resp.StatusCode == http.StatusNotFound && resp.Code != noSuchUpload:
		return storage.NotFound(op, key)
	case resp.StatusCode == http.StatusPreconditionFailed:
		return storage.Precondition(op, key)
	case resp.StatusCode == http.StatusForbidden, resp.StatusCode == http.StatusUnauthorized:
		// Ours are refused, not our caller's: for whoever asked trainerd it is unavailable.
		return fault.New(fault.Unavailable, "s3_denied", "%s in %s: access denied, check credentials and policy: %s", what, where, text)
	case resp.Code == "XMinioParentIsObject", resp.Code == "XMinioObjectExistsAsDirectory":
		return fault.New(fault.Conflict, "key_clash", "%s in %s: key is a directory of other keys or lies inside one: %s", what, where, text)
	}
	return fault.New(fault.Unavailable, "s3_error", "%s in %s: %s", what, where, text)
}

const noSuchUpload = "NoSuchUpload"

// status is the HTTP status of a library error, 0 when it has none.
func status(err error) int {
	var resp minio.ErrorResponse
	errors.As(err, &resp)
	return resp.StatusCode
}

// Stat implements storage.Blob.
func (s *Store) Stat(ctx context.Context, key string) (storage.Info, error) {
	if err := storage.CheckKey(key); err != nil {
		return storage.Info{}, err
	}
	o, err := s.core.StatObject(watch(ctx), s.config.Bucket, s.object(key), minio.StatObjectOptions{})
	if err != nil {
		return storage.Info{}, s.fault(ctx, "stat", key, err)
	}
	return storage.Info{Key: key, Size: o.Size, ETag: o.ETag, Modified: o.LastModified}, nil
}

// Get implements storage.Blob. A connection that breaks is taken up again at
// the byte where it broke, from the same version of the object.
func (s *Store) Get(ctx context.Context, key string, off, n int64) (io.ReadCloser, storage.Info, error) {
	if err := storage.CheckKey(key); err != nil {
		return nil, storage.Info{}, err
	}
	if off < 0 {
		_, err := storage.CheckRange(key, 0, off, n)
		return nil, storage.Info{}, err
	}
	if n == 0 {
		return s.empty(ctx, key, off)
	}
	ctx = watch(ctx)
	body, info, err := s.get(ctx, key, off, n, "")
	if status(err) == http.StatusRequestedRangeNotSatisfiable {
		return s.empty(ctx, key, off) // S3 has no empty ranges: off is at the end, or past it
	}
	if err != nil {
		return nil, storage.Info{}, s.fault(ctx, "get", key, err)
	}
	n, err = storage.CheckRange(key, info.Size, off, n)
	if err != nil {
		body.Close()
		return nil, storage.Info{}, err
	}
	return &reader{s: s, ctx: ctx, key: key, etag: info.ETag, body: body, off: off, left: n}, info, nil
}

// empty answers a range without bytes.
func (s *Store) empty(ctx context.Context, key string, off int64) (io.ReadCloser, storage.Info, error) {
	info, err := s.Stat(ctx, key)
	if err != nil {
		return nil, storage.Info{}, err
	}
	if _, err := storage.CheckRange(key, info.Size, off, 0); err != nil {
		return nil, storage.Info{}, err
	}
	return io.NopCloser(bytes.NewReader(nil)), info, nil
}

// get sends one request for a range; etag is the version wanted, "" any. The error is the library's.
func (s *Store) get(ctx context.Context, key string, off, n int64, etag string) (io.ReadCloser, storage.Info, error) {
	var opts minio.GetObjectOptions
	ranged := off > 0 || n >= 0
	switch {
	case n >= 0:
		opts.Set("Range", fmt.Sprintf("bytes=%d-%d", off, off+n-1))
	case off > 0:
		opts.Set("Range", fmt.Sprintf("bytes=%d-", off))
	}
	if etag != "" {
		if err := opts.SetMatchETag(etag); err != nil {
			return nil, storage.Info{}, err
		}
	}
	body, o, header, err := s.core.GetObject(ctx, s.config.Bucket, s.object(key), opts)
	if err != nil {
		return nil, storage.Info{}, err
	}
	info := storage.Info{Key: key, Size: o.Size, ETag: o.ETag, Modified: o.LastModified}
	if ranged {
		// Content-Length is of the range; "bytes 5-9/1234" has the whole.
		content := header.Get("Content-Range")
		_, total, _ := strings.Cut(content, "/")
		info.Size, err = strconv.ParseInt(total, 10, 64)
		if err != nil || !strings.HasPrefix(content, fmt.Sprintf("bytes %d-", off)) {
			body.Close()
			return nil, storage.Info{}, fmt.Errorf("service answered a range from %d with Content-Range %q", off, content)
		}
	}
	return body, info, nil
}

// resumes is how often in a row a reader reconnects without getting a byte.
const resumes = 5

// reader reads exactly left bytes of one version of an object.
type reader struct {
	s    *Store
	ctx  context.Context // the Get's own, as Blob.Get says
	key  string
	etag string
	body io.ReadCloser // nil while disconnected
	off  int64
	left int64
	dry  int   // reconnections since the last byte
	err  error // final
}

func (r *reader) Read(p []byte) (int, error) {
	if r.err != nil {
		return 0, r.err
	}
	if len(p) == 0 {
		return 0, nil
	}
	for r.left > 0 {
		// Bytes that the kernel already holds do not outlive a cancellation.
		if err := r.ctx.Err(); err != nil {
			r.err = r.s.fault(r.ctx, "read", r.key, err)
			return 0, r.err
		}
		if r.body == nil {
			if r.err = r.reconnect(); r.err != nil {
				return 0, r.err
			}
		}
		n, err := r.body.Read(p[:min(int64(len(p)), r.left)])
		if n > 0 {
			r.off, r.left, r.dry = r.off+int64(n), r.left-int64(n), 0
			return n, nil // an error comes again with the next Read
		}
		if err == nil {
			continue
		}
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		if r.ctx.Err() != nil || r.dry >= resumes { // the wait may have been what was cancelled
			r.err = r.s.fault(r.ctx, "read", r.key, err)
			return 0, r.err
		}
		r.body.Close()
		r.body = nil
	}
	r.err = io.EOF
	return 0, io.EOF
}

func (r *reader) reconnect() error {
	r.dry++
	if err := pause(r.ctx, r.dry); err != nil {
		return r.s.fault(r.ctx, "read", r.key, err)
	}
	body, _, err := r.s.get(r.ctx, r.key, r.off, r.left, r.etag)
	if status(err) == http.StatusPreconditionFailed {
		return fault.New(fault.Unavailable, "object_changed", "read %q in %s: the object was replaced while it was read", r.key, r.s.config)
	}
	if err != nil {
		return r.s.fault(r.ctx, "read", r.key, err)
	}
	r.body = body
	return nil
}

func (r *reader) Close() error {
	if r.err == nil {
		r.err = fault.New(fault.Internal, "closed", "read %q: reader is closed", r.key)
	}
	if r.body == nil {
		return nil
	}
	body := r.body
	r.body = nil
	return body.Close()
}

// List implements storage.Blob.
func (s *Store) List(ctx context.Context, prefix string, f func(storage.Info) error) error {
	// Leaving the loop early must end the library's requests as well.
	listing, cancel := context.WithCancel(watch(ctx))
	defer cancel()
	for o := range s.core.ListObjectsIter(listing, s.config.Bucket, minio.ListObjectsOptions{Prefix: s.prefix + prefix, Recursive: true}) {
		if o.Err != nil {
			return s.fault(ctx, "list", prefix, o.Err)
		}
		key, ok := strings.CutPrefix(o.Key, s.prefix)
		if !ok || storage.CheckKey(key) != nil {
			continue // a directory marker ("a/") or another tool's odd key: no key of a Blob
		}
		if err := f(storage.Info{Key: key, Size: o.Size, ETag: strings.Trim(o.ETag, `"`), Modified: o.LastModified}); err != nil {
			return err
		}
	}
	// The library ends a cancelled listing without an error: it must not look whole.
	if err := ctx.Err(); err != nil {
		return s.fault(ctx, "list", prefix, err)
	}
	return nil
}

// Delete implements storage.Blob.
func (s *Store) Delete(ctx context.Context, key string) error {
	if err := storage.CheckKey(key); err != nil {
		return err
	}
	err := s.core.RemoveObject(watch(ctx), s.config.Bucket, s.object(key), minio.RemoveObjectOptions{})
	if err == nil {
		return nil
	}
	if err = s.fault(ctx, "delete", key, err); errors.Is(err, storage.ErrNotFound) {
		return nil
	}
	return err
}

// Presign returns a URL that reads the object without credentials until ttl is
// over (at most 7 days). It is a secret itself. The object need not exist.
func (s *Store) Presign(ctx context.Context, key string, ttl time.Duration) (string, error) {
	if err := storage.CheckKey(key); err != nil {
		return "", err
	}
	if ttl < time.Second || ttl > 7*24*time.Hour {
		return "", fault.BadField("ttl", ttl, "1s to 168h")
	}
	u, err := s.core.PresignedGetObject(ctx, s.config.Bucket, s.object(key), ttl, nil)
	if err != nil {
		return "", s.fault(ctx, "presign", key, err)
	}
	return u.String(), nil
}

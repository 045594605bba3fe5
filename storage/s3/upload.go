package s3

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"hash"
	"io"
	"math/rand/v2"
	"net/http"
	"sync"
	"time"

	"github.com/minio/minio-go/v7"
	"golang.org/x/sync/errgroup"

	"trainerd/internal/fault"
	"trainerd/storage"
)

// Uploads are put together here from the library's single requests, since its
// PutObject leaves the condition out of CompleteMultipartUpload (the only
// request of a multipart upload where S3 checks it), takes a source's
// io.ErrUnexpectedEOF for the end of the object, and computes a wrong trailing
// checksum when it sends a body twice.
const (
	// partSize is the body of one request: larger objects are multipart. At most
	// uploadParallel+2 parts are in memory.
	partSize       = 16 << 20
	uploadParallel = 4
	maxParts       = 10000

	checksumAlgorithm = "x-amz-checksum-algorithm"
	checksumType      = "x-amz-checksum-type"
	fullObject        = "FULL_OBJECT"
)

var crc64 = minio.ChecksumCRC64NVME

// Put implements storage.Blob. Every part is buffered, so that it can be sent
// again, and carries its CRC64NVME; the whole object's is checked at the end.
func (s *Store) Put(ctx context.Context, key string, r io.Reader, size int64, c storage.Condition) (storage.Info, error) {
	if err := errors.Join(storage.CheckKey(key), c.Check()); err != nil {
		return storage.Info{}, err
	}
	ctx = watch(ctx)
	size0 := int64(partSize)
	if size > partSize*(maxParts-1) { // keep known sizes within the number of parts S3 allows
		size0 = (size/(maxParts-1) + 1<<20) &^ (1<<20 - 1)
	}
	src := storage.Source(ctx, r, size)
	first, end, err := readPart(src, nil, size0)
	if err != nil {
		return storage.Info{}, s.sourceFault(ctx, key, err)
	}
	if end {
		return s.putSingle(ctx, key, first, c)
	}
	return s.putMultipart(ctx, key, first, src, size0, c)
}

// sourceFault is for errors of what was to be stored, not of the store.
func (s *Store) sourceFault(ctx context.Context, key string, err error) error {
	if ctx.Err() != nil {
		return s.fault(ctx, "put", key, err)
	}
	if f, ok := fault.As(err); ok {
		return fault.New(f.Kind, f.Code, "put %q in %s: %w", key, s.config, err)
	}
	return fault.New(fault.Internal, "bad_source", "put %q in %s: %w", key, s.config, err)
}

// readPart fills buf up to size bytes; end says that the source ended. A part
// that is full is looked one read past, so that the last one knows it is.
func readPart(r io.Reader, buf []byte, size int64) (part []byte, end bool, err error) {
	buf = buf[:0]
	for int64(len(buf)) < size {
		if len(buf) == cap(buf) {
			// Doubling: small objects of unknown size must not take a part's memory.
			grown := make([]byte, len(buf), min(max(2*int64(cap(buf)), 32<<10), size))
			copy(grown, buf)
			buf = grown
		}
		n, err := r.Read(buf[len(buf):min(int64(cap(buf)), size)])
		buf = buf[:len(buf)+n]
		if err == io.EOF {
			return buf, true, nil
		}
		if err != nil {
			return nil, false, err
		}
	}
	return buf, false, nil
}

func checksum(data []byte) string {
	h := crc64.Hasher()
	h.Write(data)
	return encode(h)
}

func encode(h hash.Hash) string { return base64.StdEncoding.EncodeToString(h.Sum(nil)) }

// payloadDigest is what the request's signature covers: over TLS nothing need.
func (s *Store) payloadDigest(data []byte) string {
	if s.config.Secure {
		return ""
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

func condition(opts *minio.PutObjectOptions, c storage.Condition) {
	switch {
	case c.IfAbsent:
		opts.SetMatchETagExcept("*")
	case c.IfMatch != "":
		opts.SetMatchETag(c.IfMatch)
	}
}

// conflictRounds bounds the repetitions after 409 ConditionalRequestConflict.
const conflictRounds = 10

func (s *Store) putSingle(ctx context.Context, key string, data []byte, c storage.Condition) (storage.Info, error) {
	opts := minio.PutObjectOptions{
		DisableContentSha256: true, // no aws-chunked body: payloadDigest signs it in the header
		UserMetadata:         map[string]string{crc64.Key(): checksum(data)},
	}
	condition(&opts, c)
	for round := 1; ; round++ {
		info, err := s.core.PutObject(ctx, s.config.Bucket, s.object(key), bytes.NewReader(data), int64(len(data)), "", s.payloadDigest(data), opts)
		if err == nil {
			return storage.Info{Key: key, Size: int64(len(data)), ETag: info.ETag, Modified: info.LastModified}, nil
		}
		if status(err) != http.StatusConflict || c == (storage.Condition{}) || !conditional(err) || round == conflictRounds {
			return storage.Info{}, s.putFault(ctx, key, c, err)
		}
		// Another writer was at the key: see who won, then try again.
		if err := s.holds(ctx, key, c); err != nil {
			return storage.Info{}, err
		}
		if err := pause(ctx, round); err != nil {
			return storage.Info{}, s.fault(ctx, "put", key, err)
		}
	}
}

// conditional reports the 409s that are about a condition, not about the key.
func conditional(err error) bool {
	var resp minio.ErrorResponse
	errors.As(err, &resp)
	return resp.Code == "ConditionalRequestConflict" || resp.Code == "OperationAborted"
}

// holds returns ErrPrecondition when c does not hold now.
func (s *Store) holds(ctx context.Context, key string, c storage.Condition) error {
	info, err := s.Stat(ctx, key)
	switch {
	case err != nil && !errors.Is(err, storage.ErrNotFound):
		return err
	case c.IfAbsent && err == nil, c.IfMatch != "" && (err != nil || info.ETag != c.IfMatch):
		return storage.Precondition("put", key)
	}
	return nil
}

// putFault is fault for a Put: a missing object fails IfMatch, with 404 on the wire.
func (s *Store) putFault(ctx context.Context, key string, c storage.Condition, err error) error {
	if status(err) == http.StatusConflict && conditional(err) {
		return fault.New(fault.Busy, "conditional_conflict", "put %q in %s: other conditional writes of the key kept winning", key, s.config)
	}
	err = s.fault(ctx, "put", key, err)
	if c.IfMatch != "" && errors.Is(err, storage.ErrNotFound) {
		return storage.Precondition("put", key)
	}
	return err
}

// pause waits with full jitter, longer with every round.
func pause(ctx context.Context, round int) error {
	t := time.NewTimer(time.Duration(rand.Int64N(int64(20*time.Millisecond) << min(round, 6))))
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

func (s *Store) putMultipart(ctx context.Context, key string, first []byte, src io.Reader, size int64, c storage.Condition) (storage.Info, error) {
	second, end, err := readPart(src, nil, size)
	if err != nil {
		return storage.Info{}, s.sourceFault(ctx, key, err)
	}
	if end && len(second) == 0 { // the object is one part exactly
		return s.putSingle(ctx, key, first, c)
	}
	if c != (storage.Condition{}) {
		if err := s.holds(ctx, key, c); err != nil { // spares the upload; Complete decides
			return storage.Info{}, err
		}
	}
	bucket, object := s.config.Bucket, s.object(key)
	id, err := s.core.NewMultipartUpload(ctx, bucket, object, minio.PutObjectOptions{
		UserMetadata: map[string]string{checksumAlgorithm: crc64.String(), checksumType: fullObject}})
	if err != nil {
		return storage.Info{}, s.fault(ctx, "put", key, err)
	}
	info, err := s.uploadParts(ctx, key, id, first, second, end, src, size, c)
	if err != nil {
		// The parts cost space until they are aborted, also when ctx has ended. Sweep finds what this misses.
		abort, cancel := context.WithTimeout(context.WithValue(context.WithoutCancel(ctx), outageKey{}, nil), 30*time.Second)
		defer cancel()
		_ = s.core.AbortMultipartUpload(abort, bucket, object, id)
		return storage.Info{}, err
	}
	return info, nil
}

// uploadParts sends the parts, a few at a time, and joins them. It reads the
// source in order and digests the whole on the way.
func (s *Store) uploadParts(ctx context.Context, key, id string, first, second []byte, end bool, src io.Reader, size int64, c storage.Condition) (storage.Info, error) {
	bucket, object := s.config.Bucket, s.object(key)
	var (
		whole = crc64.Hasher()
		total int64
		parts []minio.CompletePart
		mu    sync.Mutex // guards the entries of parts
	)
	group, sending := errgroup.WithContext(ctx)
	group.SetLimit(uploadParallel)
	free := make(chan []byte, uploadParallel+2) // buffers to fill again
	send := func(data []byte) {
		whole.Write(data)
		total += int64(len(data))
		mu.Lock()
		number := len(parts) + 1
		parts = append(parts, minio.CompletePart{PartNumber: number})
		mu.Unlock()
		group.Go(func() error {
			sum := checksum(data)
			part, err := s.core.PutObjectPart(sending, bucket, object, id, number, bytes.NewReader(data), int64(len(data)), minio.PutObjectPartOptions{
				Sha256Hex: s.payloadDigest(data), DisableContentSha256: true,
				CustomHeader: http.Header{http.CanonicalHeaderKey(crc64.Key()): {sum}},
			})
			if err != nil {
				return s.fault(ctx, "put", key, err)
			}
			mu.Lock()
			parts[number-1].ETag, parts[number-1].ChecksumCRC64NVME = part.ETag, sum
			mu.Unlock()
			free <- data
			return nil
		})
	}
	send(first)
	send(second)
	var err error
	for !end && err == nil && sending.Err() == nil {
		var buf []byte
		select {
		case buf = <-free:
		default:
		}
		buf, end, err = readPart(src, buf, size)
		switch {
		case err != nil:
			err = s.sourceFault(ctx, key, err)
		case len(buf) > 0 && len(parts) == maxParts:
			err = fault.New(fault.TooLarge, "object_too_large", "put %q in %s: more than %d bytes of a stream of unknown size", key, s.config, total)
		case len(buf) > 0:
			send(buf)
		}
	}
	if sent := group.Wait(); sent != nil && err == nil {
		err = sent
	}
	if err != nil {
		return storage.Info{}, err
	}
	opts := minio.PutObjectOptions{UserMetadata: map[string]string{crc64.Key(): encode(whole), checksumType: fullObject}}
	condition(&opts, c)
	info, err := s.core.CompleteMultipartUpload(ctx, bucket, object, id, parts, opts)
	if err != nil {
		return storage.Info{}, s.putFault(ctx, key, c, err)
	}
	return storage.Info{Key: key, Size: total, ETag: info.ETag, Modified: info.LastModified}, nil
}

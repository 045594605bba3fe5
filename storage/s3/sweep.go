package s3

import (
	"context"
	"strings"
	"time"

	"github.com/minio/minio-go/v7"
)

// Sweep aborts multipart uploads under the store's prefix that began longer than
// age ago (their process was killed), and returns how many. Their parts cost
// space and show in no listing. Let age be longer than any upload takes.
func (s *Store) Sweep(ctx context.Context, age time.Duration) (int, error) {
	before := time.Now().Add(-age)
	var stale []minio.ObjectMultipartInfo
	listing, cancel := context.WithCancel(ctx)
	defer cancel()
	// MinIO lists uploads for no prefix or for one whole key, nothing in between: filter here.
	for u := range s.core.ListIncompleteUploads(listing, s.config.Bucket, "", true) {
		if u.Err != nil {
			return 0, s.fault(ctx, "list uploads", "", u.Err)
		}
		if strings.HasPrefix(u.Key, s.prefix) && u.Initiated.Before(before) {
			stale = append(stale, u)
		}
	}
	n := 0
	for _, u := range stale {
		err := s.core.AbortMultipartUpload(ctx, s.config.Bucket, u.Key, u.UploadID)
		if err != nil && minio.ToErrorResponse(err).Code != noSuchUpload { // it ended meanwhile
			return n, s.fault(ctx, "abort upload", strings.TrimPrefix(u.Key, s.prefix), err)
		}
		n++
	}
	return n, nil
}

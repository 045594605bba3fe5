//go:build minio

package s3

import (
	"net/http"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"trainerd/client"
	"trainerd/server/servertest"
	"trainerd/storage"
)

// TestMinIODirectPull: with Direct, a client with a token gets every file from
// MinIO itself by presigned addresses, and none from the server.
func TestMinIODirectPull(t *testing.T) {
	store := open(t, config(t))
	var through, redirected atomic.Int64
	e := servertest.Start(t, servertest.Options{
		WrapStore: func(storage.Blob) storage.Blob { return store },
		Wrap: func(next http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if strings.Contains(r.URL.Path, "/files/") {
					if r.URL.Query().Get("redirect") == "true" {
						redirected.Add(1)
					} else {
						through.Add(1)
					}
				}
				next.ServeHTTP(w, r)
			})
		}})
	c, err := client.New(e.URL, client.Options{Token: "not-for-the-store"})
	if err != nil {
		t.Fatal(err)
	}
	j, err := c.CreateJob(t.Context(), e.JobDocument(2, nil), "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Wait(t.Context(), j.ID, 20*time.Millisecond, func(j client.Job) bool { return j.PolicyStep == 0 }); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "d")
	m, stats, err := c.PullWith(t.Context(), j.ID, client.Latest, dir, client.PullOptions{Direct: true})
	if err != nil {
		t.Fatal(err)
	}
	if stats.Fetched != m.Bytes("hf/") || through.Load() != 0 || redirected.Load() == 0 {
		t.Errorf("%+v of %d bytes, %d files through the server, %d redirected", stats, m.Bytes("hf/"), through.Load(), redirected.Load())
	}
}

package server_test

import (
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"trainerd/client"
	"trainerd/server/access"
	"trainerd/server/servertest"
)

// TestSourcesOfJobs: a job names only what the server allows, also through links.
func TestSourcesOfJobs(t *testing.T) {
	root := t.TempDir()
	model := servertest.WriteModel(t, servertest.TinyConfig(), 1, "F32")
	if err := os.CopyFS(filepath.Join(root, "m"), os.DirFS(model)); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(model, filepath.Join(root, "link")); err != nil {
		t.Fatal(err)
	}
	sources, err := access.NewSources([]string{root}, nil)
	if err != nil {
		t.Fatal(err)
	}
	e := servertest.Start(t, servertest.Options{Wrap: described(t), ModelDir: model, Sources: sources.Resolve})
	c, ctx := connect(t, e)
	for _, source := range []string{"dir:" + model, "dir:" + root + "/link", "dir:" + root + "/m/../link", "dir:" + root + "/m/../../" + filepath.Base(model), "dir:/etc", "dir:/nowhere", "s3://bucket/x"} {
		_, err := c.CreateJob(ctx, e.JobDocument(2, map[string]any{"model": map[string]any{"source": source}}), "")
		var refusal *client.Error
		if !asRefusal(err, &refusal) || refusal.Status != http.StatusForbidden || refusal.Code != "source_not_allowed" || refusal.Errors[0].Name != "model.source" {
			t.Errorf("%q: %v", source, err)
		}
	}
	for _, source := range []string{"dir:" + root + "/m\x00", "s3://169.254.169.254:80/latest", "s3://key:secret@bucket/x", "s3://bucket/../x", "http://127.0.0.1/x", "file:///etc", "DIR:" + root} {
		_, err := c.CreateJob(ctx, e.JobDocument(2, map[string]any{"model": map[string]any{"source": source}}), "")
		if client.Code(err) != "invalid_job" || !strings.Contains(err.Error(), "model.source") {
			t.Errorf("%q: %v", source, err)
		}
	}
	j := create(t, c, ctx, e.JobDocument(2, map[string]any{"model": map[string]any{"source": "dir:" + root + "/m"}}))
	await(t, c, ctx, j.ID, "loaded", func(j client.Job) bool { return j.State != "loading" })
}

func asRefusal(err error, to **client.Error) bool {
	for ; err != nil; err = unwrap(err) {
		if e, ok := err.(*client.Error); ok {
			*to = e
			return len(e.Errors) > 0
		}
	}
	return false
}

func unwrap(err error) error {
	if u, ok := err.(interface{ Unwrap() error }); ok {
		return u.Unwrap()
	}
	return nil
}

// TestRestartLooksAtSourcesAgain: what was allowed when a job was made may not be
// when the server starts again. The job waits, loses nothing, and goes on once it may.
func TestRestartLooksAtSourcesAgain(t *testing.T) {
	var narrowed atomic.Bool
	none, err := access.NewSources(nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	e := servertest.Start(t, servertest.Options{Sources: func(source string) (string, error) {
		if narrowed.Load() {
			return none.Resolve(source)
		}
		return source, nil
	}})
	c, ctx := connect(t, e)
	j := create(t, c, ctx, e.JobDocument(2, nil))
	await(t, c, ctx, j.ID, "loaded", func(j client.Job) bool { return j.State != "loading" })
	if _, err := c.Submit(ctx, j.ID, servertest.Batch("g", 2, 2, -1, 1), ""); err != nil {
		t.Fatal(err)
	}
	await(t, c, ctx, j.ID, "step 1", func(j client.Job) bool { return j.PolicyStep == 1 })
	e.Stop()
	narrowed.Store(true)
	e.Boot(t)
	c, ctx = connect(t, e)
	for range 20 { // it tries again and again
		time.Sleep(20 * time.Millisecond)
		if got, err := c.Job(ctx, j.ID); err != nil || got.State != "loading" {
			t.Fatalf("with a source that is no longer allowed: %s, %v", got.State, err)
		}
	}
	narrowed.Store(false)
	await(t, c, ctx, j.ID, "loaded again", func(j client.Job) bool { return j.State == "waiting" && j.Step == 1 })
}

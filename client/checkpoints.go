package client

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"trainerd/storage"
)

// Latest, as a step, names the newest checkpoint.
const Latest int64 = -1

// Publish asks for a checkpoint of the current policy now, with optimizer state if snapshot.
func (c *Client) Publish(ctx context.Context, job string, snapshot bool) (storage.Manifest, error) {
	var m storage.Manifest
	k, err := post(jobPath(job, "checkpoints"), map[string]bool{"snapshot": snapshot})
	if err != nil {
		return m, err
	}
	err = c.json(ctx, k, &m)
	return m, err
}

// Checkpoints lists a job's whole checkpoints by step.
func (c *Client) Checkpoints(ctx context.Context, job string) ([]storage.Manifest, error) {
	var list struct {
		Checkpoints []storage.Manifest `json:"checkpoints"`
	}
	err := c.json(ctx, get(jobPath(job, "checkpoints"), nil), &list)
	return list.Checkpoints, err
}

// Checkpoint returns the manifest of a step, or of the newest checkpoint with Latest.
func (c *Client) Checkpoint(ctx context.Context, job string, step int64) (storage.Manifest, error) {
	at := "latest"
	if step != Latest {
		at = strconv.FormatInt(step, 10)
	}
	var m storage.Manifest
	err := c.json(ctx, get(jobPath(job, "checkpoints", at), nil), &m)
	return m, err
}

// Newer waits up to wait (the server caps it) for a checkpoint of a step after
// the given one; ok is false when none came.
func (c *Client) Newer(ctx context.Context, job string, after int64, wait time.Duration) (m storage.Manifest, ok bool, err error) {
	q := url.Values{"wait": {wait.String()}}
	if after >= 0 {
		q.Set("after", strconv.FormatInt(after, 10))
	}
	res, err := c.do(ctx, get(jobPath(job, "checkpoints", "latest"), q))
	if err != nil {
		if after < 0 && Code(err) == "checkpoint_not_found" {
			return m, false, nil
		}
		return m, false, err
	}
	defer res.Body.Close()
	if res.StatusCode == http.StatusNotModified {
		return m, false, nil
	}
	if err := json.NewDecoder(res.Body).Decode(&m); err != nil {
		return m, false, fmt.Errorf("read manifest: %w", err)
	}
	return m, true, nil
}

// File reads n bytes of a checkpoint's file from off (n < 0: to the end). What
// was read is not verified; see Pull.
func (c *Client) File(ctx context.Context, job string, step int64, name string, off, n int64) (io.ReadCloser, error) {
	if n == 0 {
		return io.NopCloser(strings.NewReader("")), nil
	}
	parts := strings.Split(name, "/")
	for i := range parts {
		parts[i] = url.PathEscape(parts[i])
	}
	k := get(jobPath(job, "checkpoints", strconv.FormatInt(step, 10), "files", strings.Join(parts, "/")), nil)
	if off > 0 || n > 0 {
		span := fmt.Sprintf("bytes=%d-", off)
		if n > 0 {
			span += strconv.FormatInt(off+n-1, 10)
		}
		k.header = http.Header{"Range": {span}}
	}
	res, err := c.do(ctx, k)
	if err != nil {
		return nil, err
	}
	if k.header != nil && res.StatusCode != http.StatusPartialContent {
		res.Body.Close()
		return nil, fmt.Errorf("read %s of step %d: the server ignored the range", name, step)
	}
	return res.Body, nil
}

// Pull brings the Hugging Face directory of a step's checkpoint (Latest: the
// newest) into dir: every file is verified against the manifest, then dir is
// swapped in atomically. See storage.Checkpoints.Pull.
func (c *Client) Pull(ctx context.Context, job string, step int64, dir string) (storage.Manifest, error) {
	m, err := c.Checkpoint(ctx, job, step)
	if err != nil {
		return m, err
	}
	if m.Job != job {
		return m, fmt.Errorf("pull job %s: the server answered a manifest of job %s", job, m.Job)
	}
	return m, storage.Checkpoints{Blob: fileBlob{c: c, m: m}}.Pull(ctx, m, "hf/", dir)
}

// fileBlob shows the files of one checkpoint over HTTP as the objects of a store
// that can only be read, which is what Pull needs of one.
type fileBlob struct {
	c *Client
	m storage.Manifest
}

// Get implements storage.Blob.
func (b fileBlob) Get(ctx context.Context, key string, off, n int64) (io.ReadCloser, storage.Info, error) {
	info, err := b.Stat(ctx, key)
	if err != nil {
		return nil, storage.Info{}, err
	}
	r, err := b.c.File(ctx, b.m.Job, b.m.Step, strings.TrimPrefix(key, b.m.Prefix+"/"), off, n)
	return r, info, err
}

// Stat implements storage.Blob.
func (b fileBlob) Stat(_ context.Context, key string) (storage.Info, error) {
	f, ok := b.m.File(strings.TrimPrefix(key, b.m.Prefix+"/"))
	if !ok {
		return storage.Info{}, storage.NotFound("read", key)
	}
	return storage.Info{Key: key, Size: f.Size, ETag: f.SHA256, Modified: b.m.Created}, nil
}

// List implements storage.Blob.
func (b fileBlob) List(_ context.Context, prefix string, f func(storage.Info) error) error {
	for _, file := range b.m.Files {
		key := b.m.Prefix + "/" + file.Name
		if !strings.HasPrefix(key, prefix) {
			continue
		}
		if err := f(storage.Info{Key: key, Size: file.Size, ETag: file.SHA256, Modified: b.m.Created}); err != nil {
			return err
		}
	}
	return nil
}

// Put implements storage.Blob; it is refused.
func (b fileBlob) Put(_ context.Context, key string, _ io.Reader, _ int64, _ storage.Condition) (storage.Info, error) {
	return storage.Info{}, fmt.Errorf("write %s: a checkpoint read over HTTP cannot be written", key)
}

// Delete implements storage.Blob; it is refused.
func (b fileBlob) Delete(_ context.Context, key string) error {
	return fmt.Errorf("delete %s: a checkpoint read over HTTP cannot be changed", key)
}

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
	return c.file(ctx, job, step, name, off, n, false)
}

// file reads a file through the server, or with direct from wherever the server
// says that its store has it.
func (c *Client) file(ctx context.Context, job string, step int64, name string, off, n int64, direct bool) (io.ReadCloser, error) {
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
	if direct {
		k.query, k.elsewhere = url.Values{"redirect": {"true"}}, true
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

// Delta opens what turns the files of step from into those of step to: a stream
// for package storage/delta.
func (c *Client) Delta(ctx context.Context, job string, from, to int64) (io.ReadCloser, error) {
	res, err := c.do(ctx, get(jobPath(job, "checkpoints", strconv.FormatInt(to, 10), "delta"), url.Values{"from": {strconv.FormatInt(from, 10)}}))
	if err != nil {
		return nil, err
	}
	return res.Body, nil
}

// PullOptions change how Pull works.
type PullOptions struct {
	Holder string        // of the lease that keeps the checkpoint meanwhile; "": "pull"
	Delta  bool          // fetch what changed since the checkpoint that lies in the directory, where that can be had
	Direct bool          // fetch files from the store itself where the server hands out such addresses
	Note   func(error)   // hears what cost time and did no harm: no lease, no delta. nil: nobody does
	Lease  time.Duration // how long the lease lasts without a renewal; default 2 min
}

// Pull brings the Hugging Face directory of a step's checkpoint (Latest: the
// newest) into dir: every file is verified against the manifest, then dir is
// swapped in atomically. See storage.Checkpoints.Pull.
func (c *Client) Pull(ctx context.Context, job string, step int64, dir string) (storage.Manifest, error) {
	m, _, err := c.PullWith(ctx, job, step, dir, PullOptions{})
	return m, err
}

// PullWith is Pull with options. While it works it holds a lease, so that
// retention does not take the checkpoint away; where none can be had it goes on
// without, unless the reason is that the checkpoint is gone.
func (c *Client) PullWith(ctx context.Context, job string, step int64, dir string, o PullOptions) (storage.Manifest, storage.PullStats, error) {
	note := func(err error) {
		if o.Note != nil {
			o.Note(err)
		}
	}
	m, err := c.Checkpoint(ctx, job, step)
	if err != nil {
		return m, storage.PullStats{}, err
	}
	if m.Job != job {
		return m, storage.PullStats{}, fmt.Errorf("pull job %s: the server answered a manifest of job %s", job, m.Job)
	}
	release, err := c.hold(ctx, job, m.Step, o, note)
	if err != nil {
		return m, storage.PullStats{}, err
	}
	defer release()
	if m, err = c.Checkpoint(ctx, job, m.Step); err != nil { // a newer attempt may have come before the lease
		return m, storage.PullStats{}, err
	}
	po := storage.PullOptions{Failed: note}
	if o.Delta {
		po.Delta = func(ctx context.Context, from storage.Pulled) (io.ReadCloser, error) {
			return c.Delta(ctx, job, from.Step, m.Step)
		}
	}
	stats, err := storage.Checkpoints{Blob: fileBlob{c: c, m: m, direct: o.Direct}}.PullWith(ctx, m, "hf/", dir, po)
	return m, stats, err
}

// hold takes a lease and renews it until release is called.
func (c *Client) hold(ctx context.Context, job string, step int64, o PullOptions, note func(error)) (release func(), err error) {
	holder, ttl := o.Holder, o.Lease
	if holder == "" {
		holder = "pull"
	}
	if ttl <= 0 {
		ttl = 2 * time.Minute
	}
	l, err := c.once().Lease(ctx, job, step, holder, ttl)
	switch code := Code(err); {
	case err == nil:
	case code == "checkpoint_not_found", code == "checkpoint_going", code == "job_not_found", ctx.Err() != nil:
		return nil, err
	default:
		note(fmt.Errorf("pull without a lease: %w", err))
		return func() {}, nil
	}
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			select {
			case <-time.After(ttl / 3):
			case <-ctx.Done():
				return
			}
			renewed, err := c.Renew(ctx, job, l, ttl)
			if err == nil {
				l = renewed
			} else if ctx.Err() == nil {
				note(fmt.Errorf("renew the lease: %w", err))
			}
		}
	}()
	return func() {
		cancel()
		<-ended
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		if err := c.once().Release(ctx, job, l); err != nil {
			note(fmt.Errorf("release the lease: %w", err)) // it ends by itself
		}
	}, nil
}

// fileBlob shows the files of one checkpoint over HTTP as the objects of a store
// that can only be read, which is what Pull needs of one.
type fileBlob struct {
	c      *Client
	m      storage.Manifest
	direct bool
}

// Get implements storage.Blob.
func (b fileBlob) Get(ctx context.Context, key string, off, n int64) (io.ReadCloser, storage.Info, error) {
	info, err := b.Stat(ctx, key)
	if err != nil {
		return nil, storage.Info{}, err
	}
	r, err := b.c.file(ctx, b.m.Job, b.m.Step, strings.TrimPrefix(key, b.m.Prefix+"/"), off, n, b.direct)
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

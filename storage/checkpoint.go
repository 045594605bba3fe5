package storage

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"trainerd/internal/fault"
)

// Checkpoints reads and writes the checkpoints of all jobs in one Blob.
type Checkpoints struct{ Blob Blob }

// Latest returns the manifest that latest.json names; ErrNotFound when there is none.
// Where latest.json is missing, damaged or names a checkpoint that is gone, it
// is the newest whole checkpoint of List: a crash between manifest and
// latest.json loses nothing. Once latest.json exists the answer never goes back
// to an older step; until then, several committers at once of a job's very first
// checkpoints can make it do so (a job has one committer).
func (c Checkpoints) Latest(ctx context.Context, job string) (Manifest, error) {
	if err := CheckJob(job); err != nil {
		return Manifest{}, err
	}
	at, _, err := c.readLatest(ctx, job)
	if err == nil {
		var m Manifest
		var data []byte
		if m, data, err = c.manifest(ctx, job, at.Step, at.Attempt); err == nil {
			if digest := hexSHA256(data); digest != at.SHA256 {
				return Manifest{}, fault.New(fault.Internal, "corrupt_manifest",
					"read %s/%s: sha256 is %s, latest.json says %s", at.Prefix, manifestName, digest, at.SHA256)
			}
			return m, nil
		}
	}
	if !errors.Is(err, ErrNotFound) && !errors.Is(err, errBadLatest) {
		return Manifest{}, fmt.Errorf("read latest checkpoint of job %s: %w", job, err)
	}
	return c.newestWhole(ctx, job)
}

// newestWhole is the last manifest of List; damaged ones count only when no other is there.
func (c Checkpoints) newestWhole(ctx context.Context, job string) (Manifest, error) {
	all, err := c.List(ctx, job)
	if len(all) > 0 {
		return all[len(all)-1], nil
	}
	if err != nil {
		return Manifest{}, err
	}
	return Manifest{}, fault.New(fault.NotFound, "no_checkpoint", "find checkpoint of job %s: %w", job, ErrNotFound)
}

// At returns the newest whole checkpoint of a step.
func (c Checkpoints) At(ctx context.Context, job string, step int64) (Manifest, error) {
	if err := CheckJob(job); err != nil {
		return Manifest{}, err
	}
	if step < 0 {
		return Manifest{}, fault.BadField("step", step, "0 or more")
	}
	all, err := c.manifestsUnder(ctx, job, stepPrefix(job, step))
	if err != nil {
		return Manifest{}, err
	}
	if len(all) == 0 {
		return Manifest{}, fault.New(fault.NotFound, "no_checkpoint", "find checkpoint %d of job %s: %w", step, job, ErrNotFound)
	}
	return all[len(all)-1], nil
}

// List returns all whole checkpoints of a job by step, then attempt. Manifests
// that cannot be read do not hide the others: both may be returned, a list
// without the damaged ones and an error that names each of them.
func (c Checkpoints) List(ctx context.Context, job string) ([]Manifest, error) {
	if err := CheckJob(job); err != nil {
		return nil, err
	}
	return c.manifestsUnder(ctx, job, checkpointsOf(job))
}

func (c Checkpoints) manifestsUnder(ctx context.Context, job, prefix string) ([]Manifest, error) {
	type id struct {
		step    int64
		attempt int
	}
	var found []id
	err := c.Blob.List(ctx, prefix, func(o Info) error {
		name, ok := strings.CutSuffix(strings.TrimPrefix(o.Key, checkpointsOf(job)), "/"+manifestName)
		if !ok {
			return nil
		}
		if step, attempt, ok := parsePrefix(name); ok {
			found = append(found, id{step, attempt})
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list checkpoints of job %s: %w", job, err)
	}
	var all []Manifest
	var damaged []error
	for _, f := range found {
		m, _, err := c.manifest(ctx, job, f.step, f.attempt)
		switch {
		case err == nil:
			all = append(all, m)
		case ctx.Err() != nil:
			return nil, err
		case !errors.Is(err, ErrNotFound): // gone since the listing: retention was faster
			damaged = append(damaged, err)
		}
	}
	slices.SortFunc(all, func(a, b Manifest) int {
		if a.newer(b.Step, b.Attempt) {
			return 1
		}
		return -1
	})
	return all, errors.Join(damaged...)
}

// manifest reads the manifest of one prefix and checks that it is of that prefix.
func (c Checkpoints) manifest(ctx context.Context, job string, step int64, attempt int) (Manifest, []byte, error) {
	key := prefixOf(job, step, attempt) + "/" + manifestName
	data, _, err := readSmall(ctx, c.Blob, key, MaxManifest)
	if err != nil {
		return Manifest{}, nil, err
	}
	m, err := DecodeManifest(data)
	if err != nil {
		return Manifest{}, nil, fault.New(fault.Internal, "corrupt_manifest", "read %s: %w", key, err)
	}
	if m.Job != job || m.Step != step || m.Attempt != attempt {
		return Manifest{}, nil, fault.New(fault.Internal, "corrupt_manifest", "read %s: it is the manifest of %s", key, m.Prefix)
	}
	return m, data, nil
}

// Open reads n bytes of a checkpoint's file from off (n < 0: to the end).
// The digest is of the whole file, so that it is not verified here; the size is.
func (c Checkpoints) Open(ctx context.Context, m Manifest, name string, off, n int64) (io.ReadCloser, error) {
	if err := m.Validate(); err != nil {
		return nil, err
	}
	f, ok := m.File(name)
	if !ok {
		return nil, fault.New(fault.NotFound, "no_such_file", "open file %.200q of checkpoint %s: %w", name, m.Prefix, ErrNotFound)
	}
	if _, err := CheckRange(name, f.Size, off, n); err != nil {
		return nil, err
	}
	r, info, err := c.Blob.Get(ctx, m.Prefix+"/"+name, off, n)
	if err != nil {
		return nil, fmt.Errorf("open checkpoint file: %w", err)
	}
	if info.Size != f.Size {
		r.Close()
		return nil, corruptFile(m, name, fmt.Sprintf("size is %d, manifest says %d", info.Size, f.Size))
	}
	return r, nil
}

func corruptFile(m Manifest, name, why string) error {
	return &fault.Error{Kind: fault.Internal, Code: "corrupt_file",
		Msg: fmt.Sprintf("read file %q of checkpoint %s: %s", name, m.Prefix, why)}
}

// readSmall reads a whole object of at most limit bytes together with the ETag it had.
func readSmall(ctx context.Context, b Blob, key string, limit int64) ([]byte, Info, error) {
	r, info, err := b.Get(ctx, key, 0, -1)
	if err != nil {
		return nil, Info{}, err
	}
	defer r.Close()
	if info.Size > limit {
		return nil, info, fault.New(fault.TooLarge, "object_too_large", "read %s: got %d bytes, expected at most %d", key, info.Size, limit)
	}
	data, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err != nil {
		return nil, Info{}, fmt.Errorf("read %s: %w", key, err)
	}
	return data, info, nil
}

func hexSHA256(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

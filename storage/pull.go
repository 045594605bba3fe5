package storage

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sync/errgroup"

	"trainerd/internal/fault"
)

// PulledName is the file that Pull leaves in the directory it made. It says
// which checkpoint is there, and that the directory is Pull's to replace.
const PulledName = ".trainerd.json"

// Pulled is the content of PulledName.
type Pulled struct {
	Job     string `json:"job"`
	Step    int64  `json:"step"`
	Attempt int    `json:"attempt"`
	Prefix  string `json:"prefix"`
	Files   string `json:"files"` // the name prefix that was pulled, as "hf/"
}

// ReadPulled says which checkpoint Pull put into dir; ErrNotFound when none.
func ReadPulled(dir string) (Pulled, error) {
	data, err := os.ReadFile(filepath.Join(dir, PulledName))
	if errors.Is(err, os.ErrNotExist) {
		return Pulled{}, NotFound("read", filepath.Join(dir, PulledName))
	}
	if err != nil {
		return Pulled{}, fault.New(fault.Unavailable, "pull_io", "read pulled checkpoint: %w", err)
	}
	var p Pulled
	if err := decodeStrict(data, maxLatest, "pulled", &p); err != nil {
		return Pulled{}, fmt.Errorf("read %s: %w", filepath.Join(dir, PulledName), err)
	}
	return p, nil
}

// pullParallel is how many files are fetched at once: enough to hide a store's
// latency, few enough not to starve whoever else uses the node.
const pullParallel = 4

// Pull copies the files of a checkpoint whose name has the given prefix ("hf/"
// is stripped) into dir, verifies every digest, and swaps dir in atomically.
//
// The files are written to a directory beside dir (".{base}.pull-*"), verified
// against the manifest and synced; only then dir changes, by one rename: an
// exchange of the two directories where the system has it (Linux on ext4, xfs,
// btrfs, tmpfs), else by moving the old one aside first, which leaves an instant
// without dir. Any error leaves the old dir as it was. A reader that has files
// of the old one open keeps them. What a killed Pull leaves is cleaned by the
// next one into the same dir; several may run at once.
//
// A dir that exists must be empty or Pull's own (PulledName); anything else is
// refused, since it would be deleted. If dir is a symbolic link, the link is
// replaced and what it points to stays.
func (c Checkpoints) Pull(ctx context.Context, m Manifest, prefix, dir string) error {
	if err := m.Validate(); err != nil {
		return err
	}
	if prefix != "" && !strings.HasSuffix(prefix, "/") {
		return fault.BadField("prefix", fmt.Sprintf("%q", prefix), `"" or a name that ends with "/"`)
	}
	var files []File
	for _, f := range m.Files {
		if strings.HasPrefix(f.Name, prefix) {
			files = append(files, f)
		}
	}
	if len(files) == 0 {
		return fault.New(fault.NotFound, "no_such_file", "pull checkpoint %s: it has no files under %q: %w", m.Prefix, prefix, ErrNotFound)
	}
	s, err := newSwap(dir)
	if err != nil {
		return err
	}
	defer s.close()
	if err := c.fetch(ctx, m, prefix, files, s.temp); err != nil {
		return fmt.Errorf("pull checkpoint %s: %w", m.Prefix, err)
	}
	note, err := json.Marshal(Pulled{Job: m.Job, Step: m.Step, Attempt: m.Attempt, Prefix: m.Prefix, Files: prefix})
	if err != nil {
		return fmt.Errorf("encode %s: %w", PulledName, err)
	}
	if err := os.WriteFile(filepath.Join(s.temp, PulledName), append(note, '\n'), 0o644); err != nil {
		return fault.New(fault.Unavailable, "pull_io", "pull checkpoint %s: %w", m.Prefix, err)
	}
	if err := s.commit(ctx); err != nil {
		return fmt.Errorf("pull checkpoint %s: %w", m.Prefix, err)
	}
	return nil
}

func (c Checkpoints) fetch(ctx context.Context, m Manifest, prefix string, files []File, temp string) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(pullParallel)
	for _, f := range files {
		g.Go(func() error {
			return c.fetchFile(ctx, m, f, filepath.Join(temp, filepath.FromSlash(strings.TrimPrefix(f.Name, prefix))))
		})
	}
	return g.Wait()
}

// fetchFile copies one file to path, verified and synced.
func (c Checkpoints) fetchFile(ctx context.Context, m Manifest, f File, path string) (err error) {
	local := func(err error) error {
		return fault.New(fault.Unavailable, "pull_io", "write file %q: %w", f.Name, err)
	}
	r, err := c.Open(ctx, m, f.Name, 0, -1)
	if errors.Is(err, ErrNotFound) {
		return corruptFile(m, f.Name, "it is missing in the store")
	}
	if err != nil {
		return err
	}
	defer r.Close()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return local(err)
	}
	out, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return local(err)
	}
	defer out.Close()
	sum := sha256.New()
	src := &readFault{r: r}
	// One byte more than promised is enough to know that the file is too long.
	n, err := io.Copy(io.MultiWriter(out, sum), io.LimitReader(src, f.Size+1))
	switch {
	case src.err != nil:
		return fmt.Errorf("read file %q: %w", f.Name, src.err)
	case err != nil:
		return local(err)
	case n != f.Size:
		return corruptFile(m, f.Name, fmt.Sprintf("it has %d bytes or more, manifest says %d", n, f.Size))
	}
	if digest := hex.EncodeToString(sum.Sum(nil)); digest != f.SHA256 {
		return corruptFile(m, f.Name, fmt.Sprintf("sha256 is %s, manifest says %s", digest, f.SHA256))
	}
	if err := out.Sync(); err != nil {
		return local(err)
	}
	if err := out.Close(); err != nil {
		return local(err)
	}
	return nil
}

// readFault remembers a reader's error, to tell it from the writer's.
type readFault struct {
	r   io.Reader
	err error
}

func (r *readFault) Read(p []byte) (int, error) {
	n, err := r.r.Read(p)
	if err != nil && err != io.EOF {
		r.err = err
	}
	return n, err
}

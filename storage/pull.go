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
	// SHA256 is the digest of the manifest; "" from an older Pull.
	SHA256 string `json:"manifest_sha256,omitempty"`
}

// PullOptions change how Pull gets the files. The zero value fetches each whole.
type PullOptions struct {
	// Delta opens a delta from the checkpoint that lies in the directory to the one
	// being pulled. An error, or a delta that does not fit, costs the saving only:
	// what it did not give is fetched whole.
	Delta func(ctx context.Context, from Pulled) (io.ReadCloser, error)
	// Failed hears why a delta was of no use. nil: nobody does.
	Failed func(error)
}

// PullStats say where the bytes of a pull came from.
type PullStats struct {
	Bytes   int64 // of the files
	Fetched int64 // of files that came whole
	Delta   int64 // read of a delta, useful or not
	Kept    int64 // of files that the directory had already, unchanged
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
	_, err := c.PullWith(ctx, m, prefix, dir, PullOptions{})
	return err
}

// PullWith is Pull with options.
func (c Checkpoints) PullWith(ctx context.Context, m Manifest, prefix, dir string, o PullOptions) (PullStats, error) {
	var stats PullStats
	digest, err := m.Digest()
	if err != nil {
		return stats, err
	}
	if prefix != "" && !strings.HasSuffix(prefix, "/") {
		return stats, fault.BadField("prefix", fmt.Sprintf("%q", prefix), `"" or a name that ends with "/"`)
	}
	var files []File
	for _, f := range m.Files {
		if strings.HasPrefix(f.Name, prefix) {
			files = append(files, f)
			stats.Bytes += f.Size
		}
	}
	if len(files) == 0 {
		return stats, fault.New(fault.NotFound, "no_such_file", "pull checkpoint %s: it has no files under %q: %w", m.Prefix, prefix, ErrNotFound)
	}
	s, err := newSwap(dir)
	if err != nil {
		return stats, err
	}
	defer s.close()
	if o.Delta != nil {
		files, err = c.patch(ctx, m, prefix, files, s, o, &stats)
	}
	if err == nil {
		err = c.fetch(ctx, m, prefix, files, s.temp)
	}
	if err != nil {
		return stats, fmt.Errorf("pull checkpoint %s: %w", m.Prefix, err)
	}
	for _, f := range files {
		stats.Fetched += f.Size
	}
	note, err := json.Marshal(Pulled{Job: m.Job, Step: m.Step, Attempt: m.Attempt, Prefix: m.Prefix, Files: prefix, SHA256: digest})
	if err != nil {
		return stats, fmt.Errorf("encode %s: %w", PulledName, err)
	}
	if err := os.WriteFile(filepath.Join(s.temp, PulledName), append(note, '\n'), 0o644); err != nil {
		return stats, fault.New(fault.Unavailable, "pull_io", "pull checkpoint %s: %w", m.Prefix, err)
	}
	if err := s.commit(ctx); err != nil {
		return stats, fmt.Errorf("pull checkpoint %s: %w", m.Prefix, err)
	}
	return stats, nil
}

// patch makes what it can out of the directory as it is: by the delta, and by
// keeping files that have not changed. It returns the files that are left to fetch.
func (c Checkpoints) patch(ctx context.Context, m Manifest, prefix string, files []File, s *swap, o PullOptions, stats *PullStats) ([]File, error) {
	was, err := ReadPulled(s.dir)
	if err != nil || was.Job != m.Job || was.Files != prefix {
		return files, nil // nothing to begin with
	}
	failed := func(err error) {
		if o.Failed != nil {
			o.Failed(err)
		}
	}
	done := map[string]bool{}
	if stream, err := o.Delta(ctx, was); err != nil {
		failed(err)
	} else {
		counted := &countReader{r: stream}
		done, err = applyDelta(m, prefix, s.dir, s.temp, counted)
		stats.Delta = counted.n
		stream.Close()
		if err != nil {
			failed(err)
		}
	}
	var left []File
	for _, f := range files {
		switch {
		case done[f.Name]:
		case keepFile(f, pulledPath(s.dir, prefix, f.Name), pulledPath(s.temp, prefix, f.Name)):
			stats.Kept += f.Size
		default:
			left = append(left, f)
		}
	}
	return left, ctx.Err()
}

// keepFile copies a file that the directory has already; false when it has another one.
func keepFile(f File, from, to string) bool {
	in, err := os.Open(from)
	if err != nil {
		return false
	}
	defer in.Close()
	if info, err := in.Stat(); err != nil || info.Size() != f.Size {
		return false
	}
	if writeVerified(in, f, to) != nil {
		os.Remove(to)
		return false
	}
	return true
}

type countReader struct {
	r io.Reader
	n int64
}

func (c *countReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
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
func (c Checkpoints) fetchFile(ctx context.Context, m Manifest, f File, path string) error {
	r, err := c.Open(ctx, m, f.Name, 0, -1)
	if errors.Is(err, ErrNotFound) {
		return corruptFile(m, f.Name, "it is missing in the store")
	}
	if err != nil {
		return err
	}
	defer r.Close()
	err = writeVerified(r, f, path)
	var other *otherContent
	if errors.As(err, &other) {
		return corruptFile(m, f.Name, other.why)
	}
	return err
}

// otherContent says that what was read is not the file.
type otherContent struct{ why string }

func (e *otherContent) Error() string { return e.why }

// writeVerified writes the content of a file to a new path and syncs it.
func writeVerified(r io.Reader, f File, path string) error {
	local := func(err error) error {
		return fault.New(fault.Unavailable, "pull_io", "write file %q: %w", f.Name, err)
	}
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
		return &otherContent{fmt.Sprintf("it has %d bytes or more, manifest says %d", n, f.Size)}
	}
	if digest := hex.EncodeToString(sum.Sum(nil)); digest != f.SHA256 {
		return &otherContent{fmt.Sprintf("sha256 is %s, manifest says %s", digest, f.SHA256)}
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

package storage

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"trainerd/internal/fault"
	"trainerd/storage/delta"
)

// WriteDelta writes what turns the files of one checkpoint under a name prefix
// into those of another: a delta (package delta) of the files that both have,
// with one size and other content. word is the size of a file's values in bytes.
// Its cost is reading both versions of these files once.
func (c Checkpoints) WriteDelta(ctx context.Context, out io.Writer, base, target Manifest, prefix string, word func(name string) int) error {
	w := delta.NewWriter(out)
	for _, f := range target.Files {
		was, ok := base.File(f.Name)
		if !ok || !strings.HasPrefix(f.Name, prefix) || was.Size != f.Size || was.SHA256 == f.SHA256 {
			continue
		}
		if err := c.writeDelta(ctx, w, base, target, was, f, word(f.Name)); err != nil {
			return fmt.Errorf("write the delta from %s to %s: %w", base.Prefix, target.Prefix, err)
		}
	}
	return w.Close()
}

func (c Checkpoints) writeDelta(ctx context.Context, w *delta.Writer, base, target Manifest, was, is File, word int) error {
	f := delta.File{Name: is.Name, Size: is.Size, Word: word}
	if !decodeDigest(&f.Base, was.SHA256) || !decodeDigest(&f.Target, is.SHA256) {
		return fault.New(fault.Internal, "corrupt_manifest", "file %q: its digest is none", is.Name)
	}
	old, err := c.Open(ctx, base, was.Name, 0, -1)
	if err != nil {
		return err
	}
	defer old.Close()
	now, err := c.Open(ctx, target, is.Name, 0, -1)
	if err != nil {
		return err
	}
	defer now.Close()
	_, err = w.File(f, old, now)
	return err
}

func decodeDigest(to *delta.Digest, text string) bool {
	n, err := hex.Decode(to[:], []byte(text))
	return err == nil && n == len(to)
}

// applyDelta makes files of temp out of those in dir and a delta, each verified
// against the manifest. It returns the names of those that are done: after an
// error they are good all the same, and the others are not there.
func applyDelta(m Manifest, prefix, dir, temp string, stream io.Reader) (done map[string]bool, err error) {
	done = map[string]bool{}
	r, err := delta.NewReader(stream)
	if err != nil {
		return done, err
	}
	for {
		part, err := r.Next()
		if err == io.EOF {
			return done, nil
		}
		if err != nil {
			return done, err
		}
		f, ok := m.File(part.Name)
		var want delta.Digest
		if !ok || done[f.Name] || !strings.HasPrefix(f.Name, prefix) || f.Size != part.Size || !decodeDigest(&want, f.SHA256) || want != part.Target {
			return done, fault.New(fault.Malformed, "bad_delta", "read delta: file %.100q of %d bytes is none of checkpoint %s", part.Name, part.Size, m.Prefix)
		}
		if err := applyPart(r, pulledPath(dir, prefix, f.Name), pulledPath(temp, prefix, f.Name)); err != nil {
			return done, err
		}
		done[f.Name] = true
	}
}

// applyPart makes the file at to out of the one at from. After an error there is none.
func applyPart(r *delta.Reader, from, to string) (err error) {
	local := func(err error) error { return fault.New(fault.Unavailable, "pull_io", "apply delta: %w", err) }
	base, err := os.Open(from)
	if err != nil {
		return local(err)
	}
	defer base.Close()
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return local(err)
	}
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return local(err)
	}
	defer func() {
		out.Close()
		if err != nil {
			os.Remove(to)
		}
	}()
	if err := r.Apply(base, out); err != nil {
		return err
	}
	if err := errors.Join(out.Sync(), out.Close()); err != nil {
		return local(err)
	}
	return nil
}

func pulledPath(dir, prefix, name string) string {
	return filepath.Join(dir, filepath.FromSlash(strings.TrimPrefix(name, prefix)))
}

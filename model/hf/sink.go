package hf

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"trainerd/internal/fault"
)

// DirSink returns a Sink that writes into dir, each file atomically and fsynced.
func DirSink(dir string) Sink {
	return func(ctx context.Context, name string, write func(io.Writer) error) error {
		if !filepath.IsLocal(name) {
			return fault.BadField("file name", name, "a path inside the directory")
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		path := filepath.Join(dir, name)
		parent := filepath.Dir(path)
		if err := os.MkdirAll(parent, 0o755); err != nil {
			return fmt.Errorf("write file: %w", err)
		}
		return replaceFile(parent, path, write)
	}
}

// replaceFile writes a temporary file beside path and renames it into place
// once its bytes are on disk; the directory is synced, so that the name is too.
func replaceFile(parent, path string, write func(io.Writer) error) (err error) {
	f, err := os.CreateTemp(parent, ".tmp-*")
	if err != nil {
		return fmt.Errorf("write file: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close(), os.Remove(f.Name()))
		}
	}()
	if err := write(f); err != nil {
		return err
	}
	// CreateTemp's mode is for secrets; a model directory is for its readers.
	if err := f.Chmod(0o644); err != nil {
		return fmt.Errorf("write file: %w", err)
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("write file: %w", err)
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return fmt.Errorf("write file: %w", err)
	}
	return errors.Join(f.Close(), syncDir(parent))
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("sync directory: %w", err)
	}
	return errors.Join(d.Sync(), d.Close())
}

package disk

import (
	"context"
	"errors"
	"io/fs"
	"slices"
	"strings"

	"trainerd/storage"
)

// List implements storage.Blob. It sees every object that is there from before
// it begins until it ends; of those that come or go meanwhile it may see some.
func (s *Store) List(ctx context.Context, prefix string, f func(storage.Info) error) error {
	err := s.walk(ctx, "", prefix, f)
	var stop *stopError
	if errors.As(err, &stop) {
		return stop.err
	}
	if err != nil {
		return s.fault("list", prefix, err)
	}
	return nil
}

// stopError carries the callback's own error past the wrapping.
type stopError struct{ err error }

func (e *stopError) Error() string { return e.err.Error() }

// walk visits dir ("" or with a slash at its end). Order of keys is byte order
// of whole paths: a directory sorts as its name with the slash, after "a-b" and
// "a.b" when it is called "a".
func (s *Store) walk(ctx context.Context, dir, prefix string, f func(storage.Info) error) error {
	entries, err := s.readDir(dir)
	if err != nil {
		return err
	}
	names := make([]string, 0, len(entries))
	for _, e := range entries {
		name := dir + e.Name()
		if name == storage.Reserved {
			continue
		}
		mode := e.Type()
		if mode&fs.ModeSymlink != 0 {
			st, err := s.root.Stat(name)
			if err != nil {
				continue // dangling, or out of the root: no key
			}
			mode = st.Mode().Type()
		}
		switch {
		case mode.IsDir() && (strings.HasPrefix(name+"/", prefix) || strings.HasPrefix(prefix, name+"/")):
			names = append(names, name+"/")
		case mode.IsRegular() && strings.HasPrefix(name, prefix) && storage.CheckKey(name) == nil:
			names = append(names, name)
		}
	}
	slices.Sort(names)
	for _, name := range names {
		if err := ctx.Err(); err != nil {
			return err
		}
		if strings.HasSuffix(name, "/") {
			if err := s.walk(ctx, name, prefix, f); err != nil {
				return err
			}
			continue
		}
		info, err := s.stat(name)
		if errors.Is(err, storage.ErrNotFound) {
			continue // deleted since the directory was read
		}
		if err != nil {
			return err
		}
		if err := f(info); err != nil {
			return &stopError{err}
		}
	}
	return nil
}

func (s *Store) readDir(dir string) ([]fs.DirEntry, error) {
	d, err := s.root.Open(dir + ".")
	if missing(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.ReadDir(-1)
}

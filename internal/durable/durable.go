// Package durable makes directories that a power cut does not take back. A new
// name lies in its parent, and is durable once the parent was synced.
package durable

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"trainerd/internal/crashpoint"
)

// MkdirAll makes dir and the parents that are missing, and syncs where each
// name went before it makes the next: a directory that has a child is durable,
// whenever the process is killed. name is of crashpoint.Sync.
func MkdirAll(name, dir string, perm fs.FileMode) error {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	var missing []string
	for at := abs; ; at = filepath.Dir(at) {
		_, err := os.Stat(at)
		if err == nil {
			// Whoever made it may have died before its name was synced.
			if err := SyncDir(name, filepath.Dir(at)); err != nil && !errors.Is(err, fs.ErrPermission) {
				return err // a parent that cannot be read was made by somebody else
			}
			break
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		missing = append(missing, at)
	}
	for i := len(missing) - 1; i >= 0; i-- {
		if err := os.Mkdir(missing[i], perm); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		if err := SyncDir(name, filepath.Dir(missing[i])); err != nil {
			return err
		}
	}
	return nil
}

// SyncDir makes the names in a directory durable.
func SyncDir(name, dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	err = crashpoint.Sync(name, d)
	return errors.Join(err, d.Close())
}

// SyncTree makes the names in a directory and in all below it durable.
func SyncTree(name, dir string) error {
	return filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) { // deleted meanwhile
			return nil
		}
		if err != nil || !e.IsDir() {
			return err
		}
		if err := SyncDir(name, path); !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	})
}

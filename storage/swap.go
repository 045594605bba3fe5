package storage

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"trainerd/internal/fault"
)

// swap replaces a directory with a new one in one step. temp, beside it, is
// where the new one grows. A lock on temp says that its owner is alive: the
// kernel drops it with the process, so that leftovers are known by being free.
type swap struct {
	dir, parent, base string
	temp              string
	lock              *os.File
}

// exchange swaps two directory entries atomically; errors.ErrUnsupported where
// the system cannot. Tests replace it to reach the other way.
var exchange = exchangeNames

func swapFault(dir string, err error) error {
	return fault.New(fault.Unavailable, "pull_io", "swap directory %s: %w", dir, err)
}

// newSwap checks dir, cleans what dead owners left beside it, and makes temp.
func newSwap(dir string) (*swap, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, swapFault(dir, err)
	}
	s := &swap{dir: abs, parent: filepath.Dir(abs), base: filepath.Base(abs)}
	if s.parent == s.dir {
		return nil, fault.BadField("dir", dir, "a directory other than the root")
	}
	if err := os.MkdirAll(s.parent, 0o755); err != nil {
		return nil, swapFault(dir, err)
	}
	if err := s.clean(); err != nil {
		return nil, swapFault(dir, err)
	}
	if err := s.replaceable(); err != nil {
		return nil, err
	}
	// A cleaner may remove the new directory before it is locked; then there is another try.
	for range 100 {
		temp, err := os.MkdirTemp(s.parent, s.tempPrefix()+"*")
		if err != nil {
			return nil, swapFault(dir, err)
		}
		lock, alive, err := lockDir(temp)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, swapFault(dir, err)
		}
		if alive {
			if err := os.Chmod(temp, 0o755); err != nil { // MkdirTemp's 0700 would hide it from an engine under another user
				lock.Close()
				return nil, swapFault(dir, err)
			}
			s.temp, s.lock = temp, lock
			return s, nil
		}
	}
	return nil, swapFault(dir, errors.New("temporary directories vanish at once"))
}

func (s *swap) tempPrefix() string { return "." + s.base + ".pull-" }
func (s *swap) oldPrefix() string  { return "." + s.base + ".old-" }

// replaceable refuses a directory that holds somebody's files.
func (s *swap) replaceable() error {
	entries, err := os.ReadDir(s.dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return swapFault(s.dir, err)
	case len(entries) == 0:
		return nil
	}
	if _, err := ReadPulled(s.dir); err != nil {
		return fault.New(fault.Conflict, "not_a_pulled_directory",
			"replace directory %s: it holds other files; expected an empty directory or one with a valid %s", s.dir, PulledName)
	}
	return nil
}

// clean brings back a directory that a dead owner had moved aside, and removes
// temporary ones without an owner. While somebody swaps under this parent it
// leaves everything as it is.
func (s *swap) clean() error {
	parent, free, err := lockDir(s.parent)
	if err != nil || !free {
		return err
	}
	defer parent.Close()
	entries, err := os.ReadDir(s.parent)
	if err != nil {
		return err
	}
	slices.SortFunc(entries, func(a, b fs.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
	for _, e := range entries {
		path := filepath.Join(s.parent, e.Name())
		old := strings.HasPrefix(e.Name(), s.oldPrefix())
		ours := old || strings.HasPrefix(e.Name(), s.tempPrefix())
		if !ours || !e.IsDir() && e.Type()&fs.ModeSymlink == 0 {
			continue
		}
		if e.Type()&fs.ModeSymlink != 0 { // the old dir was a link: only the link is ours
			if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
			continue
		}
		lock, free, err := lockDir(path)
		if err != nil || !free {
			continue // gone, or its owner is alive
		}
		if _, serr := os.Lstat(s.dir); old && errors.Is(serr, fs.ErrNotExist) {
			err = os.Rename(path, s.dir)
		} else {
			err = os.RemoveAll(path)
		}
		lock.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// lockDir takes the lock of a directory that still is at path; false when
// somebody else has it or the directory is gone.
func lockDir(path string) (*os.File, bool, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, false, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		return nil, false, nil
	}
	held, err1 := f.Stat()
	there, err2 := os.Stat(path)
	if err1 != nil || err2 != nil || !os.SameFile(held, there) {
		f.Close()
		return nil, false, nil
	}
	return f, true, nil
}

// commit syncs temp and puts it in dir's place. Swaps under one parent follow
// one another by a lock on the parent, held for the renames only.
func (s *swap) commit(ctx context.Context) error {
	if err := syncTree(s.temp); err != nil {
		return swapFault(s.dir, err)
	}
	parent, err := os.Open(s.parent)
	if err != nil {
		return swapFault(s.dir, err)
	}
	defer parent.Close()
	for wait := time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
		err := syscall.Flock(int(parent.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			break
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) && !errors.Is(err, syscall.EINTR) {
			return swapFault(s.dir, err)
		}
		if err := sleep(ctx, wait); err != nil {
			return fmt.Errorf("wait for the lock of %s: %w", s.parent, err)
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := s.replaceable(); err != nil { // it may have become somebody's since
		return err
	}
	if err := s.replace(); err != nil {
		return swapFault(s.dir, err)
	}
	if err := parent.Sync(); err != nil {
		return swapFault(s.dir, err)
	}
	return nil
}

// replace leaves what was in dir's place at temp, or at nothing.
func (s *swap) replace() error {
	_, err := os.Lstat(s.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return os.Rename(s.temp, s.dir)
	}
	if err != nil {
		return err
	}
	err = exchange(s.temp, s.dir)
	if !errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	aside := filepath.Join(s.parent, s.oldPrefix()+strings.TrimPrefix(filepath.Base(s.temp), s.tempPrefix()))
	if err := os.Rename(s.dir, aside); err != nil {
		return err
	}
	if err := os.Rename(s.temp, s.dir); err != nil {
		return errors.Join(err, os.Rename(aside, s.dir))
	}
	return os.Rename(aside, s.temp)
}

// close removes what lies at temp: the unfinished new directory, or the old one.
// What cannot be removed is left to the next clean.
func (s *swap) close() {
	if info, err := os.Lstat(s.temp); err == nil && info.Mode()&fs.ModeSymlink != 0 {
		os.Remove(s.temp)
	} else {
		os.RemoveAll(s.temp)
	}
	s.lock.Close()
}

// syncTree makes a directory's files and names durable, the deepest first.
func syncTree(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if e.IsDir() {
			if err := syncTree(path); err != nil {
				return err
			}
		} else if err := syncPath(path); err != nil {
			return err
		}
	}
	return syncPath(dir)
}

func syncPath(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

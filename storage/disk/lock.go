package disk

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
	"syscall"
	"time"
)

// lock takes the root's lock: one holder at a time in this process by a channel,
// among processes by a lock on a file, which the kernel drops with its holder.
// It is held for a rename and a directory sync, never while data is copied.
func (s *Store) lock(ctx context.Context) (unlock func(), err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	select {
	case s.turn <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	defer func() {
		if err != nil {
			<-s.turn
		}
	}()
	f, err := s.root.OpenFile(lockName, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	// Polled, since a blocked flock does not see the context end.
	for wait := 200 * time.Microsecond; ; wait = min(2*wait, 10*time.Millisecond) {
		err := flock(f)
		if err == nil {
			return func() { f.Close(); <-s.turn }, nil
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			f.Close()
			return nil, err
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, ctx.Err()
		case <-time.After(wait):
		}
	}
}

// flock takes an exclusive lock without waiting.
func flock(f *os.File) error {
	for {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if !errors.Is(err, syscall.EINTR) {
			return err
		}
	}
}

// createTemp makes a locked temporary file. The lock says that its writer is
// alive; the sweep of another process removes only files it can lock.
func (s *Store) createTemp() (*os.File, string, error) {
	for {
		var b [12]byte
		rand.Read(b[:]) // never fails
		name := tempDir + "/put-" + hex.EncodeToString(b[:])
		f, err := s.root.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o644)
		if err != nil {
			return nil, "", err
		}
		if err := flock(f); err == nil {
			// A sweep may have come between creation and lock.
			if st, err := f.Stat(); err == nil && links(st) > 0 {
				return f, name, nil
			}
		} else if !errors.Is(err, syscall.EWOULDBLOCK) {
			f.Close()
			s.root.Remove(name)
			return nil, "", err
		}
		f.Close()
	}
}

// sweep removes temporary files whose writer is gone.
func (s *Store) sweep() error {
	entries, err := s.readDir(tempDir + "/")
	if err != nil {
		return err
	}
	for _, e := range entries {
		name := tempDir + "/" + e.Name()
		f, err := s.root.Open(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		if flock(f) == nil {
			err = s.root.Remove(name)
		}
		f.Close()
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

package spool

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"

	"trainerd/internal/durable"
)

// file is an open segment.
type file interface {
	io.ReaderAt
	io.WriterAt
	Size() (int64, error)
	Truncate(size int64) error
	Sync() error
	// Block is 1, or of what many bytes, at multiples of it and from memory aligned
	// to it, the log is to be written.
	Block() int64
	io.Closer
}

// disk is the directory of a log. Creations and removals are durable after Sync.
type disk interface {
	Names() ([]string, error)
	Create(name string) (file, error) // fails when it exists
	Open(name string) (file, error)
	Remove(name string) error
	Sync() error
	io.Closer
}

// osDisk is a real directory, locked against a second process.
type osDisk struct {
	dir  string
	lock *os.File
}

// lockName is a file that is locked while the log is open. It is not a segment.
const lockName = "lock"

func openDisk(dir string) (*osDisk, error) {
	if err := durable.MkdirAll("spool.dir_name", dir, 0o755); err != nil {
		return nil, err
	}
	lock, err := os.OpenFile(filepath.Join(dir, lockName), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		lock.Close()
		return nil, fmt.Errorf("lock %s: another process has the log open: %w", lock.Name(), err)
	}
	return &osDisk{dir: dir, lock: lock}, nil
}

func (d *osDisk) Names() ([]string, error) {
	entries, err := os.ReadDir(d.dir)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names, nil
}

func (d *osDisk) Create(name string) (file, error) {
	return open(filepath.Join(d.dir, name), os.O_RDWR|os.O_CREATE|os.O_EXCL)
}

func (d *osDisk) Open(name string) (file, error) {
	return open(filepath.Join(d.dir, name), os.O_RDWR)
}

func open(path string, flags int) (file, error) {
	f, err := os.OpenFile(path, flags, 0o644)
	if err != nil {
		return nil, err
	}
	return &osFile{File: f}, nil
}

func (d *osDisk) Remove(name string) error { return os.Remove(filepath.Join(d.dir, name)) }
func (d *osDisk) Sync() error              { return durable.SyncDir("", d.dir) }
func (d *osDisk) Close() error             { return d.lock.Close() }

// osFile is a file of the system. What is written to it in blocks does not go
// through the page cache, if the file system has such a way.
type osFile struct {
	*os.File
	block  int64 // 0: not asked for yet
	direct interface {
		io.WriterAt
		io.Closer
	} // the same file; nil: everything goes through the page cache
}

func (f *osFile) Block() int64 {
	if f.block == 0 {
		f.block = 1
		if d, err := openDirect(f.Name()); err == nil {
			f.block, f.direct = directBlock, d
		}
	}
	return f.block
}

func (f *osFile) WriteAt(b []byte, at int64) (int, error) {
	if f.direct != nil && at%directBlock == 0 && len(b)%directBlock == 0 {
		n, err := f.direct.WriteAt(b, at)
		if !errors.Is(err, syscall.EINVAL) {
			return n, err
		}
		// It could be opened so, but not written: then as everybody does.
		if err := f.direct.Close(); err != nil {
			return n, err
		}
		f.direct = nil
	}
	return f.File.WriteAt(b, at)
}

func (f *osFile) Close() error {
	err := f.File.Close()
	if f.direct != nil {
		err = errors.Join(err, f.direct.Close())
	}
	return err
}

func (f *osFile) Size() (int64, error) {
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

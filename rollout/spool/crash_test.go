package spool

import (
	"errors"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"syscall"
)

// memDisk is a directory in memory that knows what is durable and can fail. It
// is the disk of tests that crash: crash keeps what was synced, and of the rest
// what the generator says.
type memDisk struct {
	mu      sync.Mutex
	files   map[string]*memFile // as the process sees it
	durable map[string]*memFile // names whose entry was synced
	room    int                 // bytes that may still be written; -1: no limit
	fail    func(op string) error
	syncs   int
	block   int64 // in which logs are written; 0: 1
}

type memFile struct {
	d      *memDisk
	now    []byte
	synced []byte
	writes []memWrite // since the last sync
}

// memWrite is a write that has not been synced; data nil is a truncation to at.
type memWrite struct {
	at   int64
	data []byte
}

func newMemDisk() *memDisk {
	return &memDisk{files: map[string]*memFile{}, durable: map[string]*memFile{}, room: -1, fail: func(string) error { return nil }}
}

func (d *memDisk) Names() ([]string, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Collect(maps.Keys(d.files)), nil
}

func (d *memDisk) Create(name string) (file, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.fail("create"); err != nil {
		return nil, err
	}
	if d.files[name] != nil {
		return nil, fs.ErrExist
	}
	d.files[name] = &memFile{d: d}
	return d.files[name], nil
}

func (d *memDisk) Open(name string) (file, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.files[name] == nil {
		return nil, fs.ErrNotExist
	}
	return d.files[name], nil
}

func (d *memDisk) Remove(name string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.fail("remove"); err != nil {
		return err
	}
	if d.files[name] == nil {
		return fs.ErrNotExist
	}
	delete(d.files, name)
	return nil
}

func (d *memDisk) Sync() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.fail("syncdir"); err != nil {
		return err
	}
	d.durable = maps.Clone(d.files)
	return nil
}

func (d *memDisk) Close() error { return nil }

// crash is the disk after a power cut: entries of the directory that were not
// synced may be there or not, and of the unsynced writes of a file any subset,
// the last of them cut anywhere, has reached the platter.
func (d *memDisk) crash(r *rand.Rand) *memDisk {
	d.mu.Lock()
	defer d.mu.Unlock()
	after := newMemDisk()
	after.block = d.block
	for name := range d.files {
		if d.durable[name] != d.files[name] && r.IntN(2) == 0 {
			continue
		}
		after.files[name] = d.files[name].survive(after, r)
	}
	for name, f := range d.durable {
		if d.files[name] == nil && r.IntN(2) == 0 { // a removal that was not synced
			after.files[name] = f.survive(after, r)
		}
	}
	after.durable = maps.Clone(after.files)
	return after
}

func (f *memFile) survive(d *memDisk, r *rand.Rand) *memFile {
	b := slices.Clone(f.synced)
	for _, w := range f.writes {
		if r.IntN(3) == 0 {
			continue
		}
		if w.data != nil && r.IntN(3) == 0 {
			w.data = w.data[:r.IntN(len(w.data)+1)]
		}
		b = w.apply(b)
	}
	return &memFile{d: d, now: b, synced: slices.Clone(b)}
}

func (w memWrite) apply(b []byte) []byte {
	if w.data == nil {
		return append(b[:min(int64(len(b)), w.at)], make([]byte, max(0, w.at-int64(len(b))))...)
	}
	if n := w.at + int64(len(w.data)) - int64(len(b)); n > 0 {
		b = append(b, make([]byte, n)...)
	}
	copy(b[w.at:], w.data)
	return b
}

func (f *memFile) ReadAt(p []byte, at int64) (int, error) {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	if at > int64(len(f.now)) {
		return 0, io.EOF
	}
	n := copy(p, f.now[at:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (f *memFile) WriteAt(p []byte, at int64) (int, error) {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	err := f.d.fail("write")
	if f.d.room >= 0 && len(p) > f.d.room { // a short write, as of a full disk
		p, err = p[:f.d.room], syscall.ENOSPC
	} else if err != nil {
		p = p[:len(p)/2]
	}
	if f.d.room >= 0 {
		f.d.room -= len(p)
	}
	w := memWrite{at, append([]byte{}, p...)}
	f.writes = append(f.writes, w)
	f.now = w.apply(f.now)
	return len(p), err
}

func (f *memFile) Truncate(size int64) error {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	if err := f.d.fail("truncate"); err != nil {
		return err
	}
	w := memWrite{at: size}
	f.writes = append(f.writes, w)
	f.now = w.apply(f.now)
	return nil
}

func (f *memFile) Sync() error {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	if err := f.d.fail("sync"); err != nil {
		return err
	}
	f.d.syncs++
	f.synced, f.writes = slices.Clone(f.now), nil
	return nil
}

func (f *memFile) Size() (int64, error) {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	return int64(len(f.now)), nil
}

func (f *memFile) Block() int64 { return max(f.d.block, 1) }

func (f *memFile) Close() error { return nil }

var errDisk = errors.New("the disk says no")

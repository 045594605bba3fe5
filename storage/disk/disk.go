package disk

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"

	"trainerd/internal/crashpoint"
	"trainerd/internal/durable"
	"trainerd/internal/fault"
	"trainerd/storage"
)

// Names under the root that no key can have (storage.CheckKey refuses them).
const (
	tempDir  = storage.Reserved + "/tmp"
	etagDir  = storage.Reserved + "/etag"
	lockName = storage.Reserved + "/lock"
)

// Store is a storage.Blob over one directory. Several stores, in one process or
// in several, may share it.
type Store struct {
	dir    string
	root   *os.Root // holds every name inside the directory, symbolic links included
	turn   chan struct{}
	direct func(f *os.File, on bool) error // setDirect
}

var _ storage.Blob = (*Store)(nil)

// Open makes the directory if it is missing and removes the temporary files of
// processes that are gone.
func Open(dir string) (*Store, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, fault.New(fault.Invalid, "bad_directory", "open store %s: %w", dir, err)
	}
	s := &Store{dir: abs, turn: make(chan struct{}, 1), direct: setDirect}
	if err := durable.MkdirAll("store.dir_name", abs, 0o755); err != nil {
		return nil, s.fault("open", "", err)
	}
	if s.root, err = os.OpenRoot(abs); err != nil {
		return nil, s.fault("open", "", err)
	}
	for _, d := range []string{tempDir, etagDir} {
		if err := s.root.MkdirAll(d, 0o755); err != nil {
			s.root.Close()
			return nil, s.fault("open", "", err)
		}
	}
	if err := s.sweep(); err != nil {
		s.root.Close()
		return nil, s.fault("open", "", err)
	}
	return s, nil
}

// Close releases the directory. Readers that are open stay usable.
func (s *Store) Close() error { return s.root.Close() }

// Settle makes durable what keys under a prefix are there, and the directories on
// the way to it: a process that was killed may have left some that a power cut
// could still take back, with everything that is put into them later.
func (s *Store) Settle(prefix string) error {
	dir := strings.TrimSuffix(prefix, "/")
	if err := storage.CheckKey(dir); err != nil {
		return err
	}
	for at := path.Dir(dir); ; at = path.Dir(at) {
		if err := s.syncDir("store.settled", at); err != nil && !missing(err) {
			return s.fault("settle", prefix, err)
		}
		if at == "." {
			break
		}
	}
	if err := durable.SyncTree("store.settled", filepath.Join(s.dir, filepath.FromSlash(dir))); err != nil {
		return s.fault("settle", prefix, err)
	}
	return nil
}

// Dir is the store's directory as an absolute path.
func (s *Store) Dir() string { return s.dir }

// Path is the file of a key, for readers on this machine that take a path.
func (s *Store) Path(key string) (string, error) {
	if err := storage.CheckKey(key); err != nil {
		return "", err
	}
	return filepath.Join(s.dir, filepath.FromSlash(key)), nil
}

// fault names operation, key and directory, and says who can mend it.
func (s *Store) fault(op, key string, err error) error {
	switch {
	case errors.Is(err, storage.ErrNotFound), errors.Is(err, storage.ErrPrecondition):
		return err
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return fault.New(fault.Unavailable, "cancelled", "%s %q in %s: %w", op, key, s.dir, err)
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return fault.New(fault.Unavailable, "disk_full", "%s %q in %s: %w", op, key, s.dir, err)
	}
	if f, ok := fault.As(err); ok {
		return fault.New(f.Kind, f.Code, "%s %q in %s: %w", op, key, s.dir, err)
	}
	return fault.New(fault.Unavailable, "disk_io", "%s %q in %s: %w", op, key, s.dir, err)
}

// missing reports errors that mean: no file of this name.
func missing(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR)
}

// Put implements storage.Blob: a temporary file, synced, then renamed under the
// root's lock, then the directory synced.
func (s *Store) Put(ctx context.Context, key string, r io.Reader, size int64, c storage.Condition) (storage.Info, error) {
	if err := errors.Join(storage.CheckKey(key), c.Check()); err != nil {
		return storage.Info{}, err
	}
	info, err := s.put(ctx, key, storage.Source(ctx, r, size), c)
	if err != nil {
		return storage.Info{}, s.fault("put", key, err)
	}
	return info, nil
}

func (s *Store) put(ctx context.Context, key string, r io.Reader, c storage.Condition) (storage.Info, error) {
	if err := ctx.Err(); err != nil {
		return storage.Info{}, err
	}
	// Ahead of the upload: a condition that fails already need not read the source.
	if err := s.holds(key, c); err != nil {
		return storage.Info{}, err
	}
	temp, name, err := s.createTemp()
	if err != nil {
		return storage.Info{}, err
	}
	defer temp.Close()
	defer s.root.Remove(name) // of no effect once it is renamed
	etag, err := s.fill(temp, r)
	if err != nil {
		return storage.Info{}, err
	}
	crashpoint.Reach("store.copied")
	if err := crashpoint.Sync("store.file", temp); err != nil {
		return storage.Info{}, err
	}
	st, err := temp.Stat()
	if err != nil {
		return storage.Info{}, err
	}
	unlock, err := s.lock(ctx)
	if err != nil {
		return storage.Info{}, err
	}
	defer unlock()
	if err := s.holds(key, c); err != nil {
		return storage.Info{}, err
	}
	if err := s.makeDirs(path.Dir(key)); err != nil {
		return storage.Info{}, err
	}
	// The digest first: it counts only for a file of this inode, size and time,
	// which the rename keeps, so that a crash between the two is harmless.
	if s.remember(key, st, etag) != nil {
		if err := s.forget(key); err != nil {
			return storage.Info{}, err
		}
	}
	crashpoint.Reach("store.before_rename")
	if err := s.root.Rename(name, key); err != nil {
		return storage.Info{}, clash(key, err)
	}
	crashpoint.Reach("store.renamed")
	if err := s.syncDir("store.file_name", path.Dir(key)); err != nil {
		return storage.Info{}, err
	}
	return storage.Info{Key: key, Size: st.Size(), ETag: etag, Modified: st.ModTime()}, nil
}

// fill copies r to a file and returns the SHA-256 in hex, which r may have taken already.
func (s *Store) fill(f *os.File, r io.Reader) (digest string, err error) {
	out := newWriter(f, s.direct)
	defer out.release()
	if d, ok := r.(storage.Digested); ok {
		if _, err := d.WriteTo(out); err != nil {
			return "", err
		}
		return d.Digest(), out.finish()
	}
	sum := sha256.New()
	if _, err := io.CopyBuffer(io.MultiWriter(out, sum), r, make([]byte, 256<<10)); err != nil {
		return "", err
	}
	return hex.EncodeToString(sum.Sum(nil)), out.finish()
}

// clash explains the errors of a key that continues another one or is continued by one.
func clash(key string, err error) error {
	for _, e := range []error{syscall.ENOTDIR, syscall.EISDIR, syscall.EEXIST, syscall.ENOTEMPTY} {
		if errors.Is(err, e) {
			return fault.New(fault.Conflict, "key_clash", "key is a directory of other keys or lies inside one: %w", err)
		}
	}
	return err
}

// holds returns ErrPrecondition when c does not hold now.
func (s *Store) holds(key string, c storage.Condition) error {
	if !c.IfAbsent && c.IfMatch == "" {
		return nil
	}
	info, err := s.stat(key)
	switch {
	case err != nil && !errors.Is(err, storage.ErrNotFound):
		return err
	case c.IfAbsent && err != nil, c.IfMatch != "" && err == nil && info.ETag == c.IfMatch:
		return nil
	}
	return storage.Precondition("put", key)
}

// makeDirs makes a directory and its parents and syncs where each name went.
func (s *Store) makeDirs(dir string) error {
	if dir == "." {
		return nil
	}
	err := s.root.Mkdir(dir, 0o755)
	switch {
	case errors.Is(err, fs.ErrExist):
		if st, serr := s.root.Stat(dir); serr == nil && !st.IsDir() {
			return clash(dir, syscall.ENOTDIR)
		}
		return nil
	case errors.Is(err, fs.ErrNotExist):
		if err := s.makeDirs(path.Dir(dir)); err != nil {
			return err
		}
		if err := s.root.Mkdir(dir, 0o755); err != nil {
			return clash(dir, err)
		}
	case err != nil:
		return clash(dir, err)
	}
	crashpoint.Reach("store.dir_made")
	return s.syncDir("store.dir_name", path.Dir(dir))
}

// syncDir syncs a directory; name is of crashpoint.Sync.
func (s *Store) syncDir(name, dir string) error {
	d, err := s.root.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return crashpoint.Sync(name, d)
}

// open opens the regular file of a key; ErrNotFound for anything else.
func (s *Store) open(op, key string) (*os.File, fs.FileInfo, error) {
	// Non-blocking, so that a pipe put there by someone cannot hang the store.
	f, err := s.root.OpenFile(key, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if missing(err) {
		return nil, nil, storage.NotFound(op, key)
	}
	if err != nil {
		return nil, nil, err
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = storage.NotFound(op, key)
	}
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	return f, st, nil
}

func (s *Store) stat(key string) (storage.Info, error) {
	f, st, err := s.open("stat", key)
	if err != nil {
		return storage.Info{}, err
	}
	defer f.Close()
	return s.info(key, f, st)
}

func (s *Store) info(key string, f *os.File, st fs.FileInfo) (storage.Info, error) {
	etag, err := s.etag(key, f, st)
	return storage.Info{Key: key, Size: st.Size(), ETag: etag, Modified: st.ModTime()}, err
}

// Stat implements storage.Blob.
func (s *Store) Stat(ctx context.Context, key string) (storage.Info, error) {
	if err := storage.CheckKey(key); err != nil {
		return storage.Info{}, err
	}
	if err := ctx.Err(); err != nil {
		return storage.Info{}, s.fault("stat", key, err)
	}
	info, err := s.stat(key)
	if err != nil {
		return storage.Info{}, s.fault("stat", key, err)
	}
	return info, nil
}

// Get implements storage.Blob. The reader holds the file that was there: a
// later Put or Delete does not touch it.
func (s *Store) Get(ctx context.Context, key string, off, n int64) (io.ReadCloser, storage.Info, error) {
	if err := storage.CheckKey(key); err != nil {
		return nil, storage.Info{}, err
	}
	if err := ctx.Err(); err != nil {
		return nil, storage.Info{}, s.fault("get", key, err)
	}
	f, st, err := s.open("get", key)
	if err != nil {
		return nil, storage.Info{}, s.fault("get", key, err)
	}
	info, err := s.info(key, f, st)
	if err == nil {
		n, err = storage.CheckRange(key, st.Size(), off, n)
	}
	if err != nil {
		f.Close()
		return nil, storage.Info{}, s.fault("get", key, err)
	}
	return &reader{s: s, ctx: ctx, key: key, r: io.NewSectionReader(f, off, n), f: f}, info, nil
}

// reader reads a range of an open file until its context ends.
type reader struct {
	s   *Store
	ctx context.Context // the Get's own, as Blob.Get says
	key string
	r   *io.SectionReader
	f   *os.File
}

func (r *reader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, r.s.fault("read", r.key, err)
	}
	n, err := r.r.Read(p)
	if err != nil && err != io.EOF {
		err = r.s.fault("read", r.key, err)
	}
	return n, err
}

func (r *reader) Close() error { return r.f.Close() }

// Delete implements storage.Blob. Directories that become empty go as well.
func (s *Store) Delete(ctx context.Context, key string) error {
	if err := storage.CheckKey(key); err != nil {
		return err
	}
	unlock, err := s.lock(ctx)
	if err != nil {
		return s.fault("delete", key, err)
	}
	defer unlock()
	st, err := s.root.Lstat(key)
	if missing(err) || err == nil && st.IsDir() {
		return nil
	}
	if err == nil {
		err = s.root.Remove(key)
	}
	if err == nil {
		err = s.forget(key)
	}
	dir := path.Dir(key)
	for err == nil && s.prune(dir) {
		dir = path.Dir(dir)
	}
	if err == nil {
		err = s.syncDir("store.removed_name", dir)
	}
	if err != nil {
		return s.fault("delete", key, err)
	}
	return nil
}

// prune removes an empty directory; false for the root, a link and one with entries.
func (s *Store) prune(dir string) bool {
	if dir == "." {
		return false
	}
	st, err := s.root.Lstat(dir)
	return err == nil && st.IsDir() && s.root.Remove(dir) == nil
}

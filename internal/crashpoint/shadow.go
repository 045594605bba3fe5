//go:build crashpoints

package crashpoint

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

// Shadow is a directory that keeps, beside the real one, what of it is durable:
//
//	files/INODE  content of a file at its last fsync
//	dirs/INODE   JSON of a directory's entries at its last fsync
//
// It is written after each sync that succeeded. A process that is killed between
// the two has told nobody of the sync, so that the image is one that a power cut
// a moment earlier might have left.
//
// The database syncs itself, in the middle of a transaction: its file is copied
// when the transaction has returned (see Transact).
type Shadow struct {
	dir string
	mu  sync.Mutex
}

// entry is a name of a directory.
type entry struct {
	Inode string // unique although numbers are used again: with the time of birth
	Dir   bool
}

// OpenShadow makes or opens the image in dir.
func OpenShadow(dir string) *Shadow {
	check(os.MkdirAll(filepath.Join(dir, "files"), 0o755))
	check(os.MkdirAll(filepath.Join(dir, "dirs"), 0o755))
	return &Shadow{dir: dir}
}

// Durable records the file or directory at path as it is now.
func (s *Shadow) Durable(path string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.durable(path)
}

func (s *Shadow) durable(path string) {
	e, err := look(path)
	check(err)
	if !e.Dir {
		data, err := os.ReadFile(path)
		check(err)
		s.put("files", e.Inode, data)
		return
	}
	names, err := list(path)
	check(err)
	data, err := json.Marshal(names)
	check(err)
	s.put("dirs", e.Inode, data)
}

// put writes by renaming, so that a kill leaves the old image or the new one.
func (s *Shadow) put(kind, inode string, data []byte) {
	to := filepath.Join(s.dir, kind, inode)
	check(os.WriteFile(to+".new", data, 0o644))
	check(os.Rename(to+".new", to))
}

// look identifies what is at path.
func look(path string) (entry, error) {
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_INO|unix.STATX_TYPE|unix.STATX_BTIME, &st)
	if err != nil {
		return entry{}, &fs.PathError{Op: "statx", Path: path, Err: err}
	}
	return entry{fmt.Sprintf("%d-%d.%09d", st.Ino, st.Btime.Sec, st.Btime.Nsec), st.Mode&unix.S_IFMT == unix.S_IFDIR}, nil
}

func list(dir string) (map[string]entry, error) {
	found, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	out := map[string]entry{}
	for _, f := range found {
		e, err := look(filepath.Join(dir, f.Name()))
		if errors.Is(err, fs.ErrNotExist) { // gone meanwhile
			continue
		}
		if err != nil {
			return nil, err
		}
		out[f.Name()] = e
	}
	return out, nil
}

// PowerCut makes of root what a power cut might leave of it, and returns how
// many files and names lost something. No process may use root meanwhile. What
// was synced stays; of the rest r decides: a name that was added, replaced or
// removed may be as before or as now, and each sector of a file that was not
// synced too. databases are files whose pages only their own header makes valid.
func (s *Shadow) PowerCut(root string, r *rand.Rand, databases ...string) (lost int, err error) {
	after := root + ".after"
	c := cut{s: s, r: r, databases: databases, contents: map[string][]byte{}}
	if err := c.index(root); err != nil {
		return 0, err
	}
	self, err := look(root)
	if err != nil {
		return 0, err
	}
	if err := c.dir(self, after); err != nil {
		return 0, err
	}
	if err := errors.Join(os.RemoveAll(root), os.RemoveAll(s.dir), os.Rename(after, root)); err != nil {
		return 0, err
	}
	OpenShadow(s.dir)
	return c.lost, s.All(root)
}

// All records a whole tree as durable.
func (s *Shadow) All(root string) error {
	return filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err == nil {
			s.Durable(path)
		}
		return err
	})
}

// cut is a power cut under way.
type cut struct {
	s         *Shadow
	r         *rand.Rand
	databases []string
	contents  map[string][]byte // of files as the dead process saw them, by inode
	dirs      map[string]map[string]entry
	lost      int
}

// index reads the tree as the dead process saw it.
func (c *cut) index(root string) error {
	c.dirs = map[string]map[string]entry{}
	return filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		e, err := look(path)
		if err != nil {
			return err
		}
		if e.Dir {
			c.dirs[e.Inode], err = list(path)
			return err
		}
		c.contents[e.Inode], err = os.ReadFile(path)
		return err
	})
}

// dir writes what is left of a directory to path.
func (c *cut) dir(self entry, path string) error {
	if err := os.MkdirAll(path, 0o755); err != nil {
		return err
	}
	now, was := c.dirs[self.Inode], map[string]entry{}
	if data, err := os.ReadFile(filepath.Join(c.s.dir, "dirs", self.Inode)); err == nil {
		if err := json.Unmarshal(data, &was); err != nil {
			return err
		}
	}
	names := slices.Collect(maps.Keys(now))
	for name := range was {
		if _, ok := now[name]; !ok {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	for _, name := range names {
		e, there := now[name]
		if old, had := was[name]; (old != e || had != there) && c.r.IntN(2) == 0 {
			e, there = old, had
			c.lost++
		}
		if !there {
			continue
		}
		to := filepath.Join(path, name)
		if e.Dir {
			if err := c.dir(e, to); err != nil {
				return err
			}
		} else if err := os.WriteFile(to, c.file(e, slices.Contains(c.databases, name)), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// sector is what a disk writes whole.
const sector = 512

// file returns what is left of a file's content.
func (c *cut) file(e entry, database bool) []byte {
	was, err := os.ReadFile(filepath.Join(c.s.dir, "files", e.Inode))
	now, there := c.contents[e.Inode]
	if !there { // removed, and the removal was lost: nothing was written since it was synced
		return was
	}
	if err == nil && bytes.Equal(was, now) {
		return now
	}
	c.lost++
	if c.r.IntN(4) == 0 {
		return now
	}
	if database || c.r.IntN(2) == 0 {
		return was
	}
	size := []int{len(was), len(now), min(len(was), len(now)) + c.r.IntN(max(len(was), len(now))-min(len(was), len(now))+1)}[c.r.IntN(3)]
	out := make([]byte, size)
	for at := 0; at < size; at += sector {
		from := was
		if c.r.IntN(2) == 0 {
			from = now
		}
		if at < len(from) {
			copy(out[at:min(at+sector, size)], from[at:min(at+sector, len(from))])
		}
	}
	return out
}

package disk

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"syscall"
)

// An ETag is the SHA-256 of the content. Small files are digested whenever it
// is asked for; for larger ones it is remembered in a file of its own beside,
// ".trainerd/etag/{sha256 of the key}", together with inode, size and time of
// the file that it was computed from. A remembered digest counts only while all
// three still agree, so it can be stale, torn or missing without harm: then the
// content is read again. That also is how files that were copied in get one.

// rememberFrom is the size in bytes from which a digest is remembered: about
// what is read as fast as a second small file is opened.
const rememberFrom = 256 << 10

// version identifies the content of a file that is never written in place.
func version(st fs.FileInfo) string {
	var ino uint64
	if sys, ok := st.Sys().(*syscall.Stat_t); ok {
		ino = uint64(sys.Ino)
	}
	return fmt.Sprintf("%d %d %d", ino, st.Size(), st.ModTime().UnixNano())
}

// links is the number of names a file has; 0 once it is removed.
func links(st fs.FileInfo) uint64 {
	if sys, ok := st.Sys().(*syscall.Stat_t); ok {
		return uint64(sys.Nlink)
	}
	return 1
}

func etagName(key string) string {
	sum := sha256.Sum256([]byte(key))
	return etagDir + "/" + hex.EncodeToString(sum[:])
}

// etag returns the digest of an open file. f's offset does not move.
func (s *Store) etag(key string, f *os.File, st fs.FileInfo) (string, error) {
	if st.Size() >= rememberFrom {
		if digest, ok := s.remembered(key, st); ok {
			return digest, nil
		}
	}
	sum := sha256.New()
	if _, err := io.Copy(sum, io.NewSectionReader(f, 0, st.Size())); err != nil {
		return "", err
	}
	digest := hex.EncodeToString(sum.Sum(nil))
	// What cannot be remembered (a read-only disk) is computed again next time.
	_ = s.remember(key, st, digest)
	return digest, nil
}

// remembered returns a digest only if it belongs to exactly this version of the file.
func (s *Store) remembered(key string, st fs.FileInfo) (string, bool) {
	data, err := s.root.ReadFile(etagName(key))
	if err != nil {
		return "", false
	}
	digest, rest, ok := strings.Cut(string(data), " ")
	return digest, ok && len(digest) == 2*sha256.Size && rest == version(st)+"\n"
}

// remember notes the digest of one version of a key's file. Without a sync: a
// note that a crash tears does not match.
func (s *Store) remember(key string, st fs.FileInfo, digest string) error {
	if st.Size() < rememberFrom {
		return nil
	}
	var b [12]byte
	rand.Read(b[:]) // never fails
	temp := tempDir + "/etag-" + hex.EncodeToString(b[:])
	if err := s.root.WriteFile(temp, []byte(digest+" "+version(st)+"\n"), 0o644); err != nil {
		return err
	}
	if err := s.root.Rename(temp, etagName(key)); err != nil {
		s.root.Remove(temp)
		return err
	}
	return nil
}

// forget removes what was noted for a key.
func (s *Store) forget(key string) error {
	if err := s.root.Remove(etagName(key)); err != nil && !missing(err) {
		return err
	}
	return nil
}

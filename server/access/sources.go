package access

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"trainerd/internal/fault"
	"trainerd/storage"
)

// Sources says which model sources a job may name. job: sources are checkpoints
// of this server and always pass: only those who may create jobs name them.
type Sources struct {
	roots   []root
	buckets map[string]bool
	any     bool
}

// root is a directory that models may lie below.
type root struct{ given, real string }

// AnySource allows every source: the server of one person on loopback.
func AnySource() *Sources { return &Sources{any: true} }

// NewSources allows what lies below the roots and in the buckets, and nothing
// else. A root must exist.
func NewSources(roots, buckets []string) (*Sources, error) {
	s := &Sources{buckets: map[string]bool{}}
	for _, dir := range roots {
		given, err := filepath.Abs(dir)
		if err != nil || dir == "" {
			return nil, fault.BadField("model_root", strconv.Quote(dir), "a directory")
		}
		real, err := filepath.EvalSymlinks(given)
		if err != nil {
			return nil, fmt.Errorf("model_root: %w", err)
		}
		if st, err := os.Stat(real); err != nil || !st.IsDir() {
			return nil, fault.BadField("model_root", strconv.Quote(dir), "a directory")
		}
		s.roots = append(s.roots, root{given, real})
	}
	for _, b := range buckets {
		at, err := storage.ParseURL("s3://" + b)
		if err != nil || at.Prefix != "" {
			return nil, fault.BadField("model_bucket", strconv.Quote(b), "the name of a bucket")
		}
		s.buckets[at.Bucket] = true
	}
	return s, nil
}

// Resolve returns a source as it may be opened: a directory without symbolic
// links. A refusal is the same whether or not what was named exists.
func (s *Sources) Resolve(source string) (string, error) {
	if s == nil || s.any {
		return source, nil
	}
	switch {
	case strings.HasPrefix(source, "dir:"):
		real, err := s.directory(strings.TrimPrefix(source, "dir:"))
		if err != nil {
			return "", err
		}
		return "dir:" + real, nil
	case strings.HasPrefix(source, "s3://"):
		at, err := storage.ParseURL(source)
		if err != nil || !s.buckets[at.Bucket] {
			return "", denied(source, "s3://BUCKET/PREFIX with a bucket that the server allows")
		}
	}
	return source, nil
}

// directory follows a path below a root to the directory that it means, and
// looks at what the directory holds: every file must be a plain one below a root.
func (s *Sources) directory(path string) (string, error) {
	refused := denied("dir:"+path, "a directory below one of the server's model roots")
	abs, err := filepath.Abs(path)
	if err != nil || path == "" || strings.ContainsRune(path, 0) || !s.below(abs) {
		return "", refused
	}
	real, err := filepath.EvalSymlinks(abs)
	if err != nil || !s.below(real) {
		return "", refused
	}
	entries, err := os.ReadDir(real)
	if err != nil {
		return "", refused
	}
	for _, entry := range entries {
		at, err := filepath.EvalSymlinks(filepath.Join(real, entry.Name()))
		if err != nil || !s.below(at) {
			return "", denied("dir:"+path+" with "+strconv.Quote(entry.Name()), "no link that leads out of the server's model roots")
		}
		st, err := os.Stat(at)
		if err != nil || !st.Mode().IsRegular() && st.Mode().Type() != fs.ModeDir {
			return "", denied("dir:"+path+" with "+strconv.Quote(entry.Name()), "plain files and directories")
		}
	}
	return real, nil
}

// below says whether a clean absolute path lies below a root or is one.
func (s *Sources) below(path string) bool {
	for _, r := range s.roots {
		for _, base := range []string{r.given, r.real} {
			if rel, err := filepath.Rel(base, path); err == nil && filepath.IsLocal(rel) {
				return true
			}
		}
	}
	return false
}

func denied(got, expected string) error {
	return &fault.Error{Kind: fault.Denied, Code: "source_not_allowed", Msg: "job document",
		Fields: []fault.Field{{Name: "model.source", Row: -1, Got: clip(strconv.Quote(got)), Expected: expected}}}
}

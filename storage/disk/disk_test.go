package disk

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"trainerd/internal/fault"
	"trainerd/storage"
	"trainerd/storage/storagetest"
)

func open(t *testing.T, dir string) *Store {
	t.Helper()
	s, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func TestSuite(t *testing.T) {
	storagetest.Run(t, storagetest.Config{
		Open:  func(t *testing.T) storage.Blob { return open(t, t.TempDir()) },
		Again: func(t *testing.T, b storage.Blob) storage.Blob { return open(t, b.(*Store).Dir()) },
	})
}

// tree lists the files under root, those of the store itself included.
func tree(t *testing.T, root string) []string {
	t.Helper()
	var all []string
	err := filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			rel, _ := filepath.Rel(root, path)
			all = append(all, rel)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// TestSweepOnOpen removes what killed processes left, and nothing of live ones.
func TestSweepOnOpen(t *testing.T) {
	dir := t.TempDir()
	first := open(t, dir)
	for _, name := range []string{"put-dead", "etag-dead"} {
		if err := os.WriteFile(filepath.Join(dir, tempDir, name), []byte("x"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	r, w := io.Pipe()
	done := make(chan error, 1)
	go func() {
		_, err := first.Put(t.Context(), "k", r, -1, storage.Condition{})
		done <- err
	}()
	w.Write([]byte("begun, ")) // returns when the temporary file is there
	open(t, dir)
	if got := tree(t, filepath.Join(dir, tempDir)); len(got) != 1 || got[0] == "put-dead" {
		t.Errorf("temporary files are %q, expected the live one only", got)
	}
	w.Write([]byte("ended"))
	w.Close()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if data, err := os.ReadFile(filepath.Join(dir, "k")); string(data) != "begun, ended" {
		t.Errorf("object is %q, %v", data, err)
	}
	if got := tree(t, filepath.Join(dir, tempDir)); len(got) != 0 {
		t.Errorf("put left %q", got)
	}
}

// TestETagRemembered proves by a planted digest that large files are not read
// again, and that any change of the file makes the memory worthless.
func TestETagRemembered(t *testing.T) {
	s := open(t, t.TempDir())
	path := filepath.Join(s.Dir(), "k")
	note := filepath.Join(s.Dir(), etagName("k"))
	etag := func() string {
		t.Helper()
		info, err := s.Stat(t.Context(), "k")
		if err != nil {
			t.Fatal(err)
		}
		return info.ETag
	}
	sum := func(data []byte) string { d := sha256.Sum256(data); return hex.EncodeToString(d[:]) }
	data := bytes.Repeat([]byte("x"), rememberFrom)
	if _, err := s.Put(t.Context(), "k", bytes.NewReader(data), -1, storage.Condition{}); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(note)
	if err != nil {
		t.Fatal(err)
	}
	planted := strings.Repeat("0", 64)
	if err := os.WriteFile(note, append([]byte(planted), text[64:]...), 0o644); err != nil {
		t.Fatal(err)
	}
	if got := etag(); got != planted {
		t.Errorf("ETag is %s: the content was read although a digest is remembered", got)
	}
	// Changed by another hand, the size the same.
	data[0] = 'y'
	if err := os.WriteFile(path, data, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(path, time.Time{}, time.Now().Add(time.Second)); err != nil {
		t.Fatal(err)
	}
	if got := etag(); got != sum(data) {
		t.Errorf("ETag is %s after a change, expected the content's", got)
	}
	for _, torn := range []string{"", "zz", planted, planted + " ", strings.Repeat("\x00", 100)} {
		if err := os.WriteFile(note, []byte(torn), 0o644); err != nil {
			t.Fatal(err)
		}
		if got := etag(); got != sum(data) {
			t.Errorf("ETag is %s with a torn note %q", got, torn)
		}
	}
	if err := s.Delete(t.Context(), "k"); err != nil {
		t.Fatal(err)
	}
	if got := tree(t, s.Dir()); len(got) != 1 || got[0] != lockName {
		t.Errorf("delete left %q", got)
	}
}

// TestLinksStayInside checks that a link out of the root is no way out.
func TestLinksStayInside(t *testing.T) {
	outside := t.TempDir()
	if err := os.WriteFile(filepath.Join(outside, "secret"), []byte("s"), 0o644); err != nil {
		t.Fatal(err)
	}
	s := open(t, t.TempDir())
	if err := os.Symlink(outside, filepath.Join(s.Dir(), "out")); err != nil {
		t.Fatal(err)
	}
	if r, _, err := s.Get(t.Context(), "out/secret", 0, -1); err == nil {
		r.Close()
		t.Error("read through a link out of the root")
	}
	if _, err := s.Put(t.Context(), "out/new", strings.NewReader("x"), 1, storage.Condition{}); err == nil {
		t.Error("wrote through a link out of the root")
	}
	if err := s.List(t.Context(), "", func(o storage.Info) error { t.Errorf("listed %s", o.Key); return nil }); err != nil {
		t.Error(err)
	}
	if got := tree(t, outside); len(got) != 1 {
		t.Errorf("outside holds %q", got)
	}
}

func TestKeyClash(t *testing.T) {
	s := open(t, t.TempDir())
	for _, key := range []string{"a", "b/c"} {
		if _, err := s.Put(t.Context(), key, strings.NewReader("x"), 1, storage.Condition{}); err != nil {
			t.Fatal(err)
		}
	}
	for _, key := range []string{"a/b", "a/b/c", "b"} {
		_, err := s.Put(t.Context(), key, strings.NewReader("x"), 1, storage.Condition{})
		if fault.KindOf(err) != fault.Conflict || !strings.Contains(err.Error(), key) {
			t.Errorf("put %q: %v, expected a conflict", key, err)
		}
	}
}

// TestLockHonoursContext waits behind another holder until the context ends.
func TestLockHonoursContext(t *testing.T) {
	s := open(t, t.TempDir())
	other := open(t, s.Dir())
	unlock, err := other.lock(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	if _, err := s.Put(ctx, "k", strings.NewReader("x"), 1, storage.Condition{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("put behind a lock: %v, expected %v", err, context.DeadlineExceeded)
	}
	unlock()
	if _, err := s.Put(t.Context(), "k", strings.NewReader("x"), 1, storage.Condition{IfAbsent: true}); err != nil {
		t.Errorf("put after the lock: %v", err)
	}
}

// TestFrozenV1 pulls the checkpoint that the first version wrote.
func TestFrozenV1(t *testing.T) {
	root := t.TempDir()
	if err := os.CopyFS(root, os.DirFS("../testdata/v1")); err != nil {
		t.Fatal(err)
	}
	c := storage.Checkpoints{Blob: open(t, root)}
	m, err := c.Latest(t.Context(), "demo")
	if err != nil || m.Step != 7 {
		t.Fatalf("latest is step %d, %v", m.Step, err)
	}
	dir := filepath.Join(t.TempDir(), "model")
	if err := c.Pull(t.Context(), m, "hf/", dir); err != nil {
		t.Fatal(err)
	}
	if data, err := os.ReadFile(filepath.Join(dir, "config.json")); string(data) != "{}" {
		t.Errorf("config.json is %q, %v", data, err)
	}
}

package disk

import (
	"testing"

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

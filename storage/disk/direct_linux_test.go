package disk

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"unsafe"

	"trainerd/storage"
)

// modes are how a file system may answer the wish to write directly.
var modes = map[string]func(f *os.File, on bool) error{
	"as it is":          setDirect,
	"invalid argument":  func(*os.File, bool) error { return syscall.EINVAL },
	"no such operation": func(*os.File, bool) error { return errors.ErrUnsupported },
}

// TestDirectKeepsBytes writes files of every kind of length in pieces of any
// length, in each mode, and compares what is on the disk.
func TestDirectKeepsBytes(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	data := make([]byte, 3*directChunk+directBlock+1)
	for i := range data {
		data[i] = byte(r.Uint32())
	}
	sizes := []int{0, 1, directBlock, directChunk - 1, directChunk, directChunk + 1, directChunk + directBlock, 2*directChunk + directBlock - 1, len(data)}
	for name, mode := range modes {
		t.Run(name, func(t *testing.T) {
			s := open(t, t.TempDir())
			s.direct = mode
			for _, size := range append(sizes, r.IntN(len(data))) {
				info, err := s.Put(t.Context(), "k", &pieces{data: data[:size], r: r}, int64(size), storage.Condition{})
				if err != nil {
					t.Fatal(err)
				}
				got, err := os.ReadFile(filepath.Join(s.Dir(), "k"))
				if err != nil {
					t.Fatal(err)
				}
				if info.Size != int64(size) || !bytes.Equal(got, data[:size]) {
					t.Errorf("%d bytes put: %d kept, equal %v", size, len(got), bytes.Equal(got, data[:size]))
				}
			}
		})
	}
}

// pieces reads data in runs of random length.
type pieces struct {
	data []byte
	r    *rand.Rand
}

func (p *pieces) Read(b []byte) (int, error) {
	if len(p.data) == 0 {
		return 0, io.EOF
	}
	n := copy(b, p.data[:min(len(p.data), 1+p.r.IntN(300_000))])
	p.data = p.data[n:]
	return n, nil
}

// TestDirectIsUsed holds the writer to the mode that the test's directory has,
// found out by opening a file in it, and to leaving it at the end.
func TestDirectIsUsed(t *testing.T) {
	dir := t.TempDir()
	probe, err := os.OpenFile(filepath.Join(dir, "probe"), os.O_CREATE|os.O_WRONLY|syscall.O_DIRECT, 0o644)
	can := err == nil
	if can {
		probe.Close()
	}
	f := create(t, dir)
	w := newWriter(f, setDirect)
	defer w.release()
	if _, err := w.Write(make([]byte, directChunk-1)); err != nil || w.now {
		t.Errorf("direct %v, %v before there is a chunk", w.now, err)
	}
	if _, err := w.Write(make([]byte, 2)); err != nil || w.now != can {
		t.Errorf("direct %v, %v after a chunk; the file system has it: %v", w.now, err, can)
	}
	if err := w.finish(); err != nil || w.now {
		t.Errorf("direct %v, %v at the end", w.now, err)
	}
	if _, err := f.WriteString("odd"); err != nil {
		t.Errorf("write an odd length after the end: %v", err)
	}
}

// TestDirectWriteRefused gives the kernel an address that no direct write may
// have: the chunk goes through the page cache then, and so does the rest.
func TestDirectWriteRefused(t *testing.T) {
	f := create(t, t.TempDir())
	w := newWriter(f, setDirect)
	defer w.release()
	aligned := w.chunk
	if at := uintptr(unsafe.Pointer(unsafe.SliceData(aligned))); at%directBlock != 0 || len(aligned) != directChunk {
		t.Fatalf("a chunk of %d bytes at %#x", len(aligned), at)
	}
	w.chunk = make([]byte, directChunk+1)[1:]
	data := bytes.Repeat([]byte("0123456"), directChunk/3)
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if w.now || !w.no {
		t.Errorf("direct %v, refused %v after a write that the kernel must refuse", w.now, w.no)
	}
	if err := w.finish(); err != nil {
		t.Fatal(err)
	}
	w.chunk = aligned
	if got, err := os.ReadFile(f.Name()); err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d bytes of %d, %v", len(got), len(data), err)
	}
}

// TestDirectFailure hands on what is neither of the two answers.
func TestDirectFailure(t *testing.T) {
	broken := errors.New("broken")
	s := open(t, t.TempDir())
	s.direct = func(*os.File, bool) error { return broken }
	if _, err := s.Put(t.Context(), "k", bytes.NewReader(make([]byte, directChunk)), -1, storage.Condition{}); !errors.Is(err, broken) {
		t.Errorf("%v, expected %v", err, broken)
	}
	if got := tree(t, s.Dir()); len(got) != 0 {
		t.Errorf("a failed put left %q", got)
	}
}

func create(t *testing.T, dir string) *os.File {
	t.Helper()
	f, err := os.CreateTemp(dir, "f")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

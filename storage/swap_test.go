package storage

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"trainerd/internal/fault"
)

// fill begins a swap into dir and writes one file and Pull's note.
func fill(t *testing.T, dir, text string) *swap {
	t.Helper()
	s, err := newSwap(dir)
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string]string{"f": text, PulledName: `{"job":"j"}`} {
		if err := os.WriteFile(filepath.Join(s.temp, name), []byte(data), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

func swapIn(t *testing.T, dir, text string) {
	t.Helper()
	s := fill(t, dir, text)
	defer s.close()
	if err := s.commit(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func check(t *testing.T, dir, text string, beside int) {
	t.Helper()
	if got, err := os.ReadFile(filepath.Join(dir, "f")); err != nil || string(got) != text {
		t.Errorf("directory holds %q (%v), expected %q", got, err, text)
	}
	if entries, _ := os.ReadDir(filepath.Dir(dir)); len(entries) != beside {
		t.Errorf("parent holds %v, expected %d entries", entries, beside)
	}
}

// TestSwap runs both ways of replacing, with and without the system's exchange.
func TestSwap(t *testing.T) {
	for name, how := range map[string]func(a, b string) error{
		"exchange": exchangeNames,
		"aside":    func(string, string) error { return errors.ErrUnsupported },
	} {
		t.Run(name, func(t *testing.T) {
			old := exchange
			exchange = how
			defer func() { exchange = old }()
			dir := filepath.Join(t.TempDir(), "a", "model")
			swapIn(t, dir, "one")
			check(t, dir, "one", 1)
			open, err := os.Open(filepath.Join(dir, "f"))
			if err != nil {
				t.Fatal(err)
			}
			defer open.Close()
			swapIn(t, dir, "two")
			check(t, dir, "two", 1)
			was := make([]byte, 3)
			if _, err := open.ReadAt(was, 0); err != nil || string(was) != "one" {
				t.Errorf("a reader of the old file sees %q, %v", was, err)
			}
			if st, err := os.Stat(dir); err != nil || st.Mode().Perm() != 0o755 {
				t.Errorf("mode is %v, %v", st.Mode(), err)
			}
		})
	}
}

func TestSwapSymlink(t *testing.T) {
	parent := t.TempDir()
	target := filepath.Join(t.TempDir(), "target")
	swapIn(t, target, "target")
	dir := filepath.Join(parent, "model")
	if err := os.Symlink(target, dir); err != nil {
		t.Fatal(err)
	}
	swapIn(t, dir, "new")
	check(t, dir, "new", 1)
	check(t, target, "target", 1)
}

// TestSwapLeftovers finds what a killed process left: its lock is gone with it.
func TestSwapLeftovers(t *testing.T) {
	parent := t.TempDir()
	dir := filepath.Join(parent, "model")
	swapIn(t, dir, "one")

	dead := fill(t, dir, "dead")
	dead.lock.Close()
	alive := fill(t, dir, "alive") // cleans what is dead
	if _, err := os.Stat(dead.temp); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a dead owner's directory is still there: %v", err)
	}
	swapIn(t, dir, "two") // leaves what is alive
	check(t, dir, "two", 2)
	if err := alive.commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	alive.close()
	check(t, dir, "alive", 1)

	// Killed between the two renames of the other way: the old one comes back.
	if err := os.Rename(dir, filepath.Join(parent, ".model.old-123")); err != nil {
		t.Fatal(err)
	}
	fill(t, dir, "unused").close()
	check(t, dir, "alive", 1)
	// Killed after them: the old one goes.
	if err := os.Mkdir(filepath.Join(parent, ".model.old-456"), 0o755); err != nil {
		t.Fatal(err)
	}
	fill(t, dir, "unused").close()
	check(t, dir, "alive", 1)
}

func TestSwapKeepsForeignFiles(t *testing.T) {
	parent := t.TempDir()
	dir := filepath.Join(parent, "home")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	fill(t, dir, "empty is fine").close()
	waiting := fill(t, dir, "new")
	defer waiting.close()
	if err := os.WriteFile(filepath.Join(dir, "f"), []byte("mine"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := newSwap(dir); fault.KindOf(err) != fault.Conflict {
		t.Errorf("begin: %v, expected a conflict", err)
	}
	if err := waiting.commit(t.Context()); fault.KindOf(err) != fault.Conflict {
		t.Errorf("commit: %v, expected a conflict", err)
	}
	check(t, dir, "mine", 2)
	if _, err := newSwap("/"); fault.KindOf(err) != fault.Invalid {
		t.Errorf("root: %v", err)
	}
	if err := os.WriteFile(filepath.Join(parent, "file"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := newSwap(filepath.Join(parent, "file")); err == nil {
		t.Error("a file was taken for a directory")
	}
}

package storagetest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"trainerd/internal/fault"
	"trainerd/storage"
)

// contents are the files of a test checkpoint; they differ from step to step.
func contents(step int64) map[string][]byte {
	return map[string][]byte{
		"hf/config.json":       fmt.Appendf(nil, `{"step": %d}`, step),
		"hf/model.safetensors": noise(uint64(step), 3000),
		"state/optimizer.bin":  noise(uint64(step)+1000, 2000),
	}
}

// write writes the files in order of their names.
func write(ctx context.Context, w *storage.Writer, files map[string][]byte) error {
	names := make([]string, 0, len(files))
	for name := range files {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		err := w.File(ctx, name, func(out io.Writer) error {
			_, err := io.Copy(out, stream{bytes.NewReader(files[name])})
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// commit writes one whole checkpoint.
func commit(ctx context.Context, c storage.Checkpoints, job string, step int64) (storage.Manifest, error) {
	w, err := c.Create(ctx, job, step)
	if err != nil {
		return storage.Manifest{}, err
	}
	if err := write(ctx, w, contents(step)); err != nil {
		return storage.Manifest{}, err
	}
	return w.Commit(ctx, storage.Manifest{Engine: "test"})
}

func mustCommit(t *testing.T, c storage.Checkpoints, job string, step int64) storage.Manifest {
	t.Helper()
	m, err := commit(t.Context(), c, job, step)
	if err != nil {
		t.Fatalf("commit step %d: %v", step, err)
	}
	return m
}

// whole checks that every byte a manifest promises is there.
func whole(t *testing.T, c storage.Checkpoints, m storage.Manifest) {
	t.Helper()
	want := contents(m.Step)
	if len(m.Files) != len(want) {
		t.Errorf("checkpoint %s has %d files, expected %d", m.Prefix, len(m.Files), len(want))
	}
	for _, f := range m.Files {
		r, err := c.Open(t.Context(), m, f.Name, 0, -1)
		if err != nil {
			t.Errorf("torn checkpoint: %v", err)
			continue
		}
		data, err := io.ReadAll(r)
		r.Close()
		sum := sha256.Sum256(data)
		if err != nil || !bytes.Equal(data, want[f.Name]) || hex.EncodeToString(sum[:]) != f.SHA256 || int64(len(data)) != f.Size {
			t.Errorf("torn checkpoint: file %s of %s differs (%v)", f.Name, m.Prefix, err)
		}
	}
}

// consistent checks everything that readers can find of a job and returns the latest step, -1 for none.
func consistent(t *testing.T, c storage.Checkpoints, job string) int64 {
	t.Helper()
	all, err := c.List(t.Context(), job)
	if err != nil {
		t.Errorf("list: %v", err)
	}
	for _, m := range all {
		whole(t, c, m)
		at, err := c.At(t.Context(), job, m.Step)
		if err != nil || at.Attempt < m.Attempt {
			t.Errorf("At(%d) is attempt %d, the list has %d (%v)", m.Step, at.Attempt, m.Attempt, err)
		}
	}
	latest, err := c.Latest(t.Context(), job)
	if errors.Is(err, storage.ErrNotFound) && len(all) == 0 {
		return -1
	}
	if err != nil {
		t.Errorf("latest: %v", err)
		return -1
	}
	whole(t, c, latest)
	return latest.Step
}

func testCheckpoint(t *testing.T, cfg Config) {
	c := storage.Checkpoints{Blob: cfg.Open(t)}
	ctx := t.Context()
	_, err := c.Latest(ctx, "job")
	cfg.wantFault(t, err, storage.ErrNotFound, fault.NotFound, "job")
	_, err = c.At(ctx, "job", 3)
	cfg.wantFault(t, err, storage.ErrNotFound, fault.NotFound, "job", "3")

	w, err := c.Create(ctx, "job", 3)
	if err != nil {
		t.Fatal(err)
	}
	if w.Prefix() != "jobs/job/checkpoints/00000003-0" {
		t.Errorf("prefix is %s", w.Prefix())
	}
	boom := errors.New("boom")
	err = w.File(ctx, "hf/config.json", func(out io.Writer) error { out.Write([]byte("half")); return boom })
	if !errors.Is(err, boom) || !strings.Contains(err.Error(), "hf/config.json") {
		t.Errorf("failing callback: %v", err)
	}
	if err := write(ctx, w, contents(3)); err != nil {
		t.Fatal(err)
	}
	err = w.File(ctx, "hf/config.json", func(io.Writer) error { return nil })
	cfg.wantFault(t, err, nil, fault.Conflict, "hf/config.json")
	for _, name := range []string{"", "../x", "/x", "hf/../x", "manifest.json", "claim.json", "hf//x"} {
		cfg.wantFault(t, w.File(ctx, name, func(io.Writer) error { return nil }), nil, fault.Invalid, "file")
	}
	if all, err := c.List(ctx, "job"); err != nil || len(all) != 0 {
		t.Errorf("a checkpoint without manifest shows: %v, %v", all, err)
	}
	m, err := w.Commit(ctx, storage.Manifest{Engine: "v1", Extra: map[string]any{"loss": 0.5}})
	if err != nil {
		t.Fatal(err)
	}
	if m.Created.IsZero() || time.Since(m.Created) > time.Hour || !m.Snapshot || m.Bytes("hf/") != int64(len(`{"step": 3}`)+3000) {
		t.Errorf("manifest is %+v", m)
	}
	again, err := w.Commit(ctx, storage.Manifest{})
	if err != nil || !cmp.Equal(again, m) {
		t.Errorf("second Commit: %v, %s", err, cmp.Diff(m, again))
	}
	cfg.wantFault(t, w.File(ctx, "late", func(io.Writer) error { return nil }), nil, fault.Conflict, "late")
	cfg.wantFault(t, w.Abort(ctx), nil, fault.Conflict, "abort")
	for name, read := range map[string]func() (storage.Manifest, error){
		"Latest": func() (storage.Manifest, error) { return c.Latest(ctx, "job") },
		"At":     func() (storage.Manifest, error) { return c.At(ctx, "job", 3) },
		"List": func() (storage.Manifest, error) {
			all, err := c.List(ctx, "job")
			return append(all, storage.Manifest{})[0], err
		},
	} {
		if got, err := read(); err != nil || !cmp.Equal(got, m) {
			t.Errorf("%s: %v %s", name, err, cmp.Diff(m, got))
		}
	}
	whole(t, c, m)
	r, err := c.Open(ctx, m, "hf/model.safetensors", 100, 50)
	if err != nil {
		t.Fatal(err)
	}
	if part, err := io.ReadAll(r); err != nil || !bytes.Equal(part, contents(3)["hf/model.safetensors"][100:150]) {
		t.Errorf("range of a file differs: %v", err)
	}
	r.Close()
	_, err = c.Open(ctx, m, "hf/none", 0, -1)
	cfg.wantFault(t, err, storage.ErrNotFound, fault.NotFound, "hf/none")
	_, err = c.Open(ctx, m, "hf/config.json", 1000, -1)
	cfg.wantFault(t, err, nil, fault.Invalid, "hf/config.json")

	// An aborted attempt keeps its number.
	w, err = c.Create(ctx, "job", 3)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(write(ctx, w, contents(3)), w.Abort(ctx)); err != nil {
		t.Fatal(err)
	}
	_, err = w.Commit(ctx, storage.Manifest{})
	cfg.wantFault(t, err, nil, fault.Conflict, "aborted")
	if got := keys(t, c.Blob, w.Prefix()); !slices.Equal(got, []string{w.Prefix() + "/claim.json"}) {
		t.Errorf("abort left %q", got)
	}
	if m = mustCommit(t, c, "job", 3); m.Attempt != 2 {
		t.Errorf("attempt after 0 and an aborted 1 is %d", m.Attempt)
	}
	if got, err := c.At(ctx, "job", 3); err != nil || got.Attempt != 2 {
		t.Errorf("At is attempt %d (%v), expected the newest, 2", got.Attempt, err)
	}
	for _, job := range []string{"", ".", "..", "a/b", "-\x00", strings.Repeat("j", 129)} {
		_, err := c.Create(ctx, job, 1)
		cfg.wantFault(t, err, nil, fault.Invalid, "job")
		_, err = c.Latest(ctx, job)
		cfg.wantFault(t, err, nil, fault.Invalid, "job")
	}
	_, err = c.Create(ctx, "job", -1)
	cfg.wantFault(t, err, nil, fault.Invalid, "step")
}

func testLatest(t *testing.T, cfg Config) {
	b := cfg.Open(t)
	c := storage.Checkpoints{Blob: b}
	ctx := t.Context()
	m := map[int64]storage.Manifest{}
	for _, step := range []int64{1, 2, 5, 3, 4} {
		m[step] = mustCommit(t, c, "job", step)
	}
	is := func(why string, want int64) {
		t.Helper()
		if got, err := c.Latest(ctx, "job"); err != nil || got.Step != want {
			t.Errorf("%s: latest is step %d (%v), expected %d", why, got.Step, err, want)
		}
	}
	is("older steps committed after it", 5)
	all, err := c.List(ctx, "job")
	if err != nil {
		t.Fatal(err)
	}
	var steps []int64
	for _, m := range all {
		steps = append(steps, m.Step)
	}
	if !slices.Equal(steps, []int64{1, 2, 3, 4, 5}) {
		t.Errorf("list is %v", steps)
	}
	if err := c.Promote(ctx, m[2]); err != nil {
		t.Error(err)
	}
	is("promotion of an old one", 5)
	if err := b.Delete(ctx, "jobs/job/latest.json"); err != nil {
		t.Fatal(err)
	}
	is("latest.json is missing", 5)
	if err := c.Promote(ctx, m[4]); err != nil {
		t.Error(err)
	}
	is("latest.json was written anew by an older one", 5)
	put(t, b, "jobs/job/latest.json", []byte(`{"step": 99, torn`))
	is("latest.json is damaged", 5)
	if err := c.Promote(ctx, m[1]); err != nil { // must not let a damaged pointer go backwards
		t.Error(err)
	}
	is("latest.json is mended", 5)
	put(t, b, "jobs/job/latest.json", bytes.Repeat([]byte(" "), 1<<20))
	is("latest.json is far too large", 5)
	mustCommit(t, c, "job", 6)
	is("latest.json is mended by a commit", 6)
	if err := b.Delete(ctx, "jobs/job/checkpoints/00000006-0/manifest.json"); err != nil {
		t.Fatal(err)
	}
	is("latest.json names a checkpoint without manifest", 5)
	mustCommit(t, c, "job", 7)
	is("and a newer one", 7)

	// A manifest that is not the one that was committed.
	data, _ := get(t, b, "jobs/job/checkpoints/00000007-0/manifest.json")
	put(t, b, "jobs/job/checkpoints/00000007-0/manifest.json", bytes.Replace(data, []byte(`"test"`), []byte(`"tesT"`), 1))
	_, err = c.Latest(ctx, "job")
	cfg.wantFault(t, err, nil, fault.Internal, "00000007-0", "sha256")
	put(t, b, "jobs/job/checkpoints/00000003-0/manifest.json", []byte("{}"))
	all, err = c.List(ctx, "job")
	cfg.wantFault(t, err, nil, fault.Internal, "00000003-0")
	if len(all) != 5 { // 1, 2, 4, 5, 7
		t.Errorf("one damaged manifest leaves %d of 5 in the list", len(all))
	}
}

// testCommitters lets two handles commit many steps at once while readers watch.
// The job's first checkpoint is committed before: from then on latest never goes back.
func testCommitters(t *testing.T, cfg Config) {
	var cs []storage.Checkpoints
	for _, b := range handles(t, cfg) {
		cs = append(cs, storage.Checkpoints{Blob: b})
	}
	const steps = 12
	order := rand.Perm(steps)
	for i := range order {
		order[i]++
	}
	t.Logf("order of steps: 0, then %v", order)
	if _, err := commit(t.Context(), cs[0], "job", 0); err != nil {
		t.Fatal(err)
	}
	var stop atomic.Bool
	var watchers sync.WaitGroup
	for _, c := range cs {
		watchers.Go(func() {
			seen := int64(-1)
			for !stop.Load() {
				m, err := c.Latest(t.Context(), "job")
				if errors.Is(err, storage.ErrNotFound) {
					continue
				}
				if err != nil {
					t.Errorf("latest: %v", err)
					return
				}
				if m.Step < seen {
					t.Errorf("latest went from step %d back to %d", seen, m.Step)
				}
				seen = m.Step
			}
		})
	}
	parallel(t, 4, steps, func(i int) error {
		_, err := commit(t.Context(), cs[i%2], "job", int64(order[i]))
		return err
	})
	stop.Store(true)
	watchers.Wait()
	if got := consistent(t, cs[0], "job"); got != steps {
		t.Errorf("latest is step %d, expected %d", got, steps)
	}

	// Several writers of one step get prefixes of their own.
	var mu sync.Mutex
	var attempts []int
	parallel(t, 4, 4, func(i int) error {
		m, err := commit(t.Context(), cs[i%2], "same", 1)
		mu.Lock()
		defer mu.Unlock()
		attempts = append(attempts, m.Attempt)
		return err
	})
	slices.Sort(attempts)
	if !slices.Equal(attempts, []int{0, 1, 2, 3}) {
		t.Errorf("attempts of four concurrent writers are %v", attempts)
	}
	if m, err := cs[0].Latest(t.Context(), "same"); err != nil || m.Attempt != 3 {
		t.Errorf("latest is attempt %d (%v), expected 3", m.Attempt, err)
	}
}

// testCrash dies after every number of operations of a commit, of a delete and
// of a sweep. Whatever is left, readers see only whole checkpoints, the next
// writer gets a prefix of its own, and a sweep removes the strays.
func testCrash(t *testing.T, cfg Config) {
	b := cfg.Open(t)
	c := storage.Checkpoints{Blob: b}
	ctx := t.Context()
	for _, lost := range []bool{false, true} {
		died := true
		for k := 0; died; k++ {
			job := fmt.Sprintf("job-%v-%d", lost, k)
			if k > 100 {
				t.Fatal("a commit never ends")
			}
			mustCommit(t, c, job, 1)
			d := &Dying{Blob: b, Live: k, Lost: lost}
			w, err := storage.Checkpoints{Blob: d}.Create(ctx, job, 2)
			written := false
			if err == nil {
				if err = write(ctx, w, contents(2)); err == nil {
					written = true
					_, err = w.Commit(ctx, storage.Manifest{Engine: "test"})
				}
			}
			died = d.Died()
			if died != (err != nil) {
				t.Fatalf("%s: died %v, but the error is %v", job, died, err)
			}
			if step := consistent(t, c, job); step != 1 && step != 2 || !died && step != 2 {
				t.Errorf("%s: latest is step %d", job, step)
			}
			if written && k%2 == 0 {
				// The store comes back and the same writer goes on, whatever it was told.
				d.Revive()
				if _, err := w.Commit(ctx, storage.Manifest{}); err != nil {
					t.Errorf("%s: repeated commit: %v", job, err)
				}
				if step := consistent(t, c, job); step != 2 {
					t.Errorf("%s: latest is step %d after the commit was repeated", job, step)
				}
				continue
			}
			// Another process takes over, with a prefix that no stray can spoil.
			before := keys(t, b, "jobs/"+job+"/")
			m := mustCommit(t, c, job, 2)
			if slices.ContainsFunc(before, func(key string) bool { return strings.HasPrefix(key, m.Prefix+"/") }) {
				t.Errorf("%s: prefix %s was used before", job, m.Prefix)
			}
			if latest, err := c.Latest(ctx, job); err != nil || latest.Prefix != m.Prefix {
				t.Errorf("%s: latest is %s (%v), expected %s", job, latest.Prefix, err, m.Prefix)
			}
		}
	}
}

func testPull(t *testing.T, cfg Config) {
	b := cfg.Open(t)
	c := storage.Checkpoints{Blob: b}
	ctx := t.Context()
	one, two := mustCommit(t, c, "job", 1), mustCommit(t, c, "job", 2)
	parent := t.TempDir()
	dir := filepath.Join(parent, "model")

	holds := func(why string, step int64, prefix string) {
		t.Helper()
		want := map[string]string{}
		for name, data := range contents(step) {
			if rest, ok := strings.CutPrefix(name, prefix); ok {
				want[rest] = string(data)
			}
		}
		got := map[string]string{}
		err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
			if err != nil || d.IsDir() || d.Name() == storage.PulledName {
				return err
			}
			data, err := os.ReadFile(path)
			rel, _ := filepath.Rel(dir, path)
			got[filepath.ToSlash(rel)] = string(data)
			return err
		})
		if err != nil || !cmp.Equal(want, got) {
			t.Errorf("%s: %v %s", why, err, cmp.Diff(want, got))
		}
		if p, err := storage.ReadPulled(dir); err != nil || p.Step != step || p.Files != prefix {
			t.Errorf("%s: note says %+v (%v)", why, p, err)
		}
		if entries, _ := os.ReadDir(parent); len(entries) != 1 {
			t.Errorf("%s: pull left something beside the directory: %v", why, entries)
		}
	}
	if err := c.Pull(ctx, one, "hf/", dir); err != nil {
		t.Fatal(err)
	}
	holds("first pull", 1, "hf/")
	if err := c.Pull(ctx, two, "hf/", dir); err != nil {
		t.Fatal(err)
	}
	holds("second pull", 2, "hf/")

	cfg.wantFault(t, c.Pull(ctx, one, "hf", dir), nil, fault.Invalid, "prefix")
	cfg.wantFault(t, c.Pull(ctx, one, "none/", dir), storage.ErrNotFound, fault.NotFound, "none/")
	evil := one
	evil.Files = slices.Clone(one.Files)
	evil.Files[0].Name = "hf/../../../evil"
	cfg.wantFault(t, c.Pull(ctx, evil, "hf/", dir), nil, fault.Invalid, "files[0]")

	// Damage of every sort: the error names the file and the directory stays.
	name := "hf/model.safetensors"
	data := contents(1)[name]
	for _, test := range []struct {
		name   string
		damage func()
		says   string
	}{
		{"one bit", func() { bad := bytes.Clone(data); bad[1500] ^= 1; put(t, b, one.Prefix+"/"+name, bad) }, "sha256"},
		{"shorter", func() { put(t, b, one.Prefix+"/"+name, data[:2999]) }, "size"},
		{"longer", func() { put(t, b, one.Prefix+"/"+name, append(bytes.Clone(data), 0)) }, "size"},
		{"missing", func() {
			if err := b.Delete(ctx, one.Prefix+"/"+name); err != nil {
				t.Fatal(err)
			}
		}, "missing"},
	} {
		test.damage()
		cfg.wantFault(t, c.Pull(ctx, one, "hf/", dir), nil, fault.Internal, name, test.says)
		holds(test.name, 2, "hf/")
	}
	put(t, b, one.Prefix+"/"+name, data)
	gone, cancel := context.WithCancel(ctx)
	cancel()
	if err := c.Pull(gone, one, "hf/", dir); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled pull: %v", err)
	}
	holds("cancelled", 2, "hf/")
	if err := c.Pull(ctx, one, "", dir); err != nil {
		t.Fatal(err)
	}
	holds("all files", 1, "")
}

func testRetention(t *testing.T, cfg Config) {
	b := cfg.Open(t)
	c := storage.Checkpoints{Blob: b}
	ctx := t.Context()
	one := mustCommit(t, c, "job", 1)
	two := mustCommit(t, c, "job", 2)
	cfg.wantFault(t, c.Delete(ctx, two), nil, fault.Conflict, "latest")
	if err := c.Delete(ctx, one); err != nil {
		t.Fatal(err)
	}
	if got := keys(t, b, one.Prefix+"/"); !slices.Equal(got, []string{one.Prefix + "/claim.json"}) {
		t.Errorf("delete left %q", got)
	}
	if err := c.Delete(ctx, one); err != nil {
		t.Errorf("second delete: %v", err)
	}
	if m := mustCommit(t, c, "job", 1); m.Attempt != 1 {
		t.Errorf("a deleted checkpoint's prefix was used again: attempt %d", m.Attempt)
	}

	// A sweep takes what has no manifest and is old, and beats its writer.
	w, err := c.Create(ctx, "job", 3)
	if err != nil {
		t.Fatal(err)
	}
	if err := write(ctx, w, contents(3)); err != nil {
		t.Fatal(err)
	}
	if swept, err := c.Sweep(ctx, "job", time.Hour); err != nil || len(swept) != 0 {
		t.Errorf("young files were swept: %q, %v", swept, err)
	}
	swept, err := c.Sweep(ctx, "job", -time.Hour)
	if err != nil || !slices.Equal(swept, []string{w.Prefix()}) {
		t.Errorf("swept %q (%v), expected %s", swept, err, w.Prefix())
	}
	if got := keys(t, b, w.Prefix()+"/"); !slices.Equal(got, []string{w.Prefix() + "/claim.json"}) {
		t.Errorf("sweep left %q", got)
	}
	_, err = w.Commit(ctx, storage.Manifest{})
	cfg.wantFault(t, err, storage.ErrPrecondition, fault.Conflict, "swept")
	if step := consistent(t, c, "job"); step != 2 {
		t.Errorf("latest is step %d", step)
	}
	if swept, err := c.Sweep(ctx, "job", -time.Hour); err != nil || len(swept) != 0 {
		t.Errorf("second sweep: %q, %v", swept, err)
	}

	// Dying inside Delete and Sweep.
	for _, lost := range []bool{false, true} {
		died := true
		for k := 0; died; k++ {
			if k > 100 {
				t.Fatal("a delete never ends")
			}
			job := fmt.Sprintf("dying-%v-%d", lost, k)
			victim := mustCommit(t, c, job, 1)
			mustCommit(t, c, job, 2)
			d := &Dying{Blob: b, Live: k, Lost: lost}
			if err := (storage.Checkpoints{Blob: d}).Delete(ctx, victim); (err != nil) != d.Died() {
				t.Fatalf("%s: delete: %v", job, err)
			}
			died = d.Died()
			if step := consistent(t, c, job); step != 2 {
				t.Errorf("%s: latest is step %d", job, step)
			}
			d = &Dying{Blob: b, Live: k, Lost: lost}
			if _, err := (storage.Checkpoints{Blob: d}).Sweep(ctx, job, -time.Hour); (err != nil) != d.Died() {
				t.Fatalf("%s: sweep: %v", job, err)
			}
			died = died || d.Died()
			if step := consistent(t, c, job); step != 2 {
				t.Errorf("%s: latest is step %d after the sweep", job, step)
			}
			if _, err := c.Sweep(ctx, job, -time.Hour); err != nil {
				t.Error(err)
			}
			all, err := c.List(ctx, job)
			if err != nil {
				t.Error(err)
			}
			for _, key := range keys(t, b, "jobs/"+job+"/checkpoints/") {
				prefix := key[:strings.LastIndex(key, "-")+2]
				kept := slices.ContainsFunc(all, func(m storage.Manifest) bool { return m.Prefix == prefix })
				if !kept && !strings.HasSuffix(key, "/claim.json") {
					t.Errorf("%s: stray %s", job, key)
				}
			}
		}
	}
}

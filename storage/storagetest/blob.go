package storagetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"trainerd/internal/fault"
	"trainerd/storage"
)

// Config says how a backend is tested.
type Config struct {
	// Open returns an empty store; clean-up is its own.
	Open func(t *testing.T) storage.Blob
	// Again opens a second, independent handle of the same store, as another
	// process would. The races run over both.
	Again func(t *testing.T, b storage.Blob) storage.Blob
	// Secrets may not occur in any error text.
	Secrets []string
}

// Run runs the whole suite.
func Run(t *testing.T, c Config) {
	for _, test := range []struct {
		name string
		run  func(*testing.T, Config)
	}{
		{"RoundTrip", testRoundTrip},
		{"Missing", testMissing},
		{"Keys", testKeys},
		{"Ranges", testRanges},
		{"Conditions", testConditions},
		{"BadSource", testBadSource},
		{"List", testList},
		{"ListMany", testListMany},
		{"Large", testLarge},
		{"Cancelled", testCancelled},
		{"Overwrite", testOverwrite},
		{"RaceIfAbsent", testRaceIfAbsent},
		{"RaceIfMatch", testRaceIfMatch},
		{"Checkpoint", testCheckpoint},
		{"CheckpointLatest", testLatest},
		{"CheckpointRaces", testCommitters},
		{"CheckpointCrash", testCrash},
		{"CheckpointPull", testPull},
		{"CheckpointRetention", testRetention},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(t, c) })
	}
}

// noise is n bytes that follow from seed.
func noise(seed uint64, n int) []byte {
	src := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16)})
	data := make([]byte, n)
	src.Read(data)
	return data
}

// stream hides everything of a reader but Read, and cuts it into odd pieces.
type stream struct{ r io.Reader }

func (s stream) Read(p []byte) (int, error) { return s.r.Read(p[:min(len(p), 70001)]) }

func put(t *testing.T, b storage.Blob, key string, data []byte) storage.Info {
	t.Helper()
	info, err := b.Put(t.Context(), key, bytes.NewReader(data), int64(len(data)), storage.Condition{})
	if err != nil {
		t.Fatalf("put %q: %v", key, err)
	}
	return info
}

func get(t *testing.T, b storage.Blob, key string) ([]byte, storage.Info) {
	t.Helper()
	r, info, err := b.Get(t.Context(), key, 0, -1)
	if err != nil {
		t.Fatalf("get %q: %v", key, err)
	}
	defer r.Close()
	data, err := io.ReadAll(r)
	if err != nil {
		t.Fatalf("read %q: %v", key, err)
	}
	return data, info
}

func keys(t *testing.T, b storage.Blob, prefix string) []string {
	t.Helper()
	var all []string
	if err := b.List(t.Context(), prefix, func(o storage.Info) error { all = append(all, o.Key); return nil }); err != nil {
		t.Fatalf("list %q: %v", prefix, err)
	}
	return all
}

// wantFault checks that err is the sentinel (nil: any), has the kind, names what
// it must and no secret.
func (c Config) wantFault(t *testing.T, err, sentinel error, kind fault.Kind, names ...string) {
	t.Helper()
	if err == nil || sentinel != nil && !errors.Is(err, sentinel) {
		t.Errorf("got error %v, expected %v", err, sentinel)
		return
	}
	if got := fault.KindOf(err); got != kind {
		t.Errorf("error %v is of kind %v, expected %v", err, got, kind)
	}
	for _, name := range names {
		if !strings.Contains(err.Error(), name) {
			t.Errorf("error %q does not name %q", err, name)
		}
	}
	for _, secret := range c.Secrets {
		if strings.Contains(err.Error(), secret) {
			t.Errorf("error %q holds a secret", err)
		}
	}
}

func testRoundTrip(t *testing.T, c Config) {
	b := c.Open(t)
	for _, n := range []int{0, 1, 4096, 300_000} {
		key := fmt.Sprintf("a/%d", n)
		data := noise(uint64(n), n)
		wrote, err := b.Put(t.Context(), key, stream{bytes.NewReader(data)}, []int64{-1, int64(n)}[n%2], storage.Condition{})
		if err != nil {
			t.Fatal(err)
		}
		got, info := get(t, b, key)
		if !bytes.Equal(got, data) {
			t.Errorf("%d bytes: content differs", n)
		}
		stat, err := b.Stat(t.Context(), key)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(stat, info); diff != "" {
			t.Errorf("%d bytes: Stat and Get differ: %s", n, diff)
		}
		if wrote.Key != key || wrote.Size != int64(n) || wrote.ETag == "" || wrote.ETag != stat.ETag || stat.Size != int64(n) {
			t.Errorf("%d bytes: Put said %+v, Stat %+v", n, wrote, stat)
		}
		if age := time.Since(stat.Modified); age < -time.Minute || age > time.Hour {
			t.Errorf("modified %v ago", age)
		}
	}
	first := put(t, b, "k", noise(1, 500_000))
	second := put(t, b, "k", noise(2, 500_000))
	if first.ETag == second.ETag {
		t.Error("ETag did not change with the content")
	}
	for range 2 { // the second time it is gone already
		if err := b.Delete(t.Context(), "k"); err != nil {
			t.Errorf("delete: %v", err)
		}
	}
	put(t, b, "k/below", nil) // the key is free again, also as a directory
}

func testMissing(t *testing.T, c Config) {
	b := c.Open(t)
	put(t, b, "dir/file", []byte("x"))
	for _, key := range []string{"none", "dir", "dir/none", "dir/file/none", "no/such/dir"} {
		_, err := b.Stat(t.Context(), key)
		c.wantFault(t, err, storage.ErrNotFound, fault.NotFound, key)
		_, _, err = b.Get(t.Context(), key, 0, -1)
		c.wantFault(t, err, storage.ErrNotFound, fault.NotFound, key)
		_, _, err = b.Get(t.Context(), key, 3, 4)
		c.wantFault(t, err, storage.ErrNotFound, fault.NotFound, key)
		_, _, err = b.Get(t.Context(), key, 0, 0)
		c.wantFault(t, err, storage.ErrNotFound, fault.NotFound, key)
		if err := b.Delete(t.Context(), key); err != nil {
			t.Errorf("delete of missing %q: %v", key, err)
		}
	}
	if data, _ := get(t, b, "dir/file"); string(data) != "x" {
		t.Errorf("neighbour is %q", data)
	}
}

func testKeys(t *testing.T, c Config) {
	b := c.Open(t)
	good := []string{"a b", "a+b%20c", "ünï/cødé/日本語", "q?x=1&y=#z", "-dash", ".hidden/.x", "semi;colon:at@", `quote"'` + "`", "tilde~/..x/x..", "*[a]?", "{}<>|^$!(),=", strings.Repeat("k", 255) + "/" + strings.Repeat("l", 255), "manifest.json"}
	for i, key := range good {
		put(t, b, key, []byte{byte(i)})
	}
	for i, key := range good {
		if data, info := get(t, b, key); !bytes.Equal(data, []byte{byte(i)}) || info.Key != key {
			t.Errorf("key %q: got %v of %q", key, data, info.Key)
		}
	}
	slices.Sort(good)
	if diff := cmp.Diff(good, keys(t, b, "")); diff != "" {
		t.Errorf("list: %s", diff)
	}
	bad := []string{"", "/a", "a/", "a//b", ".", "..", "../a", "a/../b", "a/./b", "a/..", "a\x00b", "a\nb", `a\b`, "a\xffb", strings.Repeat("x", 256), strings.Repeat("x/", 500) + "x", storage.Reserved + "/tmp/x", storage.Reserved}
	for _, key := range bad {
		_, err := b.Put(t.Context(), key, strings.NewReader("x"), 1, storage.Condition{})
		c.wantFault(t, err, nil, fault.Invalid, "key")
		_, _, err = b.Get(t.Context(), key, 0, -1)
		c.wantFault(t, err, nil, fault.Invalid, "key")
		_, err = b.Stat(t.Context(), key)
		c.wantFault(t, err, nil, fault.Invalid, "key")
		c.wantFault(t, b.Delete(t.Context(), key), nil, fault.Invalid, "key")
	}
	if got := keys(t, b, ""); len(got) != len(good) {
		t.Errorf("bad keys left something: %q", got)
	}
}

func testRanges(t *testing.T, c Config) {
	b := c.Open(t)
	data := noise(7, 1000)
	put(t, b, "k", data)
	put(t, b, "empty", nil)
	for _, r := range []struct{ off, n, want int64 }{
		{0, -1, 1000}, {0, 0, 0}, {0, 1, 1}, {1, 10, 10}, {990, 10, 10}, {990, 11, 10}, {990, 1 << 40, 10},
		{999, -1, 1}, {1000, -1, 0}, {1000, 0, 0}, {1000, 5, 0}, {500, 0, 0}, {17, -1, 983},
	} {
		rc, info, err := b.Get(t.Context(), "k", r.off, r.n)
		if err != nil {
			t.Errorf("range %d+%d: %v", r.off, r.n, err)
			continue
		}
		got, err := io.ReadAll(rc)
		rc.Close()
		if err != nil || !bytes.Equal(got, data[r.off:r.off+r.want]) {
			t.Errorf("range %d+%d: got %d bytes, expected %d (%v)", r.off, r.n, len(got), r.want, err)
		}
		if info.Size != 1000 || info.ETag == "" {
			t.Errorf("range %d+%d: info is %+v, expected that of the whole object", r.off, r.n, info)
		}
	}
	for _, r := range []struct{ off, n int64 }{{1001, -1}, {1001, 0}, {1001, 4}, {-1, -1}, {-5, 2}, {1 << 50, 1}} {
		_, _, err := b.Get(t.Context(), "k", r.off, r.n)
		c.wantFault(t, err, nil, fault.Invalid, "k", "offset")
	}
	if rc, info, err := b.Get(t.Context(), "empty", 0, -1); err != nil || info.Size != 0 {
		t.Errorf("empty object: %+v, %v", info, err)
	} else {
		rc.Close()
	}
}

func testConditions(t *testing.T, c Config) {
	b := c.Open(t)
	ctx := t.Context()
	attempt := func(key, data string, cond storage.Condition) (storage.Info, error) {
		return b.Put(ctx, key, strings.NewReader(data), int64(len(data)), cond)
	}
	_, err := attempt("k", "x", storage.Condition{IfMatch: "d41d8cd98f00b204e9800998ecf8427e"})
	c.wantFault(t, err, storage.ErrPrecondition, fault.Conflict, "k")
	one, err := attempt("k", "one", storage.Condition{IfAbsent: true})
	if err != nil {
		t.Fatal(err)
	}
	_, err = attempt("k", "lost", storage.Condition{IfAbsent: true})
	c.wantFault(t, err, storage.ErrPrecondition, fault.Conflict, "k")
	two, err := attempt("k", "two", storage.Condition{IfMatch: one.ETag})
	if err != nil {
		t.Fatal(err)
	}
	_, err = attempt("k", "lost", storage.Condition{IfMatch: one.ETag})
	c.wantFault(t, err, storage.ErrPrecondition, fault.Conflict, "k")
	_, err = attempt("k", "lost", storage.Condition{IfMatch: two.ETag, IfAbsent: true})
	c.wantFault(t, err, nil, fault.Invalid, "condition")
	if data, info := get(t, b, "k"); string(data) != "two" || info.ETag != two.ETag {
		t.Errorf("object is %q %+v, expected the second write %+v", data, info, two)
	}
	if err := b.Delete(ctx, "k"); err != nil {
		t.Fatal(err)
	}
	_, err = attempt("k", "lost", storage.Condition{IfMatch: two.ETag})
	c.wantFault(t, err, storage.ErrPrecondition, fault.Conflict, "k")
	if _, err = attempt("k", "three", storage.Condition{IfAbsent: true}); err != nil {
		t.Errorf("create after delete: %v", err)
	}
}

// failing yields data and then err.
type failing struct {
	data io.Reader
	err  error
}

func (f failing) Read(p []byte) (int, error) {
	n, err := f.data.Read(p)
	if err == io.EOF {
		err = f.err
	}
	return n, err
}

func testBadSource(t *testing.T, c Config) {
	b := c.Open(t)
	old := put(t, b, "k", []byte("old"))
	boom := errors.New("boom")
	for _, n := range []int{0, 10, 17 << 20} { // the last one begins a multipart upload
		data := noise(3, n)
		for _, test := range []struct {
			name string
			end  error // what the source returns after data and more
			more string
			size int64
		}{
			{"error", boom, "", -1},
			{"unexpected EOF", io.ErrUnexpectedEOF, "", -1},
			{"wrapped EOF", fmt.Errorf("x: %w", io.EOF), "", -1},
			{"too short", io.EOF, "", int64(n) + 1},
			{"too long", io.EOF, "y", int64(n)},
		} {
			source := func() io.Reader {
				return failing{io.MultiReader(bytes.NewReader(data), strings.NewReader(test.more)), test.end}
			}
			_, err := b.Put(t.Context(), "k", source(), test.size, storage.Condition{})
			c.wantFault(t, err, nil, fault.KindOf(err), "k")
			if test.name == "error" && !errors.Is(err, boom) {
				t.Errorf("source's error is lost: %v", err)
			}
			_, err = b.Put(t.Context(), "new", source(), test.size, storage.Condition{})
			if err == nil {
				t.Errorf("%s after %d bytes: no error", test.name, n)
			}
		}
	}
	if data, info := get(t, b, "k"); string(data) != "old" || info.ETag != old.ETag {
		t.Errorf("failed uploads left %d bytes instead of the old object", len(data))
	}
	if got := keys(t, b, ""); !slices.Equal(got, []string{"k"}) {
		t.Errorf("failed uploads left objects: %q", got)
	}
}

func testList(t *testing.T, c Config) {
	b := c.Open(t)
	// Byte order of whole keys differs from the order of a directory walk here.
	all := []string{"a-b", "a.b", "a/b", "a/c/d", "a0", "ab", "b", "job-1/x", "job/x", "job0"}
	for _, i := range rand.Perm(len(all)) {
		put(t, b, all[i], []byte(all[i]))
	}
	for prefix, want := range map[string][]string{
		"": all, "a": {"a-b", "a.b", "a/b", "a/c/d", "a0", "ab"}, "a/": {"a/b", "a/c/d"}, "a/c": {"a/c/d"},
		"a/c/d": {"a/c/d"}, "a/c/d/": nil, "job": {"job-1/x", "job/x", "job0"}, "job/": {"job/x"}, "zz": nil, "no/such/": nil,
	} {
		if diff := cmp.Diff(want, keys(t, b, prefix)); diff != "" {
			t.Errorf("prefix %q: %s", prefix, diff)
		}
	}
	err := b.List(t.Context(), "", func(o storage.Info) error {
		stat, err := b.Stat(t.Context(), o.Key)
		if err != nil || o.Size != stat.Size || o.ETag != stat.ETag || o.Modified.Sub(stat.Modified).Abs() >= time.Second {
			t.Errorf("listed %+v, Stat says %+v (%v)", o, stat, err)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	stop, seen := errors.New("stop"), 0
	err = b.List(t.Context(), "a", func(storage.Info) error {
		if seen++; seen == 2 {
			return stop
		}
		return nil
	})
	if err != stop || seen != 2 {
		t.Errorf("stopped listing returned %v after %d keys, expected the callback's error after 2", err, seen)
	}
}

// testListMany needs more keys than one page of S3 holds.
func testListMany(t *testing.T, c Config) {
	b := c.Open(t)
	const n = 1003
	var want []string
	for i := range n {
		want = append(want, fmt.Sprintf("many/%04d", i))
	}
	parallel(t, 8, n, func(i int) error {
		_, err := b.Put(t.Context(), want[i], strings.NewReader("x"), 1, storage.Condition{})
		return err
	})
	if diff := cmp.Diff(want, keys(t, b, "many/")); diff != "" {
		t.Error(diff)
	}
}

func testLarge(t *testing.T, c Config) {
	b := c.Open(t)
	const part = 16 << 20
	for _, test := range []struct {
		name string
		n    int
		size int64 // as told to Put
	}{
		{"one part exactly, size unknown", part, -1},
		{"one part exactly", part, part},
		{"one byte more", part + 1, -1},
		{"three parts", 2*part + 12345, 2*part + 12345},
	} {
		data := noise(uint64(test.n), test.n)
		wrote, err := b.Put(t.Context(), "large", stream{bytes.NewReader(data)}, test.size, storage.Condition{})
		if err != nil {
			t.Fatalf("%s: %v", test.name, err)
		}
		got, info := get(t, b, "large")
		if !bytes.Equal(got, data) || info.ETag != wrote.ETag || info.Size != int64(test.n) {
			t.Errorf("%s: content or info differs", test.name)
		}
		// Conditions hold for multipart uploads too.
		for _, cond := range []storage.Condition{{IfAbsent: true}, {IfMatch: "d41d8cd98f00b204e9800998ecf8427e"}} {
			_, err = b.Put(t.Context(), "large", bytes.NewReader(data), -1, cond)
			c.wantFault(t, err, storage.ErrPrecondition, fault.Conflict, "large")
		}
		if _, err = b.Put(t.Context(), "large", bytes.NewReader(data[1:]), -1, storage.Condition{IfMatch: wrote.ETag}); err != nil {
			t.Errorf("%s: IfMatch that holds: %v", test.name, err)
		}
		r, _, err := b.Get(t.Context(), "large", int64(test.n)-101, -1)
		if err != nil {
			t.Fatal(err)
		}
		if tail, err := io.ReadAll(r); err != nil || !bytes.Equal(tail, data[test.n-100:]) {
			t.Errorf("%s: tail differs (%v)", test.name, err)
		}
		r.Close()
	}
}

func testCancelled(t *testing.T, c Config) {
	b := c.Open(t)
	data := noise(5, 4<<20)
	put(t, b, "k", data)
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := b.Put(gone, "k", strings.NewReader("new"), 3, storage.Condition{})
	c.wantFault(t, err, context.Canceled, fault.Unavailable, "k")
	_, err = b.Put(gone, "k", strings.NewReader("new"), 3, storage.Condition{IfMatch: "x"})
	c.wantFault(t, err, context.Canceled, fault.Unavailable, "k")
	_, _, err = b.Get(gone, "k", 0, -1)
	c.wantFault(t, err, context.Canceled, fault.Unavailable, "k")
	_, err = b.Stat(gone, "k")
	c.wantFault(t, err, context.Canceled, fault.Unavailable, "k")
	c.wantFault(t, b.Delete(gone, "k"), context.Canceled, fault.Unavailable, "k")
	c.wantFault(t, b.List(gone, "", func(storage.Info) error { return nil }), context.Canceled, fault.Unavailable)

	// In the middle of an upload: the source cancels after some bytes.
	for _, n := range []int{100, 40 << 20} {
		ctx, cancel := context.WithCancel(t.Context())
		r := io.MultiReader(bytes.NewReader(noise(6, n)), funcReader(func([]byte) (int, error) { cancel(); return 1, nil }))
		_, err = b.Put(ctx, "k", r, -1, storage.Condition{})
		c.wantFault(t, err, context.Canceled, fault.Unavailable, "k")
	}
	// In the middle of a download.
	ctx, cancel := context.WithCancel(t.Context())
	r, _, err := b.Get(ctx, "k", 0, -1)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(r, make([]byte, 1000)); err != nil {
		t.Fatal(err)
	}
	cancel()
	if _, err = io.Copy(io.Discard, r); !errors.Is(err, context.Canceled) {
		t.Errorf("reading after cancel: %v, expected %v", err, context.Canceled)
	}
	r.Close()
	// In the middle of a listing.
	put(t, b, "l", nil)
	ctx, cancel = context.WithCancel(t.Context())
	defer cancel()
	err = b.List(ctx, "", func(storage.Info) error { cancel(); return nil })
	c.wantFault(t, err, context.Canceled, fault.Unavailable)
	if got, _ := get(t, b, "k"); !bytes.Equal(got, data) {
		t.Error("a cancelled call changed the object")
	}
}

type funcReader func([]byte) (int, error)

func (f funcReader) Read(p []byte) (int, error) { return f(p) }

package trainer

import (
	"bytes"
	"encoding/hex"
	"errors"
	"flag"
	"hash/crc32"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"trainerd/internal/checked"
	"trainerd/internal/fault"
	"trainerd/rollout"
	"trainerd/rollout/spool"
	"trainerd/storage"
)

var update = flag.Bool("update", false, "write testdata of a format that is not published yet")

// sampleQueue is a queue with something of everything.
func sampleQueue(t testing.TB) *queueState {
	t.Helper()
	asm := rollout.NewAssembler(rollout.AssemblerOptions{GroupSize: 2, MaxPolicyLag: -1})
	row := func(group, id string) rollout.Rollout {
		return rollout.Rollout{GroupID: group, ID: id, Prompt: []int32{1, 2}, Completion: []int32{3, 4}, Reward: 0.5, PolicyStep: 1}
	}
	b := &rollout.Batch{HasReward: true, Received: time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC),
		Rollouts: []rollout.Rollout{row("a", "1"), row("a", "2"), row("b", "3"), row("b", "4"), row("open", "5")}}
	if _, err := asm.Add(2, b); err != nil {
		t.Fatal(err)
	}
	if _, stale := asm.Take(1, 1); len(stale) > 0 {
		t.Fatal(stale)
	}
	if err := asm.Mark([]string{"a"}, rollout.State{Status: rollout.Trained, Step: 4}); err != nil {
		t.Fatal(err)
	}
	digest := func(c string) string { return strings.Repeat(c, 32) }
	const id = JobID("job-0123456789abcdef")
	return &queueState{job: id, step: 4, entered: 3, queue: asm.Snapshot(), keys: []keyed{
		{"first", accepted{digest("0a"), Receipt{Job: id, Batch: 2, Rows: 5, Duplicates: 1, GroupsCompleted: 2, GroupsOpen: 1, PolicyStep: 3, Step: 4}}},
		{"second", accepted{digest("ff"), Receipt{Job: id, Batch: 3, PolicyStep: -1}}},
	}}
}

func encodedQueue(t testing.TB, q *queueState) []byte {
	t.Helper()
	var out bytes.Buffer
	if err := q.encode(&out); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// testdata/v1 is read for ever.
func TestFrozenQueue(t *testing.T) {
	path := filepath.Join("testdata", "v1", "queue.bin")
	want := sampleQueue(t)
	if *update {
		if err := os.WriteFile(path, encodedQueue(t, want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	got, err := decodeQueue(bytes.NewReader(raw))
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got, cmp.AllowUnexported(queueState{}, keyed{}, accepted{}), cmp.Comparer(func(a, b *rollout.Snapshot) bool { return true })); d != "" {
		t.Fatal(d)
	}
	if !bytes.Equal(encodedQueue(t, got), raw) {
		t.Fatal("what was read is written otherwise")
	}
}

func TestADamagedQueueIsRefused(t *testing.T) {
	raw := encodedQueue(t, sampleQueue(t))
	for i := range raw {
		bad := slices.Clone(raw)
		bad[i] ^= 0x24
		if _, err := decodeQueue(bytes.NewReader(bad)); !errors.Is(err, checked.ErrDamaged) {
			t.Fatalf("byte %d changed: %v", i, err)
		}
		if _, err := decodeQueue(bytes.NewReader(raw[:i])); !errors.Is(err, checked.ErrDamaged) {
			t.Fatalf("cut at %d: %v", i, err)
		}
	}
}

// Whatever passes the checksum is refused or can be written again.
func FuzzDecodeQueue(f *testing.F) {
	raw := encodedQueue(f, sampleQueue(f))
	f.Add(raw[:len(raw)-4])
	f.Add([]byte(queueMagic))
	f.Fuzz(func(t *testing.T, body []byte) {
		sum := crc32.Checksum(body, crc32.MakeTable(crc32.Castagnoli))
		q, err := decodeQueue(bytes.NewReader(append(slices.Clone(body), byte(sum), byte(sum>>8), byte(sum>>16), byte(sum>>24))))
		if err != nil {
			return
		}
		for _, k := range q.keys {
			if _, err := hex.DecodeString(k.digest); err != nil || k.receipt.Job != q.job {
				t.Fatalf("key %+v", k)
			}
		}
		if _, err := decodeQueue(bytes.NewReader(encodedQueue(t, q))); err != nil {
			t.Fatal(err)
		}
	})
}

func TestKeyring(t *testing.T) {
	var k keyring
	k.add("a", accepted{digest: "1"})
	then := k.list
	k.add("b", accepted{digest: "2"})
	if a, ok := k.get("b"); !ok || a.digest != "2" || len(then) != 1 {
		t.Fatal(a, ok, then)
	}
	if _, ok := k.get("c"); ok {
		t.Fatal("an unknown key was found")
	}
}

// A log with a gap before it, or that ends before the snapshot does, is an error
// that says what is missing.
func TestALogThatDoesNotGoOnFromTheSnapshot(t *testing.T) {
	dir := t.TempDir()
	log, err := spool.Open(dir, 1) // a segment for each record
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	for range 9 {
		if _, err := log.Append(spool.Record{Kind: recordExpire}); err != nil {
			t.Fatal(err)
		}
	}
	if err := log.Trim(6); err != nil {
		t.Fatal(err)
	}
	j := &Job{ID: "job-0123456789abcdef", spool: log}
	snap := &storage.Manifest{Step: 4}
	for _, c := range []struct {
		snap    *storage.Manifest
		covered uint64
		want    []string // in the error; none: there is no error
	}{
		{snap, 6, nil}, {snap, 7, nil}, {snap, 9, nil},
		{snap, 5, []string{"job-0123456789abcdef", "step 4", "begins at record 7", "record 6 is missing"}},
		{snap, 10, []string{"job-0123456789abcdef", "step 4", "ends at record 9", "record 10 is missing"}},
		{nil, 0, []string{"job-0123456789abcdef", "no snapshot", "begins at record 7", "record 1 is missing"}},
		{snap, 0, []string{"step 4", "record 1 is missing"}}, // of before there were queues in snapshots
	} {
		err := j.covers(c.snap, c.covered)
		if (err == nil) != (c.want == nil) {
			t.Errorf("a snapshot of the records up to %d: %v", c.covered, err)
			continue
		}
		for _, part := range c.want {
			if f, ok := fault.As(err); !ok || f.Code != "log_gap" || !strings.Contains(err.Error(), part) {
				t.Errorf("a snapshot of the records up to %d: %v, expected %q", c.covered, err, part)
			}
		}
	}
}

package server_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"trainerd/client"
	"trainerd/server/servertest"
	"trainerd/storage"
	"trainerd/trainer"
)

// journal is a log that a test reads while a server writes it.
type journal struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (j *journal) Write(b []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.buf.Write(b)
}

var logRead = regexp.MustCompile(`msg="log read".* from=(\d+) records=(\d+) steps_replayed=(\d+)`)

// read is what the newest start read of a job's log.
func (j *journal) read(t *testing.T) (from, records, steps int) {
	t.Helper()
	j.mu.Lock()
	defer j.mu.Unlock()
	all := logRead.FindAllStringSubmatch(j.buf.String(), -1)
	if len(all) == 0 {
		t.Fatalf("no start has read a log:\n%s", j.buf.String())
	}
	for i, to := range []*int{&from, &records, &steps} {
		*to, _ = strconv.Atoi(all[len(all)-1][i+1])
	}
	return from, records, steps
}

func segments(t *testing.T, e *servertest.Env, id string) []string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(e.DataDir, "jobs", id, "spool", "*.seg"))
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// trainLog starts a server and trains n batches, one after the other.
func trainLog(t *testing.T, n int, segmentBytes int64, checkpoint map[string]any) (*servertest.Env, *client.Client, context.Context, client.Job, *journal) {
	t.Helper()
	log := &journal{}
	e := servertest.Start(t, servertest.Options{Wrap: described(t), Limits: trainer.Limits{SegmentBytes: segmentBytes}, Logger: slog.New(slog.NewTextHandler(log, nil))})
	c, ctx := connect(t, e)
	j := create(t, c, ctx, e.JobDocument(2, map[string]any{"checkpoint": checkpoint}))
	for i := range n {
		// Two groups are a step; a third, of which one row came, stays open.
		b := servertest.Batch(fmt.Sprintf("b%03d", i), 2, 2, -1, uint64(i))
		if i == n/2 {
			b = servertest.Batch(fmt.Sprintf("b%03d", i), 3, 2, -1, uint64(i))
			b.Rollouts = b.Rollouts[:5]
		}
		if _, err := c.Submit(ctx, j.ID, b, fmt.Sprint("key", i)); err != nil {
			t.Fatal(err)
		}
		await(t, c, ctx, j.ID, "its step", func(j client.Job) bool { return j.Step == int64(i+1) })
	}
	j = await(t, c, ctx, j.ID, "all steps", func(j client.Job) bool {
		return j.State == "waiting" && j.Step == int64(n) && j.PolicyStep == j.Step
	})
	return e, c, ctx, j, log
}

// sameJob compares what two servers say of a job and its n batches.
func sameJob(t *testing.T, a, b *client.Client, actx, bctx context.Context, id string, n int) {
	t.Helper()
	ask := func(c *client.Client, ctx context.Context) []any {
		j, err := c.Job(ctx, id)
		if err != nil {
			t.Fatal(err)
		}
		out := []any{j.Step, j.Queue, j.Counts}
		for i := range n {
			s, err := c.Batch(ctx, id, uint64(i+1))
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, s)
		}
		return out
	}
	if d := cmp.Diff(ask(a, actx), ask(b, bctx)); d != "" {
		t.Errorf("the job before and after the start (-before +after):\n%s", d)
	}
}

// TestAStartReadsWhatIsAfterTheSnapshot: the log of a job of 24 steps holds what
// the last ones were made of, and so does what a start reads.
func TestAStartReadsWhatIsAfterTheSnapshot(t *testing.T) {
	const n = 24
	e, c, ctx, j, log := trainLog(t, n, 1, map[string]any{"snapshot_every_steps": 1, "keep_last": 0})
	for end := time.Now().Add(20 * time.Second); len(segments(t, e, j.ID)) > 2; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("the log keeps %d segments of %d", len(segments(t, e, j.ID)), n)
		}
	}
	again := e.Crash(t)
	c2, ctx2 := connect(t, again)
	await(t, c2, ctx2, j.ID, "the job again", func(j client.Job) bool { return j.State == "waiting" })
	if from, records, steps := log.read(t); from < n-1 || records > 2 || steps > 1 {
		t.Errorf("the start read %d records from %d on and repeated %d steps", records, from, steps)
	}
	sameJob(t, c, c2, ctx, ctx2, j.ID, n)
	if r, err := c2.Submit(ctx2, j.ID, servertest.Batch("b000", 2, 2, -1, 0), "key0"); err != nil || r.Batch != 1 {
		t.Errorf("the first batch once more: %+v, %v", r, err)
	}
	if _, err := c2.Submit(ctx2, j.ID, servertest.Batch("b000", 2, 2, -1, 0), "another-key"); client.Code(err) != "group_closed" {
		t.Errorf("a group that was trained, from before the log: %v", err)
	}
}

// latest is the directory of a job's newest checkpoint in the store.
func latest(t *testing.T, e *servertest.Env, c *client.Client, ctx context.Context, id string) (string, storage.Manifest) {
	t.Helper()
	m, err := c.Checkpoint(ctx, id, client.Latest)
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(e.StoreDir, filepath.FromSlash(m.Prefix)), m
}

// TestSnapshotsWithoutAQueue: a checkpoint of before snapshots had one, and a
// log that was never trimmed.
func TestSnapshotsWithoutAQueue(t *testing.T) {
	const n = 5
	e, c, ctx, j, log := trainLog(t, n, 1<<20, map[string]any{"snapshot_every_steps": 1})
	before, err := c.Job(ctx, j.ID)
	if err != nil {
		t.Fatal(err)
	}
	dir, m := latest(t, e, c, ctx, j.ID)
	e.Stop()
	// As the old layout had it: no file, no mention of it.
	m.Files = slices.DeleteFunc(m.Files, func(f storage.File) bool { return f.Name == "state/queue.bin" })
	raw, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{
		os.Remove(filepath.Join(dir, "state", "queue.bin")),
		os.WriteFile(filepath.Join(dir, "manifest.json"), raw, 0o644),
		os.Remove(filepath.Join(e.StoreDir, "jobs", j.ID, "latest.json")),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	e.Boot(t)
	c, ctx = connect(t, e)
	after := await(t, c, ctx, j.ID, "the job again", func(j client.Job) bool { return j.State == "waiting" })
	if from, records, steps := log.read(t); from != 1 || records != n || steps != 0 {
		t.Errorf("the start read %d records from %d on and repeated %d steps", records, from, steps)
	}
	if d := cmp.Diff([]any{before.Step, before.Queue, before.Counts}, []any{after.Step, after.Queue, after.Counts}); d != "" {
		t.Errorf("(-before +after):\n%s", d)
	}
}

// TestAMissingSnapshotIsSaid: the log goes on from a snapshot that the store has
// not. The job waits for it, says so, and goes on when it is back.
func TestAMissingSnapshotIsSaid(t *testing.T) {
	const n = 6
	e, _, _, j, _ := trainLog(t, n, 1, map[string]any{"snapshot_every_steps": 3, "keep_last": 0})
	e.Stop()
	all, err := filepath.Glob(filepath.Join(e.StoreDir, "jobs", j.ID, "checkpoints", "*", "state"))
	if err != nil || len(all) < 2 {
		t.Fatal(all, err)
	}
	newest := filepath.Dir(slices.Max(all))
	away := filepath.Join(t.TempDir(), "away")
	if err := os.Rename(newest, away); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(e.StoreDir, "jobs", j.ID, "latest.json")); err != nil {
		t.Fatal(err)
	}
	e.Boot(t)
	c, ctx := connect(t, e)
	got := await(t, c, ctx, j.ID, "what is wrong", func(j client.Job) bool { return j.LastError != nil })
	if got.State != "loading" || got.LastError.Code != "restore_failed" {
		t.Errorf("state %s, %+v", got.State, got.LastError)
	}
	for _, part := range []string{j.ID, "of step 3", "begins at record", "is missing"} {
		if !strings.Contains(got.LastError.Message, part) {
			t.Errorf("%q does not say %q", got.LastError.Message, part)
		}
	}
	if err := os.Rename(away, newest); err != nil {
		t.Fatal(err)
	}
	got = await(t, c, ctx, j.ID, "the job again", func(j client.Job) bool { return j.State == "waiting" })
	if got.Step != n || got.Counts.GroupsTrained != 2*n || got.Queue.GroupsOpen != 1 {
		t.Errorf("step %d, %+v, %+v", got.Step, got.Counts, got.Queue)
	}
}

// TestADamagedLogHarmsOneJob: damage to what was once synced is an error that
// names file and offset; the log stays as it is, and other jobs go on.
func TestADamagedLogHarmsOneJob(t *testing.T) {
	for _, where := range []string{"in the middle", "in the last segment"} {
		t.Run(where, func(t *testing.T) {
			size := int64(1)
			if where == "in the last segment" {
				size = 1 << 20
			}
			e, c, ctx, j, _ := trainLog(t, 4, size, map[string]any{"snapshot_every_steps": 0})
			other := create(t, c, ctx, e.JobDocument(2, nil))
			files := segments(t, e, j.ID)
			path := files[0] // a server reads its log when it starts only
			raw, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			raw[80] ^= 1
			if err := os.WriteFile(path, raw, 0o644); err != nil {
				t.Fatal(err)
			}
			e = e.Crash(t)
			c, ctx = connect(t, e)
			got := await(t, c, ctx, j.ID, "what is wrong", func(j client.Job) bool { return j.LastError != nil })
			if !strings.Contains(got.LastError.Message, filepath.Base(path)) || !strings.Contains(got.LastError.Message, "offset") {
				t.Errorf("%s: %q names no file and offset", got.State, got.LastError.Message)
			}
			await(t, c, ctx, other.ID, "the other job", func(j client.Job) bool { return j.State == "waiting" })
			if left := segments(t, e, j.ID); len(left) != len(files) {
				t.Errorf("of %d segments %d are left", len(files), len(left))
			}
		})
	}
}

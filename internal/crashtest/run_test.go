//go:build crashpoints

package crashtest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"trainerd/client"
	"trainerd/internal/crashpoint"
	"trainerd/rollout"
	"trainerd/rollout/arrowio"
	"trainerd/sagrpo"
	"trainerd/server/servertest"
	"trainerd/storage"
)

// Shape of a run: batches of two groups, each a step, and one group that stays open.
const (
	batches   = 12
	groupSize = 4
	lag       = 4
)

// variant is a job document and the rollouts that it is given.
type variant struct {
	name       string
	iterations int
	dtype      string
	checkpoint map[string]any
	stale      string // what becomes of the groups that are over max_policy_lag; "" for no limit
	ends       bool   // by max_steps, with the open group in the first batch
}

// Places in variants.
const (
	f32 = iota
	bf16
	lagging
	ending
	admitting
)

var variants = []variant{
	f32:       {"f32", 1, "F32", map[string]any{"snapshot_every_steps": 2, "publish_every_steps": 2, "keep_last": 2}, "", false},
	bf16:      {"bf16-iterations", 2, "BF16", map[string]any{"snapshot_every_steps": 5, "keep_last": 4}, "", false},
	lagging:   {"lag-replay", 1, "F32", map[string]any{"snapshot_every_steps": 0, "publish_every_steps": 2, "keep_last": 3}, rollout.StaleReject, false},
	ending:    {"ending", 1, "F32", map[string]any{"snapshot_every_steps": 3, "keep_last": 2}, "", true},
	admitting: {"admitting", 1, "F32", map[string]any{"snapshot_every_steps": 2, "keep_last": 2}, rollout.StaleAdmit, false},
}

func (v variant) document(modelDir string, reference bool) map[string]any {
	cp := map[string]any{"dtype": v.dtype}
	for k, x := range v.checkpoint {
		cp[k] = x
	}
	if reference {
		cp["publish_every_steps"], cp["keep_last"] = 1, 0
	}
	most, stale := -1, rollout.StaleReject
	if v.stale != "" {
		most, stale = lag, v.stale
	}
	steps := 0
	if v.ends {
		steps = batches - 1
	}
	return map[string]any{
		"name": v.name, "max_steps": steps, "model": map[string]any{"source": "dir:" + modelDir},
		"objective":  map[string]any{"name": "sa_grpo", "group_size": groupSize, "iterations": v.iterations, "beta": 0.05},
		"optimizer":  map[string]any{"lr": 1e-2},
		"batch":      map[string]any{"groups_per_step": 2, "max_tokens_per_micro_batch": 64, "max_policy_lag": most, "stale": stale},
		"checkpoint": cp,
		"sampling":   map[string]any{"max_sequences": 0},
	}
}

// rollouts are the batches of a variant, in the order in which they are posted.
func (v variant) rollouts() [][]byte {
	var out [][]byte
	for i := range uint64(batches) {
		step := rollout.NoPolicyStep
		if v.stale != "" && i%3 == 1 {
			step = 0 // too old for the later steps
		}
		b := servertest.Batch(fmt.Sprintf("b%02d", i), 2, groupSize, int64(step), i)
		if last := i == batches-1; last != v.ends && (last || i == 0) {
			b.Rollouts = b.Rollouts[:groupSize+1] // of the second group one row only
		}
		var body bytes.Buffer
		if err := arrowio.Encode(&body, b, ""); err != nil {
			panic(err) // our own rows
		}
		out = append(out, body.Bytes())
	}
	return out
}

func key(i int) string { return fmt.Sprintf("batch-%d", i) }

// outcome is what a run came to.
type outcome struct {
	Counts   client.Counts
	Queue    client.Queue
	Step     int64
	Steps    []step
	Batches  []client.BatchStatus
	Final    map[string]string // digests of the last checkpoint's files: weights, moments, all
	policies map[int64]string  // digest of hf/ by step; of the reference only
}

// same compares what two runs came to.
func same(want, got outcome) error {
	if d := cmp.Diff(want, got, cmp.AllowUnexported(step{}), cmp.FilterPath(func(p cmp.Path) bool { return p.String() == "policies" }, cmp.Ignore())); d != "" {
		return fmt.Errorf("it ended otherwise (-undisturbed +killed):\n%s", d)
	}
	return nil
}

type step struct {
	Step    int64
	Groups  []string
	Metrics map[string]float64 // that do not depend on time or memory
}

// digest names the content of the files of a checkpoint under a prefix.
func digest(m storage.Manifest, prefix string) string {
	sum := sha256.New()
	for _, f := range m.Files { // sorted by name
		if strings.HasPrefix(f.Name, prefix) {
			fmt.Fprintln(sum, f.Name, f.SHA256)
		}
	}
	return hex.EncodeToString(sum.Sum(nil))
}

// strike is one death of the server.
type strike struct {
	at    string        // point, "" for none
	n     int           // at the n-th time
	after time.Duration // at this time after it goes on with its work, unless the point came first
	early bool          // at this time after the process began
	power bool          // a power cut, not kill -9 alone
}

// run is one job on a server that is killed.
type run struct {
	variant  variant
	modelDir string
	ref      *outcome // nil: this is the reference
	strikes  []strike
	off      string // left out
	segment  int64  // bytes of the spool's segments, 0 for two batches each
	rng      *rand.Rand
}

// tally counts deaths by what the process was doing.
type tally struct {
	mu     sync.Mutex
	phases [crashpoint.Phases + 1]int
	points map[string]int
	cuts   int
	lost   int
	pulls  int
	deaths int
	runs   int // that came to their end
}

func (t *tally) add(s strike, d death) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.deaths++
	t.phases[d.phase]++
	if d.point {
		t.points[s.at]++
	}
}

// do runs it in dir and returns what is not as promised.
func (r run) do(t *tally, dir string) (out outcome, err error) {
	addr, err := address()
	if err != nil {
		return out, err
	}
	if r.segment == 0 {
		r.segment = 2500
	}
	cfg := serverConfig{Root: filepath.Join(dir, "root"), Listen: addr, SegmentBytes: r.segment, QueuedRows: 6 * groupSize}
	w := &witness{ref: r.ref, url: "http://" + addr, store: filepath.Join(cfg.Root, "store"), data: filepath.Join(cfg.Root, "data"), scratch: filepath.Join(dir, "pulled")}
	shadow := crashpoint.OpenShadow(filepath.Join(dir, "shadow"))
	if err := errors.Join(os.MkdirAll(cfg.Root, 0o755), os.MkdirAll(w.scratch, 0o755)); err != nil {
		return out, err
	}
	shadow.Durable(cfg.Root)
	for _, s := range r.strikes {
		w.power = w.power || s.power
	}

	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	ctx, stop := context.WithCancelCause(ctx)
	var busy sync.WaitGroup
	defer busy.Wait()
	defer stop(nil)
	posted := make(chan struct{})
	busy.Go(func() { w.watchStatus(ctx) })
	if r.ref != nil {
		busy.Go(func() { w.watchCheckpoints(ctx) })
	}
	busy.Go(func() {
		defer close(posted)
		if err := r.post(ctx, w); err != nil {
			w.blame("%w", err)
			stop(err)
		}
	})

	for i, s := range r.strikes {
		if r.done(w) {
			break // nothing is left to disturb
		}
		at := ""
		if s.at != "" {
			at = fmt.Sprintf("%s:%d", s.at, s.n)
		}
		p, err := start(cfg, dir, at, r.off, w.power)
		if err != nil {
			return out, err
		}
		if !s.early {
			p.working(func() bool { return r.done(w) })
		}
		r.await(ctx, w, p, s)
		d, err := p.kill()
		if err != nil {
			return out, fmt.Errorf("life %d: %w", i, err)
		}
		t.add(s, d)
		if s.power {
			w.quiet.Lock()
			lost, err := shadow.PowerCut(cfg.Root, r.rng, "trainerd.db")
			w.quiet.Unlock()
			if err != nil {
				return out, fmt.Errorf("cut the power: %w", err)
			}
			t.mu.Lock()
			t.cuts, t.lost = t.cuts+1, t.lost+lost
			t.mu.Unlock()
		}
		w.audit()
		if err := w.fault(); err != nil {
			return out, fmt.Errorf("after life %d: %w", i, err)
		}
	}

	p, err := start(cfg, dir, "", r.off, false)
	if err != nil {
		return out, err
	}
	defer func() { p.kill() }()
	out, err = r.finish(ctx, w, posted, p)
	if err = errors.Join(w.fault(), err); err != nil {
		return out, err
	}
	if r.ref == nil {
		return out, nil
	}
	if err := same(*r.ref, out); err != nil {
		return out, err
	}

	// Once more, now that the newest snapshot stands for the whole log.
	if _, err := p.kill(); err != nil {
		return out, err
	}
	if p, err = start(cfg, dir, "", r.off, false); err != nil {
		return out, err
	}
	if err := r.again(ctx, w, p, out); err != nil {
		return out, fmt.Errorf("after the last start: %w", err)
	}
	t.mu.Lock()
	t.runs, t.pulls = t.runs+1, t.pulls+w.pulls
	t.mu.Unlock()
	return out, w.fault()
}

// done says that the job has come to where the undisturbed one stopped, or that
// something was not as promised.
func (r run) done(w *witness) bool {
	if w.fault() != nil {
		return true
	}
	if r.ref == nil || w.reached() < r.ref.Step {
		return false
	}
	if !r.variant.ends {
		return true
	}
	left, err := w.left()
	return err == nil && slices.Equal(left, []string{"ended.bin"})
}

// await waits until a life is over: at its point, when its time is up, or a
// little after nothing is left to do.
func (r run) await(ctx context.Context, w *witness, p *process, s strike) {
	over := time.After(s.after)
	var idle <-chan time.Time
	for {
		select {
		case <-p.ended:
			return
		case <-over:
			return
		case <-idle:
			return
		case <-ctx.Done():
			return
		case <-time.After(2 * time.Millisecond):
			if idle == nil && r.done(w) {
				idle = time.After(most)
			}
		}
	}
}

// post creates the job and posts every batch once it was accepted the one before,
// as a worker does that knows nothing of deaths.
func (r run) post(ctx context.Context, w *witness) error {
	c, err := client.New(w.url, client.Options{Retries: 1 << 20, MaxWait: 15 * time.Millisecond})
	if err != nil {
		return err
	}
	j, err := c.CreateJob(ctx, r.variant.document(r.modelDir, r.ref == nil), "the-job")
	if err != nil {
		return fmt.Errorf("create the job: %w", err)
	}
	w.name(j.ID)
	for i, body := range r.variant.rollouts() {
		got, err := c.SubmitArrow(ctx, j.ID, body, key(i))
		if err != nil {
			return fmt.Errorf("post batch %d: %w", i+1, err)
		}
		if got.Batch != uint64(i+1) || got.Duplicates != 0 {
			return fmt.Errorf("batch %d was accepted as %d with %d duplicates", i+1, got.Batch, got.Duplicates)
		}
	}
	return nil
}

// finish waits until the last server has done everything and asks what became of it.
func (r run) finish(ctx context.Context, w *witness, posted <-chan struct{}, p *process) (out outcome, err error) {
	for waiting := true; waiting; {
		if w.fault() != nil {
			return out, nil // said already
		}
		select {
		case <-posted:
			waiting = false
		case <-p.ended:
			return out, fmt.Errorf("the last server ended: %v\n%s", p.err, p.log)
		case <-ctx.Done():
			return out, fmt.Errorf("not all was posted: %w", context.Cause(ctx))
		case <-time.After(5 * time.Millisecond):
		}
	}
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	c, err := client.New(w.url, client.Options{Retries: 50, MaxWait: 50 * time.Millisecond})
	if err != nil {
		return out, err
	}
	id := w.known()
	j, err := c.Wait(ctx, id, 5*time.Millisecond, func(j client.Job) bool {
		if w.fault() != nil {
			return true
		}
		if r.variant.ends {
			return j.State == "finished"
		}
		if r.ref != nil {
			return j.State == "waiting" && j.Step >= r.ref.Step && j.Queue.GroupsComplete <= r.ref.Queue.GroupsComplete
		}
		return j.State == "waiting" && j.Queue.GroupsComplete < 2 && j.PolicyStep == j.Step && j.Counts.Batches == batches
	})
	if err != nil {
		return out, fmt.Errorf("wait for the end (%+v, queue %+v, last error %+v): %w", j.Counts, j.Queue, j.LastError, err)
	}
	var m storage.Manifest
	if r.variant.ends {
		m, err = c.Checkpoint(ctx, id, client.Latest)
	} else {
		m, err = c.Publish(ctx, id, true)
	}
	if err != nil {
		return out, fmt.Errorf("publish the end: %w", err)
	}
	if named, err := w.latest(ctx, id); err != nil || named.Prefix != m.Prefix {
		return out, fmt.Errorf("latest.json names %s, not %s: %v", named.Prefix, m.Prefix, err)
	}
	if err := r.small(w, m, j.Step); err != nil {
		return out, err
	}
	if out, err = r.picture(ctx, w, c); err != nil {
		return out, err
	}
	out.Final = map[string]string{}
	for _, f := range m.Files {
		// The queue names the job and times; whether the end of a job is a snapshot depends on its deaths.
		if f.Name != "state/queue.bin" && (!r.variant.ends || strings.HasPrefix(f.Name, "hf/")) {
			out.Final[f.Name] = f.SHA256
		}
	}
	if r.ref == nil {
		return out, r.remember(ctx, c, id, &out)
	}
	return out, nil
}

// small holds what is left on disk to what the newest checkpoint needs.
func (r run) small(w *witness, m storage.Manifest, step int64) error {
	if r.variant.ends {
		var left []string
		var err error
		for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
			if left, err = w.left(); err != nil || slices.Equal(left, []string{"ended.bin"}) {
				return err
			}
		}
		return fmt.Errorf("the ended job keeps %q", left)
	}
	if m.Step != step || !m.Snapshot {
		return fmt.Errorf("the end is of step %d (snapshot %v), the job at %d", m.Step, m.Snapshot, step)
	}
	// The snapshot was taken after the last step: one batch may have come later.
	segments, err := filepath.Glob(filepath.Join(w.data, "jobs", "*", "spool", "*.seg"))
	if err != nil || len(segments) > 2 {
		return fmt.Errorf("the log has segments %q although a snapshot stands for it: %v", segments, err)
	}
	return nil
}

// again looks at the job after one more start, which had at most the last batch to read.
func (r run) again(ctx context.Context, w *witness, p *process, want outcome) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	c, err := client.New(w.url, client.Options{Retries: 200, MaxWait: 20 * time.Millisecond})
	if err != nil {
		return err
	}
	state := "waiting"
	if r.variant.ends {
		state = "finished"
	}
	if _, err := c.Wait(ctx, w.known(), 2*time.Millisecond, func(j client.Job) bool { return j.State == state || w.fault() != nil }); err != nil {
		return err
	}
	got, err := r.picture(ctx, w, c)
	if err != nil {
		return err
	}
	got.Final = want.Final
	if err := same(want, got); err != nil {
		return err
	}
	if _, err := p.kill(); err != nil {
		return err
	}
	log := p.log.String()
	if !r.variant.ends && !strings.Contains(log, "records=0 steps_replayed=0") && !strings.Contains(log, "records=1 steps_replayed=0") {
		return fmt.Errorf("it read more of the log than came after the snapshot:\n%s", log)
	}
	return nil
}

// picture is what the API says of the job; what was accepted once is not accepted twice.
func (r run) picture(ctx context.Context, w *witness, c *client.Client) (out outcome, err error) {
	id := w.known()
	for i, body := range r.variant.rollouts() { // a client that saw no answer
		got, err := c.SubmitArrow(ctx, id, body, key(i))
		if err != nil || got.Batch != uint64(i+1) {
			return out, fmt.Errorf("post batch %d again: accepted as %d: %v", i+1, got.Batch, err)
		}
	}
	if again, err := c.CreateJob(ctx, r.variant.document(r.modelDir, r.ref == nil), "the-job"); err != nil || again.ID != id {
		return out, fmt.Errorf("create the job again: job %s, not %s: %v", again.ID, id, err)
	}
	j, err := c.Job(ctx, id)
	if err != nil {
		return out, err
	}
	out.Counts, out.Queue, out.Step = j.Counts, j.Queue, j.Step
	all, err := c.Steps(ctx, id, 0)
	if err != nil {
		return out, err
	}
	for i, s := range all {
		if s.Step != int64(i+1) {
			return out, fmt.Errorf("record %d is of step %d", i+1, s.Step)
		}
		kept := map[string]float64{}
		for name, x := range s.Metrics {
			if !sagrpo.IsTiming(name) {
				kept[name] = x
			}
		}
		out.Steps = append(out.Steps, step{s.Step, s.Groups, kept})
	}
	for i := range batches {
		b, err := c.Batch(ctx, id, uint64(i+1))
		if err != nil {
			return out, err
		}
		b.Job = ""
		out.Batches = append(out.Batches, b)
	}
	return out, nil
}

// remember keeps the policy of every step of the undisturbed run.
func (r run) remember(ctx context.Context, c *client.Client, id string, out *outcome) error {
	all, err := c.Checkpoints(ctx, id)
	if err != nil {
		return err
	}
	out.policies = map[int64]string{}
	for _, m := range all {
		out.policies[m.Step] = digest(m, "hf/")
	}
	if len(out.policies) != int(out.Step)+1 {
		return fmt.Errorf("the undisturbed run published %d of %d policies", len(out.policies), out.Step+1)
	}
	return nil
}

// undisturbed is what every variant came to when nothing died, once for all tests.
var undisturbed []*outcome

// references runs every variant undisturbed, unless that was done.
func references(t *testing.T) (modelDir string, refs []*outcome) {
	t.Helper()
	modelDir = servertest.WriteModel(t, servertest.TinyConfig(), 1, "F32")
	for _, v := range variants[len(undisturbed):] {
		began := time.Now()
		out, err := run{variant: v, modelDir: modelDir}.do(&tally{points: map[string]int{}}, t.TempDir())
		if err != nil {
			t.Fatalf("%s undisturbed: %v", v.name, err)
		}
		if refused := out.Counts.GroupsRefused; (v.stale == rollout.StaleReject) != (refused["policy_lag"] > 0) ||
			(v.stale == rollout.StaleAdmit) != (out.Counts.Stale.Admitted > 0) || v.ends != (refused["job_finished"] > 0) {
			t.Fatalf("%s refused %v: the variant does not test what it is for", v.name, refused)
		}
		t.Logf("%s undisturbed: %d steps, %d groups trained, refused %v, %v", v.name, out.Step, out.Counts.GroupsTrained, out.Counts.GroupsRefused, time.Since(began).Round(time.Millisecond))
		undisturbed = append(undisturbed, &out)
	}
	return modelDir, undisturbed
}

package server_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"trainerd/client"
	"trainerd/internal/fault"
	"trainerd/kernels"
	"trainerd/rollout/arrowio"
	"trainerd/server/servertest"
)

// bits are the digests of everything that training decides in a job's
// checkpoints: weights and, in snapshots, exact weights and optimizer state.
func bits(t *testing.T, c *client.Client, ctx context.Context, job string) map[string]string {
	t.Helper()
	all, err := c.Checkpoints(ctx, job)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for _, m := range all {
		for _, f := range m.Files {
			if strings.HasSuffix(f.Name, ".safetensors") || strings.HasSuffix(f.Name, "optimizer.bin") {
				out[fmt.Sprintf("%d/%s", m.Step, f.Name)] = f.SHA256
			}
		}
	}
	return out
}

// metric reads one value of /metrics.
func metric(t *testing.T, e *servertest.Env, name, job string) float64 {
	t.Helper()
	res, err := http.Get(e.URL + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	label := ""
	if job != "" {
		label = `\{job="` + job + `"\}`
	}
	m := regexp.MustCompile(`(?m)^` + name + label + ` (\S+)$`).FindSubmatch(text)
	if m == nil {
		t.Fatalf("/metrics has no %s of %q", name, job)
	}
	v, err := strconv.ParseFloat(string(m[1]), 64)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// plan returns the bytes that a job's model takes on the device.
func plan(t *testing.T, j client.Job) int64 {
	t.Helper()
	var doc struct {
		MemoryPlan kernels.Plan `json:"memory_plan"`
	}
	if err := json.Unmarshal(j.Document, &doc); err != nil || doc.MemoryPlan.Total == 0 {
		t.Fatalf("job without a plan: %v, %s", err, j.Document)
	}
	return doc.MemoryPlan.Total
}

// wholeJob is a job with everything that lives on the device: a reference,
// a sampler, old log-probs between iterations, weights published rounded.
func wholeJob(n int, seed int) map[string]any {
	return map[string]any{
		"objective": map[string]any{"name": "sa_grpo", "group_size": n, "iterations": 3, "beta": 0.05,
			"reference": map[string]any{"sync_every_steps": 2, "sync_alpha": 0.3}},
		"optimizer":  map[string]any{"lr": 1e-2 / float64(seed)},
		"batch":      map[string]any{"groups_per_step": 2, "max_tokens_per_micro_batch": 64, "max_policy_lag": -1},
		"checkpoint": map[string]any{"snapshot_every_steps": 3, "dtype": "BF16", "keep_last": 0},
		"seed":       seed,
	}
}

// feed submits batches [from, to) of a job, which are of two groups each.
func feed(t *testing.T, c *client.Client, ctx context.Context, job string, n, from, to, seed int) {
	t.Helper()
	for i := from; i < to; i++ {
		if _, err := c.Submit(ctx, job, servertest.Batch(fmt.Sprintf("b%d", i), 2, n, 0, uint64(100*seed+i)), fmt.Sprintf("k%d", i)); err != nil {
			t.Fatal(err)
		}
	}
}

// ask samples and scores, and returns what came out.
func ask(t *testing.T, c *client.Client, ctx context.Context, job string) []any {
	t.Helper()
	s, err := c.Sample(ctx, job, client.SampleRequest{Prompts: [][]int32{{5, 6, 7}, {9}}, N: 3, MaxTokens: 8})
	if err != nil {
		t.Fatal(err)
	}
	rows, step, err := c.LogProbs(ctx, job, []arrowio.ScoreRow{{Prompt: []int32{5, 6}, Completion: []int32{7, 8, 9}}})
	if err != nil {
		t.Fatal(err)
	}
	return []any{s, rows, step}
}

// TestJobsTakeTurnsOnTheDevice trains jobs that fit on the device one at a time,
// with requests between, kills the server while one of them is in host memory,
// and holds both against each alone: the same bits.
func TestJobsTakeTurnsOnTheDevice(t *testing.T) {
	const n, batches = 3, 4
	at := func(j client.Job) bool { return j.PolicyStep == 3*batches && j.State == "waiting" }
	alone := map[int][]any{}
	var total int64
	var model string
	for seed := 1; seed <= 2; seed++ {
		e := servertest.Start(t, servertest.Options{ModelDir: model})
		model = e.ModelDir
		c, ctx := connect(t, e)
		j := create(t, c, ctx, e.JobDocument(n, wholeJob(n, seed)))
		feed(t, c, ctx, j.ID, n, 0, 2, seed)
		await(t, c, ctx, j.ID, "step 6", func(j client.Job) bool { return j.PolicyStep == 6 })
		asked := ask(t, c, ctx, j.ID)
		feed(t, c, ctx, j.ID, n, 2, batches, seed)
		j = await(t, c, ctx, j.ID, "the end", at)
		total = plan(t, j)
		alone[seed] = append(asked, bits(t, c, ctx, j.ID))
		e.Stop()
	}

	o := servertest.Options{ModelDir: model, DeviceMemory: total + total/2, SwapMemory: 4 * total}
	e := servertest.Start(t, o)
	c, ctx := connect(t, e)
	jobs := map[int]string{}
	asked := map[int][]any{}
	for seed := 1; seed <= 2; seed++ {
		jobs[seed] = create(t, c, ctx, e.JobDocument(n, wholeJob(n, seed))).ID
	}
	// One that does not fit even alone is refused with the plan, and harms nobody.
	large := wholeJob(n, 3)
	large["batch"] = map[string]any{"max_tokens_per_micro_batch": 4096}
	_, err := c.CreateJob(ctx, e.JobDocument(n, large), "")
	if client.Code(err) != "does_not_fit" || !strings.Contains(err.Error(), "max_tokens_per_micro_batch") {
		t.Errorf("a job that never fits: %v", err)
	}
	both := func(do func(seed int)) {
		var wg sync.WaitGroup
		for seed := 1; seed <= 2; seed++ {
			wg.Go(func() { do(seed) })
		}
		wg.Wait()
	}
	both(func(seed int) { feed(t, c, ctx, jobs[seed], n, 0, 2, seed) })
	for seed := 1; seed <= 2; seed++ {
		await(t, c, ctx, jobs[seed], "step 6", func(j client.Job) bool { return j.PolicyStep == 6 })
	}
	for seed := 1; seed <= 2; seed++ { // brings the models back one after the other
		asked[seed] = ask(t, c, ctx, jobs[seed])
		j, err := c.Job(ctx, jobs[seed])
		other, oerr := c.Job(ctx, jobs[3-seed])
		if err != nil || oerr != nil || !j.Resident || other.Resident {
			t.Errorf("resident: %v, the other %v; %v, %v", j.Resident, other.Resident, err, oerr)
		}
	}
	for seed := 1; seed <= 2; seed++ {
		in, out := metric(t, e, "trainerd_swaps_in_total", jobs[seed]), metric(t, e, "trainerd_swaps_out_total", jobs[seed])
		if out < 2 || in < 1 || math.Abs(in-out) > 1 {
			t.Errorf("job %d left the device %v times and came back %v times", seed, out, in)
		}
	}

	crashed := e.Crash(t) // with one of them in host memory
	for name, e := range map[string]*servertest.Env{"the server": e, "after a crash": crashed} {
		c, ctx := connect(t, e)
		both(func(seed int) {
			await(t, c, ctx, jobs[seed], "the job", func(j client.Job) bool { return j.State == "waiting" })
			feed(t, c, ctx, jobs[seed], n, 2, batches, seed)
		})
		for seed := 1; seed <= 2; seed++ {
			await(t, c, ctx, jobs[seed], "the end", at)
			if d := cmp.Diff(alone[seed], append(asked[seed], bits(t, c, ctx, jobs[seed]))); d != "" {
				t.Errorf("%s, job %d (-alone +beside another):\n%s", name, seed, d)
			}
		}
	}
}

// TestHostMemoryBoundsSwapping: without host memory for it, a job that does not
// fit beside the others is refused, until one of them ends or fails.
func TestHostMemoryBoundsSwapping(t *testing.T) {
	const n = 2
	e := servertest.Start(t, servertest.Options{})
	c, ctx := connect(t, e)
	total := plan(t, await(t, c, ctx, create(t, c, ctx, e.JobDocument(n, nil)).ID, "the plan", func(j client.Job) bool { return j.State == "waiting" }))
	e.Stop()

	e = servertest.Start(t, servertest.Options{ModelDir: e.ModelDir, DeviceMemory: total + total/2})
	c, ctx = connect(t, e)
	bad := create(t, c, ctx, e.JobDocument(n, nil))
	if _, err := c.CreateJob(ctx, e.JobDocument(n, nil), ""); client.Code(err) != "does_not_fit" || !strings.Contains(err.Error(), "swap_memory") {
		t.Errorf("a second job: %v", err)
	}
	b := servertest.Batch("a", 2, n, 0, 1)
	for i := range b.Rollouts {
		b.Rollouts[i].Reward = float64(i % 2)
		b.Rollouts[i].SamplerLogProbs = slices.Repeat([]float32{-200}, len(b.Rollouts[i].Completion)) // no float32 has the ratio to that
	}
	if _, err := c.Submit(ctx, bad.ID, b, ""); err != nil {
		t.Fatal(err)
	}
	if j, err := c.Wait(ctx, bad.ID, 0, client.Job.Final); err != nil || j.State != "failed" {
		t.Fatalf("%+v, %v", j, err)
	}
	good := create(t, c, ctx, e.JobDocument(n, nil))
	if _, err := c.Submit(ctx, good.ID, servertest.Batch("a", 2, n, 0, 1), ""); err != nil {
		t.Fatal(err)
	}
	await(t, c, ctx, good.ID, "step 1", func(j client.Job) bool { return j.Step == 1 })
}

// poison is the learning rate of a job whose steps break a fragile device.
const poison = 0.125

// fragile is a device on which the optimizer step of a poisonous job goes wrong.
type fragile struct {
	kernels.Device
	kernels.Scratcher
	how  string // panic, or lose
	lost atomic.Bool
}

func newFragile(how string) func(kernels.Device) kernels.Device {
	return func(d kernels.Device) kernels.Device {
		return &fragile{Device: d, Scratcher: d.(kernels.Scratcher), how: how}
	}
}

func (f *fragile) AdamW(a kernels.AdamW) {
	switch {
	case a.LR != poison:
		f.Device.AdamW(a)
	case f.how == "panic":
		panic("adamw: an index is out of range")
	default:
		if d, ok := f.Device.(interface{ Break() }); ok {
			d.Break() // and the calls behind it fail by themselves
			f.Device.AdamW(a)
			return
		}
		f.lost.Store(true)
	}
}

// gone is what every call gives once the device is lost, as CUDA's sticky errors do.
func (f *fragile) gone(err error) error {
	if f.lost.Load() {
		return fault.New(fault.Internal, "device_lost", "an illegal address was accessed")
	}
	return err
}

func (f *fragile) Sync() error { return f.gone(f.Device.Sync()) }

func (f *fragile) Alloc(purpose string, t kernels.DType, n int) (kernels.Buffer, error) {
	if err := f.gone(nil); err != nil {
		return nil, err
	}
	return f.Device.Alloc(purpose, t, n)
}

// TestBrokenJobHarmsNoOther trains a healthy job beside one whose step breaks:
// by a panic, or so that the device is lost for all. The broken one fails and
// says why; the other's checkpoints have the bits that they have alone, although
// it had to start again from its snapshot and log, in the middle of a consumption.
func TestBrokenJobHarmsNoOther(t *testing.T) {
	const n, batches = 3, 4
	at := func(j client.Job) bool { return j.PolicyStep == 3*batches && j.State == "waiting" }
	e := servertest.Start(t, servertest.Options{})
	model := e.ModelDir
	c, ctx := connect(t, e)
	j := create(t, c, ctx, e.JobDocument(n, wholeJob(n, 1)))
	feed(t, c, ctx, j.ID, n, 0, batches, 1)
	j = await(t, c, ctx, j.ID, "the end", at)
	want, total := bits(t, c, ctx, j.ID), plan(t, j)
	e.Stop()

	for _, tc := range []struct {
		name, how, code string
		memory          int64
		losses          float64
	}{
		{"panic", "panic", "panic", 0, 0},
		{"lost device", "lose", "device_lost", 0, 1},
		{"lost device, jobs taking turns", "lose", "device_lost", total + total/2, 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			e := servertest.Start(t, servertest.Options{ModelDir: model, WrapDevice: newFragile(tc.how), DeviceMemory: tc.memory, SwapMemory: 4 * total})
			c, ctx := connect(t, e)
			good := create(t, c, ctx, e.JobDocument(n, wholeJob(n, 1)))
			doc := wholeJob(n, 2)
			doc["optimizer"] = map[string]any{"lr": poison}
			bad := create(t, c, ctx, e.JobDocument(n, doc))
			feed(t, c, ctx, good.ID, n, 0, 1, 1)
			await(t, c, ctx, good.ID, "step 1", func(j client.Job) bool { return j.Step >= 1 })
			feed(t, c, ctx, bad.ID, n, 0, 1, 2)
			j, err := c.Wait(ctx, bad.ID, 0, client.Job.Final)
			if err != nil || j.State != "failed" || j.LastError == nil || j.LastError.Code != tc.code || j.Step != 0 {
				t.Fatalf("the broken job is %s at step %d: %+v, %v", j.State, j.Step, j.LastError, err)
			}
			// The server takes work at once, or says that the job loads.
			for i := 1; i < batches; i++ {
				for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
					_, err := c.Submit(ctx, good.ID, servertest.Batch(fmt.Sprintf("b%d", i), 2, n, 0, uint64(100+i)), fmt.Sprintf("k%d", i))
					if err == nil {
						break
					}
					if client.Code(err) != "job_loading" || time.Now().After(deadline) {
						t.Fatal(err)
					}
				}
			}
			j = await(t, c, ctx, good.ID, "the end", at)
			if d := cmp.Diff(want, bits(t, c, ctx, good.ID)); d != "" {
				t.Errorf("checkpoints (-alone +beside the broken job):\n%s", d)
			}
			if j.Counts.Rollouts != 2*n*batches || j.Counts.GroupsTrained != 2*batches {
				t.Errorf("counts %+v", j.Counts)
			}
			if got := metric(t, e, "trainerd_device_lost_total", ""); got != tc.losses {
				t.Errorf("%v losses counted, expected %v", got, tc.losses)
			}
			if j, err := c.Job(ctx, bad.ID); err != nil || j.Resident {
				t.Errorf("the broken job holds the device: %v", err)
			}
			ask(t, c, ctx, good.ID)
		})
	}
}

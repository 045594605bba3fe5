package main

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"trainerd/client"
	"trainerd/model"
	"trainerd/model/hf"
	"trainerd/rollout"
)

// command runs trainerd with arguments and returns what it wrote.
func command(t *testing.T, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	var out, log bytes.Buffer
	root := newRoot()
	root.SetArgs(args)
	root.SetOut(&out)
	root.SetErr(&log)
	err = root.ExecuteContext(t.Context())
	return out.String(), log.String(), err
}

// boot starts a server on port 0 that ends with the test.
func boot(t *testing.T, change func(*Config)) (*Program, *client.Client) {
	t.Helper()
	c := DefaultConfig()
	dir := t.TempDir()
	c.Listen, c.Device, c.Workers, c.Data, c.Store = "127.0.0.1:0", "cpu", 1, filepath.Join(dir, "data"), "dir:"+filepath.Join(dir, "store")
	if change != nil {
		change(&c)
	}
	p := &Program{Config: c, Log: slog.New(slog.DiscardHandler)}
	if err := p.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if p.api == nil {
			return
		}
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		if err := p.Close(ctx); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	cl, err := client.New(p.URL(), client.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return p, cl
}

// tinyModel writes a byte-level model much smaller than the demo's.
func tinyModel(t *testing.T) string {
	t.Helper()
	c := byteModel()
	c.Hidden, c.FFN, c.Layers, c.Heads, c.KVHeads, c.HeadDim = 16, 16, 1, 2, 1, 8
	src, err := model.NewRandom(c, 1)
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "model")
	if err := hf.Write(t.Context(), hf.DirSink(dir), "", src, hf.WriteOptions{Carried: byteTokenizer()}); err != nil {
		t.Fatal(err)
	}
	return dir
}

// newJob creates a job on a tiny model and waits for the checkpoint that it starts from.
func newJob(t *testing.T, c *client.Client) client.Job {
	t.Helper()
	j, err := c.CreateJob(t.Context(), map[string]any{"model": map[string]any{"source": "dir:" + tinyModel(t)},
		"objective": map[string]any{"group_size": 2}, "batch": map[string]any{"groups_per_step": 1, "max_tokens_per_micro_batch": 256},
		"sampling": map[string]any{"max_sequences": 0, "max_tokens": 0}}, "")
	if err != nil {
		t.Fatal(err)
	}
	if j, err = c.Wait(t.Context(), j.ID, time.Millisecond, func(j client.Job) bool { return j.PolicyStep >= 0 || j.Final() }); err != nil || j.Final() {
		t.Fatalf("%+v, %v", j, err)
	}
	return j
}

// pairs is a batch of groups of two, each of 8 tokens a row.
func pairs(prefix string, groups int) *rollout.Batch {
	b := &rollout.Batch{HasReward: true}
	for i := range 2 * groups {
		b.Rollouts = append(b.Rollouts, rollout.Rollout{GroupID: prefix + string(rune('a'+i/2)), Prompt: []int32{1, 2, 3, 4},
			Completion: []int32{5, 6, int32(i % 2), 256}, Reward: float64(i % 2), PolicyStep: 0})
	}
	return b
}

func TestProgramServesAndCloses(t *testing.T) {
	p, c := boot(t, nil)
	if strings.HasSuffix(p.URL(), ":0") {
		t.Fatalf("no port was picked: %s", p.URL())
	}
	for _, path := range []string{"/healthz", "/readyz", "/metrics", "/openapi.json"} {
		res, err := http.Get(p.URL() + path)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if res.StatusCode != 200 {
			t.Errorf("%s: status %d", path, res.StatusCode)
		}
	}
	j := newJob(t, c)
	polling, end := context.WithCancel(t.Context()) // a long poll does not hold a stop up
	follow := make(chan error, 1)
	go func() {
		_, _, err := c.Newer(polling, j.ID, 0, time.Minute)
		follow <- err
	}()
	url := p.URL()
	began := time.Now()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := p.Close(ctx); err != nil {
		t.Fatal(err)
	}
	p.api = nil
	if took := time.Since(began); took > 15*time.Second {
		t.Errorf("the stop took %v", took)
	}
	if res, err := http.Get(url + "/healthz"); err == nil {
		res.Body.Close()
		t.Error("it still answers")
	}
	end() // or the client would repeat the call for a while
	<-follow
	// Everything was let go of: another server opens the same directories and knows the job.
	q := &Program{Config: p.Config, Log: p.Log}
	if err := q.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer q.Close(ctx)
	if c, err := client.New(q.URL(), client.Options{}); err != nil {
		t.Error(err)
	} else if got, err := c.Job(ctx, j.ID); err != nil || got.ID != j.ID {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestProgramRefuses(t *testing.T) {
	file := filepath.Join(tinyModel(t), "config.json")
	for _, tc := range []struct {
		name   string
		change func(*Config)
		want   string
	}{
		{"device", func(c *Config) { c.Device = "tpu" }, "device"},
		{"cuda number", func(c *Config) { c.Device = "cuda:x" }, "cuda:x"},
		{"workers of a GPU", func(c *Config) { c.Device, c.Workers = "cuda:0", 2 }, "workers"},
		{"store", func(c *Config) { c.Store = "ftp://x" }, "store"},
		{"bucket without an endpoint", func(c *Config) { c.Store, c.S3Endpoint = "s3://bucket/x", "" }, "endpoint"},
		{"data is a file", func(c *Config) { c.Data = file }, file},
		{"address in use", func(c *Config) { c.Listen = "127.0.0.1:1x" }, "listen"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := DefaultConfig()
			dir := t.TempDir()
			c.Listen, c.Device, c.Data, c.Store = "127.0.0.1:0", "cpu", filepath.Join(dir, "data"), "dir:"+filepath.Join(dir, "store")
			tc.change(&c)
			err := (&Program{Config: c, Log: slog.New(slog.DiscardHandler)}).Start(t.Context())
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Fatalf("%v, expected an error that names %s", err, tc.want)
			}
		})
	}
}

// TestLimitsAreUsed sets each limit of the configuration so low that it must be felt.
func TestLimitsAreUsed(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(*Config)
		groups int
		status int
		code   string
	}{
		{"none", func(*Config) {}, 3, 0, ""},
		{"max_body_bytes", func(c *Config) { c.MaxBodyBytes = 200 }, 3, 413, "body_too_large"},
		{"max_batch_rows", func(c *Config) { c.MaxBatchRows = 5 }, 3, 413, "too_many_rows"},
		{"max_batch_tokens", func(c *Config) { c.MaxBatchTokens = 47 }, 3, 413, "too_many_tokens"},
		{"max_queue_rows", func(c *Config) { c.MaxQueueRows = 5 }, 3, 413, "batch_too_large"},
		{"max_queue_tokens", func(c *Config) { c.MaxQueueTokens = 20 }, 3, 413, "batch_too_large"},
		{"max_queue_bytes", func(c *Config) { c.MaxQueueBytes = 80 }, 3, 413, "batch_too_large"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, c := boot(t, tc.change)
			j, err := c.CreateJob(t.Context(), map[string]any{"model": map[string]any{"source": "dir:" + tinyModel(t)}, "objective": map[string]any{"group_size": 2}}, "")
			if err != nil {
				t.Fatal(err)
			}
			_, err = c.Submit(t.Context(), j.ID, pairs("g", tc.groups), "")
			if client.Code(err) != tc.code {
				t.Errorf("%v, expected %q", err, tc.code)
			}
		})
	}
}

// TestDeviceMemoryIsUsed: jobs that fit one at a time are refused without host
// memory to put them in, and taken with it.
func TestDeviceMemoryIsUsed(t *testing.T) {
	doc := map[string]any{"model": map[string]any{"source": "dir:" + tinyModel(t)}, "objective": map[string]any{"group_size": 2},
		"batch": map[string]any{"max_tokens_per_micro_batch": 64}, "sampling": map[string]any{"max_sequences": 0}}
	const memory = 600 << 10 // one takes 409984 bytes
	for _, swap := range []int64{0, -1, 10 << 20} {
		_, c := boot(t, func(c *Config) { c.DeviceMemory, c.SwapMemory = memory, swap })
		if _, err := c.CreateJob(t.Context(), doc, ""); err != nil {
			t.Fatal(err)
		}
		_, err := c.CreateJob(t.Context(), doc, "")
		if want := map[bool]string{true: "does_not_fit"}[swap == 0]; client.Code(err) != want {
			t.Errorf("swap_memory %d: a second job gives %v, expected %q", swap, err, want)
		}
		if _, err := c.CreateJob(t.Context(), map[string]any{"model": doc["model"], "objective": doc["objective"]}, ""); client.Code(err) != "does_not_fit" {
			t.Errorf("a job that is too large for the device: %v", err)
		}
	}
}

// TestCaptureLimitIsUsed holds max_capture_bytes to what it says.
func TestCaptureLimitIsUsed(t *testing.T) {
	for limit, synchronous := range map[int64]int64{1: 1, 1 << 20: 0} {
		_, c := boot(t, func(cfg *Config) { cfg.MaxCaptureBytes = limit })
		j := newJob(t, c)
		j, err := c.Wait(t.Context(), j.ID, time.Millisecond, func(j client.Job) bool { return j.PolicyStep == 0 || j.Final() })
		if err != nil || j.Publication.Synchronous != synchronous || (j.Publication.Holds != "") != (synchronous > 0) {
			t.Errorf("limit %d: %+v, %v", limit, j.Publication, err)
		}
	}
}

// TestPeakGivesMFU holds peak_tflops to what it says: the metric is there when
// it is set, and not otherwise.
func TestPeakGivesMFU(t *testing.T) {
	for _, peak := range []float64{0, 1e-3} {
		_, c := boot(t, func(cfg *Config) { cfg.PeakTFLOPS = peak })
		j := newJob(t, c)
		if _, err := c.Submit(t.Context(), j.ID, pairs("g", 1), ""); err != nil {
			t.Fatal(err)
		}
		j, err := c.Wait(t.Context(), j.ID, time.Millisecond, func(j client.Job) bool { return j.Step >= 1 || j.Final() })
		if err != nil || j.Step != 1 {
			t.Fatalf("%+v, %v", j, err)
		}
		steps, err := c.Steps(t.Context(), j.ID, 0)
		if err != nil || len(steps) != 1 {
			t.Fatalf("%d steps, %v", len(steps), err)
		}
		if mfu, ok := steps[0].Metrics["mfu"]; ok != (peak > 0) || ok && !(mfu > 0) {
			t.Errorf("peak %v: mfu %v, %v", peak, mfu, ok)
		}
	}
}

func TestServe(t *testing.T) {
	dir := t.TempDir()
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	pr, pw := io.Pipe()
	var log bytes.Buffer
	root := newRoot()
	root.SetArgs([]string{"--json", "serve", "--listen", "127.0.0.1:0", "--device", "cpu", "--workers", "1", "--data", filepath.Join(dir, "data"), "--s3-secret-key", "hunter2"})
	root.SetOut(pw)
	root.SetErr(&log)
	done := make(chan error, 1)
	go func() {
		done <- root.ExecuteContext(ctx)
		pw.Close()
	}()
	var first struct{ Msg, Addr string }
	if err := json.NewDecoder(pr).Decode(&first); err != nil || first.Msg != "listening" {
		t.Fatalf("%+v, %v", first, err)
	}
	go io.Copy(io.Discard, pr)
	res, err := http.Get("http://" + first.Addr + "/healthz")
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	stop() // as a signal does
	select {
	case err := <-done:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(30 * time.Second):
		t.Fatal("it does not stop")
	}
	lines := strings.Split(strings.TrimSpace(log.String()), "\n")
	for _, l := range lines {
		var v struct{ Time, Level, Msg string }
		if err := json.Unmarshal([]byte(l), &v); err != nil || v.Msg == "" {
			t.Errorf("not a JSON log line: %q", l)
		}
	}
	if !strings.Contains(lines[0], `"s3_secret_key":"[redacted]"`) || strings.Contains(log.String(), "hunter2") {
		t.Errorf("configuration: %s", lines[0])
	}
}

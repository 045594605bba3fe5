package servertest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/labstack/echo/v4"

	"trainerd/kernels"
	"trainerd/kernels/cpu"
	"trainerd/model"
	"trainerd/model/hf"
	"trainerd/rollout"
	"trainerd/server"
	"trainerd/storage"
	"trainerd/storage/disk"
	"trainerd/trainer"
)

// TinyConfig is a Llama of two layers and 64 tokens: token 0 begins, token 1 ends.
func TinyConfig() model.Config {
	return model.Config{Type: "llama", Vocab: 64, Hidden: 32, FFN: 48, Layers: 2, Heads: 4, KVHeads: 2, HeadDim: 8, MaxPositions: 128,
		RopeTheta: 10000, NormEps: 1e-5, Tied: true, InitStd: 0.3, BOS: 0, EOS: []int32{1}}
}

// WriteModel writes a random model as a Hugging Face directory and returns its path.
func WriteModel(t testing.TB, cfg model.Config, seed uint64, dtype string) string {
	t.Helper()
	src, err := model.NewRandom(cfg, seed)
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	dir := filepath.Join(t.TempDir(), "model")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := hf.Write(context.Background(), hf.DirSink(dir), "", src, hf.WriteOptions{DType: dtype}); err != nil {
		t.Fatal(err)
	}
	return dir
}

// DefaultWrap, when set, wraps every server whose Options name no Wrap.
var DefaultWrap func(testing.TB) func(http.Handler) http.Handler

// Options change what Start builds. Zero values mean the defaults.
type Options struct {
	Limits       trainer.Limits
	ServerLimits server.Limits
	Wrap         func(http.Handler) http.Handler // around the server, to look at what passes
	ModelDir     string                          // default: a new TinyConfig model
	DType        string                          // of the default model; "" is F32
	WrapStore    func(storage.Blob) storage.Blob // around the checkpoint store, to inject failures
	OpenStore    func(ctx context.Context, url string) (storage.Blob, error)
	Guard        echo.MiddlewareFunc
	Sources      func(source string) (string, error)
	Logger       *slog.Logger

	DeviceMemory int64         // limit of the CPU device; 0: none
	SwapMemory   int64         // host memory for models that do not fit beside others
	SwapHold     time.Duration // how long a model keeps the device
	BeforeSync   func()        // before each fsync of a spool: a slow disk
	// WrapDevice wraps the device, to inject failures. A lost one is opened again,
	// wrapped anew.
	WrapDevice func(kernels.Device) kernels.Device
	// BeforeReopen is called before a lost device is opened again; its error is what
	// the opening ends in.
	BeforeReopen func() error
}

// OpenDevice opens the device of every Env, with so many bytes; 0: no limit. Builds
// for another device than the CPU set it.
var OpenDevice = func(memory int64) (kernels.Device, error) { return cpu.New(1, cpu.Memory(memory)) }

// Env is a running server. Its directories outlive Stop, for a restart.
type Env struct {
	URL      string
	Manager  *trainer.Manager
	Server   *server.Server
	Handler  http.Handler // Server, with what is wrapped around it
	ModelDir string
	DataDir  string
	StoreDir string

	opts  Options
	close func()
}

// Start boots a server that ends with the test.
func Start(t testing.TB, o Options) *Env {
	t.Helper()
	if o.Wrap == nil && DefaultWrap != nil {
		o.Wrap = DefaultWrap(t)
	}
	e := &Env{opts: o, ModelDir: o.ModelDir, DataDir: t.TempDir(), StoreDir: t.TempDir()}
	if e.ModelDir == "" {
		dtype := o.DType
		if dtype == "" {
			dtype = "F32"
		}
		e.ModelDir = WriteModel(t, TinyConfig(), 1, dtype)
	}
	e.Boot(t)
	t.Cleanup(func() { e.Stop() })
	return e
}

// Boot starts the server on the directories, after Start or Stop.
func (e *Env) Boot(t testing.TB) {
	t.Helper()
	dev, err := e.openDevice()
	if err != nil {
		t.Fatal(err)
	}
	e.boot(t, dev)
}

func (e *Env) openDevice() (kernels.Device, error) {
	dev, err := OpenDevice(e.opts.DeviceMemory)
	if err == nil && e.opts.WrapDevice != nil {
		dev = e.opts.WrapDevice(dev)
	}
	return dev, err
}

func (e *Env) reopenDevice() (kernels.Device, error) {
	if e.opts.BeforeReopen != nil {
		if err := e.opts.BeforeReopen(); err != nil {
			return nil, err
		}
	}
	return e.openDevice()
}

func (e *Env) boot(t testing.TB, dev kernels.Device) {
	store, err := disk.Open(e.StoreDir)
	if err != nil {
		t.Fatal(err)
	}
	blob := storage.Blob(store)
	if e.opts.WrapStore != nil {
		blob = e.opts.WrapStore(blob)
	}
	e.Manager, err = trainer.NewManager(trainer.Options{Device: dev, DataDir: e.DataDir, Store: blob, OpenStore: e.opts.OpenStore,
		Version: "test", Limits: e.opts.Limits, Sources: e.opts.Sources, Logger: e.opts.Logger,
		Reopen: e.reopenDevice, DeviceMemory: e.opts.DeviceMemory, SwapMemory: e.opts.SwapMemory, SwapHold: e.opts.SwapHold, BeforeSync: e.opts.BeforeSync})
	if err != nil {
		t.Fatal(err)
	}
	e.Server = server.New(server.Options{Manager: e.Manager, Version: "test", Limits: e.opts.ServerLimits, Guard: e.opts.Guard, Logger: e.opts.Logger})
	e.Handler = e.Server
	if e.opts.Wrap != nil {
		e.Handler = e.opts.Wrap(e.Server)
	}
	hs := e.Server.HTTPServer()
	hs.Handler = e.Handler
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	e.URL = "http://" + l.Addr().String()
	served := make(chan struct{})
	go func() { hs.Serve(l); close(served) }()
	e.close = func() {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		e.Server.Close()
		if err := hs.Shutdown(ctx); err != nil {
			t.Errorf("shut down HTTP: %v", err)
			hs.Close()
		}
		<-served
		if err := e.Manager.Close(ctx); err != nil {
			t.Errorf("close manager: %v", err)
		}
		store.Close()
		if dev := e.Manager.Device(); dev != nil { // nil: lost, and nobody needed it since
			if err := dev.Close(); err != nil {
				t.Errorf("close device: %v", err)
			}
		}
	}
}

// Stop ends the server gracefully. It may be called again.
func (e *Env) Stop() {
	if e.close != nil {
		e.close()
		e.close = nil
	}
}

// JobDocument returns a job on the tiny model: groups of n, two groups a step.
// Extra members replace those of the same name.
func (e *Env) JobDocument(n int, extra map[string]any) map[string]any {
	doc := map[string]any{
		"name":      "test",
		"model":     map[string]any{"source": "dir:" + e.ModelDir},
		"objective": map[string]any{"name": "sa_grpo", "group_size": n},
		"optimizer": map[string]any{"lr": 1e-2},
		"batch":     map[string]any{"groups_per_step": 2, "max_tokens_per_micro_batch": 64},
		"sampling":  map[string]any{"max_sequences": 8, "max_tokens": 512},
	}
	for k, v := range extra {
		doc[k] = v
	}
	return doc
}

// Batch makes groups of n random completions each; the reward is the share of
// tokens under 32. Ids begin with the name.
func Batch(name string, groups, n int, policyStep int64, seed uint64) *rollout.Batch {
	rng := rand.New(rand.NewPCG(seed, 7))
	b := &rollout.Batch{HasReward: true}
	for g := range groups {
		prompt := tokens(rng, 3+rng.IntN(5))
		for range n {
			r := rollout.Rollout{GroupID: fmt.Sprintf("%s-%d", name, g), Prompt: prompt, Completion: tokens(rng, 1+rng.IntN(6)), PolicyStep: policyStep}
			for _, id := range r.Completion {
				if id < 32 {
					r.Reward += 1 / float64(len(r.Completion))
				}
			}
			b.Rollouts = append(b.Rollouts, r)
		}
	}
	return b
}

func tokens(rng *rand.Rand, n int) []int32 {
	out := make([]int32, n)
	for i := range out {
		out[i] = 2 + rng.Int32N(62)
	}
	return out
}

// Crash returns a server that was started on copies of the directories as they
// are now: what a start after kill -9 at this moment finds. The first one goes on.
func (e *Env) Crash(t testing.TB) *Env {
	t.Helper()
	o := e.opts
	o.ModelDir = e.ModelDir
	c := &Env{opts: o, ModelDir: e.ModelDir}
	for from, to := range map[string]*string{e.DataDir: &c.DataDir, e.StoreDir: &c.StoreDir} {
		for try := 0; ; try++ {
			*to = t.TempDir()
			err := os.CopyFS(*to, os.DirFS(from))
			if err == nil {
				break
			}
			if !errors.Is(err, fs.ErrNotExist) || try == 100 { // else retention deleted what was about to be copied
				t.Fatal(err)
			}
		}
	}
	c.Boot(t)
	t.Cleanup(func() { c.Stop() })
	return c
}

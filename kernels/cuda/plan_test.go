package cuda

import (
	"context"
	"slices"
	"strings"
	"testing"

	"trainerd/internal/fault"
	"trainerd/kernels"
	"trainerd/model"
)

// cardWith is a device that computes nothing with so much memory free as an 80 GB
// card has beside its context: scratch and reserves are the real device's.
func cardWith(t *testing.T, free int64) *Device {
	t.Helper()
	r := &recorder{next: 1 << 20, room: free, fail: map[string]error{}}
	d, err := newDevice(kernels.Info{Name: "cuda:0", Model: "NVIDIA H100 80GB HBM3"}, Options{}, func() (driver, error) { return r, nil })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.Close() })
	return d
}

// qwen7b has the shape of Qwen2.5-7B.
var qwen7b = model.Config{Type: "qwen2", QKVBias: true, MaxPositions: 32768, RopeTheta: 1e6, NormEps: 1e-6, InitStd: 0.02, BOS: -1,
	Hidden: 3584, FFN: 18944, Layers: 28, Heads: 28, KVHeads: 4, HeadDim: 128, Vocab: 152064}

// shapes is a source that has tensors and no values: a job that does not fit must not read any.
type shapes struct {
	model.Source
	t *testing.T
}

func (s shapes) Config() model.Config { return qwen7b }
func (s shapes) DType() string        { return "BF16" }
func (s shapes) Names() []string      { s.t.Error("the source was asked for tensors"); return nil }

// Test7BOn80GB plans a full-parameter job of 7.6 billion parameters at the
// SecLoop load: four groups of a prompt of 1536 tokens and seven completions
// are 12,314 tokens, of which 6,170 are predicted, in one micro-batch.
func Test7BOn80GB(t *testing.T) {
	const gib = 1 << 30
	free := int64(78.5 * gib) // of 79.1 GiB, with a context of 0.6
	d := cardWith(t, free)
	budget := d.Info().MemFree
	opt := model.Options{Train: true, MaxTokens: 12314, MaxPredictions: 6170, CompactMoments: true, BF16Gradients: true}
	got, plan, ok, err := model.Fit(d, qwen7b, opt, budget)
	if err != nil {
		t.Fatal(err)
	}
	n := float64(qwen7b.Parameters())
	t.Logf("%.3f billion parameters on %.2f GiB: recompute %v and %d layers more, %.2f GiB in all", n/1e9, float64(budget)/gib, got.Recompute, got.RecomputeMore, float64(plan.Total)/gib)
	for purpose, bytes := range plan.Bytes {
		t.Logf("%-10s %6.2f GiB, %5.2f bytes a parameter", purpose, float64(bytes)/gib, float64(bytes)/n)
	}
	if !ok || plan.Total > budget {
		t.Fatalf("it does not fit: %v", plan)
	}
	// 2 and 2 bytes of a weight, 2 of its gradient, 1 + 4/128 and 2 of its moments;
	// padding to 128 elements adds less than 1e-5 of them.
	for purpose, want := range map[string]float64{"weights": 4, "gradients": 2, "optimizer": 3 + 4.0/128} {
		if per := float64(plan.Bytes[purpose]) / n; per < want || per > want*(1+1e-5) {
			t.Errorf("%s take %v bytes a parameter, expected %v", purpose, per, want)
		}
	}
	// As much as fits is kept: one layer less recomputed would not.
	less := got
	if less.RecomputeMore--; less.RecomputeMore < 0 {
		less.Recompute, less.RecomputeMore = got.Recompute-1, qwen7b.Layers-1
	}
	if p, err := model.Plan(d, qwen7b, less); err != nil || p.Total <= budget {
		t.Errorf("with a layer less recomputed it would fit too: %v, %v", p, err)
	}

	// The same with a job's default budget of tokens and its sampler's cache.
	whole := opt
	whole.MaxTokens, whole.MaxPredictions, whole.SampleSlots, whole.SampleTokens = 16384, 0, 32, 8192
	as, wholePlan, ok, err := model.Fit(d, qwen7b, whole, budget)
	if err != nil || !ok {
		t.Fatalf("a job of default budget and sampler does not fit: %v, %v", wholePlan, err)
	}
	t.Logf("default batch and sampler: recompute %v and %d layers more, %v", as.Recompute, as.RecomputeMore, wholePlan)

	// Any one of the formats in float32 is refused with the plan, before anything is read or allocated.
	for name, o := range map[string]model.Options{
		"float32":           {},
		"float32 moments":   {BF16Gradients: true},
		"float32 gradients": {CompactMoments: true},
	} {
		o.Train, o.MaxTokens, o.MaxPredictions, o.Recompute = true, opt.MaxTokens, opt.MaxPredictions, model.RecomputeLayers
		if _, plan, ok, err := model.Fit(d, qwen7b, o, budget); err != nil || ok {
			t.Errorf("%s: fits with %v, %v", name, plan, err)
		}
		_, err := model.Load(context.Background(), d, shapes{t: t}, o)
		f, is := fault.As(err)
		if !is || f.Kind != fault.TooLarge || !strings.Contains(err.Error(), "gradients") || !strings.Contains(err.Error(), "optimizer ") {
			t.Fatalf("%s: %v, expected a refusal with the plan", name, err)
		}
		var told, want []string
		for _, x := range f.Fields {
			told = append(told, x.Name)
		}
		if !o.CompactMoments {
			want = append(want, "optimizer.moments")
		}
		if !o.BF16Gradients {
			want = append(want, "optimizer.gradients")
		}
		if !slices.Equal(told, want) {
			t.Errorf("%s: told to change %q, expected %q", name, told, want)
		}
		if free := d.Info().MemFree; free != budget {
			t.Errorf("%s: %d bytes were taken", name, budget-free)
		}
		t.Logf("%s: %v", name, err)
	}
}

// TestHostMoments7B: with its float32 moments in host memory the same job fits with
// gradients in either format, and the card's plan has neither moment.
func TestHostMoments7B(t *testing.T) {
	const gib = 1 << 30
	d := cardWith(t, int64(78.5*gib))
	budget := d.Info().MemFree
	for _, bf16 := range []bool{true, false} {
		opt := model.Options{Train: true, MaxTokens: 12314, MaxPredictions: 6170, BF16Gradients: bf16, HostMoments: true}
		got, plan, ok, err := model.Fit(d, qwen7b, opt, budget)
		if err != nil || !ok {
			t.Fatalf("bfloat16 gradients %v: fits %v with %v, %v", bf16, ok, plan, err)
		}
		n := qwen7b.Parameters()
		if plan.Host < 8*n || plan.Host > 8*n+8*n/1000 || plan.Bytes["optimizer"] > 1024 {
			t.Errorf("%v for %d parameters: expected their float32 moments, 8 bytes each, on the host and next to nothing of them on the card", plan, n)
		}
		t.Logf("bfloat16 gradients %v: recompute %v and %d layers more, %v", bf16, got.Recompute, got.RecomputeMore, plan)
	}
}

// TestAllocHost: host memory takes nothing of the card's, and is freed like the card's.
func TestAllocHost(t *testing.T) {
	d, r := record(t)
	room, freed := r.room, r.freed
	b, err := d.AllocHost("optimizer", kernels.F32, 1000)
	if err != nil {
		t.Fatal(err)
	}
	d.Free(b)
	if err := d.Sync(); err != nil {
		t.Fatal(err)
	}
	if r.hostBytes != 4096 || r.room != room || r.freed != freed+1 {
		t.Errorf("%d bytes of the host, %d of the card taken, %d frees; expected 4096, 0 and 1", r.hostBytes, room-r.room, r.freed-freed)
	}
}

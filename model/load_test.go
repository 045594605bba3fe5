package model_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"gorgonia.org/tensor"

	"trainerd/internal/fault"
	"trainerd/kernels"
	"trainerd/model"
)

// TestRandomSource pins what NewRandom gives: its moments, its constants, and
// its dependence on seed and name only.
func TestRandomSource(t *testing.T) {
	cfg := configs()["qwen2"]
	cfg.InitStd, cfg.Hidden, cfg.Vocab = 0, 64, 300
	src, err := model.NewRandom(cfg, 7)
	if err != nil {
		t.Fatal(err)
	}
	x := readTensor(t, src, "model.embed_tokens.weight")
	mean, sq := 0.0, 0.0
	for _, v := range x {
		mean += float64(v) / float64(len(x))
		sq += float64(v) * float64(v) / float64(len(x))
	}
	// 19200 draws: standard errors are 0.02/139 = 1.4e-4 and 0.02/196 = 1e-4.
	if math.Abs(mean) > 7e-4 || math.Abs(math.Sqrt(sq)-0.02) > 5e-4 {
		t.Errorf("mean %v, deviation %v, expected 0 and 0.02", mean, math.Sqrt(sq))
	}
	for name, want := range map[string]float32{"model.norm.weight": 1, "model.layers.1.self_attn.k_proj.bias": 0, "model.layers.0.input_layernorm.weight": 1} {
		if got := readTensor(t, src, name); slices.Min(got) != want || slices.Max(got) != want {
			t.Errorf("%s is not all %v", name, want)
		}
	}
	again, _ := model.NewRandom(cfg, 7)
	if !slices.Equal(x, readTensor(t, again, "model.embed_tokens.weight")) {
		t.Error("the same seed gave other weights")
	}
	other, _ := model.NewRandom(cfg, 8)
	if slices.Equal(x, readTensor(t, other, "model.embed_tokens.weight")) ||
		slices.Equal(readTensor(t, src, "model.layers.0.mlp.up_proj.weight"), readTensor(t, src, "model.layers.1.mlp.up_proj.weight")) {
		t.Error("another seed or name gave the same weights")
	}
	count := int64(0)
	for _, name := range src.Names() {
		shape, _ := src.Shape(name)
		n := int64(1)
		for _, d := range shape {
			n *= int64(d)
		}
		count += n
	}
	if count != cfg.Parameters() {
		t.Errorf("%d parameters in all tensors, Parameters says %d", count, cfg.Parameters())
	}
}

// TestExportRoundTrip: what Load reads, Export gives back bit for bit.
func TestExportRoundTrip(t *testing.T) {
	for name, cfg := range configs() {
		src := randomSource(t, cfg, 3)
		m := load(t, newDevice(t), src, model.Options{MaxTokens: 8})
		want := map[string][]float32{}
		for _, n := range src.Names() {
			want[n] = readTensor(t, src, n)
		}
		sameBits(t, name, weightsOf(t, m), want)
		if got := m.Export().DType(); got != src.DType() {
			t.Errorf("%s: dtype %s, expected the source's %s", name, got, src.DType())
		}
	}
}

// altered is a source with something wrong with it.
type altered struct {
	model.Source
	missing, extra, reshaped, nan, unreadable string
	reads                                     *int
}

func (a altered) Names() []string {
	names := slices.DeleteFunc(a.Source.Names(), func(n string) bool { return n == a.missing })
	if a.extra != "" {
		names = append(names, a.extra)
	}
	return names
}

func (a altered) Shape(name string) ([]int, bool) {
	if name == a.missing {
		return nil, false
	}
	if name == a.reshaped {
		return []int{3, 3}, true
	}
	return a.Source.Shape(name)
}

var errRead = errors.New("bad sector")

func (a altered) Read(name string, dst *tensor.Dense) error {
	if a.reads != nil {
		*a.reads++
	}
	if name == a.unreadable {
		return fmt.Errorf("read %s: %w", name, errRead)
	}
	err := a.Source.Read(name, dst)
	if name == a.nan {
		dst.Float32s()[1] = float32(math.NaN())
	}
	return err
}

func TestLoadRefuses(t *testing.T) {
	cfg := configs()["llama-mha"]
	dev, src := newDevice(t), randomSource(t, cfg, 3)
	opt := trainOptions()
	const up = "model.layers.0.mlp.up_proj.weight"
	for name, a := range map[string]altered{
		"missing": {missing: up}, "extra": {extra: "model.layers.7.mlp.up_proj.weight"}, "shape": {reshaped: up}, "nan": {nan: up},
	} {
		a.Source = src
		want := up
		if a.extra != "" {
			want = a.extra
		}
		_, err := model.Load(context.Background(), dev, a, opt)
		if err == nil || fault.KindOf(err) != fault.Invalid || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, expected an invalid fault that names %s", name, err, want)
		}
	}
	if _, err := model.Load(context.Background(), dev, altered{Source: src, unreadable: up}, opt); !errors.Is(err, errRead) {
		t.Errorf("unreadable: %v", err)
	}
	if _, err := model.Load(context.Background(), dev, altered{Source: src, extra: "model.layers.0.self_attn.rotary_emb.inv_freq"}, opt); err != nil {
		t.Errorf("a tensor that follows from the config: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := model.Load(ctx, dev, src, opt); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	for field, o := range map[string]model.Options{
		"max_tokens_per_micro_batch": {Train: true}, "max_predictions": {MaxTokens: 1, MaxPredictions: -1},
		"sample_slots": {MaxTokens: 1, SampleSlots: -1}, "sample_tokens": {MaxTokens: 1, SampleSlots: 1}, "recompute": {MaxTokens: 1, Recompute: 9},
	} {
		if _, err := model.Load(context.Background(), dev, src, o); err == nil || !strings.Contains(err.Error(), field) {
			t.Errorf("%+v: %v, expected a fault that names %s", o, err, field)
		}
	}
}

// TestTooLarge: a model that does not fit is refused before any weight is read,
// with the plan and a micro-batch that does fit.
func TestTooLarge(t *testing.T) {
	cfg := configs()["qwen3-tied"]
	cfg.Layers, cfg.FFN = 1, 1<<18 // 3 MB of activations a token: few tokens fill a machine
	dev := newDevice(t)
	opt := trainOptions()
	small, err := model.Plan(dev, cfg, opt)
	if err != nil {
		t.Fatal(err)
	}
	opt.MaxTokens = int(2 * small.Free / (small.Bytes["scratch"] / int64(opt.MaxTokens)))
	reads := 0
	_, err = model.Load(context.Background(), dev, altered{Source: randomSource(t, cfg, 1), reads: &reads}, opt)
	e, ok := fault.As(err)
	if !ok || e.Kind != fault.TooLarge || !strings.Contains(e.Msg, "scratch") || len(e.Fields) == 0 {
		t.Fatalf("%v, expected a too_large fault with the plan", err)
	}
	if reads != 0 {
		t.Errorf("%d tensors were read", reads)
	}
	var total, free int64
	var fits int
	if _, err := fmt.Sscanf(e.Msg, "the model does not fit on cpu: %d bytes of %d free", &total, &free); err != nil || total <= free {
		t.Fatalf("%q: %v, expected more bytes than there are", e.Msg, err)
	}
	if _, err := fmt.Sscanf(e.Fields[0].Expected, "at most %d", &fits); err != nil || e.Fields[0].Name != "max_tokens_per_micro_batch" {
		t.Fatalf("fields %v, expected a max_tokens_per_micro_batch that fits", e.Fields)
	}
	for tokens, want := range map[int]bool{fits: true, fits + fits/32: false} {
		opt.MaxTokens = tokens
		p, err := model.Plan(dev, cfg, opt)
		if err != nil || (p.Total <= free) != want {
			t.Errorf("%d tokens take %d of %d bytes (%v), expected fits to be %v", tokens, p.Total, free, err, want)
		}
	}

	cfg.Layers, cfg.FFN, cfg.Hidden = 40, 1<<20, 1<<14
	if _, err := model.Load(context.Background(), dev, altered{Source: randomSource(t, cfg, 1)}, trainOptions()); fault.KindOf(err) != fault.TooLarge ||
		!strings.Contains(err.Error(), "a smaller model") {
		t.Errorf("%v, expected advice to take a smaller model", err)
	}
}

// TestPlanIsExact: the arena is as large as the largest call needs, no call
// needs more, and the largest call needs all of it.
func TestPlanIsExact(t *testing.T) {
	for name, cfg := range configs() {
		t.Run(name, func(t *testing.T) {
			seed := rand.Uint64()
			rng := rand.New(rand.NewPCG(seed, 0))
			for _, opt := range []model.Options{
				{Train: true, MaxTokens: 40, SampleSlots: 6, SampleTokens: 200},
				{Train: true, MaxTokens: 40, MaxPredictions: 7, Recompute: model.RecomputeLayers, Reference: true},
				{Train: true, MaxTokens: 40, MaxPredictions: 7, Recompute: model.RecomputeMLP, RecomputeMore: 1, BF16Gradients: true, CompactMoments: true},
				{Train: true, MaxTokens: 40, BF16Gradients: true},
				{MaxTokens: 40},
				{MaxTokens: 2, SampleSlots: 50, SampleTokens: 500},
			} {
				dev := newDevice(t)
				plan, err := model.Plan(dev, cfg, opt)
				if err != nil {
					t.Fatal(err)
				}
				m := load(t, dev, randomSource(t, cfg, 1), opt)
				if m.Plan().Total != plan.Total {
					t.Errorf("Load planned %d bytes, Plan said %d", m.Plan().Total, plan.Total)
				}
				for range 5 {
					s := []sample{{randomTokens(rng, 1+rng.IntN(max(1, opt.MaxTokens-1)), cfg.Vocab), nil}}
					for left := opt.MaxTokens - len(s[0].prompt) + 1; left > 0; {
						n := 1 + rng.IntN(left)
						s[0].completions = append(s[0].completions, randomTokens(rng, n, cfg.Vocab))
						left -= max(n-1, 1)
					}
					b := pack(s, true)
					if _, err := m.Score(b, model.Policy, 1); err != nil {
						t.Fatalf("seed %d: %v", seed, err)
					}
					if opt.Train {
						if _, err := m.ForwardBackward(b, crossEntropy(len(b.Rows))); err != nil {
							t.Fatalf("seed %d: %v", seed, err)
						}
					}
					if opt.SampleSlots > 0 {
						generate(t, m, model.GenerateRequest{Prompts: [][]int32{s[0].prompt}, N: opt.SampleSlots + 3, MaxTokens: 3, Temperature: 1, Seed: 1})
					}
				}
				if got, limit := m.ScratchPeak(), plan.Bytes["scratch"]; got > limit || got < limit/2 {
					t.Errorf("%+v: scratch peak %d of %d planned", opt, got, limit)
				}
				if opt.SampleSlots == 0 {
					b := largest(opt, cfg.Vocab)
					if opt.Train {
						l := crossEntropy(len(b.Rows))
						l.Old, l.Ref, l.Adv, l.TIS = l.Weight, l.Weight, l.Weight, l.Weight
						_, err = m.ForwardBackward(b, l)
					} else {
						_, err = m.Score(b, model.Policy, 1)
					}
					if got, want := m.ScratchPeak(), plan.Bytes["scratch"]; err != nil || got != want {
						t.Errorf("%+v: the largest batch takes %d bytes of scratch (%v), planned were %d", opt, got, err, want)
					}
				}
				m.Close()
			}
		})
	}
}

// largest is the batch that takes the most memory: every token its own segment.
func largest(opt model.Options, vocab int) *model.Batch {
	b := &model.Batch{}
	for i := range opt.MaxTokens {
		b.Tokens = append(b.Tokens, int32(i%vocab))
		b.Positions = append(b.Positions, 0)
		b.Segments = append(b.Segments, model.Segment{Start: i, Len: 1, Prefix: -1})
		b.Rows = append(b.Rows, int32(i))
		b.Targets = append(b.Targets, 0)
	}
	return b
}

func TestConfigValidate(t *testing.T) {
	for field, change := range map[string]func(*model.Config){
		"model_type":              func(c *model.Config) { c.Type = "gpt2" },
		"vocab_size":              func(c *model.Config) { c.Vocab = 0 },
		"hidden_size":             func(c *model.Config) { c.Hidden = -1 },
		"intermediate_size":       func(c *model.Config) { c.FFN = 1 << 40 },
		"num_hidden_layers":       func(c *model.Config) { c.Layers = 1 << 13 },
		"num_attention_heads":     func(c *model.Config) { c.Heads = 0 },
		"num_key_value_heads":     func(c *model.Config) { c.KVHeads = 3 },
		"head_dim":                func(c *model.Config) { c.HeadDim = 7 },
		"max_position_embeddings": func(c *model.Config) { c.MaxPositions = 0 },
		"rope_theta":              func(c *model.Config) { c.RopeTheta = math.NaN() },
		"rms_norm_eps":            func(c *model.Config) { c.NormEps = 0 },
		"initializer_range":       func(c *model.Config) { c.InitStd = -1 },
		"attention_bias":          func(c *model.Config) { c.QKVBias = true },
		"qk_norm":                 func(c *model.Config) { c.QKNorm = true },
		"bos_token_id":            func(c *model.Config) { c.BOS = -2 },
		"eos_token_id":            func(c *model.Config) { c.EOS = []int32{-1} },
	} {
		cfg := configs()["llama-tied"]
		change(&cfg)
		e, ok := fault.As(cfg.Validate())
		if !ok || e.Kind != fault.Invalid || !slices.ContainsFunc(e.Fields, func(f fault.Field) bool { return f.Name == field }) {
			t.Errorf("%s: %v, expected an invalid fault that names it", field, e)
		}
	}
	for what, change := range map[string]func(*model.Config){
		"parameters": func(c *model.Config) { c.Hidden, c.FFN, c.Layers = 1<<22, 1<<24, 1<<10 },
		"heads of":   func(c *model.Config) { c.Heads, c.HeadDim = 1<<14, 1<<14 },
	} {
		cfg := configs()["llama-tied"]
		change(&cfg)
		if err := cfg.Validate(); err == nil || !strings.Contains(err.Error(), what) {
			t.Errorf("%s: %v, expected a fault about the product", what, err)
		}
	}
	for name, cfg := range configs() {
		if err := cfg.Validate(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestBatchValidate(t *testing.T) {
	cfg := configs()["llama-tied"]
	m := load(t, newDevice(t), randomSource(t, cfg, 1), model.Options{Train: true, MaxTokens: 8})
	for name, c := range map[string]struct {
		change func(*model.Batch, *model.Loss)
		field  string
	}{
		"no tokens":   {func(b *model.Batch, _ *model.Loss) { b.Tokens = nil }, "tokens"},
		"token":       {func(b *model.Batch, _ *model.Loss) { b.Tokens[1] = int32(cfg.Vocab) }, "tokens (row 1)"},
		"positions":   {func(b *model.Batch, _ *model.Loss) { b.Positions = b.Positions[1:] }, "positions"},
		"position":    {func(b *model.Batch, _ *model.Loss) { b.Positions[0] = int32(cfg.MaxPositions) }, "positions (row 0)"},
		"no rows":     {func(b *model.Batch, _ *model.Loss) { b.Rows, b.Targets = nil, nil }, "rows"},
		"row":         {func(b *model.Batch, _ *model.Loss) { b.Rows[0] = -1 }, "rows (row 0)"},
		"targets":     {func(b *model.Batch, _ *model.Loss) { b.Targets = b.Targets[1:] }, "targets"},
		"target":      {func(b *model.Batch, _ *model.Loss) { b.Targets[2] = 99 }, "targets (row 2)"},
		"gap":         {func(b *model.Batch, _ *model.Loss) { b.Segments[1].Start++ }, "segments (row 1)"},
		"uncovered":   {func(b *model.Batch, _ *model.Loss) { b.Segments = b.Segments[:1] }, "segments"},
		"negative":    {func(b *model.Batch, _ *model.Loss) { b.Segments[1].Len = -1 }, "segments (row 1)"},
		"prefix":      {func(b *model.Batch, _ *model.Loss) { b.Segments[1].Prefix = 5 }, "segments (row 1)"},
		"own prefix":  {func(b *model.Batch, _ *model.Loss) { b.Segments[1].Prefix = 1 }, "segments (row 1)"},
		"too large":   {func(b *model.Batch, _ *model.Loss) { *b = *pack([]sample{{make([]int32, 8), [][]int32{{1, 2}}}}, true) }, "max_tokens_per_micro_batch"},
		"weights":     {func(_ *model.Batch, l *model.Loss) { l.Weight = nil }, "loss.weight"},
		"advantages":  {func(_ *model.Batch, l *model.Loss) { l.Surrogate.Kind = kernels.SurrogateClip }, "loss.adv"},
		"reference":   {func(_ *model.Batch, l *model.Loss) { l.Surrogate.Beta = 1 }, "loss.ref"},
		"old":         {func(_ *model.Batch, l *model.Loss) { l.Old = []float32{1} }, "loss.old"},
		"temperature": {func(_ *model.Batch, l *model.Loss) { l.Temperature = 0 }, "temperature"},
		"coefficients": {func(_ *model.Batch, l *model.Loss) {
			l.Coefficients = func(model.Scores) (a, b []float32) { return nil, nil }
		}, "loss.coefficients"},
	} {
		b := pack([]sample{{[]int32{1, 2, 3}, [][]int32{{4, 5}, {6}}}}, true)
		l := crossEntropy(len(b.Rows))
		c.change(b, &l)
		_, err := m.ForwardBackward(b, l)
		if k := fault.KindOf(err); err == nil || (k != fault.Invalid && k != fault.TooLarge) || !strings.Contains(err.Error(), c.field) {
			t.Errorf("%s: %v, expected a fault that names %s", name, err, c.field)
		}
	}
	b := pack([]sample{{[]int32{1, 2, 3}, [][]int32{{4, 5}, {6}}}}, true)
	if _, err := m.Score(b, model.Reference, 1); fault.KindOf(err) != fault.Invalid || err == nil {
		t.Errorf("reference that was not loaded: %v", err)
	}
	if _, err := m.Score(b, model.Policy, float32(math.Inf(1))); fault.KindOf(err) != fault.Invalid || err == nil {
		t.Errorf("infinite temperature: %v", err)
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Score(b, model.Policy, 1); fault.KindOf(err) != fault.Unavailable || err == nil {
		t.Errorf("closed model: %v", err)
	}
}

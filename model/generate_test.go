package model_test

import (
	"context"
	"errors"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"trainerd/internal/fault"
	"trainerd/model"
)

func sampleOptions(slots, rows int) model.Options {
	return model.Options{MaxTokens: 64, SampleSlots: slots, SampleTokens: rows}
}

func generate(t *testing.T, m *model.Model, r model.GenerateRequest) []model.Completion {
	t.Helper()
	out, err := m.Generate(context.Background(), r)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func request(rng *rand.Rand, vocab int) model.GenerateRequest {
	r := model.GenerateRequest{N: 4, MaxTokens: 9, Temperature: 0.8, TopP: 1, Seed: 11, Stop: []int32{2, 3}}
	for range 5 {
		r.Prompts = append(r.Prompts, randomTokens(rng, 1+rng.IntN(8), vocab))
	}
	r.Prompts = append(r.Prompts, r.Prompts[1]) // the same prompt twice shares a cache
	return r
}

// TestGenerateScores: the sampler's log-probs are those of the training path,
// which runs without a cache, and completions end as they say.
func TestGenerateScores(t *testing.T) {
	for name, cfg := range configs() {
		t.Run(name, func(t *testing.T) {
			m := load(t, newDevice(t), randomSource(t, cfg, 7), sampleOptions(32, 512))
			r := request(rand.New(rand.NewPCG(1, 2)), cfg.Vocab)
			for _, mode := range []struct{ temperature, topP float32 }{{0.8, 1}, {1.3, 0.7}, {0, 1}} {
				r.Temperature, r.TopP = mode.temperature, mode.topP
				out := generate(t, m, r)
				if len(out) != len(r.Prompts)*r.N {
					t.Fatalf("%d completions, expected %d", len(out), len(r.Prompts)*r.N)
				}
				for i, c := range out {
					last := c.Tokens[len(c.Tokens)-1]
					if c.Prompt != i/r.N || c.Stopped != slices.Contains(r.Stop, last) || len(c.Tokens) > r.MaxTokens ||
						(!c.Stopped && len(c.Tokens) != r.MaxTokens) || len(c.LogProbs) != len(c.Tokens) {
						t.Fatalf("completion %d is %+v", i, c)
					}
					for _, id := range c.Tokens[:len(c.Tokens)-1] {
						if slices.Contains(r.Stop, id) {
							t.Fatalf("completion %d goes on after a stop: %v", i, c.Tokens)
						}
					}
					temperature := mode.temperature
					if temperature == 0 {
						temperature = 1
					}
					s, err := m.Score(pack([]sample{{r.Prompts[c.Prompt], [][]int32{c.Tokens}}}, true), model.Policy, temperature)
					if err != nil {
						t.Fatal(err)
					}
					for j, lp := range c.LogProbs {
						if d := math.Abs(float64(lp - s.LogProb[j])); !(d <= 2e-5) {
							t.Errorf("completion %d token %d: log-prob %v, scored %v", i, j, lp, s.LogProb[j])
						}
					}
				}
			}
		})
	}
}

// TestGenerateDoesNotDependOnBatching: slots, cache size, prefill chunks and
// company change nothing.
func TestGenerateDoesNotDependOnBatching(t *testing.T) {
	for name, cfg := range configs() {
		t.Run(name, func(t *testing.T) {
			src, dev := randomSource(t, cfg, 8), newDevice(t)
			r := request(rand.New(rand.NewPCG(3, 4)), cfg.Vocab)
			want := generate(t, load(t, dev, src, sampleOptions(32, 512)), r)
			lengths := map[int]bool{}
			for _, c := range want {
				lengths[len(c.Tokens)] = true
			}
			if len(lengths) < 3 {
				t.Fatalf("completions of lengths %v only: nothing leaves the batch early", lengths)
			}
			for _, opt := range []model.Options{
				{MaxTokens: 64, SampleSlots: 3, SampleTokens: 512},
				{MaxTokens: 64, SampleSlots: 1, SampleTokens: 16},
				{MaxTokens: 64, SampleSlots: 7, SampleTokens: 40},
				{MaxTokens: 3, SampleSlots: 5, SampleTokens: 300},
			} {
				got := generate(t, load(t, dev, src, opt), r)
				if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b float32) bool { return math.Abs(float64(a-b)) < 1e-5 })); diff != "" {
					t.Errorf("%+v: (-crowd +got)\n%s", opt, diff)
				}
			}
			// Completion (0,0) alone: same seed, no company.
			alone := r
			alone.Prompts, alone.N = r.Prompts[:1], 1
			got := generate(t, load(t, dev, src, sampleOptions(1, 64)), alone)
			if diff := cmp.Diff(want[0].Tokens, got[0].Tokens); diff != "" {
				t.Errorf("alone: (-crowd +alone)\n%s", diff)
			}
		})
	}
}

// TestGenerateFollowsTheDistribution draws many first tokens and compares their
// frequencies with the scored probabilities: with n draws a frequency's standard
// deviation is sqrt(p(1-p)/n); five of them happen once in 1.7 million.
func TestGenerateFollowsTheDistribution(t *testing.T) {
	cfg := configs()["qwen2"]
	m := load(t, newDevice(t), randomSource(t, cfg, 9), model.Options{MaxTokens: 64, SampleSlots: 64, SampleTokens: 256})
	const n = 4000
	prompt := []int32{4, 5, 6}
	count := make([]int, cfg.Vocab)
	for _, c := range generate(t, m, model.GenerateRequest{Prompts: [][]int32{prompt}, N: n, MaxTokens: 1, Temperature: 1.5, Seed: 3}) {
		count[c.Tokens[0]]++
	}
	var completions [][]int32
	for id := range cfg.Vocab {
		completions = append(completions, []int32{int32(id)})
	}
	s, err := m.Score(pack([]sample{{prompt, completions}}, true), model.Policy, 1.5)
	if err != nil {
		t.Fatal(err)
	}
	for id, lp := range s.LogProb {
		p := math.Exp(float64(lp))
		if d, limit := math.Abs(float64(count[id])/n-p), 5*math.Sqrt(p*(1-p)/n); d > limit {
			t.Errorf("token %d: frequency %v, probability %v", id, float64(count[id])/n, p)
		}
	}
}

func TestGenerateSeeds(t *testing.T) {
	cfg := configs()["llama-tied"]
	m := load(t, newDevice(t), randomSource(t, cfg, 7), sampleOptions(32, 512))
	r := request(rand.New(rand.NewPCG(1, 2)), cfg.Vocab)
	a, again := generate(t, m, r), generate(t, m, r)
	if diff := cmp.Diff(a, again); diff != "" {
		t.Errorf("the same request twice: %s", diff)
	}
	r.Seed++
	if b := generate(t, m, r); cmp.Equal(a, b) {
		t.Error("another seed gave the same completions")
	}
	if cmp.Equal(a[0].Tokens, a[1].Tokens) && cmp.Equal(a[1].Tokens, a[2].Tokens) && cmp.Equal(a[2].Tokens, a[3].Tokens) {
		t.Error("four completions of a prompt are equal")
	}
}

// countdown is a context that is cancelled when it has been asked n times.
type countdown struct {
	context.Context
	n int
}

func (c *countdown) Err() error {
	if c.n--; c.n < 0 {
		return context.Canceled
	}
	return nil
}

// TestGenerateStops: a cancelled call ends between two tokens and leaves the model usable.
func TestGenerateStops(t *testing.T) {
	cfg := configs()["qwen3-tied"]
	m := load(t, newDevice(t), randomSource(t, cfg, 7), sampleOptions(32, 512))
	r := request(rand.New(rand.NewPCG(1, 2)), cfg.Vocab)
	want := generate(t, m, r)
	for n := range 4 {
		if out, err := m.Generate(&countdown{context.Background(), n}, r); !errors.Is(err, context.Canceled) || out != nil {
			t.Errorf("cancelled after %d questions: %d completions, %v", n, len(out), err)
		}
	}
	if diff := cmp.Diff(want, generate(t, m, r)); diff != "" {
		t.Errorf("after cancelled calls: %s", diff)
	}
}

func TestGenerateRefuses(t *testing.T) {
	cfg := configs()["llama-tied"]
	dev, src := newDevice(t), randomSource(t, cfg, 7)
	m := load(t, dev, src, sampleOptions(2, 20))
	good := model.GenerateRequest{Prompts: [][]int32{{1, 2}}, N: 1, MaxTokens: 4, Temperature: 1}
	for name, c := range map[string]struct {
		change func(*model.GenerateRequest)
		kind   fault.Kind
	}{
		"no prompts":      {func(r *model.GenerateRequest) { r.Prompts = nil }, fault.Invalid},
		"empty prompt":    {func(r *model.GenerateRequest) { r.Prompts = [][]int32{{1}, {}} }, fault.Invalid},
		"token":           {func(r *model.GenerateRequest) { r.Prompts = [][]int32{{1, int32(cfg.Vocab)}} }, fault.Invalid},
		"n":               {func(r *model.GenerateRequest) { r.N = 0 }, fault.Invalid},
		"max tokens":      {func(r *model.GenerateRequest) { r.MaxTokens = 0 }, fault.Invalid},
		"positions":       {func(r *model.GenerateRequest) { r.MaxTokens = cfg.MaxPositions }, fault.Invalid},
		"temperature":     {func(r *model.GenerateRequest) { r.Temperature = float32(math.NaN()) }, fault.Invalid},
		"top-p":           {func(r *model.GenerateRequest) { r.TopP = 1.5 }, fault.Invalid},
		"more than cache": {func(r *model.GenerateRequest) { r.MaxTokens = 30 }, fault.TooLarge},
	} {
		r := good
		c.change(&r)
		if _, err := m.Generate(context.Background(), r); err == nil || fault.KindOf(err) != c.kind {
			t.Errorf("%s: %v, expected a fault of kind %v", name, err, c.kind)
		}
	}
	if _, err := load(t, dev, src, model.Options{MaxTokens: 8}).Generate(context.Background(), good); fault.KindOf(err) != fault.Unavailable {
		t.Errorf("without slots: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := m.Generate(ctx, good); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

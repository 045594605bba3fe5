package model_test

import (
	"context"
	"math"
	"math/rand/v2"
	"testing"

	"gorgonia.org/tensor"

	"trainerd/kernels"
	"trainerd/kernels/cpu"
	"trainerd/model"
)

// configs are tiny decoders of every type: GQA and MHA, tied and untied, head
// dimensions that are and are not hidden/heads.
func configs() map[string]model.Config {
	base := model.Config{Vocab: 29, Hidden: 24, FFN: 20, Layers: 2, Heads: 4, KVHeads: 2, HeadDim: 6, MaxPositions: 64,
		RopeTheta: 100, NormEps: 1e-5, InitStd: 0.3, BOS: -1, EOS: []int32{2}}
	llama := base
	llama.Type, llama.Tied = "llama", true
	mha := base
	mha.Type, mha.KVHeads, mha.Layers = "llama", 4, 1
	odd := base
	odd.Type, odd.Heads, odd.KVHeads, odd.HeadDim, odd.Tied = "llama", 3, 1, 8, true
	qwen2 := base
	qwen2.Type, qwen2.QKVBias = "qwen2", true
	qwen3 := base
	qwen3.Type, qwen3.QKNorm, qwen3.HeadDim, qwen3.Tied = "qwen3", true, 8, true
	return map[string]model.Config{"llama-tied": llama, "llama-mha": mha, "llama-mqa": odd, "qwen2": qwen2, "qwen3-tied": qwen3}
}

func newDevice(t testing.TB) kernels.Device {
	t.Helper()
	// One worker: on shapes this small a second only waits, and results do not depend on it.
	dev, err := cpu.New(1)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dev.Close() })
	return dev
}

// jiggled adds noise to norms and biases, so that a wrong use of them shows.
type jiggled struct {
	model.Source
}

func (j jiggled) Read(name string, dst *tensor.Dense) error {
	if err := j.Source.Read(name, dst); err != nil {
		return err
	}
	if len(dst.Shape()) == 1 {
		rng := rand.New(rand.NewPCG(uint64(len(name)), uint64(name[len(name)-9])))
		for i, x := range dst.Float32s() {
			dst.Float32s()[i] = x + float32(rng.NormFloat64())*0.2
		}
	}
	return nil
}

func randomSource(t testing.TB, cfg model.Config, seed uint64) model.Source {
	t.Helper()
	src, err := model.NewRandom(cfg, seed)
	if err != nil {
		t.Fatal(err)
	}
	return jiggled{src}
}

func load(t testing.TB, dev kernels.Device, src model.Source, opt model.Options) *model.Model {
	t.Helper()
	m, err := model.Load(context.Background(), dev, src, opt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

// sample is a prompt with completions, as a group of rollouts has them.
type sample struct {
	prompt      []int32
	completions [][]int32
}

func randomTokens(rng *rand.Rand, n, vocab int) []int32 {
	out := make([]int32, n)
	for i := range out {
		out[i] = int32(rng.IntN(vocab))
	}
	return out
}

func randomSamples(rng *rand.Rand, vocab int) []sample {
	var out []sample
	for range 2 {
		s := sample{prompt: randomTokens(rng, 1+rng.IntN(7), vocab)}
		for range 3 {
			s.completions = append(s.completions, randomTokens(rng, 1+rng.IntN(5), vocab))
		}
		out = append(out, s)
	}
	return out
}

// pack lays samples into one batch; with shared false every completion brings
// its own copy of the prompt. Predictions come in the order of the completions.
func pack(samples []sample, shared bool) *model.Batch {
	b := &model.Batch{}
	add := func(tokens []int32, pos, prefix int) int {
		b.Segments = append(b.Segments, model.Segment{Start: len(b.Tokens), Len: len(tokens), Prefix: prefix})
		for i, id := range tokens {
			b.Tokens = append(b.Tokens, id)
			b.Positions = append(b.Positions, int32(pos+i))
		}
		return len(b.Segments) - 1
	}
	for _, s := range samples {
		prompt := -1
		for _, c := range s.completions {
			if prompt < 0 || !shared {
				prompt = add(s.prompt, 0, -1)
			}
			last := b.Segments[prompt].Start + len(s.prompt) - 1
			own := add(c[:len(c)-1], len(s.prompt), prompt)
			for i, id := range c {
				row := last
				if i > 0 {
					row = b.Segments[own].Start + i - 1
				}
				b.Rows = append(b.Rows, int32(row))
				b.Targets = append(b.Targets, id)
			}
		}
	}
	return b
}

func trainOptions() model.Options { return model.Options{Train: true, MaxTokens: 128} }

// TestScoreMatchesReference compares log-probs and entropies of packed batches
// with the float64 decoder. Float32 through two layers of unit-size values is
// good to a few 1e-6; a wrong mask, angle or head mapping misses by 1e-1.
func TestScoreMatchesReference(t *testing.T) {
	for name, cfg := range configs() {
		t.Run(name, func(t *testing.T) {
			src := randomSource(t, cfg, 1)
			m := load(t, newDevice(t), src, model.Options{MaxTokens: 128, MaxPredictions: 5})
			ref := newRefModel(t, src)
			seed := rand.Uint64()
			rng := rand.New(rand.NewPCG(seed, 0))
			samples := randomSamples(rng, cfg.Vocab)
			for _, shared := range []bool{true, false} {
				got, err := m.Score(pack(samples, shared), model.Policy, 0.7)
				if err != nil {
					t.Fatal(err)
				}
				i := 0
				for _, s := range samples {
					for _, c := range s.completions {
						lp, ent := ref.logProbs(append(append([]int32(nil), s.prompt...), c...), len(s.prompt), 0.7)
						for j := range lp {
							if d := math.Abs(float64(got.LogProb[i]) - lp[j]); !(d < 2e-5) {
								t.Errorf("seed %d shared %v: log-prob %d is %v, expected %v", seed, shared, i, got.LogProb[i], lp[j])
							}
							if d := math.Abs(float64(got.Entropy[i]) - ent[j]); !(d < 2e-5) {
								t.Errorf("seed %d shared %v: entropy %d is %v, expected %v", seed, shared, i, got.Entropy[i], ent[j])
							}
							i++
						}
					}
				}
				if i != len(got.LogProb) {
					t.Fatalf("%d log-probs, expected %d", len(got.LogProb), i)
				}
			}
		})
	}
}

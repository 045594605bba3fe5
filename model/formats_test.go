package model_test

import (
	"bytes"
	"math"
	"math/rand/v2"
	"strings"
	"testing"

	"trainerd/internal/fault"
	"trainerd/kernels/cpu"
	"trainerd/model"
)

// formats are the ways in which a model can keep what it trains with.
func formats() map[string]model.Options {
	out := map[string]model.Options{}
	for name, set := range map[string]func(*model.Options){
		"float32":            func(*model.Options) {},
		"compact moments":    func(o *model.Options) { o.CompactMoments = true },
		"bfloat16 gradients": func(o *model.Options) { o.BF16Gradients = true },
		"both":               func(o *model.Options) { o.CompactMoments, o.BF16Gradients = true, true },
	} {
		o := trainOptions()
		o.RoundingSeed = 11
		set(&o)
		out[name] = o
	}
	return out
}

// tinyStateModel is the model of the frozen state files.
var tinyStateModel = model.Config{Type: "qwen3", Vocab: 7, Hidden: 4, FFN: 3, Layers: 1, Heads: 2, KVHeads: 1, HeadDim: 2, MaxPositions: 64,
	RopeTheta: 100, NormEps: 1e-5, QKNorm: true, InitStd: 0.3, BOS: -1}

// TestStateOfAnotherFormat: a state is refused by a model whose moments are
// kept differently, by the name of the setting, and nothing is changed.
func TestStateOfAnotherFormat(t *testing.T) {
	dev, src := newDevice(t), randomSource(t, tinyStateModel, 1)
	for from, opt := range formats() {
		m := load(t, dev, src, opt)
		train(t, m, 1)
		var state bytes.Buffer
		if err := m.SaveState(&state); err != nil {
			t.Fatal(err)
		}
		for to, other := range formats() {
			target := load(t, dev, src, other)
			err := target.LoadState(bytes.NewReader(state.Bytes()))
			if opt.CompactMoments == other.CompactMoments {
				if err != nil {
					t.Errorf("%s to %s: %v", from, to, err)
				}
				continue
			}
			f, ok := fault.As(err)
			if !ok || f.Kind != fault.Invalid || len(f.Fields) != 1 || f.Fields[0].Name != "optimizer.moments" {
				t.Errorf("%s to %s: %v, expected a refusal that names optimizer.moments", from, to, err)
			}
			if target.Steps() != 0 {
				t.Errorf("%s to %s: %d steps after a refusal", from, to, target.Steps())
			}
			train(t, target, 1) // which a half loaded model refuses
		}
	}
}

// TestFormatsAreRepeatable: the same steps give the same bits, with any number
// of workers; another seed gives others where there is rounding by chance.
func TestFormatsAreRepeatable(t *testing.T) {
	cfg := configs()["qwen3-tied"]
	for name, opt := range formats() {
		run := func(workers int, seed uint64) map[string][]float32 {
			dev, err := cpu.New(workers)
			if err != nil {
				t.Fatal(err)
			}
			defer dev.Close()
			o := opt
			o.RoundingSeed = seed
			m := load(t, dev, randomSource(t, cfg, 4), o)
			defer m.Close()
			for range 2 {
				twoMicroBatches(t, m)
			}
			return weightsOf(t, m)
		}
		want := run(1, 5)
		sameBits(t, name+", again", run(1, 5), want)
		sameBits(t, name+", with 3 workers", run(3, 5), want)
		if other := run(1, 6); name != "float32" && equalBits(other, want) {
			t.Errorf("%s: another seed rounds the same", name)
		} else if name == "float32" && !equalBits(other, want) {
			t.Errorf("%s: the seed makes a difference", name)
		}
	}
}

func equalBits(a, b map[string][]float32) bool {
	for name, x := range a {
		for i := range x {
			if math.Float32bits(x[i]) != math.Float32bits(b[name][i]) {
				return false
			}
		}
	}
	return true
}

// twoMicroBatches runs a step that accumulates.
func twoMicroBatches(t *testing.T, m *model.Model) {
	t.Helper()
	for i := range 2 {
		b := pack(randomSamples(rand.New(rand.NewPCG(uint64(m.Steps()), uint64(i))), m.Config().Vocab), true)
		if _, err := m.ForwardBackward(b, crossEntropy(len(b.Rows))); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := m.OptimStep(model.AdamW{LR: 0.01, Beta1: 0.9, Beta2: 0.95, Eps: 1e-8, WeightDecay: 0.1, MaxGradNorm: 1}); err != nil {
		t.Fatal(err)
	}
}

// TestBF16Gradients: after one micro-batch every gradient is the float32 one,
// rounded to nearest. A tied embedding is added to twice. After K more, each
// sum was rounded K times to a neighbour: an error without bias of at most one
// unit, 2^-7 of the sum so far, half of it in deviation. With S the largest
// norm of a partial sum the errors' norm has a mean square of at most
// K·(2^-8·S)²; three of the roots are allowed, and 1-cosine half their square.
func TestBF16Gradients(t *testing.T) {
	for name, cfg := range configs() {
		t.Run(name, func(t *testing.T) {
			seed := rand.Uint64()
			t.Logf("seed %d", seed)
			dev, src := newDevice(t), randomSource(t, cfg, 3)
			opt := formats()["bfloat16 gradients"]
			opt.RoundingSeed = seed
			exact, kept := load(t, dev, src, trainOptions()), load(t, dev, src, opt)
			largest := map[string]float64{}
			const micros = 12
			for k := range micros {
				b := pack(randomSamples(rand.New(rand.NewPCG(seed, uint64(k))), cfg.Vocab), true)
				for _, m := range []*model.Model{exact, kept} {
					if _, err := m.ForwardBackward(b, crossEntropy(len(b.Rows))); err != nil {
						t.Fatal(err)
					}
				}
				want, got := gradients(t, exact), gradients(t, kept)
				roundings := float64(k)
				if cfg.Tied {
					roundings += float64(k) + 1
				}
				for tensor, w := range want {
					largest[tensor] = max(largest[tensor], norm(w))
					if k == 0 && !(cfg.Tied && strings.Contains(tensor, "embed")) {
						for i := range w {
							bits := math.Float32bits(w[i])
							if nearest := math.Float32frombits((bits + 0x7fff + bits>>16&1) &^ 0xffff); got[tensor][i] != nearest {
								t.Fatalf("%s[%d] is %v, expected %v, which is %v rounded", tensor, i, got[tensor][i], nearest, w[i])
							}
						}
						continue
					}
					diff, dot := make([]float32, len(w)), 0.0
					for i := range w {
						diff[i] = got[tensor][i] - w[i]
						dot += float64(got[tensor][i]) * float64(w[i])
					}
					// the first micro-batch's rounding to nearest is a half of one of the others
					limit := 3 * math.Sqrt(roundings+1) * 0x1p-8 * largest[tensor]
					if d := norm(diff); !(d <= limit) {
						t.Errorf("micro-batch %d: %s is off by %.3g, expected at most %.3g", k, tensor, d, limit)
					}
					if k == micros-1 && tensor == "model.layers.0.mlp.down_proj.weight" {
						t.Logf("%s after %d micro-batches: off by %.2e of its norm, 1-cosine %.2e", tensor, micros, norm(diff)/norm(w), 1-dot/(norm(w)*norm(got[tensor])))
					}
				}
			}
		})
	}
}

// TestHostMomentsNeedADevice: a device that is the host refuses them by name, before anything is allocated.
func TestHostMomentsNeedADevice(t *testing.T) {
	dev := newDevice(t)
	_, err := model.Plan(dev, tinyStateModel, model.Options{Train: true, MaxTokens: 8, HostMoments: true})
	f, ok := fault.As(err)
	if !ok || f.Kind != fault.Invalid || len(f.Fields) != 1 || f.Fields[0].Name != "optimizer.moments_in" {
		t.Fatalf("%v, expected a refusal that names optimizer.moments_in", err)
	}
}

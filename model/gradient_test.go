package model_test

import (
	"math"
	"math/rand/v2"
	"testing"

	"trainerd/kernels"
	"trainerd/kernels/cpu"
	"trainerd/model"
)

// lossRows are per-prediction inputs of a clipped surrogate that puts rows on
// every branch: clipped above, clipped below, unclipped, masked.
func lossRows(rng *rand.Rand, fresh []float32) model.Loss {
	n := len(fresh)
	l := model.Loss{Temperature: 0.9,
		Surrogate: kernels.Surrogate{EpsLow: 0.2, EpsHigh: 0.28, Beta: 0.1, EntropyCoef: 0.05},
		Old:       make([]float32, n), Ref: make([]float32, n), Adv: make([]float32, n), Weight: make([]float32, n), TIS: make([]float32, n)}
	for i := range n {
		// Ratios of exp(±0.1), inside, and exp(±0.6), outside: away from the kinks
		// at log 0.8 and log 1.28, so that differences are smooth.
		l.Old[i] = fresh[i] + []float32{-0.6, -0.1, 0.1, 0.6}[rng.IntN(4)]
		l.Ref[i] = fresh[i] + float32(rng.NormFloat64())*0.3
		l.Adv[i] = float32(rng.NormFloat64())
		l.Weight[i] = float32(rng.IntN(4)) / 8
		l.TIS[i] = 0.5 + rng.Float32()
	}
	return l
}

// refLoss is the same loss in float64 over the reference decoder.
func refLoss(r *refModel, samples []sample, l model.Loss) float64 {
	loss, i := 0.0, 0
	for _, s := range samples {
		for _, c := range s.completions {
			lp, ent := r.logProbs(append(append([]int32(nil), s.prompt...), c...), len(s.prompt), float64(l.Temperature))
			for j := range lp {
				g := math.Exp(lp[j] - float64(l.Old[i]))
				a := float64(l.Adv[i])
				clipped := math.Min(math.Max(g, 1-float64(l.Surrogate.EpsLow)), 1+float64(l.Surrogate.EpsHigh))
				d := float64(l.Ref[i]) - lp[j]
				loss += float64(l.Weight[i]) * (-math.Min(g*a, clipped*a)*float64(l.TIS[i]) +
					float64(l.Surrogate.Beta)*(math.Exp(d)-d-1) - float64(l.Surrogate.EntropyCoef)*ent[j])
				i++
			}
		}
	}
	return loss
}

// gradient runs one ForwardBackward from a clean slate and returns all gradients by name.
func gradient(t testing.TB, m *model.Model, b *model.Batch, l model.Loss) map[string][]float32 {
	t.Helper()
	m.ZeroGrad()
	if _, err := m.ForwardBackward(b, l); err != nil {
		t.Fatal(err)
	}
	return gradients(t, m)
}

func gradients(t testing.TB, m *model.Model) map[string][]float32 {
	t.Helper()
	out := map[string][]float32{}
	g := m.Gradient()
	for _, name := range g.Names() {
		out[name] = readTensor(t, g, name)
	}
	return out
}

func norm(parts ...[]float32) float64 {
	ss := 0.0
	for _, p := range parts {
		for _, x := range p {
			ss += float64(x) * float64(x)
		}
	}
	return math.Sqrt(ss)
}

func globalNorm(g map[string][]float32) float64 {
	var all [][]float32
	for _, x := range g {
		all = append(all, x)
	}
	return norm(all...)
}

// sameGradient fails unless every tensor agrees to tol of its own norm, or of a
// thousandth of the global one where its own is tiny.
func sameGradient(t *testing.T, what string, got, want map[string][]float32, tol float64) {
	t.Helper()
	all := globalNorm(want)
	if all == 0 || len(got) != len(want) {
		t.Fatalf("%s: %d and %d tensors of global norm %v", what, len(got), len(want), all)
	}
	for name, w := range want {
		diff := make([]float32, len(w))
		for i := range w {
			diff[i] = got[name][i] - w[i]
		}
		if d, limit := norm(diff), tol*math.Max(norm(w), 1e-3*all); !(d <= limit) {
			t.Errorf("%s: %s differs by %.3g, expected at most %.3g (norm %.3g)", what, name, d, limit, norm(w))
		}
	}
}

// TestGradientMatchesDifferences holds the gradient against central differences
// of the float64 reference along random directions, one tensor at a time (all
// its elements move at once), and along single elements. The difference's own
// error is about h² = 1e-8 relative; the rest is float32.
func TestGradientMatchesDifferences(t *testing.T) {
	for name, cfg := range configs() {
		t.Run(name, func(t *testing.T) {
			seed := rand.Uint64()
			t.Logf("seed %d", seed)
			rng := rand.New(rand.NewPCG(seed, 0))
			src := randomSource(t, cfg, 2)
			m := load(t, newDevice(t), src, trainOptions())
			ref := newRefModel(t, src)
			samples := randomSamples(rng, cfg.Vocab)
			b := pack(samples, true)
			fresh, err := m.Score(b, model.Policy, 0.9)
			if err != nil {
				t.Fatal(err)
			}
			l := lossRows(rng, fresh.LogProb)
			l.Weight[0] = 1
			g := gradient(t, m, b, l)
			all := globalNorm(g)
			const h = 1e-4
			for tensor, w := range ref.w {
				for trial := range 3 {
					direction := make([]float64, len(w))
					if trial == 0 {
						direction[rng.IntN(len(w))] = 1
					} else {
						ss := 0.0
						for i := range direction {
							direction[i] = rng.NormFloat64()
							ss += direction[i] * direction[i]
						}
						for i := range direction {
							direction[i] /= math.Sqrt(ss)
						}
					}
					at := func(x float64) float64 {
						old := append([]float64(nil), w...)
						for i := range w {
							w[i] += x * direction[i]
						}
						defer copy(w, old)
						return refLoss(ref, samples, l)
					}
					want := (at(h) - at(-h)) / (2 * h)
					got := 0.0
					for i, x := range g[tensor] {
						got += float64(x) * direction[i]
					}
					if d := math.Abs(got - want); !(d <= 1e-4*math.Max(norm(g[tensor]), 1e-3*all)) {
						t.Errorf("%s trial %d: derivative %.6g, expected %.6g (tensor norm %.3g)", tensor, trial, got, want, norm(g[tensor]))
					}
				}
			}
		})
	}
}

// TestGradientInvariance: the gradient does not depend on whether prompts are
// shared, how the rows are cut into micro-batches and head chunks, their order, or what is recomputed.
func TestGradientInvariance(t *testing.T) {
	for name, cfg := range configs() {
		t.Run(name, func(t *testing.T) {
			seed := rand.Uint64()
			t.Logf("seed %d", seed)
			rng := rand.New(rand.NewPCG(seed, 0))
			src, dev := randomSource(t, cfg, 3), newDevice(t)
			m := load(t, dev, src, trainOptions())
			samples := randomSamples(rng, cfg.Vocab)
			b := pack(samples, true)
			fresh, err := m.Score(b, model.Policy, 0.9)
			if err != nil {
				t.Fatal(err)
			}
			l := lossRows(rng, fresh.LogProb)
			l.Weight[0] = 1
			want := gradient(t, m, b, l)
			sameGradient(t, "prompt repeated", gradient(t, m, pack(samples, false), l), want, 1e-5)
			for what, tc := range map[string]struct {
				opt model.Options
				tol float64
			}{
				"head in chunks":                      {model.Options{Train: true, MaxTokens: 128, MaxPredictions: 3}, 1e-5},
				"mlp recomputed":                      {model.Options{Train: true, MaxTokens: 128, Recompute: model.RecomputeMLP}, 0},
				"layers recomputed":                   {model.Options{Train: true, MaxTokens: 128, Recompute: model.RecomputeLayers}, 0},
				"mlp recomputed in the first":         {model.Options{Train: true, MaxTokens: 128, RecomputeMore: 1}, 0},
				"the first recomputed, mlp in others": {model.Options{Train: true, MaxTokens: 128, Recompute: model.RecomputeMLP, RecomputeMore: 1}, 0},
			} {
				other := load(t, dev, src, tc.opt)
				sameGradient(t, what, gradient(t, other, b, l), want, tc.tol)
				other.Close()
			}

			// One micro-batch per completion, in reverse order.
			m.ZeroGrad()
			end := len(b.Rows)
			for i := len(samples) - 1; i >= 0; i-- {
				for j := len(samples[i].completions) - 1; j >= 0; j-- {
					c := samples[i].completions[j]
					part := l
					from := end - len(c)
					part.Old, part.Ref, part.Adv, part.Weight, part.TIS = l.Old[from:end], l.Ref[from:end], l.Adv[from:end], l.Weight[from:end], l.TIS[from:end]
					end = from
					if _, err := m.ForwardBackward(pack([]sample{{samples[i].prompt, [][]int32{c}}}, true), part); err != nil {
						t.Fatal(err)
					}
				}
			}
			sameGradient(t, "micro-batches", gradients(t, m), want, 1e-5)

			// Segments the other way round: completions stand before their prompts.
			flipped, order := flip(b)
			part := l
			for _, p := range []*[]float32{&part.Old, &part.Ref, &part.Adv, &part.Weight, &part.TIS} {
				src := *p
				*p = make([]float32, len(src))
				for i, o := range order {
					(*p)[i] = src[o]
				}
			}
			sameGradient(t, "segments reversed", gradient(t, m, flipped, part), want, 1e-5)
		})
	}
}

// flip reverses the order of segments and of predictions; order[i] is where
// prediction i was before.
func flip(b *model.Batch) (*model.Batch, []int) {
	out, n := &model.Batch{}, len(b.Segments)
	moved := make([]int32, len(b.Tokens))
	for i := n - 1; i >= 0; i-- {
		s := b.Segments[i]
		at := len(out.Tokens)
		for k := range s.Len {
			moved[s.Start+k] = int32(at + k)
		}
		out.Tokens = append(out.Tokens, b.Tokens[s.Start:s.Start+s.Len]...)
		out.Positions = append(out.Positions, b.Positions[s.Start:s.Start+s.Len]...)
		prefix := -1
		if s.Prefix >= 0 {
			prefix = n - 1 - s.Prefix
		}
		out.Segments = append(out.Segments, model.Segment{Start: at, Len: s.Len, Prefix: prefix})
	}
	var order []int
	for i := len(b.Rows) - 1; i >= 0; i-- {
		out.Rows = append(out.Rows, moved[b.Rows[i]])
		out.Targets = append(out.Targets, b.Targets[i])
		order = append(order, i)
	}
	return out, order
}

// TestCoefficients: giving the surrogate's own derivatives by callback is the
// same as fusing it, with the head in one piece and in chunks.
func TestCoefficients(t *testing.T) {
	for name, cfg := range configs() {
		rng := rand.New(rand.NewPCG(5, 0))
		src, dev := randomSource(t, cfg, 4), newDevice(t)
		for _, rows := range []int{0, 4} {
			opt := trainOptions()
			opt.MaxPredictions = rows
			m := load(t, dev, src, opt)
			b := pack(randomSamples(rng, cfg.Vocab), true)
			fresh, err := m.Score(b, model.Policy, 0.9)
			if err != nil {
				t.Fatal(err)
			}
			l := lossRows(rng, fresh.LogProb)
			want := gradient(t, m, b, l)
			given, calls := model.Loss{Temperature: l.Temperature}, 0
			given.Coefficients = func(s model.Scores) (dlp, dent []float32) {
				calls++
				dlp, dent = make([]float32, len(s.LogProb)), make([]float32, len(s.LogProb))
				for i := range dlp {
					_, dlp[i], dent[i] = l.Surrogate.Token(s.LogProb[i], l.Old[i], l.Ref[i], l.Adv[i], l.Weight[i], l.TIS[i], s.Entropy[i])
				}
				return dlp, dent
			}
			sameGradient(t, name, gradient(t, m, b, given), want, 1e-5)
			if calls != 1 {
				t.Errorf("%s: coefficients were asked for %d times, expected once", name, calls)
			}
			m.Close()
		}
	}
}

// TestGradientIsReproducible: the same calls give the same bits, with any number of workers.
func TestGradientIsReproducible(t *testing.T) {
	cfg := configs()["qwen3-tied"]
	cfg.Hidden, cfg.FFN, cfg.Vocab = 64, 96, 300 // large enough to be shared out
	b := pack(randomSamples(rand.New(rand.NewPCG(7, 0)), cfg.Vocab), true)
	var want map[string][]float32
	for _, workers := range []int{1, 1, 2, 3} {
		dev, err := cpu.New(workers)
		if err != nil {
			t.Fatal(err)
		}
		m := load(t, dev, randomSource(t, cfg, 6), trainOptions())
		got := gradient(t, m, b, crossEntropy(len(b.Rows)))
		if want == nil {
			want = got
		}
		sameBits(t, "gradient", got, want)
		m.Close()
		dev.Close()
	}
}

// TestOverwriteAfterStep: what an earlier step left in the gradient buffers
// does not leak into the next one.
func TestOverwriteAfterStep(t *testing.T) {
	for name, cfg := range configs() {
		rng := rand.New(rand.NewPCG(6, 0))
		m := load(t, newDevice(t), randomSource(t, cfg, 5), trainOptions())
		b := pack(randomSamples(rng, cfg.Vocab), true)
		ones := make([]float32, len(b.Rows))
		for i := range ones {
			ones[i] = 1
		}
		l := model.Loss{Temperature: 1, Surrogate: kernels.Surrogate{Kind: kernels.SurrogateNLL}, Weight: ones}
		want := gradient(t, m, b, l)
		if _, err := m.ForwardBackward(pack(randomSamples(rng, cfg.Vocab)[:1], true), model.Loss{Temperature: 1,
			Coefficients: func(s model.Scores) ([]float32, []float32) { return s.LogProb, nil }}); err != nil {
			t.Fatal(err)
		}
		if _, err := m.OptimStep(model.AdamW{LR: 0, Beta1: 0.9, Beta2: 0.95, Eps: 1e-8}); err != nil {
			t.Fatal(err)
		}
		if g := globalNorm(gradients(t, m)); g != 0 {
			t.Errorf("%s: gradient norm %v after a step, expected 0", name, g)
		}
		again := accumulate(t, m, b, l)
		sameGradient(t, name, again, want, 0)
	}
}

// accumulate is gradient without the clean slate.
func accumulate(t *testing.T, m *model.Model, b *model.Batch, l model.Loss) map[string][]float32 {
	t.Helper()
	if _, err := m.ForwardBackward(b, l); err != nil {
		t.Fatal(err)
	}
	return gradients(t, m)
}

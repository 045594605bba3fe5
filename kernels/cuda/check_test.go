//go:build cuda || cudaemu

package cuda

import (
	"context"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"gorgonia.org/tensor"

	"trainerd/kernels"
	"trainerd/kernels/cpu"
	"trainerd/model"
)

// shapeOf is a small decoder with everything that the device has a kernel for.
func shapeOf(kind string, hd int) model.Config {
	return model.Config{Type: kind, Vocab: 50, Hidden: 32, FFN: 40, Layers: 2, Heads: 4, KVHeads: 2, HeadDim: hd, MaxPositions: 128,
		RopeTheta: 1e4, NormEps: 1e-6, Tied: kind == "qwen2", QKVBias: kind == "qwen2", QKNorm: kind == "qwen3", InitStd: 0.1, BOS: -1}
}

// groupBatch is one prompt of p tokens with completions, the first prediction of each being its prompt's last row.
func groupBatch(rng *rand.Rand, vocab, p int, completions ...int) *model.Batch {
	b := &model.Batch{}
	add := func(n, at int) {
		for i := range n {
			b.Tokens, b.Positions = append(b.Tokens, int32(rng.IntN(vocab))), append(b.Positions, int32(at+i))
		}
	}
	add(p, 0)
	b.Segments = []model.Segment{{Start: 0, Len: p, Prefix: -1}}
	for _, n := range completions {
		from := len(b.Tokens)
		b.Segments = append(b.Segments, model.Segment{Start: from, Len: n, Prefix: 0})
		add(n, p)
		for i := range n {
			row := from + i - 1
			if i == 0 {
				row = p - 1
			}
			b.Rows, b.Targets = append(b.Rows, int32(row)), append(b.Targets, b.Tokens[from+i])
		}
	}
	return b
}

// lossOf weights every token alike; completions of rising and of falling advantage take turns.
func lossOf(rng *rand.Rand, n int) model.Loss {
	l := model.Loss{Surrogate: kernels.Surrogate{Kind: kernels.SurrogateClip, EpsLow: 0.2, EpsHigh: 0.28}, Temperature: 1}
	for range n {
		l.Adv, l.Weight = append(l.Adv, float32(rng.NormFloat64())), append(l.Weight, 1/float32(n))
	}
	return l
}

func load(t *testing.T, dev kernels.Device, cfg model.Config) *model.Model {
	t.Helper()
	return loadAs(t, dev, cfg, model.Options{Train: true, MaxTokens: 96, SampleSlots: 4, SampleTokens: 64})
}

func loadAs(t *testing.T, dev kernels.Device, cfg model.Config, opt model.Options) *model.Model {
	t.Helper()
	src, err := model.NewRandom(cfg, 3)
	if err != nil {
		t.Fatal(err)
	}
	m, err := model.Load(context.Background(), dev, src, opt)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// tensorsOf reads everything a source names.
func tensorsOf(t *testing.T, src model.Source) map[string][]float32 {
	t.Helper()
	defer src.Close()
	out := map[string][]float32{}
	for _, name := range src.Names() {
		shape, _ := src.Shape(name)
		x := tensor.New(tensor.WithShape(shape...), tensor.Of(tensor.Float32))
		if err := src.Read(name, x); err != nil {
			t.Fatal(err)
		}
		out[name] = slices.Clone(x.Data().([]float32))
	}
	return out
}

// roundings is how far a result of the whole model may be off in bfloat16, as a
// share of its size: about 12 values of a layer are rounded to 2^-9 on the way, of
// which the squares add up; six standard deviations, twice that for the backward pass.
func roundings(layers int) float64 {
	return 6 * math.Sqrt(float64(12*layers+4)) / 512
}

// testModels holds log-probs, gradients and steps of whole models to the CPU device.
func testModels(t *testing.T, dev kernels.Device) {
	for _, c := range []struct {
		kind string
		hd   int
	}{{"qwen2", 8}, {"qwen3", 16}, {"llama", 64}} {
		t.Run(c.kind, func(t *testing.T) {
			cfg := shapeOf(c.kind, c.hd)
			host, err := cpu.New(0)
			if err != nil {
				t.Fatal(err)
			}
			defer host.Close()
			ref, m := load(t, host, cfg), load(t, dev, cfg)
			defer ref.Close()
			defer m.Close()
			rng := rand.New(rand.NewPCG(5, 6))
			b := groupBatch(rng, cfg.Vocab, 21, 9, 1, 14)
			loss := lossOf(rng, len(b.Rows))
			want, err := ref.ForwardBackward(b, loss)
			if err != nil {
				t.Fatal(err)
			}
			got, err := m.ForwardBackward(b, loss)
			if err != nil {
				t.Fatal(err)
			}
			// Logits are sums over normalised hidden states (size 1) times rows of the head.
			spread := cfg.InitStd * math.Sqrt(float64(cfg.Hidden))
			for i := range want.LogProb {
				if diff, most := math.Abs(float64(got.LogProb[i]-want.LogProb[i])), 2*spread*roundings(cfg.Layers); !(diff <= most) {
					t.Errorf("log-prob %d is %v, expected %v ± %.3g", i, got.LogProb[i], want.LogProb[i], most)
				}
			}
			gw, gg := tensorsOf(t, ref.Gradient()), tensorsOf(t, m.Gradient())
			for name, x := range gw {
				if d, most := distance(x, gg[name]), 2*roundings(cfg.Layers); !(d <= most) {
					t.Errorf("gradient of %s is off by %.3g of its norm, expected at most %.3g", name, d, most)
				}
			}
			if peak, plan := m.ScratchPeak(), m.Plan().Bytes["scratch"]; peak > plan {
				t.Errorf("scratch peaked at %d bytes of %d planned", peak, plan)
			}
		})
	}
	compact := model.Options{Train: true, MaxTokens: 96, CompactMoments: true, BF16Gradients: true, RoundingSeed: 3}
	t.Run("gradients kept in bfloat16", func(t *testing.T) {
		for _, kind := range []string{"qwen2", "qwen3"} { // the first has one embedding for both ends
			cfg := shapeOf(kind, 16)
			exact, kept := load(t, dev, cfg), loadAs(t, dev, cfg, compact)
			rng := rand.New(rand.NewPCG(8, 9))
			const micros = 3
			for range micros {
				b := groupBatch(rng, cfg.Vocab, 20, 8, 11, 3)
				loss := lossOf(rng, len(b.Rows))
				for _, m := range []*model.Model{exact, kept} {
					if _, err := m.ForwardBackward(b, loss); err != nil {
						t.Fatal(err)
					}
				}
			}
			got := tensorsOf(t, kept.Gradient())
			for name, x := range tensorsOf(t, exact.Gradient()) {
				// A sum is rounded at most twice a micro-batch, by up to 2^-7 of it; partial sums
				// are no larger than twice the whole here.
				if d, most := distance(x, got[name]), 2*0x1p-7*math.Sqrt(2*micros); !(d <= most) {
					t.Errorf("%s: gradient of %s is off by %.3g of its norm, expected at most %.3g", kind, name, d, most)
				}
			}
			exact.Close()
			kept.Close()
		}
	})
	for name, opt := range map[string]model.Options{
		"same bits twice":                              {Train: true, MaxTokens: 96},
		"same bits twice on compact moments":           compact,
		"same bits twice, moments on the host":         {Train: true, MaxTokens: 96, HostMoments: true},
		"same bits twice, compact moments on the host": {Train: true, MaxTokens: 96, CompactMoments: true, BF16Gradients: true, RoundingSeed: 3, HostMoments: true},
		"same bits twice, layers recomputed":           {Train: true, MaxTokens: 96, Recompute: model.RecomputeMLP, RecomputeMore: 1},
	} {
		t.Run(name, func(t *testing.T) {
			sameBitsTwice(t, dev, opt)
		})
	}
	t.Run("sampled log-probs", func(t *testing.T) {
		cfg := shapeOf("qwen2", 8)
		m := load(t, dev, cfg)
		defer m.Close()
		prompt := []int32{3, 1, 4, 1, 5, 9, 2, 6}
		out, err := m.Generate(context.Background(), model.GenerateRequest{Prompts: [][]int32{prompt}, N: 3, MaxTokens: 6, Temperature: 1, Seed: 11, Stop: []int32{}})
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range out {
			b := groupBatch(rand.New(rand.NewPCG(1, 1)), cfg.Vocab, len(prompt), len(c.Tokens))
			copy(b.Tokens, prompt)
			copy(b.Tokens[len(prompt):], c.Tokens)
			copy(b.Targets, c.Tokens)
			s, err := m.Score(b, model.Policy, 1)
			if err != nil {
				t.Fatal(err)
			}
			for i, lp := range c.LogProbs {
				most := 2 * cfg.InitStd * math.Sqrt(float64(cfg.Hidden)) * roundings(cfg.Layers)
				if diff := math.Abs(float64(lp - s.LogProb[i])); !(diff <= most) {
					t.Errorf("token %d was sampled at log-prob %v, the training path gives %v, expected within %.3g", i, lp, s.LogProb[i], most)
				}
			}
		}
	})
}

// sameBitsTwice runs three steps of two micro-batches each, twice; what is
// recomputed changes no bit either.
func sameBitsTwice(t *testing.T, dev kernels.Device, opt model.Options) {
	var first map[string][]float32
	keep := opt
	keep.Recompute, keep.RecomputeMore, keep.HostMoments = model.RecomputeCheap, 0, false
	for run, o := range []model.Options{keep, opt} {
		m := loadAs(t, dev, shapeOf("qwen2", 8), o)
		rng := rand.New(rand.NewPCG(8, 9))
		for range 3 {
			for range 2 {
				b := groupBatch(rng, 50, 20, 8, 11, 3)
				if _, err := m.ForwardBackward(b, lossOf(rng, len(b.Rows))); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := m.OptimStep(model.AdamW{LR: 1e-3, Beta1: 0.9, Beta2: 0.95, Eps: 1e-8, MaxGradNorm: 1}); err != nil {
				t.Fatal(err)
			}
		}
		w := tensorsOf(t, m.Export())
		m.Close()
		if run == 0 {
			first = w
			continue
		}
		for name, x := range first {
			if !slices.Equal(x, w[name]) {
				t.Errorf("%s differs between two runs", name)
			}
		}
	}
}

// distance is the norm of the difference as a share of the first one's.
func distance(x, y []float32) float64 {
	var d, n float64
	for i := range x {
		d += (float64(x[i]) - float64(y[i])) * (float64(x[i]) - float64(y[i]))
		n += float64(x[i]) * float64(x[i])
	}
	if n == 0 {
		return math.Sqrt(d)
	}
	return math.Sqrt(d / n)
}

// testMaster feeds one gradient stream at lr 3e-6 to the device's master weights, to
// AdamW in float64, and to weights that are bfloat16 alone: the first two agree, the last does not.
//
// Gradients in bfloat16 are off by 2^-9 of themselves, and so are the updates,
// but where gradients of both signs cancel in a moment: thrice that. Of a
// compact first moment a code is 4 % wide where it counts, so it is off by 2 %,
// is itself about a quarter of a gradient, and what it is off by comes again nine
// times: 4 % of a movement in which each gradient counts once. Twice that is allowed.
func testMaster(t *testing.T, dev kernels.Device) {
	for _, c := range []struct {
		name    string
		grad    kernels.DType
		compact bool
		off     float64 // of the movement
	}{
		{"float32", kernels.F32, false, 1e-3}, // 1e-5 of a weight is far more of its movement
		{"bfloat16 gradients", kernels.BF16, false, 3 * 0x1p-9},
		{"compact moments", kernels.F32, true, 0.08},
		{"both", kernels.BF16, true, 0.08},
	} {
		t.Run(c.name, func(t *testing.T) { follow(t, dev, c.grad, c.compact, c.off) })
	}
}

func follow(t *testing.T, dev kernels.Device, kept kernels.DType, compact bool, most float64) {
	const n, steps, lr = 1024, 200, 3e-6
	rng := rand.New(rand.NewPCG(3, 4))
	buffer := func(k kernels.DType, n int) kernels.Buffer {
		b, err := dev.Alloc("test", k, n)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { dev.Free(b) })
		return b
	}
	start, high, low := make([]float32, n), make([]float32, n), make([]int16, n)
	for i := range start {
		start[i] = float32(rng.NormFloat64() * 0.02)
		bits := math.Float32bits(start[i])
		upper := (bits + 0x8000) >> 16
		high[i], low[i] = math.Float32frombits(upper<<16), int16(bits-upper<<16)
	}
	dense := func(x any) *tensor.Dense { return tensor.New(tensor.WithShape(n), tensor.WithBacking(x)) }
	p, rem, g, coef := buffer(kernels.BF16, n), buffer(kernels.I16, n), buffer(kept, n), buffer(kernels.F32, 1)
	var m, v, scale kernels.Buffer
	if compact {
		m, v, scale = buffer(kernels.I8, n), buffer(kernels.BF16, n), buffer(kernels.F32, kernels.MomentBlocks(n))
		dev.Zero(scale)
	} else {
		m, v = buffer(kernels.F32, n), buffer(kernels.F32, n)
	}
	dev.Upload(p, dense(high))
	dev.Upload(rem, dense(low))
	dev.Zero(m)
	dev.Zero(v)
	dev.Upload(coef, tensor.New(tensor.WithShape(1), tensor.WithBacking([]float32{1})))
	exact, plain, m1, m2 := make([]float64, n), make([]float32, n), make([]float64, n), make([]float64, n)
	for i := range exact {
		exact[i], plain[i] = float64(start[i]), high[i]
	}
	for step := 1; step <= steps; step++ {
		grad := make([]float32, n)
		for i := range grad {
			grad[i] = float32(rng.NormFloat64() * 1e-3)
		}
		dev.Upload(g, dense(grad))
		dev.AdamW(kernels.AdamW{P: p, Rem: rem, G: g, M: m, Scale: scale, V: v, Coef: coef, Seed: 7, LR: lr, Beta1: 0.9, Beta2: 0.95, Eps: 1e-8, Step: int64(step)})
		for i, x := range grad {
			m1[i], m2[i] = 0.9*m1[i]+0.1*float64(x), 0.95*m2[i]+0.05*float64(x)*float64(x)
			u := lr * (m1[i] / (1 - math.Pow(0.9, float64(step)))) / (math.Sqrt(m2[i]/(1-math.Pow(0.95, float64(step)))) + 1e-8)
			exact[i] -= u
			bits := math.Float32bits(plain[i] - float32(u))
			plain[i] = math.Float32frombits((bits + 0x7fff + bits>>16&1) &^ 0xffff)
		}
	}
	gotHigh, gotLow := make([]float32, n), make([]int16, n)
	if err := dev.Download(dense(gotHigh), p); err != nil {
		t.Fatal(err)
	}
	if err := dev.Download(dense(gotLow), rem); err != nil {
		t.Fatal(err)
	}
	if err := dev.Sync(); err != nil {
		t.Fatal(err)
	}
	var moved, off, lostBy float64
	for i := range exact {
		master := float64(math.Float32frombits(math.Float32bits(gotHigh[i]) + uint32(int32(gotLow[i]))))
		moved += math.Abs(exact[i] - float64(start[i]))
		off += math.Abs(master - exact[i])
		lostBy += math.Abs(float64(plain[i]) - exact[i])
		if rel := math.Abs(master-exact[i]) / math.Max(math.Abs(exact[i]), 1e-3); !(rel <= 1e-5) && kept == kernels.F32 && !compact {
			t.Errorf("master %d is %v, expected %v: off by %.3g, expected at most 1e-5", i, master, exact[i], rel)
		}
	}
	t.Logf("mean movement %.3g; master off by %.3g, plain bfloat16 by %.3g of it", moved/n, off/moved, lostBy/moved)
	if !(off <= most*moved) {
		t.Errorf("masters are off by %.3g of the movement, expected at most %.3g", off/moved, most)
	}
	if lostBy < 0.5*moved {
		t.Errorf("plain bfloat16 weights are off by only %.3g of the movement: this test shows nothing", lostBy/moved)
	}
}

// testStaging uploads several times what the staging memory holds, in pieces of
// all sizes and both types, before anything is waited for, and reads it back.
func testStaging(t *testing.T, dev kernels.Device) {
	const n = 5 * stageBytes / 4
	rng := rand.New(rand.NewPCG(7, 8))
	want := make([]float32, n)
	for i := range want {
		want[i] = float32(rng.IntN(1 << 7)) // exact in bfloat16
	}
	for _, k := range []kernels.DType{kernels.F32, kernels.BF16} {
		b, err := dev.Alloc("test", k, n)
		if err != nil {
			t.Fatal(err)
		}
		defer dev.Free(b)
		piece := make([]float32, stageBytes) // more than a slot at once
		for from := 0; from < n; {
			to := min(n, from+1+rng.IntN(stageBytes/2))
			x := piece[:to-from]
			copy(x, want[from:to])
			dev.Upload(b.Slice(from, to), tensor.New(tensor.WithShape(len(x)), tensor.WithBacking(x)))
			for i := range x {
				x[i] = -1 // it may be changed when Upload returns
			}
			from = to
		}
		got := make([]float32, n)
		if err := dev.Download(tensor.New(tensor.WithShape(n), tensor.WithBacking(got)), b); err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(got, want) {
			t.Errorf("%v: what came back is not what was sent", k)
		}
	}
	if err := dev.Sync(); err != nil {
		t.Fatal(err)
	}
}

// testMemory takes memory and gives it back: what is free says so. A driver takes it by pages of 2 MiB.
func testMemory(t *testing.T, dev kernels.Device) {
	const n, slack = 64 << 20, 4 << 20
	before := dev.Info().MemFree
	for range 3 {
		b, err := dev.Alloc("test", kernels.I8, n)
		if err != nil {
			t.Fatal(err)
		}
		if took := before - dev.Info().MemFree; took < n || took > n+slack {
			t.Errorf("%d bytes took %d", n, took)
		}
		dev.Free(b)
		if err := dev.Sync(); err != nil {
			t.Fatal(err)
		}
		if kept := before - dev.Info().MemFree; kept < -slack || kept > slack {
			t.Errorf("%d bytes did not come back", kept)
		}
	}
}

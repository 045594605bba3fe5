package model_test

import (
	"math"
	"math/rand/v2"
	"strings"
	"testing"

	"trainerd/internal/fault"
	"trainerd/kernels"
	"trainerd/model"
)

// crossEntropy is the NLL loss with equal weights that sum to 1.
func crossEntropy(n int) model.Loss {
	w := make([]float32, n)
	for i := range w {
		w[i] = 1 / float32(n)
	}
	return model.Loss{Temperature: 1, Surrogate: kernels.Surrogate{Kind: kernels.SurrogateNLL}, Weight: w}
}

func weightsOf(t testing.TB, m *model.Model) map[string][]float32 {
	t.Helper()
	out := map[string][]float32{}
	src := m.Export()
	for _, name := range src.Names() {
		out[name] = readTensor(t, src, name)
	}
	return out
}

// TestOptimStep follows three AdamW steps in float64 from the device's own
// gradients: clipping by the global norm, decay on matrices only, bias
// correction. An update is at most about LR = 0.01 and float32 keeps weights of
// size 1 to 6e-8; 1e-6 covers three of them and the clip factor's rounding.
func TestOptimStep(t *testing.T) {
	for name, cfg := range configs() {
		t.Run(name, func(t *testing.T) {
			m := load(t, newDevice(t), randomSource(t, cfg, 1), trainOptions())
			b := pack(randomSamples(rand.New(rand.NewPCG(1, 1)), cfg.Vocab), true)
			o := model.AdamW{LR: 0.01, Beta1: 0.9, Beta2: 0.95, Eps: 1e-8, WeightDecay: 0.1, MaxGradNorm: 0.5}
			w := map[string][]float64{}
			for n, x := range weightsOf(t, m) {
				for _, v := range x {
					w[n] = append(w[n], float64(v))
				}
			}
			m1, m2 := map[string][]float64{}, map[string][]float64{}
			for step := 1; step <= 3; step++ {
				if _, err := m.ForwardBackward(b, crossEntropy(len(b.Rows))); err != nil {
					t.Fatal(err)
				}
				g := gradients(t, m)
				all := globalNorm(g)
				if all < o.MaxGradNorm {
					t.Fatalf("gradient norm %v is not clipped", all)
				}
				res, err := m.OptimStep(o)
				if err != nil {
					t.Fatal(err)
				}
				if d := math.Abs(res.GradNorm-all) / all; d > 1e-6 {
					t.Errorf("step %d: norm %v, expected %v", step, res.GradNorm, all)
				}
				got := weightsOf(t, m)
				for n, x := range w {
					if m1[n] == nil {
						m1[n], m2[n] = make([]float64, len(x)), make([]float64, len(x))
					}
					decay := o.WeightDecay
					if strings.Contains(n, "norm") || strings.HasSuffix(n, "bias") {
						decay = 0
					}
					for i := range x {
						gi := float64(g[n][i]) * o.MaxGradNorm / (all + 1e-6)
						m1[n][i] = o.Beta1*m1[n][i] + (1-o.Beta1)*gi
						m2[n][i] = o.Beta2*m2[n][i] + (1-o.Beta2)*gi*gi
						mh, vh := m1[n][i]/(1-math.Pow(o.Beta1, float64(step))), m2[n][i]/(1-math.Pow(o.Beta2, float64(step)))
						x[i] -= o.LR * decay * x[i]
						x[i] -= o.LR * mh / (math.Sqrt(vh) + o.Eps)
						if d := math.Abs(float64(got[n][i]) - x[i]); d > 1e-6*(1+math.Abs(x[i])) {
							t.Fatalf("step %d: %s[%d] is %v, expected %v", step, n, i, got[n][i], x[i])
						}
						x[i] = float64(got[n][i])
					}
				}
			}
			if m.Steps() != 3 {
				t.Errorf("%d steps, expected 3", m.Steps())
			}
		})
	}
}

// TestTrainingLearns: a fixed batch's cross entropy falls far below its start.
func TestTrainingLearns(t *testing.T) {
	for name, cfg := range configs() {
		m := load(t, newDevice(t), randomSource(t, cfg, 2), trainOptions())
		b := pack(randomSamples(rand.New(rand.NewPCG(2, 2)), cfg.Vocab)[:1], true)
		mean := func(s model.Scores) (sum float64) {
			for _, x := range s.LogProb {
				sum -= float64(x) / float64(len(s.LogProb))
			}
			return sum
		}
		var first, last float64
		for step := range 30 {
			s, err := m.ForwardBackward(b, crossEntropy(len(b.Rows)))
			if err != nil {
				t.Fatal(err)
			}
			if last = mean(s); step == 0 {
				first = last
			}
			if _, err := m.OptimStep(model.AdamW{LR: 0.02, Beta1: 0.9, Beta2: 0.95, Eps: 1e-8}); err != nil {
				t.Fatal(err)
			}
		}
		if !(last < first/3) {
			t.Errorf("%s: cross entropy went from %v to %v in 30 steps", name, first, last)
		}
	}
}

func TestOptimStepWithoutGradient(t *testing.T) {
	cfg := configs()["qwen2"]
	m := load(t, newDevice(t), randomSource(t, cfg, 2), trainOptions())
	b := pack(randomSamples(rand.New(rand.NewPCG(2, 2)), cfg.Vocab), true)
	if _, err := m.ForwardBackward(b, crossEntropy(len(b.Rows))); err != nil {
		t.Fatal(err)
	}
	m.ZeroGrad()
	before := weightsOf(t, m)
	res, err := m.OptimStep(model.AdamW{LR: 0.02, Beta1: 0.9, Beta2: 0.95, Eps: 1e-8, MaxGradNorm: 1})
	if err != nil || res.GradNorm != 0 || m.Steps() != 1 {
		t.Fatalf("%+v, %v, %d steps: expected a norm of 0 and a step", res, err, m.Steps())
	}
	sameBits(t, "weights", weightsOf(t, m), before)
}

// sameBits fails at the first value that is not bitwise equal.
func sameBits(t *testing.T, what string, got, want map[string][]float32) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("%s: %d tensors, expected %d", what, len(got), len(want))
	}
	for name, w := range want {
		if len(got[name]) != len(w) {
			t.Fatalf("%s: %s has %d values, expected %d", what, name, len(got[name]), len(w))
		}
		for i := range w {
			if math.Float32bits(got[name][i]) != math.Float32bits(w[i]) {
				t.Fatalf("%s: %s[%d] is %v, expected %v", what, name, i, got[name][i], w[i])
			}
		}
	}
}

// TestOptimStepNotFinite: a poisoned gradient is refused by name and changes nothing.
func TestOptimStepNotFinite(t *testing.T) {
	for name, opt := range formats() {
		t.Run(name, func(t *testing.T) { optimStepNotFinite(t, opt) })
	}
}

func optimStepNotFinite(t *testing.T, opt model.Options) {
	cfg := configs()["qwen3-tied"]
	m := load(t, newDevice(t), randomSource(t, cfg, 2), opt)
	b := pack(randomSamples(rand.New(rand.NewPCG(2, 2)), cfg.Vocab), true)
	o := model.AdamW{LR: 0.02, Beta1: 0.9, Beta2: 0.95, Eps: 1e-8, MaxGradNorm: 1}
	l := crossEntropy(len(b.Rows))
	if _, err := m.ForwardBackward(b, l); err != nil {
		t.Fatal(err)
	}
	if _, err := m.OptimStep(o); err != nil {
		t.Fatal(err)
	}
	before := weightsOf(t, m)
	if _, err := m.ForwardBackward(b, l); err != nil { // a good micro-batch, to which a bad one is added
		t.Fatal(err)
	}
	l.Weight[1] = float32(math.NaN())
	if _, err := m.ForwardBackward(b, l); err != nil {
		t.Fatal(err)
	}
	_, err := m.OptimStep(o)
	if fault.KindOf(err) != fault.Invalid || !strings.Contains(err.Error(), "model.embed_tokens.weight") {
		t.Fatalf("%v, expected an invalid fault that names the first tensor", err)
	}
	sameBits(t, "weights", weightsOf(t, m), before)
	if m.Steps() != 1 {
		t.Errorf("%d steps, expected 1", m.Steps())
	}
	l.Weight[1] = 0
	m.ZeroGrad()
	if _, err := m.ForwardBackward(b, l); err != nil {
		t.Fatal(err)
	}
	if _, err := m.OptimStep(o); err != nil {
		t.Errorf("the step after the refused one: %v", err)
	}
}

func TestReference(t *testing.T) {
	cfg := configs()["llama-tied"]
	opt := trainOptions()
	opt.Reference = true
	m := load(t, newDevice(t), randomSource(t, cfg, 3), opt)
	b := pack(randomSamples(rand.New(rand.NewPCG(3, 2)), cfg.Vocab), true)
	score := func(w model.Weights) []float32 {
		s, err := m.Score(b, w, 1)
		if err != nil {
			t.Fatal(err)
		}
		return s.LogProb
	}
	diff := func(a, b []float32) (d float64) {
		for i := range a {
			d = math.Max(d, math.Abs(float64(a[i]-b[i])))
		}
		return d
	}
	start := score(model.Policy)
	if d := diff(start, score(model.Reference)); d != 0 {
		t.Errorf("policy and fresh reference differ by %v", d)
	}
	if _, err := m.ForwardBackward(b, crossEntropy(len(b.Rows))); err != nil {
		t.Fatal(err)
	}
	if _, err := m.OptimStep(model.AdamW{LR: 0.02, Beta1: 0.9, Beta2: 0.95, Eps: 1e-8}); err != nil {
		t.Fatal(err)
	}
	if d := diff(start, score(model.Reference)); d != 0 {
		t.Errorf("a step moved the reference by %v", d)
	}
	if err := m.SyncReference(0.5); err != nil {
		t.Fatal(err)
	}
	half := score(model.Reference)
	if diff(half, start) == 0 || diff(half, score(model.Policy)) == 0 {
		t.Error("alpha 0.5 left the reference at one end")
	}
	if err := m.SyncReference(1); err != nil {
		t.Fatal(err)
	}
	if d := diff(score(model.Policy), score(model.Reference)); d != 0 {
		t.Errorf("alpha 1 leaves a difference of %v", d)
	}
	if err := m.SyncReference(2); fault.KindOf(err) != fault.Invalid {
		t.Errorf("alpha 2: %v", err)
	}
}

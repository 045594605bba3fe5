package parity

import (
	"math"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"trainerd/model"
	"trainerd/model/gguf"
	"trainerd/model/tokenizer"
)

// smollm2Tokens holds both groups of the golden in one micro-batch.
const smollm2Tokens = 256

// openSmolLM2 opens the real weights. They are a download of 98 MB, so the test
// says how to get them; it does not pass without them.
func openSmolLM2(t *testing.T) *gguf.File {
	t.Helper()
	path := os.Getenv("TRAINERD_SMOLLM2")
	if path == "" {
		cache, err := os.UserCacheDir()
		if err != nil {
			t.Fatal(err)
		}
		path = filepath.Join(cache, "trainerd", "smollm2", "SmolLM2.gguf")
	}
	f, err := gguf.Open(path)
	if err != nil {
		t.Fatalf("SmolLM2-135M-Instruct is needed; `make test-parity` fetches it (or set TRAINERD_SMOLLM2): %v", err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// TestSmolLM2 holds the real model, imported by our GGUF reader, to a golden
// that the Python gguf package and transformers made of the same file.
func TestSmolLM2(t *testing.T) {
	src := openSmolLM2(t)
	g := readGolden(t, "smollm2.json")
	packs := g.pack(t, smollm2Tokens)
	m := load(t, device(t), src, smollm2Tokens)

	d := scoreDistance(t, m, packs)
	t.Logf("log-probs within %.1e of transformers, spread over %.1f nats", d, g.spread())
	if !(d <= logProbTolerance) {
		t.Errorf("log-probs differ by %g, tolerance %g", d, logProbTolerance)
	}
	if s := g.spread(); s < 3 {
		t.Errorf("the golden's log-probs spread over %.2f nats, expected at least 3", s)
	}

	grad := gradient(t, m, packs)
	if got, want := len(grad.Names()), len(g.Parameters); got != want {
		t.Fatalf("%d gradients, the golden has %d", got, want)
	}
	all := 0.0
	for _, p := range g.Parameters {
		all += p.Norm * p.Norm
	}
	all = math.Sqrt(all)
	worst, at := 0.0, ""
	for _, name := range grad.Names() {
		ref, ok := g.Parameters[name]
		if !ok {
			t.Fatalf("the golden has no gradient of %s", name)
		}
		x := values(t, grad, name)
		// rms of the differences of projections estimates |g - g_ref|.
		sum := 0.0
		for k, p := range project(name, x, len(ref.Projections)) {
			sum += (p - ref.Projections[k]) * (p - ref.Projections[k]) / float64(len(ref.Projections))
		}
		scale := max(ref.Norm, gradFloor*all)
		d := max(math.Sqrt(sum), math.Abs(math.Sqrt(squares(x))-ref.Norm)) / scale
		if !(d <= worst) {
			worst, at = d, name
		}
		if !(d <= gradTolerance) {
			t.Errorf("gradient of %s is off by %g of %g, tolerance %g", name, d, scale, gradTolerance)
		}
	}
	t.Logf("gradients of %d parameters within %.1e of float64 autograd (%s)", len(g.Parameters), worst, at)
}

// TestSmolLM2CanFail: the real model's golden also sees each mistake.
func TestSmolLM2CanFail(t *testing.T) {
	src := openSmolLM2(t)
	g := readGolden(t, "smollm2.json")
	dev := device(t)
	sound, err := model.Load(t.Context(), dev, src, model.Options{MaxTokens: smollm2Tokens})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range perturbations {
		m := sound
		if p.source != nil {
			if m, err = model.Load(t.Context(), dev, p.source(src), model.Options{MaxTokens: smollm2Tokens}); err != nil {
				t.Fatal(err)
			}
		}
		packs := g.pack(t, smollm2Tokens)
		if p.batch != nil {
			p.batch(g, &packs[0])
		}
		d := scoreDistance(t, m, packs)
		t.Logf("%-20s log-probs off by %.2g", p.name, d)
		if d < missFactor*logProbTolerance {
			t.Errorf("%s: log-probs off by only %g", p.name, d)
		}
		if m != sound {
			m.Close()
		}
	}
	if err := sound.Close(); err != nil {
		t.Error(err)
	}
}

// TestSmolLM2Tokenizer: the tokenizer.json that our import writes gives the ids
// of a tokenizer that Python assembled from the same metadata.
func TestSmolLM2Tokenizer(t *testing.T) {
	files, err := openSmolLM2(t).Carried()
	if err != nil {
		t.Fatal(err)
	}
	tok, err := tokenizer.Parse(files["tokenizer.json"], files["tokenizer_config.json"])
	if err != nil {
		t.Fatal(err)
	}
	var want struct {
		Texts []string  `json:"texts"`
		IDs   [][]int32 `json:"ids"`
	}
	readJSON(t, "smollm2_tokenizer.json", &want)
	if len(want.Texts) < 200 {
		t.Fatalf("%d texts in the golden", len(want.Texts))
	}
	for i, text := range want.Texts {
		got, err := tok.Encode(text)
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(got, want.IDs[i]) {
			t.Errorf("encode %q = %v, Python gives %v", text, got, want.IDs[i])
		}
	}
	for _, group := range readGolden(t, "smollm2.json").Groups {
		if got, err := tok.Encode(group.PromptText); err != nil || !slices.Equal(got, group.Prompt) {
			t.Errorf("encode %q = %v (%v), Python gives %v", group.PromptText, got, err, group.Prompt)
		}
	}
}

// project computes n random +-1 projections of a tensor. Sign k of element i is
// bit k of splitmix64(fnv1a64(name) + (i+1)*0x9E3779B97F4A7C15), 1 for plus;
// parity/py/smollm2.py has the same.
func project(name string, x []float32, n int) []float64 {
	h := uint64(0xcbf29ce484222325)
	for i := range len(name) {
		h = (h ^ uint64(name[i])) * 0x100000001b3
	}
	const parts = 8
	var partial [parts][16]float64
	var wg sync.WaitGroup
	for part := range parts {
		wg.Go(func() {
			var out [16]float64
			for i := part * len(x) / parts; i < (part+1)*len(x)/parts; i++ {
				z := h + uint64(i+1)*0x9e3779b97f4a7c15
				z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
				z = (z ^ z>>27) * 0x94d049bb133111eb
				z ^= z >> 31
				v := math.Float64bits(float64(x[i]))
				for k := range out {
					// Flipping the sign bit where bit k is 0.
					out[k] += math.Float64frombits(v ^ (z>>k&1^1)<<63)
				}
			}
			partial[part] = out
		})
	}
	wg.Wait()
	out := make([]float64, n)
	for _, p := range partial {
		for k := range out {
			out[k] += p[k]
		}
	}
	return out
}

// TestProject: a projection of a one-hot vector is its sign, and 16 projections
// estimate a norm within the four-sigma bounds of chi-squared with 16 degrees.
func TestProject(t *testing.T) {
	one := make([]float32, 1000)
	one[77] = 2
	plus := 0
	for _, p := range project("a", one, 16) {
		if p != 2 && p != -2 {
			t.Fatalf("projection %v of a one-hot vector of 2", p)
		}
		if p > 0 {
			plus++
		}
	}
	if plus == 0 || plus == 16 {
		t.Errorf("%d of 16 signs are plus", plus)
	}
	x := make([]float32, 100000)
	for i := range x {
		x[i] = float32(math.Sin(float64(i)))
	}
	sum := 0.0
	for _, p := range project("model.norm.weight", x, 16) {
		sum += p * p / 16
	}
	if ratio := sum / squares(x); ratio < 0.2 || ratio > 2.5 {
		t.Errorf("mean squared projection is %.2f of the squared norm", ratio)
	}
}

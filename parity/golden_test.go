package parity

import (
	"context"
	"encoding/json"
	"math"
	"os"
	"path/filepath"
	"testing"

	"gorgonia.org/tensor"

	"trainerd/kernels"
	"trainerd/kernels/cpu"
	"trainerd/model"
	"trainerd/model/hf"
	"trainerd/rollout"
)

// The project's tolerances; see doc.go.
const (
	logProbTolerance = 1e-4
	gradTolerance    = 1e-4
	gradFloor        = 1e-3 // of the whole gradient's norm
	lossTolerance    = 1e-5
)

// smallCases are the directories that parity/py/small.py writes.
var smallCases = []string{"qwen2-tied", "qwen2-untied", "qwen3-tied", "qwen3-untied", "llama-tied", "llama-untied"}

// golden is golden.json of a small case and, without the training run, smollm2.json.
type golden struct {
	Groups []goldenGroup `json:"groups"`
	Loss   float64       `json:"loss"`
	AdamW  struct {
		LR          float64    `json:"lr"`
		Betas       [2]float64 `json:"betas"`
		Eps         float64    `json:"eps"`
		WeightDecay float64    `json:"weight_decay"`
		MaxGradNorm float64    `json:"max_grad_norm"`
	} `json:"adamw"`
	Losses              []float64 `json:"losses"`
	GradNorms           []float64 `json:"grad_norms"`
	MaxCompletionTokens int       `json:"max_completion_tokens"`
	TRLDrGRPOLoss       float64   `json:"trl_dr_grpo_loss"`

	Parameters map[string]struct {
		Norm        float64   `json:"norm"`
		Projections []float64 `json:"projections"`
	} `json:"parameters"`
}

type goldenGroup struct {
	Prompt      []int32            `json:"prompt"`
	PromptText  string             `json:"prompt_text"`
	Completions []goldenCompletion `json:"completions"`
}

type goldenCompletion struct {
	Text       string    `json:"text"`
	Tokens     []int32   `json:"tokens"`
	Reward     float64   `json:"reward"`
	Mask       []bool    `json:"mask"` // nil: all true
	Old        []float32 `json:"old"`
	LogProbs32 []float64 `json:"logprobs32"`
	LogProbs64 []float64 `json:"logprobs64"`
}

func readJSON(t testing.TB, name string, into any) {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(data, into); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
}

func readGolden(t testing.TB, name string) *golden {
	t.Helper()
	var g golden
	readJSON(t, name, &g)
	if len(g.Groups) == 0 {
		t.Fatalf("%s holds no groups", name)
	}
	return &g
}

// rollouts gives the golden's groups as the trainer would receive them.
func (g *golden) rollouts() []rollout.Group {
	var out []rollout.Group
	for i, gg := range g.Groups {
		group := rollout.Group{ID: string(rune('a' + i)), Prompt: gg.Prompt}
		for _, c := range gg.Completions {
			group.Rollouts = append(group.Rollouts, rollout.Rollout{GroupID: group.ID, Prompt: gg.Prompt, Completion: c.Tokens, Reward: c.Reward,
				SamplerLogProbs: c.Old, LossMask: c.Mask, PolicyStep: rollout.NoPolicyStep})
		}
		out = append(out, group)
	}
	return out
}

// packed is a micro-batch of the golden with its loss and the log-probs expected of it.
type packed struct {
	batch model.Batch
	loss  model.Loss
	want  []float64 // transformers, float32
	spans []rollout.Span
}

// pack cuts the golden into micro-batches of at most maxTokens tokens, with the
// SA-GRPO loss: weight 1/(G*Q), clip 0.2/0.28.
func (g *golden) pack(t testing.TB, maxTokens int) []packed {
	t.Helper()
	packs, err := rollout.Pack(g.rollouts(), maxTokens)
	if err != nil {
		t.Fatal(err)
	}
	var out []packed
	for _, p := range packs {
		b := packed{batch: model.Batch{Tokens: p.Tokens, Positions: p.Positions, Rows: p.Rows, Targets: p.Targets}, spans: p.Spans}
		for _, s := range p.Segments {
			b.batch.Segments = append(b.batch.Segments, model.Segment{Start: s.Start, Len: s.Len, Prefix: s.Prefix})
		}
		b.loss = model.Loss{Surrogate: kernels.Surrogate{Kind: kernels.SurrogateClip, EpsLow: 0.2, EpsHigh: 0.28}, Temperature: 1}
		for _, s := range p.Spans {
			group := g.Groups[s.Group]
			mean := 0.0
			for _, c := range group.Completions {
				mean += c.Reward / float64(len(group.Completions))
			}
			c := group.Completions[s.Rollout]
			if s.Len != len(c.Tokens) {
				t.Fatalf("group %d completion %d: %d predictions of %d tokens", s.Group, s.Rollout, s.Len, len(c.Tokens))
			}
			for i := range c.Tokens {
				weight := 1 / float32(len(group.Completions)*len(g.Groups))
				if c.Mask != nil && !c.Mask[i] {
					weight = 0
				}
				b.loss.Old = append(b.loss.Old, c.Old[i])
				b.loss.Adv = append(b.loss.Adv, float32(c.Reward-mean))
				b.loss.Weight = append(b.loss.Weight, weight)
				b.want = append(b.want, c.LogProbs32[i])
			}
		}
		out = append(out, b)
	}
	return out
}

// device opens the CPU device for the length of a test.
func device(t testing.TB) kernels.Device {
	t.Helper()
	dev, err := cpu.New(0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := dev.Close(); err != nil {
			t.Error(err)
		}
	})
	return dev
}

// load puts a source on the device for training; it is freed with the test.
func load(t testing.TB, dev kernels.Device, src model.Source, maxTokens int) *model.Model {
	t.Helper()
	m, err := model.Load(context.Background(), dev, src, model.Options{Train: true, MaxTokens: maxTokens})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return m
}

func openDir(t testing.TB, name string) model.Source {
	t.Helper()
	d, err := hf.Open(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// values reads one tensor of a source.
func values(t testing.TB, src model.Source, name string) []float32 {
	t.Helper()
	shape, ok := src.Shape(name)
	if !ok {
		t.Fatalf("no tensor %s", name)
	}
	d := tensor.New(tensor.WithShape(shape...), tensor.Of(tensor.Float32))
	if err := src.Read(name, d); err != nil {
		t.Fatal(err)
	}
	return d.Data().([]float32)
}

// scoreDistance is the greatest difference of log-probs from transformers', over all batches.
func scoreDistance(t testing.TB, m *model.Model, packs []packed) float64 {
	t.Helper()
	worst := 0.0
	for i := range packs {
		s, err := m.Score(&packs[i].batch, model.Policy, 1)
		if err != nil {
			t.Fatal(err)
		}
		worst = max(worst, maxDistance(s.LogProb, packs[i].want))
	}
	return worst
}

func maxDistance(got []float32, want []float64) float64 {
	worst := 0.0
	for i, w := range want {
		d := math.Abs(float64(got[i]) - w)
		if math.IsNaN(d) {
			return math.Inf(1)
		}
		worst = max(worst, d)
	}
	return worst
}

// gradient accumulates the golden's loss gradient in the model and returns it.
func gradient(t testing.TB, m *model.Model, packs []packed) model.Source {
	t.Helper()
	m.ZeroGrad()
	for i := range packs {
		if _, err := m.ForwardBackward(&packs[i].batch, packs[i].loss); err != nil {
			t.Fatal(err)
		}
	}
	return m.Gradient()
}

// gradientDistance is the greatest |g-ref| / max(|ref|, floor*|all|) over the
// parameters, with the parameter's name.
func gradientDistance(t testing.TB, got, ref model.Source) (worst float64, at string) {
	t.Helper()
	all := 0.0
	for _, name := range ref.Names() {
		all += squares(values(t, ref, name))
	}
	for _, name := range ref.Names() {
		g, r := values(t, got, name), values(t, ref, name)
		if len(g) != len(r) {
			t.Fatalf("%s: %d elements, expected %d", name, len(g), len(r))
		}
		sum := 0.0
		for i := range g {
			d := float64(g[i]) - float64(r[i])
			sum += d * d
		}
		d := math.Sqrt(sum) / max(math.Sqrt(squares(r)), gradFloor*math.Sqrt(all))
		if !(d <= worst) { // NaN too
			worst, at = d, name
		}
	}
	return worst, at
}

func squares(x []float32) float64 {
	s := 0.0
	for _, v := range x {
		s += float64(v) * float64(v)
	}
	return s
}

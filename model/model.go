package model

import (
	"context"
	"io"

	"trainerd/kernels"
)

// Options say what a model will be used for; memory is planned from them.
type Options struct {
	Train          bool // gradients and optimizer state
	Reference      bool // a frozen copy of the weights for a KL term
	MaxTokens      int  // most tokens of a micro-batch
	MaxPredictions int  // most predictions of a micro-batch; 0: MaxTokens
	SampleSlots    int  // most sequences decoded at once; 0: no sampling
	SampleTokens   int  // most cache rows of one sampling call: prompts plus slots*max new tokens
}

// Weights selects which weights a forward pass uses.
type Weights uint8

const (
	Policy Weights = iota
	Reference
)

// Model is a policy on a device. It is used by one goroutine at a time.
type Model struct{}

// Plan returns the exact memory that Load with the same arguments will take,
// without allocating any of it.
func Plan(dev kernels.Device, cfg Config, opt Options) (kernels.Plan, error) { panic("not built yet") }

// Load puts a source's weights on the device. It plans first: a model that does
// not fit is a TooLarge fault that carries the plan and what would make it fit.
func Load(ctx context.Context, dev kernels.Device, src Source, opt Options) (*Model, error) {
	panic("not built yet")
}

// NewRandom returns a Source of freshly initialised weights (normal with
// cfg.InitStd, norms 1, biases 0), a pure function of config and seed.
func NewRandom(cfg Config, seed uint64) (Source, error) { panic("not built yet") }

func (m *Model) Config() Config         { panic("not built yet") }
func (m *Model) Device() kernels.Device { panic("not built yet") }
func (m *Model) Plan() kernels.Plan     { panic("not built yet") }

// Close frees the model's device memory.
func (m *Model) Close() error { panic("not built yet") }

// Score computes log-probs and entropies of a batch's predictions; no gradients.
func (m *Model) Score(b *Batch, w Weights, temperature float32) (Scores, error) {
	panic("not built yet")
}

// ForwardBackward adds the gradient of the loss over one micro-batch. The first
// call after OptimStep or ZeroGrad overwrites, later ones accumulate.
func (m *Model) ForwardBackward(b *Batch, l Loss) (Scores, error) { panic("not built yet") }

// ZeroGrad makes the next ForwardBackward overwrite; an OptimStep straight after it sees a zero gradient.
func (m *Model) ZeroGrad() { panic("not built yet") }

// AdamW are the optimizer's settings of one step.
type AdamW struct {
	LR, Beta1, Beta2, Eps float64
	WeightDecay           float64 // decoupled; not applied to norms and biases
	MaxGradNorm           float64 // 0: no clipping
}

// StepResult is what OptimStep measured.
type StepResult struct {
	GradNorm float64 // global norm before clipping
}

// OptimStep applies one AdamW step with the accumulated gradient and clears it.
// A gradient that is not finite changes nothing and is an Invalid fault that
// names the first tensor at fault.
func (m *Model) OptimStep(o AdamW) (StepResult, error) { panic("not built yet") }

// Steps returns how many optimizer steps the moments have seen.
func (m *Model) Steps() int64 { panic("not built yet") }

// SyncReference sets reference = (1-alpha)*reference + alpha*policy.
func (m *Model) SyncReference(alpha float32) error { panic("not built yet") }

// Export returns the policy's weights as a Source, reading from the device.
// It is valid until the next OptimStep.
func (m *Model) Export() Source { panic("not built yet") }

// Gradient returns the accumulated gradients as a Source (for tests and inspection).
func (m *Model) Gradient() Source { panic("not built yet") }

// SaveState writes optimizer moments, step count and, with a reference, its
// weights: all that Load does not restore. LoadState reads it back; the pair is bitwise.
func (m *Model) SaveState(w io.Writer) error { panic("not built yet") }
func (m *Model) LoadState(r io.Reader) error { panic("not built yet") }

// GenerateRequest asks for N completions of each prompt.
type GenerateRequest struct {
	Prompts     [][]int32
	N           int
	MaxTokens   int // most new tokens of a completion
	Temperature float32
	TopP        float32
	Seed        uint64  // the completions are a pure function of weights, request and seed
	Stop        []int32 // ids that end a completion; nil: the config's EOS
}

// Completion is one sampled continuation. LogProbs are of the full tempered
// softmax, before top-p, one per token.
type Completion struct {
	Prompt   int // index in GenerateRequest.Prompts
	Tokens   []int32
	LogProbs []float32
	Stopped  bool // ended by a stop id (which is its last token), not by MaxTokens
}

// Generate decodes all completions together; those of one prompt share its
// cache. Completion j of prompt i is element i*N+j, whatever the batching.
func (m *Model) Generate(ctx context.Context, r GenerateRequest) ([]Completion, error) {
	panic("not built yet")
}

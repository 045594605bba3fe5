package sagrpo

import (
	"fmt"
	"testing"

	"trainerd/kernels"
	"trainerd/kernels/cpu"
	"trainerd/model"
)

// fakePolicy gives log-probs from tables instead of computing them: a token's
// id is its place in the tables. It applies a loss as a device does and records
// the coefficients, which every optimizer step files under grads.
type fakePolicy struct {
	logp    [][]float32 // by steps done
	ref     []float32
	entropy []float32

	step      int
	fresh     bool
	dLogp     []float64 // accumulated since the last step
	dEntropy  []float64
	grads     [][]float64
	entGrads  [][]float64
	forward   int // calls of Accumulate
	scored    int // calls of Score
	fused     int // of Accumulate, without Coefficients
	optim     []model.AdamW
	synced    map[int]float32 // alpha by steps done
	maxTokens int
	temps     map[float32]bool
	optimErr  error
}

func (f *fakePolicy) table() []float32 { return f.logp[min(f.step, len(f.logp)-1)] }

func (f *fakePolicy) scores(b *model.Batch, table []float32) model.Scores {
	s := model.Scores{LogProb: make([]float32, len(b.Targets)), Entropy: make([]float32, len(b.Targets))}
	for i, id := range b.Targets {
		s.LogProb[i], s.Entropy[i] = table[id], f.entropy[id]
	}
	f.maxTokens = max(f.maxTokens, len(b.Tokens))
	return s
}

func (f *fakePolicy) saw(temperature float32) {
	if f.temps == nil {
		f.temps = map[float32]bool{}
	}
	f.temps[temperature] = true
}

func (f *fakePolicy) Score(b *model.Batch, w model.Weights, temperature float32) (model.Scores, error) {
	f.scored++
	f.saw(temperature)
	if w == model.Reference {
		return f.scores(b, f.ref), nil
	}
	return f.scores(b, f.table()), nil
}

func (f *fakePolicy) Settle() error { return nil }

func (f *fakePolicy) Accumulate(b *model.Batch, l model.Loss) (model.Scores, error) {
	f.forward++
	f.saw(l.Temperature)
	s := f.scores(b, f.table())
	if f.fresh || f.dLogp == nil {
		f.dLogp, f.dEntropy = make([]float64, len(f.entropy)), make([]float64, len(f.entropy))
		f.fresh = false
	}
	n := len(b.Targets)
	if l.Coefficients != nil {
		dl, de := l.Coefficients(s)
		for i, id := range b.Targets {
			f.dLogp[id] += float64(dl[i])
			if de != nil {
				f.dEntropy[id] += float64(de[i])
			}
		}
		return s, nil
	}
	f.fused++
	for name, x := range map[string][]float32{"old": l.Old, "ref": l.Ref, "adv": l.Adv, "weight": l.Weight, "tis": l.TIS} {
		if x != nil && len(x) != n || name == "weight" && len(x) != n {
			return s, fmt.Errorf("%s has %d elements for %d predictions", name, len(x), n)
		}
	}
	at := func(x []float32, i int, none float32) float32 {
		if x == nil {
			return none
		}
		return x[i]
	}
	for i, id := range b.Targets {
		logp := s.LogProb[i]
		_, dl, de := l.Surrogate.Token(logp, at(l.Old, i, logp), at(l.Ref, i, 0), at(l.Adv, i, 0), l.Weight[i], at(l.TIS, i, 1), s.Entropy[i])
		f.dLogp[id] += float64(dl)
		f.dEntropy[id] += float64(de)
	}
	return s, nil
}

func (f *fakePolicy) ZeroGrad() { f.fresh = true }

func (f *fakePolicy) OptimStep(o model.AdamW) (model.StepResult, error) {
	if f.optimErr != nil {
		return model.StepResult{}, f.optimErr
	}
	if f.fresh || f.dLogp == nil {
		f.dLogp, f.dEntropy = make([]float64, len(f.entropy)), make([]float64, len(f.entropy))
	}
	f.grads, f.entGrads = append(f.grads, f.dLogp), append(f.entGrads, f.dEntropy)
	f.optim = append(f.optim, o)
	f.fresh = true
	f.step++
	return model.StepResult{GradNorm: 1}, nil
}

func (f *fakePolicy) SyncReference(alpha float32) error {
	if f.synced == nil {
		f.synced = map[int]float32{}
	}
	f.synced[f.step] = alpha
	return nil
}

// device returns the reference device's advantages.
func device(t testing.TB) func(kernels.Advantages) {
	t.Helper()
	d, err := cpu.New(1)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d.Advantages
}

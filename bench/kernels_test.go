package bench

import (
	"bytes"
	"context"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"trainerd/kernels"
	"trainerd/kernels/cpu"
	"trainerd/model"
)

func openCPU(t *testing.T) kernels.Device {
	t.Helper()
	dev, err := cpu.New(2)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = dev.Close() })
	return dev
}

// TestKernels runs every case once at a size of no consequence.
func TestKernels(t *testing.T) {
	var results []KernelResult
	ceilings := 0
	err := Kernels(context.Background(), openCPU(t), KernelsOptions{Shape: "smoke", Load: "smoke", MaxTokens: 1000, Budget: time.Microsecond}, func(r any) error {
		switch r := r.(type) {
		case Ceilings:
			ceilings++
			if r.CopyGBs <= 0 || r.MatmulTFLOPS <= 0 {
				t.Errorf("ceilings %+v", r)
			}
		case KernelResult:
			results = append(results, r)
			if r.Seconds <= 0 || r.GBs <= 0 || (r.Bound != "") != (r.Share > 0) {
				t.Errorf("result %+v", r)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if ceilings != 1 {
		t.Errorf("%d ceilings", ceilings)
	}
	for _, op := range kernels.Operations() {
		if !slices.ContainsFunc(results, func(r KernelResult) bool { return r.Op == op }) {
			t.Errorf("operation %q is not timed", op)
		}
	}
	var table bytes.Buffer
	if err := KernelTable(&table, results); err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(table.String(), "\n"); n != len(results)+2 {
		t.Errorf("the table has %d lines for %d results:\n%s", n, len(results), table.String())
	}
}

// TestKernelCallsAreAStep holds the calls that the cases claim to those of a real
// step of one micro-batch. AdamW runs twice on parts of the weights; transfers,
// clearing and copying are the model's bookkeeping and are not claimed to be complete.
func TestKernelCallsAreAStep(t *testing.T) {
	cfg, err := Shape("smoke")
	if err != nil {
		t.Fatal(err)
	}
	l, err := LoadByName("smoke")
	if err != nil {
		t.Fatal(err)
	}
	p, err := pack(l, 1000)
	if err != nil {
		t.Fatal(err)
	}
	dev := kernels.NewTimed(openCPU(t))
	want := map[string]int{}
	for _, c := range kernelCases(dev.Info(), cfg, p, dev) {
		want[c.op] += c.calls
	}
	r, err := Step(context.Background(), dev, StepOptions{Shape: "smoke", Load: "smoke", Repeats: 1, MaxTokens: 1000, Profile: true})
	if err != nil {
		t.Fatal(err)
	}
	want["adamw"] = 2
	for _, o := range r.Profile.Ops {
		phase, known := kernels.PhaseOf(o.Op)
		if !known {
			t.Errorf("a step has an operation %q that no phase knows", o.Op)
		}
		if phase == kernels.PhaseTransfer || o.Op == "zero" || o.Op == "copy" {
			continue
		}
		if o.Calls != want[o.Op] {
			t.Errorf("%s: %d calls in a step, %d claimed", o.Op, o.Calls, want[o.Op])
		}
	}
}

// TestPack holds a packed load to its own arithmetic.
func TestPack(t *testing.T) {
	for _, name := range []string{"smoke", "cpu512", "secloop", "reason"} {
		l, err := LoadByName(name)
		if err != nil {
			t.Fatal(err)
		}
		p, err := pack(l, math.MaxInt)
		if err != nil {
			t.Fatal(err)
		}
		// The last token of a completion is predicted and not run.
		if p.tokens != l.Tokens()-l.Rollouts() || p.members != l.Rollouts() || p.predicted != l.Tokens()-len(l.Groups)*l.Prompt || len(p.positions) != p.tokens {
			t.Errorf("%s: %d tokens, %d predicted, %d members", name, p.tokens, p.predicted, p.members)
		}
		pairs := 0.0
		for _, s := range p.segments {
			for i := range s.QLen {
				pairs += float64(s.PrefixLen + i + 1)
			}
		}
		if pairs != p.pairs {
			t.Errorf("%s: %v pairs, counted %v", name, p.pairs, pairs)
		}
		if _, err := pack(l, l.Prompt); err == nil {
			t.Errorf("%s: a group was packed into %d tokens", name, l.Prompt)
		}
	}
}

// TestProfileSums: phases and gaps are the step, and the residue is what the
// host spends around it: at most 5 % in the best of three, on however busy a machine.
func TestProfileSums(t *testing.T) {
	best := math.Inf(1)
	for range 3 {
		r, err := Step(context.Background(), openCPU(t), StepOptions{Shape: "smoke", Load: "smoke", Repeats: 3, MaxTokens: 1000, Profile: true})
		if err != nil {
			t.Fatal(err)
		}
		p := r.Profile
		sum := p.Gaps
		for _, x := range p.Phases {
			sum += x.Seconds
			if (x.Calls == 0) != (x.Seconds == 0) {
				t.Errorf("phase %+v", x)
			}
		}
		if math.Abs(sum-p.StepSeconds) > 1e-9*p.StepSeconds {
			t.Errorf("phases and gaps are %v s, the step %v s", sum, p.StepSeconds)
		}
		ops := 0.0
		for _, o := range p.Ops {
			ops += o.Seconds
		}
		if math.Abs(ops+p.Gaps-p.StepSeconds) > 1e-9*p.StepSeconds {
			t.Errorf("operations and gaps are %v s, the step %v s", ops+p.Gaps, p.StepSeconds)
		}
		if p.Residue < -1e-6 {
			t.Errorf("the device saw more than the step: residue %v", p.Residue)
		}
		best = min(best, p.Residue)
		var table bytes.Buffer
		if err := p.Table(&table); err != nil || !strings.Contains(table.String(), "launch gaps") {
			t.Errorf("%v\n%s", err, table.String())
		}
	}
	if best > 0.05 {
		t.Errorf("residue %v of the step", best)
	}
}

func TestScoreAndDecode(t *testing.T) {
	r, err := Score(context.Background(), openCPU(t), StepOptions{Shape: "smoke", Load: "smoke", Repeats: 1, MaxTokens: 40})
	if err != nil {
		t.Fatal(err)
	}
	if r.Tokens != 2*(16+4*8) || r.TokensS <= 0 || r.PeakBytes <= 0 {
		t.Errorf("score %+v", r)
	}
	d, err := Decode(context.Background(), openCPU(t), DecodeOptions{Shape: "smoke", Sequences: 8, Group: 4, Prompt: 10, NewTokens: 3, Repeats: 1})
	if err != nil {
		t.Fatal(err)
	}
	if d.TokensS <= 0 || d.DecodeTokensS <= 0 || d.PeakBytes <= 0 {
		t.Errorf("decode %+v", d)
	}
	if _, err := Decode(context.Background(), openCPU(t), DecodeOptions{Shape: "smoke", Sequences: 9, Group: 4, Prompt: 10, NewTokens: 3, Repeats: 1}); err == nil {
		t.Error("9 sequences were decoded in groups of 4")
	}
}

// TestForwardIsAThird: a multiply-add of the forward pass has two in the backward pass.
func TestForwardIsAThird(t *testing.T) {
	c := model.Config{Hidden: 8, KVHeads: 1, HeadDim: 4, FFN: 16, Layers: 3, Vocab: 11}
	l := Load{Prompt: 5, Groups: [][]int{{2, 3}}}
	// Body: 3 layers of 2·64 + 2·8·4 + 3·8·16 weights on 10 tokens; head: 11·8 on 5; pairs: 12.5 + 10+2 + 15+4.5.
	want := 2.0*3*(128+64+384)*10 + 2*11*8*5 + 4*3*8*44
	if got := UsefulForwardFLOPs(c, l); got != want || UsefulFLOPs(c, l) != 3*want {
		t.Errorf("%v forward and %v, expected %v", got, UsefulFLOPs(c, l), want)
	}
}

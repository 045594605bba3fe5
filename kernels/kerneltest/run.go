package kerneltest

import (
	"flag"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"gorgonia.org/tensor"

	"trainerd/kernels"
)

var (
	seedFlag   = flag.Uint64("kerneltest.seed", 0, "seed of the random inputs; 0 takes a fresh one")
	budgetFlag = flag.Float64("kerneltest.budget", 0, "greatest cost of a case in multiply-adds; 0: what the device affords")
)

// u32 is the unit roundoff of float32.
const u32 = 1.0 / (1 << 24)

// Run tests every operation of a device, or only some groups of them.
func Run(t *testing.T, dev kernels.Device, only ...string) {
	seed := *seedFlag
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	t.Logf("device %s (%s), -kerneltest.seed=%d", dev.Info().Name, dev.Info().Model, seed)
	for i, g := range []struct {
		name string
		run  func(*env)
	}{
		{"transfer", transferCases},
		{"round", roundCases},
		{"rows", rowCases},
		{"gemm", gemmCases},
		{"norm", normCases},
		{"rope", ropeCases},
		{"attention", attentionCases},
		{"decode", decodeCases},
		{"swiglu", swigluCases},
		{"head", headCases},
		{"surrogate", surrogateCases},
		{"sample", sampleCases},
		{"advantages", advantageCases},
		{"optimizer", optimizerCases},
	} {
		if len(only) > 0 && !slices.Contains(only, g.name) {
			continue
		}
		t.Run(g.name, func(t *testing.T) {
			g.run(newEnv(t, dev, rand.New(rand.NewPCG(seed, uint64(i)))))
		})
	}
}

// env is one test on one device. Buffers taken through it are freed with the test.
type env struct {
	*testing.T
	dev    kernels.Device
	rng    *rand.Rand
	act    kernels.DType // type of weights and activations
	grad   kernels.DType // type of parameter gradients
	u      float64       // unit roundoff of act
	uGrad  float64       // unit roundoff of grad
	budget float64       // greatest cost of a case, in multiply-adds
}

func newEnv(t *testing.T, dev kernels.Device, rng *rand.Rand) *env {
	info := dev.Info()
	e := &env{T: t, dev: dev, rng: rng, act: info.Compute, grad: info.GradType, u: roundoff(info.Compute), uGrad: roundoff(info.GradType), budget: 1e14}
	if info.Name == "cpu" {
		e.budget = 2e8
	}
	if *budgetFlag > 0 {
		e.budget = *budgetFlag
	}
	return e
}

func roundoff(t kernels.DType) float64 {
	if t == kernels.BF16 {
		return 1.0 / (1 << 8)
	}
	return u32
}

// perElement is what an element of an elementwise case costs beside a
// multiply-add: it is drawn, copied, uploaded, downloaded and compared.
const perElement = 200

// sub runs a case, unless it costs more multiply-adds than the device's runs can afford.
func (e *env) sub(cost float64, name string, f func(*env)) {
	if cost > e.budget {
		return
	}
	e.T.Run(name, func(t *testing.T) {
		c := *e
		c.T = t
		f(&c)
	})
}

// round returns x rounded to a buffer type, to nearest even.
func round(t kernels.DType, x float64) float64 {
	f := float32(x)
	if t == kernels.BF16 && f == f {
		b := math.Float32bits(f)
		f = math.Float32frombits((b + 0x7fff + b>>16&1) &^ 0xffff)
	}
	return float64(f)
}

// normal returns n normal numbers of a standard deviation, rounded to a type.
func (e *env) normal(t kernels.DType, n int, std float64) []float64 {
	x := make([]float64, n)
	for i := range x {
		x[i] = round(t, e.rng.NormFloat64()*std)
	}
	return x
}

// alloc takes an uninitialised buffer.
func (e *env) alloc(t kernels.DType, n int) kernels.Buffer {
	e.Helper()
	b, err := e.dev.Alloc("test", t, n)
	if err != nil {
		e.Fatalf("allocate %d %v: %v", n, t, err)
	}
	e.Cleanup(func() { e.dev.Free(b) })
	return b
}

// load takes a buffer that holds x.
func (e *env) load(t kernels.DType, x []float64) kernels.Buffer {
	e.Helper()
	b := e.alloc(t, len(x))
	e.store(b, x)
	return b
}

// store uploads x into an existing buffer.
func (e *env) store(b kernels.Buffer, x []float64) {
	if len(x) == 0 {
		return
	}
	f := make([]float32, len(x))
	for i, v := range x {
		f[i] = float32(v)
	}
	e.dev.Upload(b, tensor.New(tensor.WithShape(len(f)), tensor.WithBacking(f)))
}

// ints takes a buffer that holds x.
func (e *env) ints(x []int32) kernels.Buffer {
	b := e.alloc(kernels.I32, len(x))
	if len(x) > 0 {
		e.dev.Upload(b, tensor.New(tensor.WithShape(len(x)), tensor.WithBacking(append([]int32(nil), x...))))
	}
	return b
}

// poisoned takes a buffer full of NaN (or of an id that no test expects).
func (e *env) poisoned(t kernels.DType, n int) kernels.Buffer {
	if t == kernels.I32 {
		x := make([]int32, n)
		for i := range x {
			x[i] = math.MinInt32
		}
		return e.ints(x)
	}
	return e.load(t, repeat(math.NaN(), n))
}

func repeat(v float64, n int) []float64 {
	x := make([]float64, n)
	for i := range x {
		x[i] = v
	}
	return x
}

// read downloads a buffer of floats.
func (e *env) read(b kernels.Buffer) []float64 {
	e.Helper()
	f := make([]float32, b.Len())
	if len(f) > 0 {
		if err := e.dev.Download(tensor.New(tensor.WithShape(len(f)), tensor.WithBacking(f)), b); err != nil {
			e.Fatalf("download %d %v: %v", b.Len(), b.Type(), err)
		}
	}
	x := make([]float64, len(f))
	for i, v := range f {
		x[i] = float64(v)
	}
	return x
}

// readInts downloads a buffer of int32.
func (e *env) readInts(b kernels.Buffer) []int32 {
	e.Helper()
	x := make([]int32, b.Len())
	if len(x) > 0 {
		if err := e.dev.Download(tensor.New(tensor.WithShape(len(x)), tensor.WithBacking(x)), b); err != nil {
			e.Fatalf("download %d %v: %v", b.Len(), b.Type(), err)
		}
	}
	return x
}

// run plans an operation, then runs it on an arena of exactly the planned
// capacity, full of NaN, and waits for it.
func (e *env) run(op func(dev kernels.Device, a kernels.Arena)) {
	e.Helper()
	planner := kernels.NewPlanner(e.dev)
	planned, err := planner.NewArena(0)
	if err != nil {
		e.Fatalf("plan an arena: %v", err)
	}
	op(planner, planned)
	capacity := planned.Peak()
	a, err := e.dev.NewArena(capacity)
	if err != nil {
		e.Fatalf("take an arena of %d bytes: %v", capacity, err)
	}
	defer e.dev.FreeArena(a)
	if capacity > 0 {
		mark := a.Mark()
		e.store(a.Alloc(kernels.F32, int(capacity/4)), repeat(math.NaN(), int(capacity/4)))
		a.Release(mark)
	}
	height := a.Mark()
	op(e.dev, a)
	if err := e.dev.Sync(); err != nil {
		e.Fatalf("sync: %v", err)
	}
	if a.Mark() < height || a.Peak() > capacity {
		e.Errorf("arena: height %d, peak %d of %d planned bytes", a.Mark(), a.Peak(), capacity)
	}
}

// value is a reference result with the magnitude that its error scales with:
// the sum of the absolute values of the terms it was added up from.
type value struct{ v, mag float64 }

// values splits results into numbers and their tolerances factor*mag + u*|v|.
func values(x []value, factor, u float64) (want, tol []float64) {
	want, tol = make([]float64, len(x)), make([]float64, len(x))
	for i, r := range x {
		want[i], tol[i] = r.v, factor*r.mag+u*math.Abs(r.v)
	}
	return want, tol
}

// tiny is added to every tolerance: results below it may be flushed to zero.
const tiny = 1e-37

// compare reports the worst element whose error exceeds its tolerance.
func (e *env) compare(name string, got, want, tol []float64) {
	e.Helper()
	if len(got) != len(want) {
		e.Errorf("%s: %d elements, expected %d", name, len(got), len(want))
		return
	}
	bad, worst, ratio := 0, 0, 0.0
	for i, g := range got {
		if g == want[i] || math.IsNaN(g) && math.IsNaN(want[i]) {
			continue
		}
		r := math.Abs(g-want[i]) / (tol[i] + tiny)
		if r <= 1 {
			continue
		}
		if bad++; !(r <= ratio) {
			worst, ratio = i, r
		}
	}
	if bad > 0 {
		e.Errorf("%s: %d of %d elements are off; [%d] is %v, expected %v ± %.3g", name, bad, len(got), worst, got[worst], want[worst], tol[worst])
	}
}

// same is compare with no tolerance.
func (e *env) same(name string, got, want []float64) {
	e.Helper()
	e.compare(name, got, want, make([]float64, len(want)))
}

// nan reports elements that are not NaN although their inputs were.
func (e *env) nan(name string, got []float64) {
	e.Helper()
	for i, g := range got {
		if !math.IsNaN(g) {
			e.Errorf("%s[%d] is %v, expected NaN from a NaN input", name, i, g)
			return
		}
	}
}

func label(format string, args ...any) string { return fmt.Sprintf(format, args...) }

package kerneltest

import (
	"math"

	"gorgonia.org/tensor"

	"trainerd/kernels"
)

func adamWCases(e *env) {
	grads := []kernels.DType{kernels.F32, kernels.BF16}
	for _, n := range []int{1, 19, 1000, 70001, 1 << 22} {
		for _, step := range []int64{1, 2, 1000} {
			for _, grad := range grads {
				e.sub(float64(n)*perElement, label("adamw/%d/step %d/%v", n, step, grad), func(e *env) { e.adamW(n, step, grad) })
			}
		}
	}
	for _, n := range []int{1, 19, 127, 128, 129, 1000, 70001, 1 << 22} {
		for i, step := range []int64{1, 2, 1000} {
			for _, grad := range grads {
				first := []int64{0, 128, 1<<32 - 256}[i]
				e.sub(float64(n)*perElement, label("adamw compact/%d/step %d/%v", n, step, grad), func(e *env) { e.adamWCompact(n, step, first, grad) })
			}
		}
	}
	e.sub(1, "adamw compact/moments do not stall", stalling)
	for _, n := range []int{0, 1, 19, 1000, 70001, 1 << 22} {
		e.sub(float64(n)*perElement, label("add gradient/%d", n), func(e *env) { e.addGrad(n, int64(n)<<20) })
	}
	e.sub(1, "add gradient/small addends are not lost", smallAddends)
}

// weight takes a weight, and its remainder on a device that has them, which start as exact float32 masters.
func (e *env) weight(p []float64) (w, rem kernels.Buffer) {
	e.Helper()
	if e.act != kernels.BF16 {
		return e.load(e.act, p), nil
	}
	w, rem = e.alloc(kernels.BF16, len(p)), e.alloc(kernels.I16, len(p))
	e.storeMaster(w, rem, p)
	return w, rem
}

// adamW runs one step of a float32 weight on float32 moments.
func (e *env) adamW(n int, step int64, grad kernels.DType) {
	p, g := e.normal(kernels.F32, n, 1), e.normal(grad, n, 0.1)
	m, v := e.normal(kernels.F32, n, 0.1), e.normal(kernels.F32, n, 0.01)
	for i := range v {
		v[i] *= v[i]
		v[i] = round(kernels.F32, v[i])
		if i%11 == 0 {
			g[i], m[i], v[i] = 0, 0, 0
		}
	}
	x := kernels.AdamW{LR: 1e-2, Beta1: 0.9, Beta2: 0.95, Eps: 1e-8, WeightDecay: 0.1, Step: step}
	for _, coef := range []float64{0.25, math.NaN(), math.Inf(1)} {
		x.P, x.Rem = e.weight(p)
		x.G = e.load(grad, g)
		x.M, x.V, x.Coef = e.load(kernels.F32, m), e.load(kernels.F32, v), e.load(kernels.F32, []float64{coef})
		e.dev.AdamW(x)
		gotP, gotM, gotV := e.readMaster(x.P, x.Rem), e.read(x.M), e.read(x.V)
		if coef != 0.25 {
			e.same("weights under a coefficient that is not finite", gotP, p)
			e.same("first moments", gotM, m)
			e.same("second moments", gotV, v)
			continue
		}
		want := newAdamWant(x, coef, p, g, m, v)
		e.compare("weights", gotP, want.p, want.tolP)
		e.compare("first moments", gotM, want.m, want.tolM)
		e.compare("second moments", gotV, want.v, want.tolV)
	}
}

// adamWant are a step's results in float64 before any moment is rounded, and
// how far float32 arithmetic may be off.
type adamWant struct{ p, m, v, tolP, tolM, tolV []float64 }

func newAdamWant(x kernels.AdamW, coef float64, p, g, m, v []float64) *adamWant {
	n := len(p)
	w := &adamWant{make([]float64, n), make([]float64, n), make([]float64, n), make([]float64, n), make([]float64, n), make([]float64, n)}
	for i := range p {
		w.p[i], w.m[i], w.v[i] = refAdamW(p[i], g[i], m[i], v[i], x, coef)
		mMag := x.Beta1*math.Abs(m[i]) + (1-x.Beta1)*math.Abs(g[i]*coef)
		w.tolM[i] = 12 * u32 * mMag // six roundings, and six of a compact moment's value
		w.tolV[i] = 8 * u32 * w.v[i]
		// the update: its moment's error, plus a dozen roundings of its own
		root := math.Sqrt(w.v[i]/(1-math.Pow(x.Beta2, float64(x.Step)))) + x.Eps
		update := x.LR * mMag / (1 - math.Pow(x.Beta1, float64(x.Step))) / root
		w.tolP[i] = 4*u32*math.Abs(p[i]) + 30*u32*update
	}
	return w
}

// margin is what is allocated on both sides of a span that an operation is given, to see that it stays inside.
const margin = kernels.MomentBlock

// between surrounds x with guards.
func between[T any](x []T, n int, guard T) []T {
	out := make([]T, 0, len(x)+2*n)
	for range n {
		out = append(out, guard)
	}
	out = append(out, x...)
	for range n {
		out = append(out, guard)
	}
	return out
}

// adamWCompact runs one step on compact moments, in the middle of larger
// buffers. Gradients span six decades, so that codes of every size come up.
func (e *env) adamWCompact(n int, step, first int64, grad kernels.DType) {
	blocks := kernels.MomentBlocks(n)
	p, g, v := e.normal(kernels.F32, n, 1), make([]float64, n), make([]float64, n)
	codes, scale := make([]int8, n), make([]float64, blocks)
	for b := range scale {
		scale[b] = round(kernels.F32, math.Abs(e.rng.NormFloat64())*0.1)
	}
	for i := range p {
		size := math.Pow(10, -6*e.rng.Float64())
		g[i] = round(grad, e.rng.NormFloat64()*size)
		v[i] = round(kernels.BF16, size*size*e.rng.ExpFloat64())
		codes[i] = int8(e.rng.IntN(255) - 127)
		block := i / kernels.MomentBlock
		switch {
		case i%11 == 0:
			g[i], codes[i], v[i] = 0, 0, 0
		case block%5 == 3: // nothing there, as in padding
			g[i], codes[i], v[i], p[i], scale[block] = 0, 0, 0, 0, 0
		case block%5 == 4: // too small to be kept
			g[i], scale[block] = round(grad, g[i]*0x1p-120), 0
		}
	}
	m := make([]float64, n)
	for i, c := range codes {
		m[i] = refMoment(c, scale[i/kernels.MomentBlock])
	}
	x := kernels.AdamW{LR: 1e-2, Beta1: 0.9, Beta2: 0.95, Eps: 1e-8, WeightDecay: 0.1, Step: step, Seed: e.rng.Uint64(), First: first}
	for _, coef := range []float64{0.25, math.NaN(), math.Inf(-1)} {
		wide := struct{ p, rem, m, s, v kernels.Buffer }{}
		wide.p, wide.rem = e.weight(between(p, margin, 3))
		wide.m, wide.s = e.loadCodes(between(codes, margin, 77)), e.load(kernels.F32, between(scale, 1, 5))
		wide.v = e.load(kernels.BF16, between(v, margin, 7))
		x.P, x.M, x.V = wide.p.Slice(margin, margin+n), wide.m.Slice(margin, margin+n), wide.v.Slice(margin, margin+n)
		x.Scale, x.G, x.Coef = wide.s.Slice(1, 1+blocks), e.load(grad, g), e.load(kernels.F32, []float64{coef})
		if wide.rem != nil {
			x.Rem = wide.rem.Slice(margin, margin+n)
		}
		e.dev.AdamW(x)
		gotP, gotM, gotS, gotV := e.readMaster(wide.p, wide.rem), e.readCodes(wide.m), e.read(wide.s), e.read(wide.v)
		if coef != 0.25 {
			e.same("weights under a coefficient that is not finite", gotP, between(p, margin, 3))
			e.same("codes of first moments", floatsOf(gotM), floatsOf(between(codes, margin, 77)))
			e.same("scales of first moments", gotS, between(scale, 1, 5))
			e.same("second moments", gotV, between(v, margin, 7))
			continue
		}
		want := newAdamWant(x, coef, p, g, m, v)
		e.compare("weights", gotP, between(want.p, margin, 3), between(want.tolP, margin, 0))
		e.sameEnds("codes of first moments", floatsOf(gotM), margin, 77)
		e.sameEnds("scales of first moments", gotS, 1, 5)
		e.sameEnds("second moments", gotV, margin, 7)
		e.compactMoments(x, want, gotM[margin:][:n], gotS[1:][:blocks], gotV[margin:][:n])
	}
}

// compactMoments holds rounded moments to the only values that the random bits
// allow. What is stored rises with the exact value, so the stored one must lie
// between what the two ends of the tolerance give.
func (e *env) compactMoments(x kernels.AdamW, want *adamWant, codes []int8, scale, v []float64) {
	e.Helper()
	n := len(codes)
	wantScale, tolScale := make([]float64, len(scale)), make([]float64, len(scale))
	for i := range n {
		b := i / kernels.MomentBlock
		wantScale[b], tolScale[b] = max(wantScale[b], math.Abs(want.m[i])), max(tolScale[b], want.tolM[i])
	}
	for b := range wantScale {
		if wantScale[b] < 0x1p-90 {
			wantScale[b] = 0
		}
	}
	e.compare("scales of first moments", scale, wantScale, tolScale)
	low, high := make([]float64, n), make([]float64, n)
	lowV, highV := make([]float64, n), make([]float64, n)
	for i := range n {
		random := refRandom(x.Seed, uint64(x.Step), x.First+int64(i))
		if s := scale[i/kernels.MomentBlock]; s > 0 {
			unit := 127 * 127 * 127 * 127 / s
			// the moment's own error, and ten roundings on the way to a code, of which each of the first root counts four times
			off := unit*want.tolM[i] + 12*u32*unit*math.Abs(want.m[i])
			low[i], high[i] = refCode(unit*want.m[i]-off, random>>16), refCode(unit*want.m[i]+off, random>>16)
		}
		lowV[i], highV[i] = refHalf(want.v[i]-want.tolV[i], random&0xffff), refHalf(want.v[i]+want.tolV[i], random&0xffff)
	}
	e.within("codes of first moments", floatsOf(codes), low, high)
	e.within("second moments", v, lowV, highV)
}

// stalling runs moments whose steps are smaller than half a code: rounded to
// nearest they stay where they are, rounded stochastically their mean follows
// the exact course. Over n independent elements the mean's deviation is that of
// one over sqrt(n), and six of them are allowed.
func stalling(e *env) {
	const n, steps, beta1, beta2 = 4096, 200, 0.9, 0.999
	// One element of each block is held at m = 1 by its gradient; the others fall
	// from code 8, (8/127)⁴, with no gradient. Second moments fall from 1.
	codes, scale, g := make([]int8, n), repeat(1, n/kernels.MomentBlock), make([]float64, n)
	for i := range codes {
		codes[i] = 8
		if i%kernels.MomentBlock == 0 {
			codes[i], g[i] = 127, 1
		}
	}
	const seven, eight = 7 * 7 * 7 * 7, 8 * 8 * 8 * 8
	if t := beta1 * eight; t-seven < eight-t {
		e.Fatal("rounded to nearest, the first moment would move: the case shows nothing")
	}
	if round(kernels.BF16, beta2) != 1 {
		e.Fatal("rounded to nearest, the second moment would move: the case shows nothing")
	}
	x := kernels.AdamW{Beta1: beta1, Beta2: beta2, Eps: 1e-8, Seed: e.rng.Uint64()}
	x.P, x.Rem = e.weight(make([]float64, n))
	x.G, x.M, x.Scale, x.V = e.load(kernels.F32, g), e.loadCodes(codes), e.load(kernels.F32, scale), e.load(kernels.BF16, repeat(1, n))
	x.Coef = e.load(kernels.F32, []float64{1})
	mean := func() (first, second float64) {
		c, s, v := e.readCodes(x.M), e.read(x.Scale), e.read(x.V)
		for i := range c {
			if i%kernels.MomentBlock > 0 {
				first += refMoment(c[i], s[i/kernels.MomentBlock]) / (n - n/kernels.MomentBlock)
				second += v[i] / (n - n/kernels.MomentBlock)
			}
		}
		return first, second
	}
	for step := int64(1); step <= steps; step++ {
		x.Step = step
		e.dev.AdamW(x)
		if step == 10 {
			// A code below 8 is at most (8⁴-7⁴)/127⁴ wide, which bounds a step's deviation by half of it.
			first, _ := mean()
			want := math.Pow(beta1, 10) * eight / (127 * 127 * 127 * 127)
			e.compare("mean of first moments after 10 steps", []float64{first}, []float64{want}, []float64{6 * math.Sqrt(10) * (eight - seven) / 2 / (127 * 127 * 127 * 127) / math.Sqrt(n-n/kernels.MomentBlock)})
		}
	}
	_, second := mean()
	// A bf16 below 1 is 2^-8 wide.
	e.compare("mean of second moments after 200 steps", []float64{second}, []float64{math.Pow(beta2, steps)}, []float64{6 * math.Sqrt(steps) * 0x1p-9 / math.Sqrt(n-n/kernels.MomentBlock)})
}

// addGrad: the first micro-batch is rounded to nearest, further ones to a neighbour of the sum.
func (e *env) addGrad(n int, first int64) {
	src := e.normal(kernels.F32, n, 1)
	dst := e.load(kernels.BF16, repeat(math.NaN(), n))
	want := make([]float64, n)
	for i, x := range src {
		want[i] = round(kernels.BF16, x)
	}
	x := kernels.AddGrad{Dst: dst, Src: e.load(kernels.F32, src), Fresh: true, First: first}
	e.dev.AddGrad(x)
	e.same("first micro-batch", e.read(dst), want)

	more := e.normal(kernels.F32, n, 0.01)
	for i := range more {
		if special := []float64{math.NaN(), math.Inf(1), math.Inf(-1), -want[i]}; i%13 == 5 {
			more[i] = special[i/13%4]
		}
	}
	seed := e.rng.Uint64()
	x.Src, x.Fresh, x.Key = e.load(kernels.F32, more), false, kernels.RoundingKey(seed, 3, 1)
	e.dev.AddGrad(x)
	low, high := make([]float64, n), make([]float64, n)
	for i := range want {
		sum := want[i] + more[i]
		if math.IsNaN(sum) || math.IsInf(sum, 0) {
			low[i], high[i] = sum, sum
			continue
		}
		random := refRandom2(seed, 3, 1, first+int64(i)) >> 16
		tol := u32 * math.Abs(sum)
		low[i], high[i] = refHalf(sum-tol, random), refHalf(sum+tol, random)
	}
	e.within("second micro-batch", e.read(dst), low, high)
}

// smallAddends adds 2^-11 to 1 for 512 times: to nearest each is lost, as a bf16
// above 1 is 2^-7 wide. A step's variance is at most 2^-11·2^-7.
func smallAddends(e *env) {
	const n, times, addend = 4096, 512, 0x1p-11
	if round(kernels.BF16, 1+addend) != 1 {
		e.Fatal("rounded to nearest, the addend would not be lost: the case shows nothing")
	}
	x := kernels.AddGrad{Dst: e.load(kernels.BF16, repeat(1, n)), Src: e.load(kernels.F32, repeat(addend, n))}
	seed := e.rng.Uint64()
	for i := range times {
		x.Key = kernels.RoundingKey(seed, uint64(i))
		e.dev.AddGrad(x)
	}
	mean := 0.0
	for _, v := range e.read(x.Dst) {
		mean += v / n
	}
	e.compare("mean of sums", []float64{mean}, []float64{1 + times*addend}, []float64{6 * math.Sqrt(times*addend*0x1p-7/n)})
}

// loadCodes takes a buffer that holds x.
func (e *env) loadCodes(x []int8) kernels.Buffer {
	e.Helper()
	b := e.alloc(kernels.I8, len(x))
	e.dev.Upload(b, tensor.New(tensor.WithShape(len(x)), tensor.WithBacking(append([]int8(nil), x...))))
	return b
}

// readCodes downloads a buffer of int8.
func (e *env) readCodes(b kernels.Buffer) []int8 {
	e.Helper()
	x := make([]int8, b.Len())
	if err := e.dev.Download(tensor.New(tensor.WithShape(len(x)), tensor.WithBacking(x)), b); err != nil {
		e.Fatalf("download %d %v: %v", b.Len(), b.Type(), err)
	}
	return x
}

func floatsOf(x []int8) []float64 {
	out := make([]float64, len(x))
	for i, v := range x {
		out[i] = float64(v)
	}
	return out
}

// sameEnds checks the guards around a span.
func (e *env) sameEnds(name string, x []float64, n int, guard float64) {
	e.Helper()
	e.same(name+", what lies before", x[:n], repeat(guard, n))
	e.same(name+", what lies behind", x[len(x)-n:], repeat(guard, n))
}

// within reports the first element outside [low, high]; NaN only is within NaN.
func (e *env) within(name string, got, low, high []float64) {
	e.Helper()
	for i, g := range got {
		if !(g >= low[i] && g <= high[i]) && !(math.IsNaN(g) && math.IsNaN(low[i])) {
			e.Errorf("%s: [%d] of %d is %v, expected %v to %v", name, i, len(got), g, low[i], high[i])
			return
		}
	}
}

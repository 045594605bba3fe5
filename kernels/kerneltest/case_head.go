package kerneltest

import (
	"math"

	"trainerd/kernels"
)

// sumTerms is how many exponentials a device may add up one after the other in
// float32 before they join a wider or shorter sum.
const sumTerms = 1024

type headShape struct {
	n, d, v     int
	temperature float64
	std         float64 // of the weights; large gives logits of ±80
}

// problem is one LM head with its host copies.
type headProblem struct {
	headShape
	hidden, w []float64
	targets   []int32
	head      kernels.Head
}

func (e *env) head(s headShape) headProblem {
	p := headProblem{headShape: s, hidden: e.normal(e.act, s.n*s.d, 1), w: e.normal(e.act, s.v*s.d, s.std)}
	for range s.n {
		p.targets = append(p.targets, int32(e.rng.IntN(s.v)))
	}
	if s.n > 2 {
		p.targets[0], p.targets[1] = 0, int32(s.v-1)
	}
	p.head = kernels.Head{
		Hidden: e.load(e.act, p.hidden), W: e.load(e.act, p.w), Targets: e.ints(p.targets),
		LogProb: e.poisoned(kernels.F32, s.n), Entropy: e.poisoned(kernels.F32, s.n), N: s.n, D: s.d, V: s.v, Temperature: float32(s.temperature),
	}
	return p
}

func (p headProblem) row(i int) headRow {
	return refHeadRow(p.hidden[i*p.d:][:p.d], p.w, p.v, p.targets[i], float64(float32(p.temperature)))
}

// logitError is what a tempered logit may be off by: a dot product of d terms and the division.
func (p headProblem) logitError(r headRow) float64 { return float64(p.d+4) * u32 * r.mag }

// logProbError: the target's logit, the normaliser (which moves by no more than
// its logits do), the sum of exponentials, and the roundings of the difference.
func (p headProblem) logProbError(r headRow) float64 {
	return 2*p.logitError(r) + (sumTerms+16)*u32 + 4*u32*(math.Abs(r.logProb)+r.mag)
}

// entropyError: a shift of every logit by at most x moves H by at most 2x(1+H);
// its two sums are of positive terms and differ by a number of the size of log V.
func (p headProblem) entropyError(r headRow) float64 {
	return (2*p.logitError(r) + (sumTerms+32)*u32) * (1 + r.entropy + math.Log(float64(p.v)))
}

// check compares log-probs and entropies.
func (p headProblem) check(e *env, rows []int) {
	e.Helper()
	lp, h := e.read(p.head.LogProb), e.read(p.head.Entropy)
	for _, i := range rows {
		r := p.row(i)
		e.compare(label("log-prob of row %d", i), lp[i:i+1], []float64{r.logProb}, []float64{p.logProbError(r)})
		e.compare(label("entropy of row %d", i), h[i:i+1], []float64{r.entropy}, []float64{p.entropyError(r)})
	}
}

func headCases(e *env) {
	for _, s := range []headShape{
		{1, 1, 1, 1, 1}, {1, 8, 5, 1, 1}, {5, 3, 2, 0.7, 1}, {40, 16, 300, 1, 0.5}, {33, 64, 1000, 0.6, 0.2}, {2, 2, 20003, 0.9, 1}, {7, 32, 4099, 1.3, 14},
		{19, 24, 257, 1, 14}, {600, 4, 40, 1, 1}, {448, 576, 49152, 1, 0.05}, {500, 896, 151936, 1, 0.05}, {64, 3584, 151936, 0.9, 0.02},
	} {
		e.sub(float64(s.n*s.d*s.v)*4, label("%dx%dx%d/T=%v/std=%v", s.n, s.d, s.v, s.temperature, s.std), func(e *env) {
			p := e.head(s)
			rows := e.picks(s.n, int(max(4, 5e7/float64(s.d*s.v))))
			e.run(func(dev kernels.Device, a kernels.Arena) {
				h := p.head
				h.Scratch = a
				dev.LogProb(h)
			})
			p.check(e, rows)
			forward := e.read(p.head.LogProb)
			e.same("log-prob of the backward pass against forward only", e.headBackward(p, rows), forward)
		})
	}
	e.sub(1, "nothing", func(e *env) {
		p := e.head(headShape{1, 2, 3, 1, 1})
		h, zero := p.head, func(t kernels.DType) kernels.Buffer { return e.alloc(t, 0) }
		h.N, h.Hidden, h.Targets, h.LogProb, h.Entropy = 0, zero(e.act), zero(kernels.I32), zero(kernels.F32), nil
		g := kernels.HeadGrad{DLogProb: zero(kernels.F32), DHidden: zero(e.act), DW: e.poisoned(e.grad, 6)}
		e.run(func(dev kernels.Device, a kernels.Arena) {
			h.Scratch = a
			dev.LogProb(h)
			dev.LogProbBackward(h, g)
		})
		e.same("dw without rows", e.read(g.DW), make([]float64, 6))
	})
	e.sub(1, "nan", func(e *env) {
		p := e.head(headShape{3, 4, 9, 1, 1})
		p.hidden[5] = math.NaN()
		e.store(p.head.Hidden, p.hidden)
		e.run(func(dev kernels.Device, a kernels.Arena) {
			h := p.head
			h.Scratch = a
			dev.LogProb(h)
		})
		e.nan("log-prob", e.read(p.head.LogProb)[1:2])
		e.nan("entropy", e.read(p.head.Entropy)[1:2])
		p.check(e, []int{0, 2})
	})
}

// headBackward checks gradients for given coefficients: some rows with none,
// some with only one of the two. It returns the log-probs.
func (e *env) headBackward(p headProblem, rows []int) []float64 {
	dlp, dent := e.normal(kernels.F32, p.n, 1), e.normal(kernels.F32, p.n, 0.3)
	for i := range dlp {
		switch i % 5 {
		case 1:
			dlp[i], dent[i] = 0, 0
		case 2:
			dent[i] = 0
		case 3:
			dlp[i] = 0
		}
	}
	before := e.normal(e.grad, p.v*p.d, 1)
	for _, variant := range []struct{ accumulate, entropy bool }{{false, true}, {true, false}} {
		if !variant.entropy {
			clear(dent)
		}
		g := kernels.HeadGrad{DLogProb: e.load(kernels.F32, dlp), DHidden: e.poisoned(e.act, p.n*p.d), DW: e.poisoned(e.grad, p.v*p.d), Accumulate: variant.accumulate}
		if variant.entropy {
			g.DEntropy = e.load(kernels.F32, dent)
		}
		if variant.accumulate {
			e.store(g.DW, before)
		}
		h := p.head
		h.LogProb, h.Entropy = e.poisoned(kernels.F32, p.n), e.poisoned(kernels.F32, p.n)
		e.run(func(dev kernels.Device, a kernels.Arena) {
			h.Scratch = a
			dev.LogProbBackward(h, g)
		})
		p.head.LogProb, p.head.Entropy = h.LogProb, h.Entropy
		p.check(e, rows)
		coefficients := func(i int, _ headRow) coefficients {
			return coefficients{dLogProb: dlp[i], dEntropy: dent[i]}
		}
		var add []float64
		if variant.accumulate {
			add = before
		}
		p.checkGradients(e, g, rows, add, coefficients)
	}
	return e.read(p.head.LogProb)
}

// coefficients of one row, with the error of the first and the magnitude it came from.
type coefficients struct{ dLogProb, dEntropy, slack float64 }

// checkGradients compares DHidden of some rows, and DW (a sample of it, if it is
// large) when all rows are among them.
func (p headProblem) checkGradients(e *env, g kernels.HeadGrad, rows []int, before []float64, at func(i int, r headRow) coefficients) {
	e.Helper()
	dHidden, dW := e.read(g.DHidden), e.read(g.DW)
	all := len(rows) >= p.n && rows[len(rows)-1] == p.n-1
	sumW := make([]value, len(dW))
	tolW := make([]float64, len(dW))
	for _, i := range rows {
		r := p.row(i)
		c := at(i, r)
		dz := r.dlogits(c.dLogProb, c.dEntropy)
		// Every probability is off by four logit errors (twice through p, twice
		// through log p + H), the sums of the statistics and a dozen roundings;
		// the logit gradients may be stored for the two products that follow.
		rel := 4*p.logitError(r) + (2*sumTerms+64)*u32 + 8*u32*r.mag + e.stored()
		want, tol := make([]float64, p.d), make([]float64, p.d)
		for j, z := range dz {
			errZ := rel*z.mag + c.slack*r.invTemp*math.Exp(r.logP[j])
			// A card's exponential flushes probabilities below the smallest normal float32 to 0.
			errZ += 0x1p-126 * r.invTemp * (math.Abs(c.dLogProb) + math.Abs(c.dEntropy)*(1+math.Abs(r.logP[j])+r.entropy))
			if int32(j) == r.target {
				errZ += c.slack * r.invTemp
			}
			for k := range p.d {
				w := p.w[j*p.d+k]
				want[k] += z.v * w
				tol[k] += (errZ + float64(p.v+2)*u32*math.Abs(z.v)) * math.Abs(w)
				if all {
					x := p.hidden[i*p.d+k]
					sumW[j*p.d+k].v += z.v * x
					tolW[j*p.d+k] += (errZ + float64(p.n+3)*u32*math.Abs(z.v)) * math.Abs(x)
				}
			}
		}
		for k := range tol {
			tol[k] += e.u * math.Abs(want[k])
		}
		e.compare(label("dhidden of row %d", i), dHidden[i*p.d:][:p.d], want, tol)
	}
	if !all {
		return
	}
	want := make([]float64, len(dW))
	for j := range want {
		want[j] = sumW[j].v
		if before != nil {
			want[j] += before[j]
			tolW[j] += float64(p.n+3) * u32 * math.Abs(before[j])
		}
		// A device may store partial sums, one for each chunk of rows.
		tolW[j] += e.uGrad*math.Abs(want[j]) + 8*(e.uGrad-u32)*tolW[j]
	}
	e.compare("dw", dW, want, tolW)
}

// surrogateCases: every kind, fused with the head. Old log-probs are placed so
// that ratios fall on both sides of every bound, but not within rounding of one.
func surrogateCases(e *env) {
	for _, c := range []struct {
		name string
		s    kernels.Surrogate
		old  bool
		tis  bool
	}{
		{"nll", kernels.Surrogate{Kind: kernels.SurrogateNLL}, false, false},
		{"nll, entropy, tis", kernels.Surrogate{Kind: kernels.SurrogateNLL, EntropyCoef: 0.02}, false, true},
		{"clip", kernels.Surrogate{EpsLow: 0.2, EpsHigh: 0.28}, true, false},
		{"clip on policy", kernels.Surrogate{EpsLow: 0.2, EpsHigh: 0.28}, false, false},
		{"clip, tis", kernels.Surrogate{EpsLow: 0.2, EpsHigh: 0.28}, true, true},
		{"clip, delta, kl, entropy", kernels.Surrogate{EpsLow: 0.2, EpsHigh: 0.28, Delta: 1.7, Beta: 0.04, EntropyCoef: 0.01}, true, true},
		{"kl on policy", kernels.Surrogate{EpsLow: 0.2, EpsHigh: 0.2, Beta: 0.5}, false, false},
		{"cispo", kernels.Surrogate{Kind: kernels.SurrogateCISPO, RatioCap: 1.5}, true, false},
		{"cispo, kl, entropy, tis", kernels.Surrogate{Kind: kernels.SurrogateCISPO, RatioCap: 1.5, Beta: 0.1, EntropyCoef: 0.01}, true, true},
	} {
		e.sub(1e6, c.name, func(e *env) {
			p := e.head(headShape{60, 16, 131, 0.8, 0.5})
			in := make([]tokenInputs, p.n)
			col := func(f func(x *tokenInputs) float64) []float64 {
				out := make([]float64, p.n)
				for i := range in {
					out[i] = f(&in[i])
				}
				return out
			}
			ratios := []float64{0.3, 0.79, 0.81, 1, 1.19, 1.21, 1.27, 1.29, 1.49, 1.51, 1.69, 1.71, 4}
			for i := range in {
				r := p.row(i)
				x := tokenInputs{logp: r.logProb, entropy: r.entropy, tis: 1, adv: e.rng.NormFloat64(), weight: e.rng.Float64()}
				x.old = round(kernels.F32, r.logProb-math.Log(ratios[i%len(ratios)]))
				if !c.old {
					x.old = r.logProb
				}
				x.ref = r.logProb + e.rng.NormFloat64()*0.3
				if c.tis {
					x.tis = 2 * e.rng.Float64()
				}
				switch i % 7 {
				case 3:
					x.adv = 0
				case 5: // masked: nothing that stands in the row may matter
					x.adv, x.tis, x.weight = math.NaN(), math.Inf(1), 0
					if c.old {
						x.old = math.NaN()
					}
					x.ref = math.NaN()
				}
				x.ref, x.adv, x.tis, x.weight = round(kernels.F32, x.ref), round(kernels.F32, x.adv), round(kernels.F32, x.tis), round(kernels.F32, x.weight)
				in[i] = x
			}
			tokens := kernels.SurrogateTokens{Weight: e.load(kernels.F32, col(func(x *tokenInputs) float64 { return x.weight }))}
			if c.s.Kind != kernels.SurrogateNLL {
				tokens.Adv = e.load(kernels.F32, col(func(x *tokenInputs) float64 { return x.adv }))
			}
			if c.old {
				tokens.Old = e.load(kernels.F32, col(func(x *tokenInputs) float64 { return x.old }))
			}
			if c.s.Beta != 0 {
				tokens.Ref = e.load(kernels.F32, col(func(x *tokenInputs) float64 { return x.ref }))
			}
			if c.tis {
				tokens.TIS = e.load(kernels.F32, col(func(x *tokenInputs) float64 { return x.tis }))
			} else {
				for i := range in {
					in[i].tis = 1
				}
			}
			g := kernels.HeadGrad{Surrogate: &c.s, Tokens: tokens, DHidden: e.poisoned(e.act, p.n*p.d), DW: e.poisoned(e.grad, p.v*p.d)}
			e.run(func(dev kernels.Device, a kernels.Arena) {
				h := p.head
				h.Scratch = a
				dev.LogProbBackward(h, g)
			})
			rows := e.picks(p.n, p.n)
			p.check(e, rows)
			p.checkGradients(e, g, rows, nil, func(i int, r headRow) coefficients {
				_, dlp, dent, mag, slope := refToken(c.s, in[i], in[i].logp)
				// the ratio moves with the log-prob's own error; a dozen roundings in the formula
				return coefficients{dlp, dent, slope*p.logProbError(r) + 24*u32*mag}
			})
		})
	}
}

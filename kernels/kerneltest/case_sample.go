package kerneltest

import (
	"math"
	"slices"

	"trainerd/kernels"
)

// draw runs Sample with the identity as head, so that row i's logits are z[i].
func (e *env) draw(z [][]float64, u []float64, temperature, topP float32) (tokens []int32, logProb []float64) {
	n, v := len(z), len(z[0])
	identity := make([]float64, v*v)
	for i := range v {
		identity[i*v+i] = 1
	}
	x := kernels.Draw{
		Hidden: e.load(e.act, slices.Concat(z...)), W: e.load(e.act, identity), U: e.load(kernels.F32, u),
		Tokens: e.poisoned(kernels.I32, n), LogProb: e.poisoned(kernels.F32, n), N: n, D: v, V: v, Temperature: temperature, TopP: topP,
	}
	e.run(func(dev kernels.Device, a kernels.Arena) {
		d := x
		d.Scratch = a
		dev.Sample(d)
	})
	return e.readInts(x.Tokens), e.read(x.LogProb)
}

// uniforms returns n numbers of [0,1) that float32 can hold.
func (e *env) uniforms(n int) []float64 {
	u := make([]float64, n)
	for i := range u {
		u[i] = float64(e.rng.Float32())
	}
	return u
}

func same(row []float64, n int) [][]float64 {
	z := make([][]float64, n)
	for i := range z {
		z[i] = row
	}
	return z
}

// softmaxOf is the tempered distribution of a row of logits.
func softmaxOf(z []float64, temperature float64) []float64 {
	p, sum, top := make([]float64, len(z)), 0.0, slices.Max(z)
	for i, x := range z {
		p[i] = math.Exp((x - top) / temperature)
		sum += p[i]
	}
	for i := range p {
		p[i] /= sum
	}
	return p
}

// nucleusOf marks the shortest run of ids, by falling probability, lower id
// first on a tie, whose mass reaches topP.
func nucleusOf(p []float64, topP float64) (keep []bool, mass float64) {
	ids := make([]int, len(p))
	for i := range ids {
		ids[i] = i
	}
	slices.SortStableFunc(ids, func(a, b int) int {
		switch {
		case p[a] > p[b]:
			return -1
		case p[a] < p[b]:
			return 1
		}
		return 0
	})
	keep = make([]bool, len(p))
	for _, i := range ids {
		keep[i] = true
		if mass += p[i]; mass >= topP {
			break
		}
	}
	return keep, mass
}

// inversion checks that each of n draws is the token whose span of the cumulative
// sum its uniform number falls into.
func (e *env) inversion(row []float64, n int) {
	v := len(row)
	for _, c := range []struct{ temperature, topP float32 }{{1, 1}, {0.7, 1}, {1, 0.9}, {1.5, 0.5}, {1, 1e-6}} {
		u := e.uniforms(n)
		u[0], u[1] = 0, 1-u32
		tokens, lp := e.draw(same(row, n), u, c.temperature, c.topP)
		p := softmaxOf(row, float64(c.temperature))
		keep, mass := nucleusOf(p, float64(c.topP))
		for i, tok := range tokens {
			if tok < 0 || int(tok) >= v || !keep[tok] {
				e.Fatalf("temperature %v, top-p %v: token %d is outside the nucleus", c.temperature, c.topP, tok)
			}
			// u must fall into the token's span of the cumulative sum in id order
			below := 0.0
			for j := range tok {
				if keep[j] {
					below += p[j] / mass
				}
			}
			slack := float64(v+16) * u32
			if u[i] < below-slack || u[i] > below+p[tok]/mass+slack {
				e.Fatalf("temperature %v, top-p %v: u %v gave token %d, whose span is [%v,%v)", c.temperature, c.topP, u[i], tok, below, below+p[tok]/mass)
			}
			// the log-prob is that of the whole tempered softmax, before top-p
			e.compare(label("log-prob of draw %d", i), lp[i:i+1], []float64{math.Log(p[tok])}, []float64{float64(v+64) * u32 * (1 + 8*8/float64(c.temperature))})
		}
	}
}

// distribution holds n draws to the probabilities of their tokens.
//
// Pearson's statistic of n draws is about chi-square with k-1 degrees of freedom:
// mean k-1, variance 2(k-1). Six deviations above the mean (and the skew of few
// degrees) happen less than once in a million runs. Tokens that fewer than ten
// draws are expected of count together.
func (e *env) distribution(row []float64, n int) {
	v, draws := len(row), float64(n)
	for _, topP := range []float32{1, 0.8} {
		tokens, _ := e.draw(same(row, n), e.uniforms(n), 1, topP)
		p := softmaxOf(row, 1)
		keep, mass := nucleusOf(p, float64(topP))
		count := make([]float64, v)
		for _, tok := range tokens {
			if tok < 0 || int(tok) >= v || !keep[tok] {
				e.Fatalf("top-p %v: token %d is outside the nucleus", topP, tok)
			}
			count[tok]++
		}
		stat, cells := 0.0, -1.0
		restWant, restGot := 0.0, 0.0
		for j := range v {
			if !keep[j] {
				continue
			}
			if want := draws * p[j] / mass; want >= 10 {
				stat, cells = stat+(count[j]-want)*(count[j]-want)/want, cells+1
			} else {
				restWant, restGot = restWant+want, restGot+count[j]
			}
		}
		if restWant >= 10 {
			stat, cells = stat+(restGot-restWant)*(restGot-restWant)/restWant, cells+1
		}
		if cells < 1 {
			continue // one token has it all
		}
		if limit := cells + 6*math.Sqrt(2*cells) + 12; stat > limit {
			e.Errorf("top-p %v: chi-square %.1f with %v degrees of freedom, expected at most %.1f", topP, stat, cells, limit)
		}
	}
}

func sampleCases(e *env) {
	const v = 61
	row := e.normal(e.act, v, 2)
	e.sub(2*3*v*v, "greedy", func(e *env) {
		z := [][]float64{slices.Clone(row), slices.Clone(row), make([]float64, v)}
		z[1][v-1], z[1][7] = 40, 40 // a tie: the lower id wins
		tokens, lp := e.draw(z, make([]float64, 3), 0, 1)
		for i, want := range []int32{int32(slices.Index(row, slices.Max(row))), 7, 0} {
			p := softmaxOf(z[i], 1)[want]
			if tokens[i] != want {
				e.Errorf("row %d: token %d, expected %d", i, tokens[i], want)
			}
			e.compare(label("log-prob of row %d", i), lp[i:i+1], []float64{math.Log(p)}, []float64{(v + 64) * u32})
		}
	})
	// A draw passes over its row some ten times, whatever its size: on an emulator of a
	// card that takes longer than its products. The smaller cases are what one, or a sanitizer, can afford.
	const perDraw = 1e4
	small := e.normal(e.act, 6, 0.5)
	for _, n := range []int{24, 4000} {
		e.sub(perDraw*float64(n), label("inversion/%d", n), func(e *env) { e.inversion(row, n) })
	}
	for _, c := range []struct {
		n   int
		row []float64
	}{{80, small}, {20000, row}} {
		e.sub(perDraw*float64(c.n), label("distribution/%d of %d", c.n, len(c.row)), func(e *env) { e.distribution(c.row, c.n) })
	}
	for _, n := range []int{10, 400} {
		e.sub(perDraw*float64(n), label("top-p is exact/%d", n), func(e *env) {
			// Eight equal logits: a nucleus of mass 0.45 is ids 0..3, of 0.5 as well, of 0.51 ids 0..4.
			for topP, most := range map[float32]int32{0.01: 0, 0.45: 3, 0.5: 3, 0.51: 4, 0.99: 7} {
				u := make([]float64, n)
				for i := range u {
					u[i] = float64(float32(i) / float32(n))
				}
				tokens, _ := e.draw(same(make([]float64, 8), n), u, 1, topP)
				for i, tok := range tokens {
					if want := int32(float64(u[i]) * float64(most+1)); tok != want {
						e.Fatalf("top-p %v: u %v gave token %d, expected %d of 0..%d", topP, u[i], tok, want, most)
					}
				}
			}
		})
	}
	e.sub(perDraw*3, "one id with all mass", func(e *env) {
		// One id holds nearly all mass, wherever it stands.
		for _, at := range []int{0, 5, 30} {
			z := make([]float64, 31)
			z[at] = 60
			for _, topP := range []float32{0.5, 0.999} {
				tokens, lp := e.draw(same(z, 3), []float64{0, 0.5, 1 - u32}, 1, topP)
				for i, tok := range tokens {
					if int(tok) != at || math.Abs(lp[i]) > 64*u32 {
						e.Errorf("top-p %v: token %d with log-prob %v, expected %d with 0", topP, tok, lp[i], at)
					}
				}
			}
		}
	})
	for _, s := range []headShape{{5, 32, 5000, 1, 0.4}, {64, 576, 49152, 0.8, 0.05}, {64, 896, 151936, 1, 0.05}} {
		e.sub(float64(s.n*s.d*s.v)*4, label("vocabulary/%d", s.v), func(e *env) {
			p := e.head(s)
			for _, topP := range []float32{1, 0.9} {
				x := kernels.Draw{
					Hidden: p.head.Hidden, W: p.head.W, U: e.load(kernels.F32, e.uniforms(s.n)),
					Tokens: e.poisoned(kernels.I32, s.n), LogProb: e.poisoned(kernels.F32, s.n),
					N: s.n, D: s.d, V: s.v, Temperature: float32(s.temperature), TopP: topP,
				}
				e.run(func(dev kernels.Device, a kernels.Arena) {
					d := x
					d.Scratch = a
					dev.Sample(d)
				})
				tokens, lp := e.readInts(x.Tokens), e.read(x.LogProb)
				for _, i := range e.picks(s.n, 8) {
					if tokens[i] < 0 || int(tokens[i]) >= s.v {
						e.Fatalf("row %d: token %d of a vocabulary of %d", i, tokens[i], s.v)
					}
					p.targets[i] = tokens[i]
					r := p.row(i)
					e.compare(label("log-prob of row %d", i), lp[i:i+1], []float64{r.logProb}, []float64{p.logProbError(r)})
				}
			}
		})
	}
	e.sub(1, "nan", func(e *env) {
		for _, temperature := range []float32{0, 1} {
			tokens, lp := e.draw([][]float64{{1, math.NaN(), 2}}, []float64{0.5}, temperature, 0.9)
			e.nan("log-prob", lp)
			if tokens[0] < 0 || tokens[0] > 2 {
				e.Errorf("token %d of 3", tokens[0])
			}
		}
	})
}

package bench

import (
	"fmt"
	"math/rand/v2"

	"gorgonia.org/tensor"

	"trainerd/kernels"
)

// heads: 2·N·V·d FLOPs forward, 6·N·V·d with the gradients of Hidden and W. Hidden, W
// and their gradients move once: logits are scratch, of which the arena says how much.
func (m *caseMaker) heads() {
	type size struct {
		n, d, v, forward, backward int
	}
	c := m.cfg
	sizes := []size{{m.p.predicted, c.Hidden, c.Vocab, 0, 1}}
	if c.Vocab > 100000 { // the goals are for 8192 tokens at two widths
		sizes = append(sizes, size{8192, 896, 151936, 0, 0}, size{8192, 3584, 152064, 0, 0})
	}
	for _, h := range sizes {
		r := rand.New(rand.NewPCG(9, uint64(h.n)))
		targets := make([]int32, h.n)
		for i := range targets {
			targets[i] = int32(r.IntN(h.v))
		}
		head := func(b *buffers, a kernels.Arena) kernels.Head {
			return kernels.Head{Hidden: b.random(m.dt, h.n*h.d), W: b.random(m.dt, h.v*h.d), Targets: b.ints(targets), LogProb: b.raw(kernels.F32, h.n),
				Entropy: b.raw(kernels.F32, h.n), N: h.n, D: h.d, V: h.v, Temperature: 1, Scratch: a}
		}
		what, flops, bytes := fmt.Sprintf("N %d d %d V %d", h.n, h.d, h.v), 2*float64(h.n)*float64(h.v)*float64(h.d), m.s*float64((h.n+h.v)*h.d)
		m.add(kernelCase{op: "log-prob", sizes: what, calls: h.forward, flops: flops, bytes: bytes, scratch: m.scratch.HeadScratch(h.n, h.d, h.v, false),
			make: func(b *buffers, a kernels.Arena) func() {
				x := head(b, a)
				return func() { b.dev.LogProb(x) }
			}})
		m.add(kernelCase{op: "log-prob backward", sizes: what, calls: h.backward, flops: 3 * flops, bytes: bytes + m.s*float64(h.n*h.d) + 2*m.g*float64(h.v*h.d),
			scratch: m.scratch.HeadScratch(h.n, h.d, h.v, true),
			make: func(b *buffers, a kernels.Arena) func() {
				x := head(b, a)
				g := kernels.HeadGrad{Surrogate: &kernels.Surrogate{Kind: kernels.SurrogateClip, EpsLow: 0.2, EpsHigh: 0.28},
					Tokens:  kernels.SurrogateTokens{Adv: b.random(kernels.F32, h.n), Weight: b.random(kernels.F32, h.n)},
					DHidden: b.raw(m.dt, h.n*h.d), DW: b.zeros(m.gt, h.v*h.d), Accumulate: true}
				return func() { b.dev.LogProbBackward(x, g) }
			}})
	}
	n, d, v := decodeSequences, c.Hidden, c.Vocab
	for _, topP := range []float32{1, 0.95} {
		m.add(kernelCase{op: "sample", sizes: fmt.Sprintf("N %d d %d V %d top-p %v", n, d, v, topP), flops: 2 * float64(n) * float64(v) * float64(d),
			bytes: m.s * float64((n+v)*d), scratch: m.scratch.DrawScratch(n, d, v),
			make: func(b *buffers, a kernels.Arena) func() {
				x := kernels.Draw{Hidden: b.random(m.dt, n*d), W: b.random(m.dt, v*d), U: b.zeros(kernels.F32, n), Tokens: b.raw(kernels.I32, n),
					LogProb: b.raw(kernels.F32, n), N: n, D: d, V: v, Temperature: 1, TopP: topP, Scratch: a}
				return func() { b.dev.Sample(x) }
			}})
	}
}

// optimizer: gradients in; weights, their low halves and both moments in and out;
// kept gradients in and out with a micro-batch's in. Where the state of the whole
// model does not fit, as much of it as does.
func (m *caseMaker) optimizer() {
	rem := 0.0
	if m.dt != kernels.F32 {
		rem = 2
	}
	fits := func(each float64) int {
		return int(min(m.cfg.Parameters(), int64(0.6*float64(m.info.MemFree)/each), 1<<31-1))
	}
	k := fits(m.g)
	m.add(kernelCase{op: "sum of squares", sizes: fmt.Sprintf("%d elements", k), calls: 1, bytes: m.g * float64(k),
		make: func(b *buffers, _ kernels.Arena) func() {
			out, x := b.zeros(kernels.F32, 1), b.random(m.gt, k)
			return func() { b.dev.SumSquares(out, x) }
		}})
	m.add(kernelCase{op: "clip coefficient", sizes: "1 element", calls: 1, bytes: 8,
		make: func(b *buffers, _ kernels.Arena) func() {
			coef, sum := b.raw(kernels.F32, 1), b.random(kernels.F32, 1)
			return func() { b.dev.ClipCoef(coef, sum, 1, 1) }
		}})
	// A step has two, which share the elements.
	adamw := func(sizes string, calls int, mt, vt, gt kernels.DType, scales float64) {
		state := m.s + rem + float64(mt.Size()+vt.Size()) + scales
		n := fits(state + float64(gt.Size()))
		m.add(kernelCase{op: "adamw", sizes: fmt.Sprintf("%d elements%s", n, sizes), calls: calls, bytes: (2*state + float64(gt.Size())) * float64(n),
			make: func(b *buffers, _ kernels.Arena) func() {
				x := kernels.AdamW{P: b.random(m.dt, n), G: b.random(gt, n), M: b.zeros(mt, n), V: b.zeros(vt, n), Coef: b.random(kernels.F32, 1),
					LR: 3e-6, Beta1: 0.9, Beta2: 0.95, Eps: 1e-8, Step: 1}
				if rem > 0 {
					x.Rem = b.zeros(kernels.I16, n)
				}
				if scales > 0 {
					x.Scale = b.zeros(kernels.F32, kernels.MomentBlocks(n))
				}
				return func() { b.dev.AdamW(x) }
			}})
	}
	adamw("", 1, kernels.F32, kernels.F32, m.gt, 0)
	adamw(", compact moments, bf16 gradients", 0, kernels.I8, kernels.BF16, kernels.BF16, 4.0/kernels.MomentBlock)
	n := fits(6)
	m.add(kernelCase{op: "add gradient", sizes: fmt.Sprintf("%d elements", n), bytes: 8 * float64(n),
		make: func(b *buffers, _ kernels.Arena) func() {
			x := kernels.AddGrad{Dst: b.zeros(kernels.BF16, n), Src: b.random(kernels.F32, n), Key: kernels.RoundingKey(1)}
			return func() { b.dev.AddGrad(x) }
		}})
	m.add(kernelCase{op: "advantages", sizes: fmt.Sprintf("%d rows in %d groups", m.p.members, len(m.p.groups)), calls: 1, transfer: true, bytes: 16 * float64(m.p.members),
		make: func(b *buffers, _ kernels.Arena) func() {
			a := kernels.Advantages{Out: make([]float64, m.p.members), R: make([]float64, m.p.members), Scale: kernels.ScaleNone}
			for g := range len(m.p.groups) + 1 {
				a.Start = append(a.Start, int32(g*m.p.members/len(m.p.groups)))
			}
			return func() { b.dev.Advantages(a) }
		}})
}

// copies: cleared bytes go out; a copy's and a lerp's elements in and out.
func (m *caseMaker) copies() {
	n := m.p.tokens * m.cfg.Hidden
	m.add(kernelCase{op: "zero", sizes: fmt.Sprintf("%d elements", n), calls: 1, bytes: m.s * float64(n),
		make: func(b *buffers, _ kernels.Arena) func() {
			x := b.raw(m.dt, n)
			return func() { b.dev.Zero(x) }
		}})
	m.add(kernelCase{op: "copy", sizes: fmt.Sprintf("%d %v to %v", n, kernels.F32, m.dt), bytes: (4 + m.s) * float64(n),
		make: func(b *buffers, _ kernels.Arena) func() {
			to, from := b.raw(m.dt, n), b.random(kernels.F32, n)
			return func() { b.dev.Copy(to, from) }
		}})
	m.add(kernelCase{op: "lerp", sizes: fmt.Sprintf("%d elements", n), bytes: 3 * m.s * float64(n),
		make: func(b *buffers, _ kernels.Arena) func() {
			to, from := b.random(m.dt, n), b.random(m.dt, n)
			return func() { b.dev.Lerp(to, from, 0.5) }
		}})
}

// transfers: what the host hands over or is handed. Their ceiling is the bus, which is not measured.
func (m *caseMaker) transfers() {
	n := int(min(m.cfg.Parameters(), 16<<20))
	host := tensor.New(tensor.WithShape(n), tensor.WithBacking(make([]float32, n)))
	m.add(kernelCase{op: "upload", sizes: fmt.Sprintf("%d float32 to %v", n, m.dt), transfer: true, bytes: 4 * float64(n),
		make: func(b *buffers, _ kernels.Arena) func() {
			x := b.raw(m.dt, n)
			return func() { b.dev.Upload(x, host) }
		}})
	m.add(kernelCase{op: "download", sizes: fmt.Sprintf("%d %v to float32", n, m.dt), transfer: true, bytes: 4 * float64(n),
		make: func(b *buffers, _ kernels.Arena) func() {
			x := b.zeros(m.dt, n)
			return func() {
				if err := b.dev.Download(host, x); err != nil && b.err == nil {
					b.err = err
				}
			}
		}})
	m.add(kernelCase{op: "layout", sizes: fmt.Sprintf("%d segments", len(m.p.segments)), calls: 1, transfer: true, bytes: 24 * float64(len(m.p.segments)),
		arena: m.scratch.LayoutScratch(len(m.p.segments), m.p.tokens),
		make: func(b *buffers, a kernels.Arena) func() {
			return func() {
				mark := a.Mark()
				b.dev.Layout(a, m.p.segments)
				a.Release(mark)
			}
		}})
	index := kernels.ScatterTo(m.p.positions)
	bytes := 4 * int64(len(index.Dst)+len(index.Start)+len(index.Src))
	m.add(kernelCase{op: "scatter", sizes: fmt.Sprintf("an index of %d rows", len(index.Src)), calls: 2, transfer: true, bytes: float64(bytes), arena: bytes + 1<<12,
		make: func(b *buffers, a kernels.Arena) func() {
			return func() {
				mark := a.Mark()
				b.dev.Scatter(a, index)
				a.Release(mark)
			}
		}})
}

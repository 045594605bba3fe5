package bench

import (
	"fmt"
	"math/rand/v2"
	"slices"

	"gorgonia.org/tensor"

	"trainerd/kernels"
	"trainerd/model"
)

// kernelCase is an operation at one size.
type kernelCase struct {
	op, sizes string
	calls     int     // in a step
	bytes     float64 // that must move
	flops     float64 // of products and attention
	live      float64 // bytes of a set of buffers, where they are not those that move
	scratch   int64   // that the operation takes from an arena itself
	arena     int64   // that its inputs take there
	transfer  bool    // no ceiling of the device applies
	// shared prepares what all sets of buffers have in common; make allocates a set and returns the call.
	shared func(*buffers, kernels.Arena)
	make   func(*buffers, kernels.Arena) func()
}

// touched is the memory of a set of buffers.
func (c *kernelCase) touched() int64 { return int64(max(c.bytes, c.live)) }

// sizes of a step, and the device that will run it.
type caseMaker struct {
	info    kernels.Info
	cfg     model.Config
	p       packing
	dt, gt  kernels.DType
	s, g    float64 // bytes of an activation and of a gradient
	scratch kernels.Scratcher
	out     []kernelCase
}

func kernelCases(info kernels.Info, cfg model.Config, p packing, scratch kernels.Scratcher) []kernelCase {
	m := &caseMaker{info: info, cfg: cfg, p: p, dt: info.Compute, gt: info.GradType,
		s: float64(info.Compute.Size()), g: float64(info.GradType.Size()), scratch: scratch}
	m.products()
	m.norms()
	m.ropes()
	m.attentions()
	m.swiglus()
	m.rows()
	m.heads()
	m.optimizer()
	m.copies()
	m.transfers()
	return m.out
}

func (m *caseMaker) add(c kernelCase) { m.out = append(m.out, c) }

// products: x·Wᵀ, dy·W and dyᵀ·x of every weight. 2·M·N·K FLOPs; A, B and C move once, C twice where it is added to.
func (m *caseMaker) products() {
	c, t := m.cfg, m.p.tokens
	width, hw := (c.Heads+2*c.KVHeads)*c.HeadDim, c.Heads*c.HeadDim
	for _, w := range []struct {
		name string
		n, k int
		bias bool
	}{{"qkv", width, c.Hidden, c.QKVBias}, {"o", c.Hidden, hw, false}, {"gate+up", 2 * c.FFN, c.Hidden, false}, {"down", c.Hidden, c.FFN, false}} {
		for _, v := range []struct {
			pass    string
			g       kernels.Gemm
			c       kernels.DType
			a, b, n int
		}{
			{"forward", kernels.Gemm{M: t, N: w.n, K: w.k, TransB: true}, m.dt, t * w.k, w.n * w.k, t * w.n},
			{"dX", kernels.Gemm{M: t, N: w.k, K: w.n}, m.dt, t * w.n, w.n * w.k, t * w.k},
			{"dW", kernels.Gemm{M: w.n, N: w.k, K: t, TransA: true, Accumulate: true}, m.gt, t * w.n, t * w.k, w.n * w.k},
		} {
			size, times := float64(v.c.Size()), 1.0
			if v.g.Accumulate {
				times = 2
			}
			m.add(kernelCase{op: "gemm", sizes: fmt.Sprintf("%s %s M %d N %d K %d", w.name, v.pass, v.g.M, v.g.N, v.g.K), calls: c.Layers,
				bytes: m.s*float64(v.a+v.b) + times*size*float64(v.n), flops: 2 * float64(v.g.M) * float64(v.g.N) * float64(v.g.K),
				make: func(b *buffers, _ kernels.Arena) func() {
					g := v.g
					g.A, g.B, g.C = b.random(m.dt, v.a), b.random(m.dt, v.b), b.zeros(v.c, v.n)
					if w.bias && v.pass == "forward" {
						g.Bias = b.random(m.dt, w.n)
					}
					return func() { b.dev.Gemm(g) }
				}})
		}
	}
	if c.QKVBias { // reads dy
		m.add(kernelCase{op: "bias backward", sizes: fmt.Sprintf("T %d N %d", t, width), calls: c.Layers, bytes: m.s * float64(t*width),
			make: func(b *buffers, _ kernels.Arena) func() {
				db, dy := b.zeros(m.gt, width), b.random(m.dt, t*width)
				return func() { b.dev.BiasBackward(db, dy, t, width, true) }
			}})
	}
}

// norms: x in, out out; with the residual x and the addend in, the sum and out
// out; backward dy and x in, dx out, and in as well where it is added to.
func (m *caseMaker) norms() {
	c, d, eps := m.cfg, m.cfg.Hidden, float32(m.cfg.NormEps)
	norm := func(t, calls int, add bool) {
		n, moves, sizes := t*d, 2.0, fmt.Sprintf("T %d D %d", t, d)
		if add {
			moves, sizes = 4, sizes+" with the residual"
		}
		m.add(kernelCase{op: "rmsnorm", sizes: sizes, calls: calls, bytes: moves * m.s * float64(n),
			make: func(b *buffers, _ kernels.Arena) func() {
				x := kernels.Norm{Out: b.raw(m.dt, n), Rstd: b.raw(kernels.F32, t), X: b.random(m.dt, n), W: b.random(m.dt, d), T: t, D: d, Eps: eps}
				if add {
					x.Add, x.Sum = b.random(m.dt, n), b.raw(m.dt, n)
				}
				return func() { b.dev.RMSNorm(x) }
			}})
	}
	norm(m.p.tokens, 2*c.Layers+1, false) // the first, and both of a layer again in the backward pass
	norm(m.p.tokens, 2*c.Layers-1, true)
	norm(m.p.predicted, 1, true) // before the head
	backward := func(t, calls int, add bool) {
		n, moves, sizes := t*d, 3.0, fmt.Sprintf("T %d D %d", t, d)
		if add {
			moves, sizes = 4, sizes+", added"
		}
		m.add(kernelCase{op: "rmsnorm backward", sizes: sizes, calls: calls, bytes: moves * m.s * float64(n),
			make: func(b *buffers, _ kernels.Arena) func() {
				x := kernels.NormBackward{DX: b.zeros(m.dt, n), DW: b.zeros(m.gt, d), DY: b.random(m.dt, n), X: b.random(m.dt, n), W: b.random(m.dt, d),
					Rstd: b.random(kernels.F32, t), T: t, D: d, AddTo: add, Accumulate: true}
				return func() { b.dev.RMSNormBackward(x) }
			}})
	}
	backward(m.p.tokens, 2*c.Layers, true)
	backward(m.p.predicted, 1, false)
}

// ropes: q and k in and out, in place; with a norm of each head q|k|v in and out, and its input once more backward.
func (m *caseMaker) ropes() {
	c, t := m.cfg, m.p.tokens
	width, qk := (c.Heads+2*c.KVHeads)*c.HeadDim, (c.Heads+c.KVHeads)*c.HeadDim
	for _, normed := range []bool{false, true} {
		sizes, calls, forward, backward := fmt.Sprintf("T %d H %d KV %d hd %d", t, c.Heads, c.KVHeads, c.HeadDim), c.Layers, 2*qk, 2*qk
		if normed {
			sizes, calls, forward, backward = sizes+" with QK-norm", 0, 2*width, 3*qk
		}
		if normed == c.QKNorm {
			calls = c.Layers
		}
		m.add(kernelCase{op: "rope", sizes: sizes, calls: calls, bytes: m.s * float64(t) * float64(forward), live: 2 * m.s * float64(t*width),
			make: func(b *buffers, _ kernels.Arena) func() {
				in := b.random(m.dt, t*width)
				x := kernels.Rope{Out: in, In: in, Pos: b.ints(m.p.positions), T: t, H: c.Heads, KV: c.KVHeads, HD: c.HeadDim, Theta: c.RopeTheta, Eps: float32(c.NormEps)}
				if normed {
					x.Out, x.QW, x.KW = b.raw(m.dt, t*width), b.random(m.dt, c.HeadDim), b.random(m.dt, c.HeadDim)
					x.Rstd = b.raw(kernels.F32, t*(c.Heads+c.KVHeads))
				}
				return func() { b.dev.Rope(x) }
			}})
		m.add(kernelCase{op: "rope backward", sizes: sizes, calls: calls, bytes: m.s * float64(t) * float64(backward), live: 2 * m.s * float64(t*width),
			make: func(b *buffers, _ kernels.Arena) func() {
				x := kernels.RopeBackward{D: b.random(m.dt, t*width), Pos: b.ints(m.p.positions), T: t, H: c.Heads, KV: c.KVHeads, HD: c.HeadDim, Theta: c.RopeTheta, Accumulate: true}
				if normed {
					x.In, x.QW, x.KW = b.random(m.dt, t*width), b.random(m.dt, c.HeadDim), b.random(m.dt, c.HeadDim)
					x.DQW, x.DKW, x.Rstd = b.zeros(m.gt, c.HeadDim), b.zeros(m.gt, c.HeadDim), b.random(kernels.F32, t*(c.Heads+c.KVHeads))
				}
				return func() { b.dev.RopeBackward(x) }
			}})
	}
}

// attentions: 4·hd FLOPs for each head and pair of query and key forward (scores
// and values), 10·hd backward (scores, dP, dV, dK, dQ). Packed q|k|v and the outputs move once.
func (m *caseMaker) attentions() {
	c, t := m.cfg, m.p.tokens
	width, hw := (c.Heads+2*c.KVHeads)*c.HeadDim, c.Heads*c.HeadDim
	pairs := float64(hw) * m.p.pairs
	layout := func(segments []kernels.Segment, rows int) (func(*buffers, kernels.Arena), func() kernels.Layout, int64) {
		var l kernels.Layout
		return func(b *buffers, a kernels.Arena) { l = b.dev.Layout(a, segments) }, func() kernels.Layout { return l }, m.scratch.LayoutScratch(len(segments), rows)
	}
	sizes := fmt.Sprintf("T %d in %d segments, H %d KV %d hd %d", t, len(m.p.segments), c.Heads, c.KVHeads, c.HeadDim)
	shared, l, room := layout(m.p.segments, t)
	m.add(kernelCase{op: "attention", sizes: sizes, calls: c.Layers, flops: 4 * pairs, bytes: m.s * float64(t*(width+hw)),
		scratch: m.scratch.AttentionScratch(t, c.Heads, c.KVHeads, c.HeadDim, false), arena: room, shared: shared,
		make: func(b *buffers, a kernels.Arena) func() {
			qkv := b.random(m.dt, t*width)
			k, v := kernels.Strided{Buf: qkv, Off: hw, Stride: width}, kernels.Strided{Buf: qkv, Off: hw + c.KVHeads*c.HeadDim, Stride: width}
			x := kernels.Attention{Out: b.raw(m.dt, t*hw), LSE: b.raw(kernels.F32, t*c.Heads), Q: kernels.Strided{Buf: qkv, Stride: width},
				K: k, V: v, PK: k, PV: v, Layout: l(), T: t, H: c.Heads, KV: c.KVHeads, HD: c.HeadDim, Scratch: a}
			return func() { b.dev.Attention(x) }
		}})
	shared, l2, room := layout(m.p.segments, t)
	m.add(kernelCase{op: "attention backward", sizes: sizes, calls: c.Layers, flops: 10 * pairs, bytes: m.s * float64(2*t*(width+hw)),
		scratch: m.scratch.AttentionScratch(t, c.Heads, c.KVHeads, c.HeadDim, true), arena: room, shared: shared,
		make: func(b *buffers, a kernels.Arena) func() {
			x := kernels.AttentionBackward{DQKV: b.raw(m.dt, t*width), DOut: b.random(m.dt, t*hw), Out: b.random(m.dt, t*hw), LSE: b.random(kernels.F32, t*c.Heads),
				QKV: b.random(m.dt, t*width), Layout: l2(), T: t, H: c.Heads, KV: c.KVHeads, HD: c.HeadDim, Scratch: a}
			return func() { b.dev.AttentionBackward(x) }
		}})
	// Decoding: one query of each sequence, the cached prompt of its group and 128 own rows. A cached row counts once.
	own, row, n := 128, 2*c.KVHeads*c.HeadDim, decodeSequences
	prompts := (n + 7) / 8
	rows := prompts*m.p.prompt + n*own
	var segments []kernels.Segment
	for i := range n {
		segments = append(segments, kernels.Segment{Q: int32(i), QLen: 1, K: int32(prompts*m.p.prompt + i*own), KLen: int32(own),
			Prefix: int32(i / 8 * m.p.prompt), PrefixLen: int32(m.p.prompt)})
	}
	shared, l3, room := layout(segments, n)
	m.add(kernelCase{op: "attention", sizes: fmt.Sprintf("decoding %d sequences of %d, H %d KV %d hd %d", n, m.p.prompt+own, c.Heads, c.KVHeads, c.HeadDim),
		flops: 4 * float64(hw) * float64(n*(m.p.prompt+own)), bytes: m.s * float64(rows*row+n*2*hw),
		scratch: m.scratch.AttentionScratch(n, c.Heads, c.KVHeads, c.HeadDim, false), arena: room, shared: shared,
		make: func(b *buffers, a kernels.Arena) func() {
			cache := b.random(m.dt, rows*row)
			k, v := kernels.Strided{Buf: cache, Stride: row}, kernels.Strided{Buf: cache, Off: row / 2, Stride: row}
			x := kernels.Attention{Out: b.raw(m.dt, n*hw), Q: kernels.Strided{Buf: b.random(m.dt, n*hw), Stride: hw}, K: k, V: v, PK: k, PV: v,
				Layout: l3(), T: n, H: c.Heads, KV: c.KVHeads, HD: c.HeadDim, Scratch: a}
			return func() { b.dev.Attention(x) }
		}})
}

// decodeSequences is how many sequences the decoding cases run at once.
const decodeSequences = 64

// swiglus: gate|up in, half as much out; backward that and the gradient in, gate|up's gradient out.
func (m *caseMaker) swiglus() {
	c, t, f := m.cfg, m.p.tokens, m.cfg.FFN
	sizes := fmt.Sprintf("T %d F %d", t, f)
	m.add(kernelCase{op: "swiglu", sizes: sizes, calls: 2 * c.Layers, bytes: 3 * m.s * float64(t*f),
		make: func(b *buffers, _ kernels.Arena) func() {
			out, gu := b.raw(m.dt, t*f), b.random(m.dt, 2*t*f)
			return func() { b.dev.SwiGLU(out, gu, t, f) }
		}})
	m.add(kernelCase{op: "swiglu backward", sizes: sizes, calls: c.Layers, bytes: 5 * m.s * float64(t*f),
		make: func(b *buffers, _ kernels.Arena) func() {
			dgu, dout, gu := b.raw(m.dt, 2*t*f), b.random(m.dt, t*f), b.random(m.dt, 2*t*f)
			return func() { b.dev.SwiGLUBackward(dgu, dout, gu, t, f) }
		}})
}

// rows: a gathered row in and out; a scattered row in, its destination in and out.
func (m *caseMaker) rows() {
	c, t, d := m.cfg, m.p.tokens, m.cfg.Hidden
	r := rand.New(rand.NewPCG(5, 5))
	tokens := make([]int32, t)
	for i := range tokens {
		tokens[i] = int32(r.IntN(c.Vocab))
	}
	predicting := slices.Concat(m.p.groups...)
	gather := func(what string, calls, height int, rows []int32) {
		m.add(kernelCase{op: "gather", sizes: fmt.Sprintf("%s: %d rows of %d from %d", what, len(rows), d, height), calls: calls, bytes: 2 * m.s * float64(len(rows)*d),
			live: m.s * float64(height*d),
			make: func(b *buffers, _ kernels.Arena) func() {
				out, table, index := b.raw(m.dt, len(rows)*d), b.random(m.dt, height*d), b.ints(rows)
				return func() { b.dev.Gather(out, table, index, d) }
			}})
	}
	gather("embedding", 1, c.Vocab, tokens)
	gather("head", 2, t, predicting)
	add := func(what string, height int, to kernels.DType, rows []int32) {
		index := kernels.ScatterTo(rows)
		var s kernels.Scatter
		m.add(kernelCase{op: "scatter add", sizes: fmt.Sprintf("%s: %d rows of %d into %d of %d", what, len(rows), d, len(index.Dst), height), calls: 1,
			bytes: m.s*float64(len(rows)*d) + 2*float64(to.Size())*float64(len(index.Dst)*d), live: float64(to.Size()) * float64(height*d),
			arena:  4*int64(len(index.Dst)+len(index.Start)+len(index.Src)) + 1<<12,
			shared: func(b *buffers, a kernels.Arena) { s = b.dev.Scatter(a, index) },
			make: func(b *buffers, _ kernels.Arena) func() {
				dst, src := b.zeros(to, height*d), b.random(m.dt, len(rows)*d)
				return func() { b.dev.ScatterAdd(dst, src, s, d, true) }
			}})
	}
	add("embedding", c.Vocab, m.gt, tokens)
	add("head", t, m.dt, predicting)
}

func denseInts(x []int32) *tensor.Dense {
	return tensor.New(tensor.WithShape(len(x)), tensor.WithBacking(x))
}

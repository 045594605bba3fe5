package model

import "trainerd/kernels"

// saved are one layer's activations. A backward pass needs all of them; in an
// inference pass x1 and x2 are one buffer and rstd and lse are nil.
type saved struct {
	x1    kernels.Buffer // [T,d] residual stream into the layer
	rstd1 kernels.Buffer // F32[T]
	pre   kernels.Buffer // [T,W] q|k|v before RoPE; the same as qkv without QK-norm
	qkv   kernels.Buffer // [T,W] q|k|v after RoPE
	rstdQ kernels.Buffer // F32[T,H+KV], with QK-norm
	attn  kernels.Buffer // [T,H*hd]
	lse   kernels.Buffer // F32[T,H]
	x2    kernels.Buffer // [T,d] residual stream after attention
	rstd2 kernels.Buffer // F32[T]
	gu    kernels.Buffer // [T,2F] gate|up
}

// pass is one run of T rows through the layers.
type pass struct {
	m    *Model
	w    *params
	t    int
	pos  kernels.Buffer // I32[T]
	acts []saved        // one per layer; in inference all the same
	// h holds norm outputs [T,d], sw SwiGLU's [T,F], out a sublayer's [T,d]
	// until the next norm adds it to the residual stream.
	h, sw, out kernels.Buffer
	attend     func(layer int, s *saved)
}

// newPass takes the pass's scratch memory. With backward the activations are
// kept for every layer, or as Options.Recompute says.
func (m *Model) newPass(w *params, positions []int32, backward bool) *pass {
	c, t := m.cfg, len(positions)
	d, width, hw := c.Hidden, c.qkvWidth(), c.Heads*c.HeadDim
	f32 := func(n int) kernels.Buffer { return m.arena.Alloc(kernels.F32, n) }
	p := &pass{m: m, w: w, t: t, pos: m.putI32(positions), acts: make([]saved, c.Layers)}
	p.h, p.sw, p.out = m.act(t*d), m.act(t*c.FFN), m.act(t*d)

	// between takes what lies between a layer's input and its gate|up.
	between := func(s *saved) {
		s.qkv, s.attn = m.act(t*width), m.act(t*hw)
		s.pre = s.qkv
		if c.QKNorm {
			s.pre = m.act(t * width)
		}
		s.x2 = s.x1
		if backward {
			s.x2 = m.act(t * d)
			s.rstd1, s.rstd2, s.lse = f32(t), f32(t), f32(t*c.Heads)
			if c.QKNorm {
				s.rstdQ = f32(t * (c.Heads + c.KVHeads))
			}
		}
	}
	var shared saved // of the layers that compute it again, or that keep nothing
	for i := range p.acts {
		s := &p.acts[i]
		mode := m.opt.recompute(i)
		if s.x1 = shared.x1; backward || s.x1 == nil {
			s.x1 = m.act(t * d)
		}
		if backward && mode < RecomputeLayers {
			between(s)
		} else {
			if shared.qkv == nil {
				shared.x1 = s.x1
				between(&shared)
			}
			x1, gu := s.x1, shared.gu
			*s = shared
			s.x1, s.gu = x1, gu
		}
		if backward && mode == RecomputeCheap {
			s.gu = m.act(t * 2 * c.FFN)
			continue
		}
		if shared.gu == nil {
			shared.gu = m.act(t * 2 * c.FFN)
		}
		s.gu = shared.gu
	}
	return p
}

// forward runs embedding and layers. The residual stream before the final norm
// is last().x2 + out, not yet added up.
func (p *pass) forward(tokens []int32) {
	m := p.m
	mark := m.arena.Mark()
	m.dev.Gather(p.acts[0].x1, p.w.embed, m.putI32(tokens), m.cfg.Hidden)
	m.arena.Release(mark)
	for l := range p.acts {
		s := &p.acts[l]
		norm := kernels.Norm{Out: p.h, Rstd: s.rstd1, X: s.x1, W: p.w.layers[l].norm1, T: p.t, D: m.cfg.Hidden, Eps: float32(m.cfg.NormEps)}
		if l > 0 {
			norm.X, norm.Add, norm.Sum = p.acts[l-1].x2, p.out, s.x1
		}
		m.dev.RMSNorm(norm)
		p.layer(l)
		m.dev.SwiGLU(p.sw, s.gu, p.t, m.cfg.FFN)
		p.linear(p.out, p.sw, p.w.layers[l].down, m.cfg.Hidden, m.cfg.FFN, nil)
	}
}

func (p *pass) last() *saved { return &p.acts[len(p.acts)-1] }

// layer computes everything of a layer from its first norm's output in h up to
// gate|up; h and out are overwritten.
func (p *pass) layer(l int) {
	m, c, s, w := p.m, p.m.cfg, &p.acts[l], &p.w.layers[l]
	p.linear(s.pre, p.h, w.qkv, c.qkvWidth(), c.Hidden, w.bias)
	m.dev.Rope(kernels.Rope{Out: s.qkv, In: s.pre, Pos: p.pos, T: p.t, H: c.Heads, KV: c.KVHeads, HD: c.HeadDim,
		Theta: c.RopeTheta, QW: w.qnorm, KW: w.knorm, Rstd: s.rstdQ, Eps: float32(c.NormEps)})
	p.attend(l, s)
	p.linear(p.out, s.attn, w.o, c.Hidden, c.Heads*c.HeadDim, nil)
	m.dev.RMSNorm(kernels.Norm{Out: p.h, Rstd: s.rstd2, X: s.x1, Add: p.out, Sum: s.x2, W: w.norm2,
		T: p.t, D: c.Hidden, Eps: float32(c.NormEps)})
	p.linear(s.gu, p.h, w.gateUp, 2*c.FFN, c.Hidden, nil)
}

// again computes what a layer did not keep.
func (p *pass) again(l int) {
	m, c, s, w := p.m, p.m.cfg, &p.acts[l], &p.w.layers[l]
	norm := kernels.Norm{Out: p.h, T: p.t, D: c.Hidden, Eps: float32(c.NormEps)}
	switch m.opt.recompute(l) {
	case RecomputeLayers:
		norm.Rstd, norm.X, norm.W = s.rstd1, s.x1, w.norm1
		m.dev.RMSNorm(norm)
		p.layer(l)
	case RecomputeMLP:
		norm.X, norm.W = s.x2, w.norm2
		m.dev.RMSNorm(norm)
		p.linear(s.gu, p.h, w.gateUp, 2*c.FFN, c.Hidden, nil)
	}
}

// linear computes y[T,n] = x[T,k]·wᵀ (+ bias).
func (p *pass) linear(y, x, w kernels.Buffer, n, k int, bias kernels.Buffer) {
	p.m.dev.Gemm(kernels.Gemm{A: x, B: w, C: y, M: p.t, N: n, K: k, TransB: true, Bias: bias})
}

// packed makes the pass attend within its own rows, as a batch's segments say.
func (p *pass) packed(segments []kernels.Segment) kernels.Layout {
	m, c := p.m, p.m.cfg
	layout := m.dev.Layout(m.arena, segments)
	q, kv, width := c.Heads*c.HeadDim, c.KVHeads*c.HeadDim, c.qkvWidth()
	p.attend = func(_ int, s *saved) {
		k := kernels.Strided{Buf: s.qkv, Off: q, Stride: width}
		v := kernels.Strided{Buf: s.qkv, Off: q + kv, Stride: width}
		m.dev.Attention(kernels.Attention{Out: s.attn, LSE: s.lse, Q: kernels.Strided{Buf: s.qkv, Stride: width},
			K: k, V: v, PK: k, PV: v, Layout: layout, T: p.t, H: c.Heads, KV: c.KVHeads, HD: c.HeadDim, Scratch: m.arena})
	}
	return layout
}

// backward runs the layers in reverse. dx [T,d] holds the gradient of the
// residual stream after the last layer and ends up as that of the embedding's
// output. It uses h, sw and out as scratch; dx must be none of them.
func (p *pass) backward(dx kernels.Buffer, layout kernels.Layout, grads *sink) {
	m, c := p.m, p.m.cfg
	d, width, hw, f, t := c.Hidden, c.qkvWidth(), c.Heads*c.HeadDim, c.FFN, p.t
	dattn, dqkv, accumulate := m.act(t*hw), m.act(t*width), grads.accumulates()
	// dw[n,k] (+)= dyᵀ·x and dx[T,k] = dy·w for y[T,n] = x[T,k]·wᵀ.
	linear := func(dw, dxk, dy, x, w kernels.Buffer, n, k int) {
		m.dev.Gemm(kernels.Gemm{A: dy, B: x, C: dw, M: n, N: k, K: t, TransA: true, Accumulate: accumulate})
		m.dev.Gemm(kernels.Gemm{A: dy, B: w, C: dxk, M: t, N: k, K: n})
	}
	eps := float32(c.NormEps)
	for l := len(p.acts) - 1; l >= 0; l-- {
		s, w, gl := &p.acts[l], &p.w.layers[l], grads.layerGrad(l)
		if l < len(p.acts)-1 { // what the layers share is still the last one's
			p.again(l)
		}
		// MLP. sw is recomputed, then holds its own gradient; the gradient of
		// gate|up takes the place of gate|up, that of the norm's output its place.
		m.dev.SwiGLU(p.sw, s.gu, t, f)
		linear(gl.down, p.sw, dx, p.sw, w.down, d, f)
		m.dev.SwiGLUBackward(s.gu, p.sw, s.gu, t, f)
		m.dev.RMSNorm(kernels.Norm{Out: p.h, Rstd: s.rstd2, X: s.x2, W: w.norm2, T: t, D: d, Eps: eps})
		linear(gl.gateUp, p.h, s.gu, p.h, w.gateUp, 2*f, d)
		m.dev.RMSNormBackward(kernels.NormBackward{DX: dx, DW: gl.norm2, DY: p.h, X: s.x2, W: w.norm2, Rstd: s.rstd2,
			T: t, D: d, AddTo: true, Accumulate: accumulate})

		// Attention.
		linear(gl.o, dattn, dx, s.attn, w.o, d, hw)
		m.dev.AttentionBackward(kernels.AttentionBackward{DQKV: dqkv, DOut: dattn, Out: s.attn, LSE: s.lse, QKV: s.qkv,
			Layout: layout, T: t, H: c.Heads, KV: c.KVHeads, HD: c.HeadDim, Scratch: m.arena})
		m.dev.RopeBackward(kernels.RopeBackward{D: dqkv, In: s.pre, Pos: p.pos, T: t, H: c.Heads, KV: c.KVHeads, HD: c.HeadDim,
			Theta: c.RopeTheta, QW: w.qnorm, KW: w.knorm, DQW: gl.qnorm, DKW: gl.knorm, Rstd: s.rstdQ, Accumulate: accumulate})
		if gl.bias != nil {
			m.dev.BiasBackward(gl.bias, dqkv, t, width, accumulate)
		}
		m.dev.RMSNorm(kernels.Norm{Out: p.h, Rstd: s.rstd1, X: s.x1, W: w.norm1, T: t, D: d, Eps: eps})
		linear(gl.qkv, p.h, dqkv, p.h, w.qkv, width, d)
		m.dev.RMSNormBackward(kernels.NormBackward{DX: dx, DW: gl.norm1, DY: p.h, X: s.x1, W: w.norm1, Rstd: s.rstd1,
			T: t, D: d, AddTo: true, Accumulate: accumulate})
		grads.putLayer(l)
	}
}

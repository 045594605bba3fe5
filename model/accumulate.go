package model

import "trainerd/kernels"

// sink is where one micro-batch's parameter gradients go. Without BF16Gradients
// operations write them to the model's own float32 buffers and add there.
// With it they are computed in float32 scratch memory, a layer at a time, and
// added to the model's bfloat16 ones when they are whole: the first
// micro-batch's are rounded to nearest, later sums stochastically.
type sink struct {
	m     *Model
	fresh bool           // the model's gradients hold nothing yet
	rows  kernels.Buffer // F32[V,d], of the head or the embedding, when staged
	norm  kernels.Buffer // F32[d], of the final norm
	layer layerParams    // of one layer
}

func (m *Model) newSink() *sink { return &sink{m: m, fresh: m.fresh} }

func (s *sink) staged() bool { return s.m.opt.BF16Gradients }

// accumulates reports whether operations add to what layerGrad and the like return.
func (s *sink) accumulates() bool { return !s.staged() && !s.fresh }

// scratch takes float32 memory for a block's gradient; nil where the architecture has none.
func (s *sink) scratch(block int) kernels.Buffer {
	if block < 0 {
		return nil
	}
	return s.m.arena.Alloc(kernels.F32, s.m.lay.blocks[block].size())
}

// headGrad returns where the gradients of the LM head and the final norm go, until putHead.
func (s *sink) headGrad() (head, norm kernels.Buffer) {
	if !s.staged() {
		return s.m.grad.head, s.m.grad.norm
	}
	s.rows, s.norm = s.scratch(s.m.lay.head), s.scratch(s.m.lay.norm)
	return s.rows, s.norm
}

func (s *sink) putHead() {
	if s.staged() {
		s.put(s.m.lay.head, s.rows, s.fresh, partBody)
		s.put(s.m.lay.norm, s.norm, s.fresh, partBody)
	}
}

// layerGrad returns where the gradients of a layer go, until putLayer.
func (s *sink) layerGrad(l int) *layerParams {
	if !s.staged() {
		return &s.m.grad.layers[l]
	}
	if s.layer.qkv == nil {
		s.layer = s.m.lay.layers[l].view(s.scratch)
	}
	return &s.layer
}

func (s *sink) putLayer(l int) {
	if !s.staged() {
		return
	}
	b := s.m.lay.layers[l]
	for _, x := range []struct {
		block int
		src   kernels.Buffer
	}{{b.qkv, s.layer.qkv}, {b.o, s.layer.o}, {b.gateUp, s.layer.gateUp}, {b.down, s.layer.down},
		{b.norm1, s.layer.norm1}, {b.bias, s.layer.bias}, {b.qnorm, s.layer.qnorm}, {b.knorm, s.layer.knorm}, {b.norm2, s.layer.norm2}} {
		if x.block >= 0 {
			s.put(x.block, x.src, s.fresh, partBody)
		}
	}
}

// addEmbedding adds the gradient of the embedding's output dx [T,d] to the
// embedding's. A tied one already holds the head's, a fresh one nothing.
func (s *sink) addEmbedding(dx kernels.Buffer, tokens []int32) {
	m := s.m
	index := m.dev.Scatter(m.arena, kernels.ScatterTo(tokens))
	empty := s.fresh && !m.cfg.Tied
	dst := m.grad.embed
	if s.staged() {
		dst = s.scratch(m.lay.embed)
	}
	if empty || s.staged() {
		m.dev.Zero(dst)
	}
	m.dev.ScatterAdd(dst, dx, index, m.cfg.Hidden, true)
	if s.staged() {
		s.put(m.lay.embed, dst, empty, partEmbedding)
	}
}

// A micro-batch adds to a tied embedding twice, with random bits of their own.
const (
	partBody = iota
	partEmbedding
)

func (s *sink) put(block int, src kernels.Buffer, fresh bool, part uint64) {
	m, b := s.m, s.m.lay.blocks[block]
	m.dev.AddGrad(kernels.AddGrad{Dst: m.grad.flat.Slice(b.off, b.off+b.size()), Src: src, Fresh: fresh,
		Key: kernels.RoundingKey(m.opt.RoundingSeed, uint64(m.steps), uint64(m.micro), part), First: int64(b.off)})
}

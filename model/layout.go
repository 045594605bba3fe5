package model

import (
	"fmt"

	"trainerd/kernels"
)

// block is one device tensor: a run of a flat buffer that starts aligned. It
// holds one Hugging Face tensor or, fused, several as consecutive rows.
type block struct {
	off, rows, cols int
	decay           bool
}

func (b block) size() int { return b.rows * b.cols }

// tensorRef is a Hugging Face tensor as a span of a flat buffer.
type tensorRef struct {
	name   string
	off, n int
	shape  []int
}

// layerBlocks are indices into layout.blocks; -1 where the architecture has none.
type layerBlocks struct {
	qkv, o, gateUp, down             int // decayed
	norm1, bias, qnorm, knorm, norm2 int // not decayed
}

// layout places every parameter in a flat buffer, once for weights, gradients,
// both moments and the reference. Decayed tensors (matrices and embedding) come
// first, so that AdamW is two calls. q|k|v and gate|up are fused by rows; the
// Hugging Face tensors are row ranges of them.
type layout struct {
	size    int // elements, padding included
	decayed int // elements [0,decayed) take weight decay
	blocks  []block
	layers  []layerBlocks
	embed   int
	head    int // equals embed when tied
	norm    int
	tensors []tensorRef // in the order of Hugging Face files
	index   map[string]int
}

// alignment is the multiple of elements at which tensors start in the flat
// buffers: every one is aligned on the device, and none shares a block of
// compact moments with another.
func (o Options) alignment(info kernels.Info) int {
	n := max(1, info.Alignment/info.Compute.Size())
	if o.CompactMoments && kernels.MomentBlock%n == 0 {
		return kernels.MomentBlock
	}
	if o.CompactMoments && n%kernels.MomentBlock != 0 {
		return n * kernels.MomentBlock
	}
	return n
}

// newLayout places the tensors of a valid config; every block starts at a
// multiple of align elements.
func newLayout(c Config, align int) *layout {
	l := &layout{index: map[string]int{}, layers: make([]layerBlocks, c.Layers)}
	place := func(rows, cols int, decay bool) int {
		l.blocks = append(l.blocks, block{off: l.size, rows: rows, cols: cols, decay: decay})
		l.size = int(kernels.Round(int64(l.size)+int64(rows)*int64(cols), int64(align)))
		return len(l.blocks) - 1
	}
	d, w, hw := c.Hidden, c.qkvWidth(), c.Heads*c.HeadDim
	l.embed = place(c.Vocab, d, true)
	l.head = l.embed
	for i := range l.layers {
		l.layers[i] = layerBlocks{
			qkv: place(w, d, true), o: place(d, hw, true),
			gateUp: place(2*c.FFN, d, true), down: place(d, c.FFN, true),
			bias: -1, qnorm: -1, knorm: -1,
		}
	}
	if !c.Tied {
		l.head = place(c.Vocab, d, true)
	}
	l.decayed = l.size
	for i := range l.layers {
		b := &l.layers[i]
		b.norm1 = place(1, d, false)
		if c.QKVBias {
			b.bias = place(w, 1, false)
		}
		if c.QKNorm {
			b.qnorm = place(1, c.HeadDim, false)
			b.knorm = place(1, c.HeadDim, false)
		}
		b.norm2 = place(1, d, false)
	}
	l.norm = place(1, d, false)
	l.name(c)
	return l
}

// name lists the Hugging Face tensors in the order in which transformers lists them.
func (l *layout) name(c Config) {
	add := func(name string, block, row int, shape ...int) {
		b := l.blocks[block]
		n := 1
		for _, s := range shape {
			n *= s
		}
		l.index[name] = len(l.tensors)
		l.tensors = append(l.tensors, tensorRef{name: name, off: b.off + row*b.cols, n: n, shape: shape})
	}
	d, hd := c.Hidden, c.HeadDim
	q, kv := c.Heads*hd, c.KVHeads*hd
	add("model.embed_tokens.weight", l.embed, 0, c.Vocab, d)
	for i, b := range l.layers {
		p := fmt.Sprintf("model.layers.%d.", i)
		if c.QKVBias {
			add(p+"self_attn.q_proj.bias", b.bias, 0, q)
		}
		add(p+"self_attn.q_proj.weight", b.qkv, 0, q, d)
		if c.QKVBias {
			add(p+"self_attn.k_proj.bias", b.bias, q, kv)
		}
		add(p+"self_attn.k_proj.weight", b.qkv, q, kv, d)
		if c.QKVBias {
			add(p+"self_attn.v_proj.bias", b.bias, q+kv, kv)
		}
		add(p+"self_attn.v_proj.weight", b.qkv, q+kv, kv, d)
		add(p+"self_attn.o_proj.weight", b.o, 0, d, q)
		if c.QKNorm {
			add(p+"self_attn.q_norm.weight", b.qnorm, 0, hd)
			add(p+"self_attn.k_norm.weight", b.knorm, 0, hd)
		}
		add(p+"mlp.gate_proj.weight", b.gateUp, 0, c.FFN, d)
		add(p+"mlp.up_proj.weight", b.gateUp, c.FFN, c.FFN, d)
		add(p+"mlp.down_proj.weight", b.down, 0, d, c.FFN)
		add(p+"input_layernorm.weight", b.norm1, 0, d)
		add(p+"post_attention_layernorm.weight", b.norm2, 0, d)
	}
	add("model.norm.weight", l.norm, 0, d)
	if !c.Tied {
		add("lm_head.weight", l.head, 0, c.Vocab, d)
	}
}

// Names lists the tensors a config has, in the order of Hugging Face files, and
// Shape their shapes. The config must be valid.
func (c Config) Names() []string {
	l := newLayout(c, 1)
	names := make([]string, len(l.tensors))
	for i, t := range l.tensors {
		names[i] = t.name
	}
	return names
}

// layerParams are one layer's tensors of one flat buffer; nil where there is none.
type layerParams struct {
	qkv, o, gateUp, down             kernels.Buffer // [W,d] [d,H*hd] [2F,d] [d,F]
	norm1, bias, qnorm, knorm, norm2 kernels.Buffer // [d] [W] [hd] [hd] [d]
}

// params are views of one flat buffer.
type params struct {
	flat   kernels.Buffer
	embed  kernels.Buffer // [V,d]
	head   kernels.Buffer // [V,d], embed when tied
	norm   kernels.Buffer // [d]
	layers []layerParams
}

func (l *layout) view(flat kernels.Buffer) *params {
	at := func(i int) kernels.Buffer {
		if i < 0 {
			return nil
		}
		b := l.blocks[i]
		return flat.Slice(b.off, b.off+b.size())
	}
	p := &params{flat: flat, embed: at(l.embed), head: at(l.head), norm: at(l.norm)}
	for _, b := range l.layers {
		p.layers = append(p.layers, b.view(at))
	}
	return p
}

// view returns a layer's tensors, each from its block by at.
func (b layerBlocks) view(at func(block int) kernels.Buffer) layerParams {
	return layerParams{
		qkv: at(b.qkv), o: at(b.o), gateUp: at(b.gateUp), down: at(b.down),
		norm1: at(b.norm1), bias: at(b.bias), qnorm: at(b.qnorm), knorm: at(b.knorm), norm2: at(b.norm2),
	}
}

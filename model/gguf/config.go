package gguf

import (
	"fmt"
	"math"
	"strconv"
	"strings"

	"trainerd/model"
)

// bounds of a plausible decoder; they keep products of sizes far from overflow.
const (
	maxLayers = 1 << 12
	maxWidth  = 1 << 20
	maxVocab  = 1 << 24
)

// config makes the architecture from the metadata, and the vocabulary and tie from the tensors.
func (h *header) config(tensors map[string]tensorInfo) (model.Config, error) {
	c := model.Config{InitStd: 0.02, BOS: -1}
	arch, err := h.text("general.architecture", "")
	if err != nil {
		return c, err
	}
	switch arch {
	case "llama", "qwen2", "qwen3":
		c.Type = arch
	default:
		return c, unsupported(`key "general.architecture"`, quoted(arch), "llama, qwen2 or qwen3")
	}
	c.QKVBias, c.QKNorm = arch == "qwen2", arch == "qwen3"

	g := getter{h: h, arch: arch}
	c.Hidden = g.size("embedding_length", maxWidth, 0)
	c.FFN = g.size("feed_forward_length", maxWidth, 0)
	c.Layers = g.size("block_count", maxLayers, 0)
	c.Heads = g.size("attention.head_count", maxWidth, 0)
	c.KVHeads = g.size("attention.head_count_kv", maxWidth, c.Heads)
	c.MaxPositions = g.size("context_length", math.MaxInt32, 0)
	c.NormEps = g.decimal("attention.layer_norm_rms_epsilon", 0)
	c.RopeTheta = g.decimal("rope.freq_base", 10000)
	if g.err != nil {
		return c, g.err
	}
	if c.NormEps <= 0 {
		return c, malformed(g.key("attention.layer_norm_rms_epsilon"), c.NormEps, "a positive number")
	}
	if c.RopeTheta <= 0 {
		return c, malformed(g.key("rope.freq_base"), c.RopeTheta, "a positive number")
	}
	if c.Heads%c.KVHeads != 0 {
		return c, malformed(g.key("attention.head_count_kv"), c.KVHeads, fmt.Sprintf("a divisor of head_count %d", c.Heads))
	}
	if _, given := h.meta[arch+".attention.key_length"]; !given && c.Hidden%c.Heads != 0 {
		return c, malformed(g.key("attention.head_count"), c.Heads, fmt.Sprintf("a divisor of embedding_length %d", c.Hidden))
	}
	c.HeadDim = g.size("attention.key_length", maxWidth, c.Hidden/c.Heads)
	if g.err == nil && c.HeadDim%2 != 0 {
		return c, malformed(g.key("attention.key_length"), c.HeadDim, "an even head dimension")
	}
	for _, key := range []string{"attention.value_length", "rope.dimension_count"} {
		if v := g.size(key, maxWidth, c.HeadDim); g.err == nil && v != c.HeadDim {
			return c, unsupported(g.key(key), v, fmt.Sprintf("%d, the head dimension", c.HeadDim))
		}
	}
	if g.err != nil {
		return c, g.err
	}
	if err := h.refuseScaling(arch, tensors); err != nil {
		return c, err
	}

	embed, ok := tensors["token_embd.weight"]
	if !ok || len(embed.dims) != 2 || embed.dims[1] > maxVocab {
		return c, malformed(`tensor "token_embd.weight"`, describeTensor(embed, ok), fmt.Sprintf("an embedding of at most %d rows", maxVocab))
	}
	c.Vocab = int(embed.dims[1])
	_, untied := tensors["output.weight"]
	c.Tied = !untied
	return c, h.endings(&c)
}

// endings fills in the ids that begin and end a text. A chat model may name a
// second end ("eot", the end of a turn).
func (h *header) endings(c *model.Config) error {
	for _, k := range []string{"bos", "eos", "eot"} {
		key := "tokenizer.ggml." + k + "_token_id"
		id, err := h.integer(key, -1)
		if err != nil {
			return err
		}
		if id >= int64(c.Vocab) || id < -1 {
			// Writers put 2^32-1 where there is no such token.
			if id == math.MaxUint32 {
				continue
			}
			return malformed("key "+quoted(key), id, fmt.Sprintf("an id below the vocabulary of %d", c.Vocab))
		}
		switch {
		case id < 0:
		case k == "bos":
			c.BOS = int32(id)
		case len(c.EOS) == 0 || c.EOS[0] != int32(id):
			c.EOS = append(c.EOS, int32(id))
		}
	}
	return nil
}

// refuseScaling refuses position embeddings that the model does not compute.
func (h *header) refuseScaling(arch string, tensors map[string]tensorInfo) error {
	key := arch + ".rope.scaling.type"
	kind, err := h.text(key, "none")
	if err != nil {
		return err
	}
	if kind != "none" && kind != "" {
		return unsupported("key "+quoted(key), quoted(kind), `"none": scaled rotary embeddings are not supported`)
	}
	for _, name := range []string{"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"} {
		if _, ok := tensors[name]; ok {
			return unsupported("tensor "+quoted(name), "scaled rotary frequencies", "none: scaled rotary embeddings are not supported")
		}
	}
	return nil
}

// getter reads keys of one architecture and keeps the first error.
type getter struct {
	h    *header
	arch string
	err  error
}

func (g *getter) key(name string) string { return "key " + quoted(g.arch+"."+name) }

// size reads a whole number from 1 to limit; def 0 means required.
func (g *getter) size(name string, limit, def int) int {
	if g.err != nil {
		return 1
	}
	if _, given := g.h.meta[g.arch+"."+name]; !given && def == 0 {
		g.err = malformed(g.key(name), "nothing", "the key")
		return 1
	}
	v, err := g.h.integer(g.arch+"."+name, int64(def))
	if err == nil && (v < 1 || v > int64(limit)) {
		err = malformed(g.key(name), v, fmt.Sprintf("1 to %d", limit))
	}
	if err != nil {
		g.err = err
		return 1
	}
	return int(v)
}

// decimal reads a number that was stored as float32 as the shortest decimal
// that rounds to it: 1e-5, not 9.999999747378752e-06. def 0 means required.
func (g *getter) decimal(name string, def float64) float64 {
	if g.err != nil {
		return def
	}
	if _, given := g.h.meta[g.arch+"."+name]; !given && def == 0 {
		g.err = malformed(g.key(name), "nothing", "the key")
		return def
	}
	v, err := g.h.number(g.arch+"."+name, def)
	if err != nil {
		g.err = err
		return def
	}
	if float64(float32(v)) == v {
		v, _ = strconv.ParseFloat(strconv.FormatFloat(v, 'g', -1, 32), 64)
	}
	return v
}

// expected lists a decoder's tensors: GGUF name to Hugging Face name and shape.
func expected(c model.Config) map[string]target {
	q, kv := c.Heads*c.HeadDim, c.KVHeads*c.HeadDim
	out := map[string]target{
		"token_embd.weight":  {"model.embed_tokens.weight", []int{c.Vocab, c.Hidden}, 0},
		"output_norm.weight": {"model.norm.weight", []int{c.Hidden}, 0},
	}
	if !c.Tied {
		out["output.weight"] = target{"lm_head.weight", []int{c.Vocab, c.Hidden}, 0}
	}
	permuteQ, permuteK := 0, 0
	if c.Type == "llama" {
		permuteQ, permuteK = c.Heads, c.KVHeads
	}
	for i := range c.Layers {
		from, to := fmt.Sprintf("blk.%d.", i), fmt.Sprintf("model.layers.%d.", i)
		add := func(src, dst string, permute int, shape ...int) {
			out[from+src] = target{to + dst, shape, permute}
		}
		add("attn_norm.weight", "input_layernorm.weight", 0, c.Hidden)
		add("ffn_norm.weight", "post_attention_layernorm.weight", 0, c.Hidden)
		add("attn_q.weight", "self_attn.q_proj.weight", permuteQ, q, c.Hidden)
		add("attn_k.weight", "self_attn.k_proj.weight", permuteK, kv, c.Hidden)
		add("attn_v.weight", "self_attn.v_proj.weight", 0, kv, c.Hidden)
		add("attn_output.weight", "self_attn.o_proj.weight", 0, c.Hidden, q)
		add("ffn_gate.weight", "mlp.gate_proj.weight", 0, c.FFN, c.Hidden)
		add("ffn_up.weight", "mlp.up_proj.weight", 0, c.FFN, c.Hidden)
		add("ffn_down.weight", "mlp.down_proj.weight", 0, c.Hidden, c.FFN)
		if c.QKVBias {
			add("attn_q.bias", "self_attn.q_proj.bias", 0, q)
			add("attn_k.bias", "self_attn.k_proj.bias", 0, kv)
			add("attn_v.bias", "self_attn.v_proj.bias", 0, kv)
		}
		if c.QKNorm {
			add("attn_q_norm.weight", "self_attn.q_norm.weight", 0, c.HeadDim)
			add("attn_k_norm.weight", "self_attn.k_norm.weight", 0, c.HeadDim)
		}
	}
	return out
}

// target is where a GGUF tensor goes.
type target struct {
	name    string
	shape   []int
	permute int // heads whose rows llama.cpp interleaved; 0: as it is
}

func describeTensor(t tensorInfo, ok bool) string {
	if !ok {
		return "nothing"
	}
	return "shape " + strings.ReplaceAll(fmt.Sprint(t.shape()), " ", "x")
}

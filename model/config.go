package model

import (
	"fmt"
	"math"

	"trainerd/internal/fault"
)

// Config is the architecture of a decoder, independent of any file format.
type Config struct {
	Type         string // Hugging Face model_type: "llama", "qwen2" or "qwen3"
	Vocab        int    // V
	Hidden       int    // d
	FFN          int    // F
	Layers       int
	Heads        int // H
	KVHeads      int // KV, divides Heads
	HeadDim      int // hd, even
	MaxPositions int // longest prompt + completion
	RopeTheta    float64
	NormEps      float64
	Tied         bool // the LM head is the embedding
	QKVBias      bool // Qwen2
	QKNorm       bool // Qwen3
	InitStd      float64
	BOS          int32   // -1 for none
	EOS          []int32 // ids that end a completion
}

// Bounds of a config. They are far beyond any model and keep every product that
// a memory plan forms (layers * tokens * width * bytes) below 2^63.
const (
	maxDim        = 1 << 24
	maxLayers     = 1 << 12
	maxParameters = 1 << 44
	maxTokens     = 1 << 22 // of a micro-batch or a sampler's cache
)

// Validate checks that the config describes a model this package can run. The
// fault names fields as config.json does.
func (c Config) Validate() error {
	var bad []fault.Field
	add := func(name string, got any, expected string) {
		bad = append(bad, fault.Field{Name: name, Row: -1, Got: fmt.Sprint(got), Expected: expected})
	}
	switch c.Type {
	case "llama", "qwen2", "qwen3":
	default:
		add("model_type", fmt.Sprintf("%q", c.Type), `"llama", "qwen2" or "qwen3"`)
	}
	for _, f := range []struct {
		name       string
		got, limit int
	}{
		{"vocab_size", c.Vocab, maxDim}, {"hidden_size", c.Hidden, maxDim}, {"intermediate_size", c.FFN, maxDim},
		{"num_hidden_layers", c.Layers, maxLayers}, {"num_attention_heads", c.Heads, maxDim},
		{"num_key_value_heads", c.KVHeads, maxDim}, {"head_dim", c.HeadDim, maxDim},
		{"max_position_embeddings", c.MaxPositions, maxDim},
	} {
		if f.got <= 0 || f.got > f.limit {
			add(f.name, f.got, fmt.Sprintf("1 to %d", f.limit))
		}
	}
	if c.KVHeads > 0 && c.Heads%c.KVHeads != 0 {
		add("num_key_value_heads", c.KVHeads, fmt.Sprintf("a divisor of num_attention_heads (%d)", c.Heads))
	}
	if c.HeadDim%2 != 0 {
		add("head_dim", c.HeadDim, "an even number")
	}
	for _, f := range []struct {
		name string
		got  float64
	}{{"rope_theta", c.RopeTheta}, {"rms_norm_eps", c.NormEps}} {
		if !(f.got > 0) || math.IsInf(f.got, 0) {
			add(f.name, f.got, "a positive number")
		}
	}
	if !(c.InitStd >= 0) || math.IsInf(c.InitStd, 0) {
		add("initializer_range", c.InitStd, "a number >= 0 (0: 0.02)")
	}
	if c.QKVBias != (c.Type == "qwen2") {
		add("attention_bias", c.QKVBias, "true for qwen2 and false for the others")
	}
	if c.QKNorm != (c.Type == "qwen3") {
		add("qk_norm", c.QKNorm, "true for qwen3 and false for the others")
	}
	if c.BOS < -1 {
		add("bos_token_id", c.BOS, "a token id, or -1 for none")
	}
	for _, id := range c.EOS {
		if id < 0 {
			add("eos_token_id", id, "a token id")
		}
	}
	if len(bad) == 0 { // every factor is bounded, so floats cannot overflow
		if w := (float64(c.Heads) + 2*float64(c.KVHeads)) * float64(c.HeadDim); w > maxDim {
			add("head_dim", c.HeadDim, fmt.Sprintf("heads of at most %d values together", maxDim))
		} else if n := float64(c.Layers)*float64(c.Hidden)*(2*w+3*float64(c.FFN)) + 2*float64(c.Vocab)*float64(c.Hidden); n > maxParameters {
			add("hidden_size", c.Hidden, fmt.Sprintf("a model of at most %d parameters, not about %.3g", int64(maxParameters), n))
		}
	}
	if len(bad) > 0 {
		return &fault.Error{Kind: fault.Invalid, Code: "invalid_config", Msg: "model config is not usable", Fields: bad}
	}
	return nil
}

// qkvWidth is W, the width of a row of packed q|k|v.
func (c Config) qkvWidth() int { return (c.Heads + 2*c.KVHeads) * c.HeadDim }

// Parameters returns the number of weights, a tied head counted once.
func (c Config) Parameters() int64 {
	d, w, f := int64(c.Hidden), int64(c.qkvWidth()), int64(c.FFN)
	layer := w*d + int64(c.Heads*c.HeadDim)*d + 3*f*d + 2*d
	if c.QKVBias {
		layer += w
	}
	if c.QKNorm {
		layer += 2 * int64(c.HeadDim)
	}
	n := int64(c.Layers)*layer + d + int64(c.Vocab)*d
	if !c.Tied {
		n += int64(c.Vocab) * d
	}
	return n
}

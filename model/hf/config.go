package hf

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"slices"

	"trainerd/internal/fault"
	"trainerd/model"
)

// rawConfig is what is read of config.json. Pointers and raw values tell what
// is absent or null from what is zero.
type rawConfig struct {
	ModelType             string          `json:"model_type"`
	VocabSize             *int            `json:"vocab_size"`
	HiddenSize            *int            `json:"hidden_size"`
	IntermediateSize      *int            `json:"intermediate_size"`
	NumHiddenLayers       *int            `json:"num_hidden_layers"`
	NumAttentionHeads     *int            `json:"num_attention_heads"`
	NumKeyValueHeads      *int            `json:"num_key_value_heads"`
	HeadDim               *int            `json:"head_dim"`
	MaxPositionEmbeddings *int            `json:"max_position_embeddings"`
	RopeTheta             *float64        `json:"rope_theta"`
	RopeScaling           json.RawMessage `json:"rope_scaling"`
	RopeParameters        json.RawMessage `json:"rope_parameters"`
	PartialRotaryFactor   *float64        `json:"partial_rotary_factor"`
	RMSNormEps            *float64        `json:"rms_norm_eps"`
	InitializerRange      *float64        `json:"initializer_range"`
	TieWordEmbeddings     *bool           `json:"tie_word_embeddings"`
	HiddenAct             *string         `json:"hidden_act"`
	AttentionBias         *bool           `json:"attention_bias"`
	MLPBias               *bool           `json:"mlp_bias"`
	UseSlidingWindow      *bool           `json:"use_sliding_window"`
	SlidingWindow         *int            `json:"sliding_window"`
	LayerTypes            []string        `json:"layer_types"`
	QuantizationConfig    json.RawMessage `json:"quantization_config"`
	BOS                   json.RawMessage `json:"bos_token_id"`
	EOS                   json.RawMessage `json:"eos_token_id"`
}

// defaults are transformers' for an absent key, by model_type; the head
// dimension 0 stands for hidden_size / num_attention_heads.
var defaults = map[string]struct {
	headDim, maxPositions int
	tied                  bool
}{
	"llama": {0, 2048, false},
	"qwen2": {0, 32768, false},
	"qwen3": {128, 32768, false},
}

// ParseConfig reads a config.json; name is what faults call it. What this
// engine does not compute exactly as transformers does (RoPE scaling, sliding
// windows, other activations, biases, quantised weights) is refused by key.
func ParseConfig(name string, data []byte) (model.Config, error) {
	var r rawConfig
	if err := json.Unmarshal(data, &r); err != nil {
		return model.Config{}, fault.New(fault.Malformed, "invalid_config", "decode %s: %w", name, err)
	}
	var bad []fault.Field
	refuse := func(key string, got any, expected string) {
		bad = append(bad, fault.Field{Name: key, Row: -1, Got: fmt.Sprint(got), Expected: expected})
	}
	fail := func() error {
		return &fault.Error{Kind: fault.Invalid, Code: "unsupported_config", Msg: name, Fields: bad}
	}
	def, ok := defaults[r.ModelType]
	if !ok {
		refuse("model_type", fmt.Sprintf("%q", r.ModelType), `"llama", "qwen2" or "qwen3"`)
		return model.Config{}, fail()
	}
	need := func(key string, v *int) int {
		if v == nil {
			refuse(key, "nothing", "a positive number")
			return 0
		}
		return *v
	}
	c := model.Config{Type: r.ModelType,
		Vocab: need("vocab_size", r.VocabSize), Hidden: need("hidden_size", r.HiddenSize), FFN: need("intermediate_size", r.IntermediateSize),
		Layers: need("num_hidden_layers", r.NumHiddenLayers), Heads: need("num_attention_heads", r.NumAttentionHeads),
		MaxPositions: or(r.MaxPositionEmbeddings, def.maxPositions), NormEps: or(r.RMSNormEps, 1e-6),
		InitStd: or(r.InitializerRange, 0.02), Tied: or(r.TieWordEmbeddings, def.tied),
		QKVBias: r.ModelType == "qwen2", QKNorm: r.ModelType == "qwen3",
	}
	c.KVHeads = or(r.NumKeyValueHeads, c.Heads)
	if c.HeadDim = or(r.HeadDim, def.headDim); c.HeadDim == 0 && c.Heads > 0 {
		if c.Hidden%c.Heads != 0 {
			refuse("hidden_size", c.Hidden, fmt.Sprintf("a multiple of num_attention_heads (%d) where head_dim is absent", c.Heads))
		}
		c.HeadDim = c.Hidden / c.Heads
	}

	var err error
	if c.RopeTheta, err = r.rope(refuse); err != nil {
		return model.Config{}, fault.New(fault.Malformed, "invalid_config", "decode %s: %w", name, err)
	}
	if act := or(r.HiddenAct, "silu"); act != "silu" {
		refuse("hidden_act", fmt.Sprintf("%q", act), `"silu"`)
	}
	// transformers' Qwen2 has its biases whatever the key says.
	if r.ModelType != "qwen2" && or(r.AttentionBias, false) {
		refuse("attention_bias", true, "false for "+r.ModelType)
	}
	if or(r.MLPBias, false) {
		refuse("mlp_bias", true, "false")
	}
	if or(r.UseSlidingWindow, false) || (r.ModelType == "llama" && r.SlidingWindow != nil) {
		refuse("sliding_window", or(r.SlidingWindow, 0), "full attention (use_sliding_window false)")
	}
	for _, kind := range r.LayerTypes {
		if kind != "full_attention" {
			refuse("layer_types", fmt.Sprintf("%q", kind), `"full_attention" in every layer`)
			break
		}
	}
	if present(r.QuantizationConfig) {
		refuse("quantization_config", "an object", "weights that are not quantised")
	}
	c.BOS = -1
	bos, err := tokenIDs(r.BOS)
	if err != nil || len(bos) > 1 {
		refuse("bos_token_id", string(r.BOS), "a token id or null")
	} else if len(bos) == 1 {
		c.BOS = bos[0]
	}
	if c.EOS, err = tokenIDs(r.EOS); err != nil {
		refuse("eos_token_id", string(r.EOS), "a token id, a list of them, or null")
	}
	if len(bad) > 0 {
		return model.Config{}, fail()
	}
	if err := c.Validate(); err != nil {
		return model.Config{}, fmt.Errorf("%s: %w", name, err)
	}
	return c, nil
}

func or[T any](p *T, def T) T {
	if p == nil {
		return def
	}
	return *p
}

// present reports whether a JSON value is there and not null.
func present(v json.RawMessage) bool { return len(v) > 0 && !bytes.Equal(v, []byte("null")) }

// rope returns theta: from rope_theta, or from rope_parameters as newer files
// have it; any scaling is refused.
func (r *rawConfig) rope(refuse func(key string, got any, expected string)) (float64, error) {
	theta := 10000.0
	for _, part := range []struct {
		key   string
		value json.RawMessage
	}{{"rope_scaling", r.RopeScaling}, {"rope_parameters", r.RopeParameters}} {
		if !present(part.value) {
			continue
		}
		var p struct {
			Type     *string  `json:"type"`
			RopeType *string  `json:"rope_type"`
			Theta    *float64 `json:"rope_theta"`
			Partial  *float64 `json:"partial_rotary_factor"`
		}
		if err := json.Unmarshal(part.value, &p); err != nil {
			return 0, fmt.Errorf("%s: %w", part.key, err)
		}
		if kind := or(p.RopeType, or(p.Type, "default")); kind != "default" {
			refuse(part.key, fmt.Sprintf("type %q", kind), `null or type "default": RoPE scaling is not supported`)
		}
		if f := or(p.Partial, 1); f != 1 {
			refuse(part.key+".partial_rotary_factor", f, "1")
		}
		theta = or(p.Theta, theta)
	}
	if f := or(r.PartialRotaryFactor, 1); f != 1 {
		refuse("partial_rotary_factor", f, "1")
	}
	return or(r.RopeTheta, theta), nil
}

// tokenIDs reads an id, a list of ids, or nothing.
func tokenIDs(v json.RawMessage) ([]int32, error) {
	if !present(v) {
		return nil, nil
	}
	var one int32
	if err := json.Unmarshal(v, &one); err == nil {
		return []int32{one}, nil
	}
	var list []int32
	err := json.Unmarshal(v, &list)
	return list, err
}

// addGenerationEOS adds the end tokens that generation_config.json names.
func addGenerationEOS(eos []int32, name string, data []byte) ([]int32, error) {
	var g struct {
		EOS json.RawMessage `json:"eos_token_id"`
	}
	if err := json.Unmarshal(data, &g); err != nil {
		return nil, fault.New(fault.Malformed, "invalid_config", "decode %s: %w", name, err)
	}
	ids, err := tokenIDs(g.EOS)
	if err != nil {
		return nil, fault.New(fault.Malformed, "invalid_config", "decode %s: eos_token_id: %w", name, err)
	}
	for _, id := range ids {
		if id < 0 {
			return nil, fault.New(fault.Invalid, "invalid_config", "%s: eos_token_id is %d, expected a token id", name, id)
		}
		if !slices.Contains(eos, id) {
			eos = append(eos, id)
		}
	}
	return eos, nil
}

// torchDType is transformers' name of a stored type.
var torchDType = map[string]string{"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

// makeConfig writes a config.json that transformers and vLLM accept.
func makeConfig(c model.Config, dtype string) ([]byte, error) {
	arch := map[string]string{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}[c.Type]
	var bos, eos any
	if c.BOS >= 0 {
		bos = c.BOS
	}
	switch len(c.EOS) {
	case 0:
	case 1:
		eos = c.EOS[0]
	default:
		eos = c.EOS
	}
	std := c.InitStd
	if std == 0 {
		std = 0.02
	}
	fields := []struct {
		key   string
		value any
	}{
		{"architectures", []string{arch}}, {"model_type", c.Type},
		{"vocab_size", c.Vocab}, {"hidden_size", c.Hidden}, {"intermediate_size", c.FFN}, {"num_hidden_layers", c.Layers},
		{"num_attention_heads", c.Heads}, {"num_key_value_heads", c.KVHeads}, {"head_dim", c.HeadDim},
		{"max_position_embeddings", c.MaxPositions}, {"rope_theta", c.RopeTheta}, {"rope_scaling", nil},
		{"rms_norm_eps", c.NormEps}, {"hidden_act", "silu"}, {"attention_bias", c.QKVBias}, {"attention_dropout", 0.0},
		{"initializer_range", std}, {"tie_word_embeddings", c.Tied}, {"bos_token_id", bos}, {"eos_token_id", eos},
		{"torch_dtype", torchDType[dtype]}, {"use_cache", true},
	}
	var o object
	for _, f := range fields {
		v, err := json.Marshal(f.value)
		if err != nil {
			return nil, fmt.Errorf("write config.json: %w", err)
		}
		o = append(o, member{f.key, v})
	}
	return o.encode()
}

// retypeConfig returns an original config.json with its stored type replaced
// and everything else as it was, unknown keys and order included.
func retypeConfig(data []byte, dtype string) ([]byte, error) {
	o, err := decodeObject(data)
	if err != nil {
		return nil, err
	}
	value := json.RawMessage(fmt.Sprintf("%q", torchDType[dtype]))
	found := false
	for i := range o {
		if o[i].key == "torch_dtype" || o[i].key == "dtype" {
			o[i].value, found = value, true
		}
	}
	if !found {
		o = append(o, member{"torch_dtype", value})
	}
	return o.encode()
}

// object is a JSON object that keeps the order of its members.
type object []member

type member struct {
	key   string
	value json.RawMessage
}

// decodeObject reads one JSON object and nothing after it. A key that comes
// twice is an error: readers differ on which one counts.
func decodeObject(data []byte) (object, error) {
	var o object
	err := eachMember(data, func(key string, dec *json.Decoder) error {
		var v json.RawMessage
		if err := dec.Decode(&v); err != nil {
			return err
		}
		o = append(o, member{key, v})
		return nil
	})
	return o, err
}

// eachMember calls fn with each key of a JSON object, the decoder standing
// before its value, which fn must consume.
func eachMember(data []byte, fn func(key string, dec *json.Decoder) error) error {
	dec := json.NewDecoder(bytes.NewReader(data))
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return fmt.Errorf("expected a JSON object: %w", orEOF(err))
	}
	seen := map[string]bool{}
	for dec.More() {
		t, err := dec.Token()
		if err != nil {
			return err
		}
		key, ok := t.(string)
		if !ok {
			return fmt.Errorf("expected a key, got %v", t)
		}
		if seen[key] {
			return fmt.Errorf("key %q comes twice", key)
		}
		seen[key] = true
		if err := fn(key, dec); err != nil {
			return fmt.Errorf("%q: %w", key, err)
		}
	}
	if _, err := dec.Token(); err != nil {
		return err
	}
	if _, err := dec.Token(); err != io.EOF {
		return fmt.Errorf("expected nothing after the object")
	}
	return nil
}

func orEOF(err error) error {
	if err == nil {
		return fmt.Errorf("got another value")
	}
	return err
}

// encode writes the object indented, as config.json has it.
func (o object) encode() ([]byte, error) {
	text, err := o.compact()
	if err != nil {
		return nil, fmt.Errorf("write config.json: %w", err)
	}
	var out bytes.Buffer
	if err := json.Indent(&out, text, "", "  "); err != nil {
		return nil, fmt.Errorf("write config.json: %w", err)
	}
	out.WriteByte('\n')
	return out.Bytes(), nil
}

// compact writes the object without line breaks; it must have a member.
func (o object) compact() ([]byte, error) {
	var b bytes.Buffer
	for i, m := range o {
		key, err := json.Marshal(m.key)
		if err != nil {
			return nil, err
		}
		b.WriteByte("{,"[min(i, 1)])
		b.Write(key)
		b.WriteByte(':')
		b.Write(m.value)
	}
	b.WriteByte('}')
	return b.Bytes(), nil
}

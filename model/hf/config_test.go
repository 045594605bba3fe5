package hf

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"trainerd/internal/fault"
	"trainerd/model"
)

const qwen25 = `{
  "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
  "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864, "max_position_embeddings": 32768,
  "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
  "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
  "use_sliding_window": false, "vocab_size": 151936}`

const llama = `{"model_type":"llama","vocab_size":97,"hidden_size":32,"intermediate_size":48,"num_hidden_layers":2,"num_attention_heads":4}`

const qwen3 = `{"model_type":"qwen3","vocab_size":97,"hidden_size":32,"intermediate_size":48,"num_hidden_layers":2,"num_attention_heads":4,
 "num_key_value_heads":2,"rope_parameters":{"rope_theta":5000000,"rope_type":"default"},"rope_scaling":null,"eos_token_id":[5,6],"bos_token_id":null,
 "layer_types":["full_attention","full_attention"]}`

// TestParseConfig: files of both generations of transformers, with its defaults for what they leave out.
func TestParseConfig(t *testing.T) {
	for name, c := range map[string]struct {
		text string
		want model.Config
	}{
		"qwen2.5": {qwen25, model.Config{Type: "qwen2", Vocab: 151936, Hidden: 896, FFN: 4864, Layers: 24, Heads: 14, KVHeads: 2, HeadDim: 64,
			MaxPositions: 32768, RopeTheta: 1e6, NormEps: 1e-6, Tied: true, QKVBias: true, InitStd: 0.02, BOS: 151643, EOS: []int32{151645}}},
		"llama": {llama, model.Config{Type: "llama", Vocab: 97, Hidden: 32, FFN: 48, Layers: 2, Heads: 4, KVHeads: 4, HeadDim: 8,
			MaxPositions: 2048, RopeTheta: 10000, NormEps: 1e-6, InitStd: 0.02, BOS: -1}},
		"qwen3": {qwen3, model.Config{Type: "qwen3", Vocab: 97, Hidden: 32, FFN: 48, Layers: 2, Heads: 4, KVHeads: 2, HeadDim: 128,
			MaxPositions: 32768, RopeTheta: 5e6, NormEps: 1e-6, QKNorm: true, InitStd: 0.02, BOS: -1, EOS: []int32{5, 6}}},
	} {
		got, err := ParseConfig(name, []byte(c.text))
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(c.want, got); diff != "" {
			t.Errorf("%s: (-want +got)\n%s", name, diff)
		}
	}
}

// edit replaces or adds one key of a JSON object.
func edit(t testing.TB, text, key, value string) []byte {
	t.Helper()
	o, err := decodeObject([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	o = slices.DeleteFunc(o, func(m member) bool { return m.key == key })
	if value != "" {
		o = append(o, member{key, json.RawMessage(value)})
	}
	out, err := o.encode()
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestParseConfigRefuses(t *testing.T) {
	for _, c := range []struct{ text, key, value, field string }{
		{llama, "model_type", `"mistral"`, "model_type"},
		{llama, "vocab_size", "", "vocab_size"},
		{llama, "num_hidden_layers", "0", "num_hidden_layers"},
		{llama, "hidden_size", "33", "hidden_size"},
		{llama, "num_key_value_heads", "3", "num_key_value_heads"},
		{llama, "head_dim", "7", "head_dim"},
		{llama, "hidden_act", `"gelu"`, "hidden_act"},
		{llama, "attention_bias", "true", "attention_bias"},
		{qwen3, "attention_bias", "true", "attention_bias"},
		{llama, "mlp_bias", "true", "mlp_bias"},
		{llama, "rope_scaling", `{"rope_type":"llama3","factor":8}`, "rope_scaling"},
		{llama, "rope_scaling", `{"type":"linear","factor":2}`, "rope_scaling"},
		{qwen25, "rope_scaling", `{"type":"yarn","factor":4}`, "rope_scaling"},
		{qwen3, "rope_parameters", `{"rope_type":"yarn","rope_theta":1000000,"factor":4}`, "rope_parameters"},
		{llama, "rope_parameters", `{"partial_rotary_factor":0.5}`, "partial_rotary_factor"},
		{llama, "partial_rotary_factor", `0.5`, "partial_rotary_factor"},
		{qwen25, "use_sliding_window", "true", "sliding_window"},
		{llama, "sliding_window", "128", "sliding_window"},
		{qwen3, "layer_types", `["full_attention","sliding_attention"]`, "layer_types"},
		{llama, "quantization_config", `{"quant_method":"gptq"}`, "quantization_config"},
		{llama, "eos_token_id", `"</s>"`, "eos_token_id"},
		{llama, "bos_token_id", `[1,2]`, "bos_token_id"},
		{llama, "rope_theta", `-1`, "rope_theta"},
	} {
		_, err := ParseConfig("my/config.json", edit(t, c.text, c.key, c.value))
		if err == nil || fault.KindOf(err) != fault.Invalid || !strings.Contains(err.Error(), c.field) || !strings.Contains(err.Error(), "my/config.json") {
			t.Errorf("%s = %s: %v, expected an invalid fault that names file and %s", c.key, c.value, err, c.field)
		}
	}
	for _, text := range []string{"", "[]", "{", `{"vocab_size":"many"}`, `{"model_type":"llama","rope_scaling":[]}`} {
		if _, err := ParseConfig("my/config.json", []byte(text)); err == nil || (fault.KindOf(err) != fault.Malformed && fault.KindOf(err) != fault.Invalid) {
			t.Errorf("%q: %v, expected a fault", text, err)
		}
	}
	for _, accepted := range []struct{ key, value string }{
		{"rope_scaling", `{"rope_type":"default"}`}, {"rope_scaling", "null"}, {"use_sliding_window", "false"}, {"attention_bias", "true"}, {"head_dim", "null"},
	} {
		if _, err := ParseConfig("x", edit(t, qwen25, accepted.key, accepted.value)); err != nil {
			t.Errorf("%s = %s: %v", accepted.key, accepted.value, err)
		}
	}
}

// TestMadeConfig: what makeConfig writes is read back as the same config.
func TestMadeConfig(t *testing.T) {
	for _, text := range []string{qwen25, llama, qwen3} {
		want, err := ParseConfig("x", []byte(text))
		if err != nil {
			t.Fatal(err)
		}
		made, err := makeConfig(want, "BF16")
		if err != nil {
			t.Fatal(err)
		}
		got, err := ParseConfig("made", made)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("(-want +got)\n%s", diff)
		}
		if !strings.Contains(string(made), `"torch_dtype": "bfloat16"`) {
			t.Errorf("no dtype in %s", made)
		}
	}
}

// TestRetypeConfig: only the stored type changes, under either of its names.
func TestRetypeConfig(t *testing.T) {
	for in, want := range map[string]string{
		`{"b": 1e-06, "torch_dtype": "bfloat16", "a": {"z": [1, 2]}}`: `{"b":1e-06,"torch_dtype":"float32","a":{"z":[1,2]}}`,
		`{"dtype":"float16","unknown":null}`:                          `{"dtype":"float32","unknown":null}`,
		`{"x":1}`:                                                     `{"x":1,"torch_dtype":"float32"}`,
	} {
		out, err := retypeConfig([]byte(in), "F32")
		if err != nil {
			t.Fatal(err)
		}
		got := strings.NewReplacer("\n", "", " ", "").Replace(string(out))
		if got != want {
			t.Errorf("%s becomes %s, expected %s", in, got, want)
		}
	}
}

func TestGenerationEOS(t *testing.T) {
	got, err := addGenerationEOS([]int32{7}, "g", []byte(`{"eos_token_id":[7,9]}`))
	if err != nil || !slices.Equal(got, []int32{7, 9}) {
		t.Errorf("%v, %v", got, err)
	}
	for _, bad := range []string{"x", `{"eos_token_id":"a"}`, `{"eos_token_id":-1}`} {
		if _, err := addGenerationEOS(nil, "g.json", []byte(bad)); err == nil || !strings.Contains(err.Error(), "g.json") || fault.KindOf(err) == fault.Internal {
			t.Errorf("%s: %v", bad, err)
		}
	}
}

// FuzzConfig: whatever the bytes, ParseConfig returns a fault or a valid config.
func FuzzConfig(f *testing.F) {
	for _, text := range []string{qwen25, llama, qwen3} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := ParseConfig("f", data)
		if err != nil {
			if k := fault.KindOf(err); k != fault.Malformed && k != fault.Invalid {
				t.Fatalf("%v is neither malformed nor invalid", err)
			}
			return
		}
		if err := c.Validate(); err != nil {
			t.Fatal(err)
		}
	})
}

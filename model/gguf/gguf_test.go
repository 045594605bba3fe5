package gguf

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"math"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"gorgonia.org/tensor"

	"trainerd/internal/fault"
	"trainerd/model"
	"trainerd/model/tokenizer"
)

// golden is what transformers' own reader makes of a file (parity/py/gguf_goldens.py).
type golden struct {
	Vocab     int     `json:"vocab"`
	Hidden    int     `json:"hidden"`
	FFN       int     `json:"ffn"`
	Layers    int     `json:"layers"`
	Heads     int     `json:"heads"`
	KVHeads   int     `json:"kv_heads"`
	HeadDim   int     `json:"head_dim"`
	Theta     float64 `json:"theta"`
	Eps       float64 `json:"eps"`
	Tied      bool    `json:"tied"`
	Positions int     `json:"positions"`
	BOS       int32   `json:"bos"`
	EOS       int32   `json:"eos"`
	Tensors   map[string]struct {
		Shape  []int     `json:"shape"`
		SHA256 string    `json:"sha256"`
		Head   []float32 `json:"head"`
	} `json:"tensors"`
}

var architectures = []struct{ name, dtype, family string }{
	{"llama", "F32", "smollm"},
	{"qwen2", "F16", "qwen2"},
	{"qwen3", "BF16", "qwen2"},
}

// TestAgreesWithTransformers reads files of every architecture and type and
// compares bit for bit.
func TestAgreesWithTransformers(t *testing.T) {
	for _, a := range architectures {
		t.Run(a.name, func(t *testing.T) {
			data, err := os.ReadFile(filepath.Join("testdata", a.name+".json"))
			if err != nil {
				t.Fatal(err)
			}
			var want golden
			if err := json.Unmarshal(data, &want); err != nil {
				t.Fatal(err)
			}
			f, err := Open(filepath.Join("testdata", a.name+".gguf"))
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			config := model.Config{Type: a.name, Vocab: want.Vocab, Hidden: want.Hidden, FFN: want.FFN, Layers: want.Layers, Heads: want.Heads, KVHeads: want.KVHeads,
				HeadDim: want.HeadDim, MaxPositions: want.Positions, RopeTheta: want.Theta, NormEps: want.Eps, Tied: want.Tied,
				QKVBias: a.name == "qwen2", QKNorm: a.name == "qwen3", InitStd: 0.02, BOS: want.BOS, EOS: []int32{want.EOS}}
			if d := cmp.Diff(config, f.Config()); d != "" {
				t.Errorf("config (-transformers +ours):\n%s", d)
			}
			if got := f.DType(); got != a.dtype {
				t.Errorf("DType() = %s, expected %s", got, a.dtype)
			}
			if len(f.Names()) != len(want.Tensors) {
				t.Errorf("%d tensors, transformers has %d", len(f.Names()), len(want.Tensors))
			}
			for name, w := range want.Tensors {
				shape, ok := f.Shape(name)
				if !ok || !slices.Equal(shape, w.Shape) {
					t.Errorf("%s: shape %v (%v), expected %v", name, shape, ok, w.Shape)
					continue
				}
				dst := tensor.New(tensor.WithShape(shape...), tensor.Of(tensor.Float32))
				if err := f.Read(name, dst); err != nil {
					t.Fatal(err)
				}
				values := dst.Data().([]float32)
				h := sha256.New()
				binary.Write(h, binary.LittleEndian, values)
				if got := hex.EncodeToString(h.Sum(nil)); got != w.SHA256 {
					t.Errorf("%s: values differ; first %v, transformers has %v", name, values[:4], w.Head)
				}
			}
		})
	}
}

// TestCarriedTokenizer holds the written tokenizer.json to the ids that Python
// gave for the tokenizer that the file was made from.
func TestCarriedTokenizer(t *testing.T) {
	data, err := os.ReadFile("../tokenizer/testdata/corpus.json")
	if err != nil {
		t.Fatal(err)
	}
	var corpus struct {
		Texts []string             `json:"texts"`
		IDs   map[string][][]int32 `json:"ids"`
	}
	if err := json.Unmarshal(data, &corpus); err != nil {
		t.Fatal(err)
	}
	for _, a := range architectures {
		t.Run(a.name, func(t *testing.T) {
			f, err := Open(filepath.Join("testdata", a.name+".gguf"))
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			files, err := f.Carried()
			if err != nil {
				t.Fatal(err)
			}
			tok, err := tokenizer.Parse(files["tokenizer.json"], files["tokenizer_config.json"])
			if err != nil {
				t.Fatal(err)
			}
			for i, text := range corpus.Texts {
				got, err := tok.Encode(text)
				if err != nil {
					t.Fatal(err)
				}
				if want := corpus.IDs[a.family][i]; !slices.Equal(got, want) {
					t.Errorf("encode %q = %v, expected %v", text, got, want)
				}
			}
			if id, ok := tok.Special("eos_token"); !ok || id != 2 {
				t.Errorf("eos_token is %d (%v)", id, ok)
			}
			var config map[string]any
			if err := json.Unmarshal(files["tokenizer_config.json"], &config); err != nil {
				t.Fatal(err)
			}
			if s, _ := config["chat_template"].(string); s == "" {
				t.Error("tokenizer_config.json has no chat_template")
			}
			var gen struct {
				BOS int `json:"bos_token_id"`
				EOS int `json:"eos_token_id"`
				Pad int `json:"pad_token_id"`
			}
			if err := json.Unmarshal(files["generation_config.json"], &gen); err != nil || gen.BOS != 1 || gen.EOS != 2 || gen.Pad != 2 {
				t.Errorf("generation_config.json: %s (%v)", files["generation_config.json"], err)
			}
			var names map[string]string
			if err := json.Unmarshal(files["special_tokens_map.json"], &names); err != nil || names["eos_token"] != "<|im_end|>" {
				t.Errorf("special_tokens_map.json: %s (%v)", files["special_tokens_map.json"], err)
			}
		})
	}
}

// TestLlama3Beginning: the Llama 3 family puts a beginning in front of every text.
func TestLlama3Beginning(t *testing.T) {
	b := sample()
	b.set("tokenizer.ggml.pre", "llama-bpe")
	f, err := b.open()
	if err != nil {
		t.Fatal(err)
	}
	files, err := f.Carried()
	if err != nil {
		t.Fatal(err)
	}
	var j struct {
		Post struct {
			Processors []struct {
				Type   string `json:"type"`
				Single []any  `json:"single"`
			} `json:"processors"`
		} `json:"post_processor"`
		Model struct {
			IgnoreMerges bool `json:"ignore_merges"`
		} `json:"model"`
	}
	if err := json.Unmarshal(files["tokenizer.json"], &j); err != nil {
		t.Fatal(err)
	}
	if len(j.Post.Processors) != 2 || j.Post.Processors[1].Type != "TemplateProcessing" || len(j.Post.Processors[1].Single) != 2 || !j.Model.IgnoreMerges {
		t.Errorf("post-processor: %+v, ignore_merges %v", j.Post, j.Model.IgnoreMerges)
	}
}

// TestSecondEnd: the end of a turn also ends a completion.
func TestSecondEnd(t *testing.T) {
	b := sample()
	b.set("tokenizer.ggml.eot_token_id", uint32(3))
	f, err := b.open()
	if err != nil {
		t.Fatal(err)
	}
	if got := f.Config().EOS; !slices.Equal(got, []int32{1, 3}) {
		t.Errorf("EOS = %v", got)
	}
}

func TestHalf(t *testing.T) {
	for _, c := range []struct {
		bits uint16
		want float32
	}{
		{0x0000, 0}, {0x3c00, 1}, {0xc000, -2}, {0x7bff, 65504}, {0x0400, 0x1p-14}, {0x0001, 0x1p-24}, {0x83ff, -0x3ffp-24}, {0x3555, 0.333251953125},
		{0x7c00, float32(math.Inf(1))}, {0xfc00, float32(math.Inf(-1))},
	} {
		if got := half(c.bits); got != c.want {
			t.Errorf("half(%#04x) = %v, expected %v", c.bits, got, c.want)
		}
	}
	if got := half(0x8000); math.Float32bits(got) != 1<<31 {
		t.Errorf("half(0x8000) = %v, expected -0", got)
	}
	if got := half(0x7e00); got == got {
		t.Errorf("half(0x7e00) = %v, expected NaN", got)
	}
}

// TestReadRefusals: a destination or name that does not fit is a fault, not a panic.
func TestReadRefusals(t *testing.T) {
	f, err := sample().open()
	if err != nil {
		t.Fatal(err)
	}
	f32 := func(shape ...int) *tensor.Dense {
		return tensor.New(tensor.WithShape(shape...), tensor.Of(tensor.Float32))
	}
	for name, err := range map[string]error{
		"missing":       f.Read("model.layers.9.mlp.up_proj.weight", f32(2, 2)),
		"wrong shape":   f.Read("model.norm.weight", f32(2, 4)),
		"wrong element": f.Read("model.norm.weight", tensor.New(tensor.WithShape(8), tensor.Of(tensor.Float64))),
	} {
		if fault.KindOf(err) != fault.Invalid {
			t.Errorf("%s: %v, expected an invalid fault", name, err)
		}
	}
	if _, ok := f.Shape("nothing"); ok {
		t.Error("Shape of a missing tensor is ok")
	}
}

// TestTruncatedAfterOpen: a file cut while it is in use is a fault that names the tensor.
func TestTruncatedAfterOpen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "m.gguf")
	image := sample().image()
	if err := os.WriteFile(path, image, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := os.Truncate(path, int64(len(image)-64)); err != nil {
		t.Fatal(err)
	}
	err = f.Read("model.norm.weight", tensor.New(tensor.WithShape(8), tensor.Of(tensor.Float32)))
	if fault.KindOf(err) != fault.Malformed || !bytes.Contains([]byte(err.Error()), []byte("model.norm.weight")) {
		t.Errorf("got %v", err)
	}
}

func TestOpenRefusals(t *testing.T) {
	if _, err := Open(filepath.Join(t.TempDir(), "none.gguf")); fault.KindOf(err) != fault.NotFound {
		t.Errorf("missing file: %v", err)
	}
	if _, err := Open(t.TempDir()); fault.KindOf(err) != fault.Invalid {
		t.Errorf("a directory: %v", err)
	}
}

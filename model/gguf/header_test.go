package gguf

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"runtime"
	"slices"
	"strings"
	"testing"

	"gorgonia.org/tensor"

	"trainerd/internal/fault"
)

// builder writes GGUF images, bad ones too.
type builder struct {
	version uint32
	keys    []string
	values  map[string]any
	tensors []builtTensor
	counts  *[2]uint64 // overrides tensor and key counts
	align   int
}

type builtTensor struct {
	name   string
	dims   []uint64
	kind   uint32
	offset *uint64 // nil: the next aligned one
	bytes  int     // of data written
}

// raw is a value written as it is, after its type.
type raw struct {
	kind uint32
	data []byte
}

func (b *builder) set(key string, v any) {
	if _, ok := b.values[key]; !ok {
		b.keys = append(b.keys, key)
	}
	b.values[key] = v
}

func (b *builder) unset(key string) {
	b.keys = slices.DeleteFunc(b.keys, func(k string) bool { return k == key })
	delete(b.values, key)
}

func (b *builder) tensor(name string) *builtTensor {
	for i := range b.tensors {
		if b.tensors[i].name == name {
			return &b.tensors[i]
		}
	}
	panic(name)
}

func (b *builder) drop(name string) {
	b.tensors = slices.DeleteFunc(b.tensors, func(t builtTensor) bool { return t.name == name })
}

func (b *builder) f32(name string, dims ...uint64) {
	n := 4
	for _, d := range dims {
		n *= int(d)
	}
	b.tensors = append(b.tensors, builtTensor{name: name, dims: dims, bytes: n})
}

func appendString(dst []byte, s string) []byte {
	return append(binary.LittleEndian.AppendUint64(dst, uint64(len(s))), s...)
}

func appendValue(dst []byte, v any) []byte {
	le := binary.LittleEndian
	switch v := v.(type) {
	case uint32:
		return le.AppendUint32(le.AppendUint32(dst, typeUint32), v)
	case int32:
		return le.AppendUint32(le.AppendUint32(dst, typeInt32), uint32(v))
	case uint64:
		return le.AppendUint64(le.AppendUint32(dst, typeUint64), v)
	case float32:
		return le.AppendUint32(le.AppendUint32(dst, typeFloat32), math.Float32bits(v))
	case string:
		return appendString(le.AppendUint32(dst, typeString), v)
	case []string:
		dst = le.AppendUint64(le.AppendUint32(le.AppendUint32(dst, typeArray), typeString), uint64(len(v)))
		for _, s := range v {
			dst = appendString(dst, s)
		}
		return dst
	case []int32:
		dst = le.AppendUint64(le.AppendUint32(le.AppendUint32(dst, typeArray), typeInt32), uint64(len(v)))
		for _, x := range v {
			dst = le.AppendUint32(dst, uint32(x))
		}
		return dst
	case raw:
		return append(le.AppendUint32(dst, v.kind), v.data...)
	}
	panic(fmt.Sprintf("%T", v))
}

func (b *builder) image() []byte {
	le := binary.LittleEndian
	counts := [2]uint64{uint64(len(b.tensors)), uint64(len(b.keys))}
	if b.counts != nil {
		counts = *b.counts
	}
	out := le.AppendUint32([]byte("GGUF"), b.version)
	out = le.AppendUint64(le.AppendUint64(out, counts[0]), counts[1])
	for _, k := range b.keys {
		out = appendValue(appendString(out, k), b.values[k])
	}
	next, data := uint64(0), []byte{}
	for _, t := range b.tensors {
		out = le.AppendUint32(appendString(out, t.name), uint32(len(t.dims)))
		for _, d := range t.dims {
			out = le.AppendUint64(out, d)
		}
		offset := next
		if t.offset != nil {
			offset = *t.offset
		}
		out = le.AppendUint64(le.AppendUint32(out, t.kind), offset)
		next += uint64((t.bytes + b.align - 1) / b.align * b.align)
		data = append(data, make([]byte, int(next)-len(data))...)
	}
	out = append(out, make([]byte, (b.align-len(out)%b.align)%b.align)...)
	return append(out, data...)
}

func (b *builder) open() (*File, error) {
	image := b.image()
	return read("test.gguf", bytes.NewReader(image), int64(len(image)))
}

// sample is a sound one-layer llama: d=8, H=2, KV=1, hd=4, F=16, V=4.
func sample() *builder {
	b := &builder{version: 3, values: map[string]any{}, align: 32}
	b.set("general.architecture", "llama")
	b.set("llama.block_count", uint32(1))
	b.set("llama.context_length", uint32(64))
	b.set("llama.embedding_length", uint32(8))
	b.set("llama.feed_forward_length", uint32(16))
	b.set("llama.attention.head_count", uint32(2))
	b.set("llama.attention.head_count_kv", uint32(1))
	b.set("llama.attention.layer_norm_rms_epsilon", float32(1e-5))
	b.set("tokenizer.ggml.model", "gpt2")
	b.set("tokenizer.ggml.pre", "smollm")
	b.set("tokenizer.ggml.tokens", []string{"a", "<end>", "b", "ab"})
	b.set("tokenizer.ggml.token_type", []int32{1, 3, 1, 1})
	b.set("tokenizer.ggml.merges", []string{"a b"})
	b.set("tokenizer.ggml.bos_token_id", uint32(1))
	b.set("tokenizer.ggml.eos_token_id", uint32(1))
	b.f32("token_embd.weight", 8, 4)
	b.f32("blk.0.attn_norm.weight", 8)
	b.f32("blk.0.attn_q.weight", 8, 8)
	b.f32("blk.0.attn_k.weight", 8, 4)
	b.f32("blk.0.attn_v.weight", 8, 4)
	b.f32("blk.0.attn_output.weight", 8, 8)
	b.f32("blk.0.ffn_norm.weight", 8)
	b.f32("blk.0.ffn_gate.weight", 8, 16)
	b.f32("blk.0.ffn_up.weight", 8, 16)
	b.f32("blk.0.ffn_down.weight", 16, 8)
	b.f32("output_norm.weight", 8)
	return b
}

// TestSampleOpens: what the refusals below change is sound to begin with.
func TestSampleOpens(t *testing.T) {
	for _, version := range []uint32{2, 3} {
		b := sample()
		b.version = version
		f, err := b.open()
		if err != nil {
			t.Fatal(err)
		}
		if c := f.Config(); c.HeadDim != 4 || !c.Tied || c.RopeTheta != 10000 || c.NormEps != 1e-5 {
			t.Errorf("config %+v", c)
		}
		if _, err := f.Carried(); err != nil {
			t.Error(err)
		}
	}
	b := sample()
	b.align = 64
	b.set("general.alignment", uint32(64))
	if _, err := b.open(); err != nil {
		t.Error(err)
	}
}

func ptr[T any](v T) *T { return &v }

// TestRefusals: each bad header is a fault of the right kind that names the thing.
func TestRefusals(t *testing.T) {
	le := binary.LittleEndian
	for _, c := range []struct {
		name  string
		bad   func(*builder)
		kind  fault.Kind
		names string
	}{
		{"version 1", func(b *builder) { b.version = 1 }, fault.Invalid, "version"},
		{"big-endian", func(b *builder) { b.version = 3 << 24 }, fault.Invalid, "big-endian"},
		{"tensor count over the limit", func(b *builder) { b.counts = &[2]uint64{1 << 60, 1} }, fault.TooLarge, "tensor count"},
		{"tensor count over the file", func(b *builder) { b.counts = &[2]uint64{60000, 1} }, fault.Malformed, "tensor count"},
		{"key count over the limit", func(b *builder) { b.counts = &[2]uint64{1, 1 << 40} }, fault.TooLarge, "key count"},
		{"key count over the file", func(b *builder) { b.counts = &[2]uint64{1, 60000} }, fault.Malformed, "key count"},
		{"string over the limit", func(b *builder) { b.set("x", raw{typeString, le.AppendUint64(nil, 1<<62)}) }, fault.TooLarge, `"x"`},
		{"string over the file", func(b *builder) { b.set("x", raw{typeString, le.AppendUint64(nil, 1<<19)}) }, fault.Malformed, `"x"`},
		{"array over the limit", func(b *builder) {
			b.set("x", raw{typeArray, le.AppendUint64(le.AppendUint32(nil, typeUint8), 1<<50)})
		}, fault.TooLarge, `"x"`},
		{"array over the file", func(b *builder) {
			b.set("x", raw{typeArray, le.AppendUint64(le.AppendUint32(nil, typeFloat64), 1<<20)})
		}, fault.Malformed, `"x"`},
		{"nested array", func(b *builder) { b.set("x", raw{typeArray, le.AppendUint64(le.AppendUint32(nil, typeArray), 1)}) }, fault.Invalid, `"x"`},
		{"unknown value type", func(b *builder) { b.set("x", raw{99, nil}) }, fault.Malformed, "value type 99"},
		{"bool of 7", func(b *builder) { b.set("x", raw{typeBool, []byte{7}}) }, fault.Malformed, "bool 7"},
		{"uint64 over int64", func(b *builder) { b.set("x", uint64(1<<63)) }, fault.TooLarge, `"x"`},
		{"key twice", func(b *builder) { b.keys = append(b.keys, "llama.block_count") }, fault.Malformed, "llama.block_count"},
		{"alignment 3", func(b *builder) { b.set("general.alignment", uint32(3)) }, fault.Malformed, "general.alignment"},
		{"alignment a string", func(b *builder) { b.set("general.alignment", "32") }, fault.Malformed, "general.alignment"},

		{"tensor twice", func(b *builder) { b.tensors = append(b.tensors, b.tensors[0]) }, fault.Malformed, "token_embd.weight"},
		{"no dimensions", func(b *builder) { b.tensor("output_norm.weight").dims = nil }, fault.Malformed, "output_norm.weight"},
		{"five dimensions", func(b *builder) { b.tensor("output_norm.weight").dims = []uint64{8, 1, 1, 1, 1} }, fault.Malformed, "5 dimensions"},
		{"dimension 0", func(b *builder) { b.tensor("output_norm.weight").dims = []uint64{0} }, fault.Malformed, "output_norm.weight"},
		{"dimension 2^63", func(b *builder) { b.tensor("output_norm.weight").dims = []uint64{1 << 63} }, fault.Malformed, "output_norm.weight"},
		{"dimensions overflow", func(b *builder) { b.tensor("output_norm.weight").dims = []uint64{1 << 32, 1 << 32} }, fault.TooLarge, "output_norm.weight"},
		{"type Q6_K", func(b *builder) { b.tensor("output_norm.weight").kind = 14 }, fault.Invalid, "Q6_K"},
		{"row that is no block", func(b *builder) { b.tensor("output_norm.weight").kind = 8 }, fault.Malformed, "Q8_0"},
		{"offset off alignment", func(b *builder) { b.tensor("output_norm.weight").offset = ptr(uint64(8)) }, fault.Malformed, "output_norm.weight"},
		{"offset past the end", func(b *builder) { b.tensor("output_norm.weight").offset = ptr(uint64(1 << 20)) }, fault.Malformed, "output_norm.weight"},
		{"offset 2^64-32", func(b *builder) { b.tensor("output_norm.weight").offset = ptr(uint64(math.MaxUint64 - 31)) }, fault.Malformed, "output_norm.weight"},
		{"data past the end", func(b *builder) { b.tensor("output_norm.weight").bytes = 0 }, fault.Malformed, "output_norm.weight"},

		{"no architecture", func(b *builder) { b.unset("general.architecture") }, fault.Invalid, "general.architecture"},
		{"architecture gemma", func(b *builder) { b.set("general.architecture", "gemma") }, fault.Invalid, "gemma"},
		{"no head count", func(b *builder) { b.unset("llama.attention.head_count") }, fault.Malformed, "llama.attention.head_count"},
		{"head counts per layer", func(b *builder) { b.set("llama.attention.head_count", []int32{2}) }, fault.Malformed, "llama.attention.head_count"},
		{"kv heads that do not divide", func(b *builder) { b.set("llama.attention.head_count_kv", uint32(3)) }, fault.Malformed, "head_count_kv"},
		{"heads that do not divide", func(b *builder) { b.set("llama.attention.head_count", uint32(3)) }, fault.Malformed, "head_count"},
		{"layers 2^31", func(b *builder) { b.set("llama.block_count", uint32(1<<31)) }, fault.Malformed, "llama.block_count"},
		{"more layers than tensors", func(b *builder) { b.set("llama.block_count", uint32(4000)) }, fault.Malformed, "llama.block_count"},
		{"a missing layer", func(b *builder) { b.set("llama.block_count", uint32(2)) }, fault.Malformed, "blk.1."},
		{"eps 0", func(b *builder) { b.set("llama.attention.layer_norm_rms_epsilon", float32(0)) }, fault.Malformed, "epsilon"},
		{"eps NaN", func(b *builder) { b.set("llama.attention.layer_norm_rms_epsilon", float32(math.NaN())) }, fault.Malformed, "epsilon"},
		{"partial rotary", func(b *builder) { b.set("llama.rope.dimension_count", uint32(2)) }, fault.Invalid, "rope.dimension_count"},
		{"rope scaling", func(b *builder) { b.set("llama.rope.scaling.type", "yarn") }, fault.Invalid, "yarn"},
		{"rope frequencies", func(b *builder) { b.f32("rope_freqs.weight", 2) }, fault.Invalid, "rope_freqs.weight"},
		{"eos outside the vocabulary", func(b *builder) { b.set("tokenizer.ggml.eos_token_id", uint32(4)) }, fault.Malformed, "eos_token_id"},
		{"no embedding", func(b *builder) { b.drop("token_embd.weight") }, fault.Malformed, "token_embd.weight"},
		{"no norm", func(b *builder) { b.drop("output_norm.weight") }, fault.Malformed, "output_norm.weight"},
		{"wrong shape", func(b *builder) { b.tensor("blk.0.attn_k.weight").dims = []uint64{4, 8} }, fault.Malformed, "blk.0.attn_k.weight"},
		{"bias in a llama", func(b *builder) { b.f32("blk.0.attn_q.bias", 8) }, fault.Invalid, "blk.0.attn_q.bias"},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := sample()
			c.bad(b)
			_, err := b.open()
			if err == nil {
				t.Fatal("accepted")
			}
			for _, want := range []string{c.names, "test.gguf"} {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%q does not name %s", err, want)
				}
			}
			if got := fault.KindOf(err); got != c.kind {
				t.Errorf("%v: kind %v, expected %v", err, got, c.kind)
			}
		})
	}
}

func TestTokenizerRefusals(t *testing.T) {
	for _, c := range []struct {
		name  string
		bad   func(*builder)
		kind  fault.Kind
		names string
	}{
		{"sentencepiece", func(b *builder) { b.set("tokenizer.ggml.model", "llama") }, fault.Invalid, "tokenizer.ggml.model"},
		{"unknown pre", func(b *builder) { b.set("tokenizer.ggml.pre", "tekken") }, fault.Invalid, "tekken"},
		{"no tokens", func(b *builder) { b.unset("tokenizer.ggml.tokens") }, fault.Malformed, "tokenizer.ggml.tokens"},
		{"more tokens than rows", func(b *builder) { b.set("tokenizer.ggml.tokens", []string{"a", "<end>", "b", "ab", "x"}) }, fault.Malformed, "tokenizer.ggml.tokens"},
		{"token twice", func(b *builder) { b.set("tokenizer.ggml.tokens", []string{"a", "<end>", "b", "a"}) }, fault.Malformed, "element 3"},
		{"token not UTF-8", func(b *builder) { b.set("tokenizer.ggml.tokens", []string{"a", "<end>", "b", "\xff"}) }, fault.Malformed, "element 3"},
		{"tokens of numbers", func(b *builder) { b.set("tokenizer.ggml.tokens", []int32{1}) }, fault.Malformed, "tokenizer.ggml.tokens"},
		{"types too few", func(b *builder) { b.set("tokenizer.ggml.token_type", []int32{1}) }, fault.Malformed, "token_type"},
		{"no merges", func(b *builder) { b.unset("tokenizer.ggml.merges") }, fault.Malformed, "tokenizer.ggml.merges"},
		{"merge of strangers", func(b *builder) { b.set("tokenizer.ggml.merges", []string{"a b", "a c"}) }, fault.Malformed, "element 1"},
		{"merge into a stranger", func(b *builder) { b.set("tokenizer.ggml.merges", []string{"b a"}) }, fault.Malformed, "element 0"},
		{"merge without a space", func(b *builder) { b.set("tokenizer.ggml.merges", []string{"ab"}) }, fault.Malformed, "element 0"},
		{"pad outside", func(b *builder) { b.set("tokenizer.ggml.padding_token_id", uint32(9)) }, fault.Malformed, "padding_token_id"},
		{"beginning wanted, none given", func(b *builder) {
			b.unset("tokenizer.ggml.bos_token_id")
			b.set("tokenizer.ggml.add_bos_token", raw{typeBool, []byte{1}})
		}, fault.Malformed, "bos_token_id"},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := sample()
			c.bad(b)
			f, err := b.open()
			if err != nil {
				t.Fatal(err)
			}
			_, err = f.Carried()
			if fault.KindOf(err) != c.kind || err == nil || !strings.Contains(err.Error(), c.names) {
				t.Errorf("got %v (kind %v), expected %v naming %s", err, fault.KindOf(err), c.kind, c.names)
			}
		})
	}
}

// TestEveryTruncation: no prefix of a sound header opens, none panics.
func TestEveryTruncation(t *testing.T) {
	image := sample().image()
	for n := range len(image) - 31 { // the last tensor fills the last 32 bytes
		if _, err := read("cut.gguf", bytes.NewReader(image[:n]), int64(n)); err == nil {
			t.Fatalf("opened %d of %d bytes", n, len(image))
		}
	}
}

// TestAllocationIsBounded: headers that promise much are refused before memory is taken.
func TestAllocationIsBounded(t *testing.T) {
	le := binary.LittleEndian
	for _, kind := range []uint32{typeUint8, typeString, typeFloat64} {
		b := sample()
		b.set("x", raw{typeArray, le.AppendUint64(le.AppendUint32(nil, kind), maxElements)})
		image := b.image()
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		if _, err := read("big.gguf", bytes.NewReader(image), int64(len(image))); err == nil {
			t.Fatal("accepted")
		}
		runtime.ReadMemStats(&after)
		// The reader's own buffers and the sound part take well under 1 MiB.
		if took := after.TotalAlloc - before.TotalAlloc; took > 1<<20 {
			t.Errorf("array of type %d: %d bytes allocated for an image of %d", kind, took, len(image))
		}
	}
}

// FuzzRead opens arbitrary images and reads everything they hold.
func FuzzRead(f *testing.F) {
	f.Add(sample().image())
	b := sample()
	b.version = 2
	b.set("tokenizer.ggml.pre", "qwen2")
	f.Add(b.image())
	f.Fuzz(func(t *testing.T, image []byte) {
		g, err := read("fuzz.gguf", bytes.NewReader(image), int64(len(image)))
		if err != nil {
			if k := fault.KindOf(err); k != fault.Malformed && k != fault.Invalid && k != fault.TooLarge {
				t.Fatalf("kind %v: %v", k, err)
			}
			return
		}
		for _, name := range g.Names() {
			shape, _ := g.Shape(name)
			if err := g.Read(name, tensor.New(tensor.WithShape(shape...), tensor.Of(tensor.Float32))); err != nil {
				t.Fatalf("%s passed the header's checks and cannot be read: %v", name, err)
			}
		}
		g.Carried()
	})
}

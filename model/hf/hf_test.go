package hf_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"gorgonia.org/tensor"

	"trainerd/internal/fault"
	"trainerd/kernels/cpu"
	"trainerd/model"
	"trainerd/model/hf"
)

func configs() map[string]model.Config {
	base := model.Config{Vocab: 31, Hidden: 16, FFN: 24, Layers: 2, Heads: 4, KVHeads: 2, HeadDim: 4, MaxPositions: 64,
		RopeTheta: 10000, NormEps: 1e-6, InitStd: 0.02, BOS: 1, EOS: []int32{2}}
	llama, qwen2, qwen3 := base, base, base
	llama.Type, llama.Tied = "llama", true
	qwen2.Type, qwen2.QKVBias, qwen2.EOS = "qwen2", true, []int32{2, 5}
	qwen3.Type, qwen3.QKNorm, qwen3.HeadDim, qwen3.BOS = "qwen3", true, 8, -1
	return map[string]model.Config{"llama": llama, "qwen2": qwen2, "qwen3": qwen3}
}

func source(t *testing.T, cfg model.Config) model.Source {
	t.Helper()
	src, err := model.NewRandom(cfg, 1)
	if err != nil {
		t.Fatal(err)
	}
	return src
}

func read(t *testing.T, src model.Source, name string) []float32 {
	t.Helper()
	shape, ok := src.Shape(name)
	if !ok {
		t.Fatalf("no tensor %s", name)
	}
	dst := tensor.New(tensor.WithShape(shape...), tensor.Of(tensor.Float32))
	if err := src.Read(name, dst); err != nil {
		t.Fatal(err)
	}
	return dst.Float32s()
}

func write(t *testing.T, dir string, src model.Source, o hf.WriteOptions) {
	t.Helper()
	if err := hf.Write(context.Background(), hf.DirSink(dir), "", src, o); err != nil {
		t.Fatal(err)
	}
}

func open(t *testing.T, dir string) *hf.Dir {
	t.Helper()
	d, err := hf.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// files returns a directory's files by name.
func files(t *testing.T, dir string) map[string][]byte {
	t.Helper()
	out := map[string][]byte{}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if out[e.Name()], err = os.ReadFile(filepath.Join(dir, e.Name())); err != nil {
			t.Fatal(err)
		}
	}
	return out
}

// TestRoundTrip writes a model, opens it, loads it on a device, exports it and
// writes it again: F32 is bitwise the source, every type is bitwise itself, in
// one file and in shards.
func TestRoundTrip(t *testing.T) {
	dev, err := cpu.New(1)
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	for name, cfg := range configs() {
		for _, dtype := range []string{"F32", "BF16", "F16"} {
			for _, shard := range []int64{0, 3000} {
				t.Run(fmt.Sprintf("%s/%s/%d", name, dtype, shard), func(t *testing.T) {
					src := source(t, cfg)
					first, second := t.TempDir(), t.TempDir()
					carried := map[string][]byte{"tokenizer.json": []byte("{}"), "generation_config.json": []byte(`{"eos_token_id": [2]}`)}
					write(t, first, src, hf.WriteOptions{DType: dtype, ShardBytes: shard, Carried: carried})
					d := open(t, first)
					if diff := cmp.Diff(cfg, d.Config()); diff != "" {
						t.Errorf("config (-want +got)\n%s", diff)
					}
					if d.DType() != dtype {
						t.Errorf("dtype %s", d.DType())
					}
					for _, n := range src.Names() {
						want, got := read(t, src, n), read(t, d, n)
						for i := range want {
							// Half an ulp: 2^-9 of a bfloat16, 2^-12 of a half or 2^-25 where it is subnormal.
							limit := map[string]float64{"F32": 0, "BF16": math.Abs(float64(want[i])) / 256, "F16": math.Abs(float64(want[i]))/2048 + 0x1p-25}[dtype]
							if math.Abs(float64(got[i]-want[i])) > limit {
								t.Fatalf("%s[%d] is %v, expected %v", n, i, got[i], want[i])
							}
						}
					}
					m, err := model.Load(context.Background(), dev, d, model.Options{MaxTokens: 4})
					if err != nil {
						t.Fatal(err)
					}
					defer m.Close()
					copied, err := d.Carried()
					if err != nil {
						t.Fatal(err)
					}
					write(t, second, m.Export(), hf.WriteOptions{DType: "source", ShardBytes: shard, Carried: copied, ConfigJSON: d.ConfigJSON()})
					a, b := files(t, first), files(t, second)
					if (shard == 0) != (a["model.safetensors"] != nil) || (shard > 0) != (a["model.safetensors.index.json"] != nil) || len(a) != len(b) {
						t.Errorf("wrote %d and %d files", len(a), len(b))
					}
					for n := range a {
						if !bytes.Equal(a[n], b[n]) {
							t.Errorf("%s differs after a round trip", n)
						}
					}
				})
			}
		}
	}
}

// TestShardsAndIndex: shards keep to their size, and the index tells all.
func TestShardsAndIndex(t *testing.T) {
	dir := t.TempDir()
	src := source(t, configs()["qwen3"])
	const limit = 4000
	write(t, dir, src, hf.WriteOptions{ShardBytes: limit})
	all := files(t, dir)
	var index struct {
		Metadata struct {
			Total int64 `json:"total_size"`
		}
		WeightMap map[string]string `json:"weight_map"`
	}
	if err := json.Unmarshal(all["model.safetensors.index.json"], &index); err != nil {
		t.Fatal(err)
	}
	if len(index.WeightMap) != len(src.Names()) || index.Metadata.Total != 4*src.Config().Parameters() {
		t.Errorf("index of %d tensors and %d bytes, expected %d and %d", len(index.WeightMap), index.Metadata.Total, len(src.Names()), 4*src.Config().Parameters())
	}
	shards := 0
	for name, data := range all {
		if !strings.HasSuffix(name, ".safetensors") {
			continue
		}
		shards++
		header := int(data[0]) | int(data[1])<<8
		if len(data)-8-header > limit || header%8 != 0 {
			t.Errorf("%s: %d data bytes after a header of %d", name, len(data)-8-header, header)
		}
		if !strings.HasPrefix(string(data[8:]), `{"__metadata__":{"format":"pt"}`) {
			t.Errorf("%s starts with %q", name, data[8:48])
		}
	}
	if shards < 3 || all[fmt.Sprintf("model-%05d-of-%05d.safetensors", shards, shards)] == nil {
		t.Errorf("%d shards", shards)
	}
}

// tiedWithHead is a file that carries the head of a tied model, as some do.
type tiedWithHead struct{ model.Source }

func (s tiedWithHead) Names() []string { return append(s.Source.Names(), "lm_head.weight") }
func (s tiedWithHead) Shape(name string) ([]int, bool) {
	if name == "lm_head.weight" {
		name = "model.embed_tokens.weight"
	}
	return s.Source.Shape(name)
}

func TestWriteDropsTiedHead(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, tiedWithHead{source(t, configs()["llama"])}, hf.WriteOptions{})
	if _, ok := open(t, dir).Shape("lm_head.weight"); ok {
		t.Error("a tied model was written with a head of its own")
	}
}

// scaled makes one tensor's values large.
type scaled struct {
	model.Source
	tensor string
	value  float32
}

func (s scaled) Read(name string, dst *tensor.Dense) error {
	err := s.Source.Read(name, dst)
	if name == s.tensor {
		dst.Float32s()[3] = s.value
	}
	return err
}

type lacking struct {
	model.Source
	tensor string
}

func (s lacking) Shape(name string) ([]int, bool) {
	if name == s.tensor {
		return nil, false
	}
	return s.Source.Shape(name)
}

func TestWriteRefuses(t *testing.T) {
	cfg := configs()["qwen2"]
	src := source(t, cfg)
	sink := func(context.Context, string, func(io.Writer) error) error { return nil }
	for name, c := range map[string]struct {
		src  model.Source
		o    hf.WriteOptions
		text string
	}{
		"dtype":        {src, hf.WriteOptions{DType: "Q8_0"}, "dtype"},
		"weights file": {src, hf.WriteOptions{Carried: map[string][]byte{"model.safetensors": nil}}, "model.safetensors"},
		"path":         {src, hf.WriteOptions{Carried: map[string][]byte{"../x": nil}}, "../x"},
		"other config": {src, hf.WriteOptions{ConfigJSON: []byte(`{"model_type":"qwen2","vocab_size":31,"hidden_size":16,"intermediate_size":24,"num_hidden_layers":3,"num_attention_heads":4}`)}, "another model"},
		"missing":      {lacking{src, "model.norm.weight"}, hf.WriteOptions{}, "model.norm.weight"},
	} {
		if err := hf.Write(context.Background(), sink, "", c.src, c.o); fault.KindOf(err) != fault.Invalid || err == nil || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v, expected an invalid fault that names %s", name, err, c.text)
		}
	}
	const big = "model.layers.0.mlp.up_proj.weight"
	if err := hf.Write(context.Background(), hf.DirSink(t.TempDir()), "", scaled{src, big, 1e6}, hf.WriteOptions{DType: "F16"}); fault.KindOf(err) != fault.Invalid || err == nil || !strings.Contains(err.Error(), big) {
		t.Errorf("overflow: %v, expected an invalid fault that names %s", err, big)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := hf.Write(ctx, hf.DirSink(t.TempDir()), "", src, hf.WriteOptions{}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	full := errors.New("store full")
	failing := func(context.Context, string, func(io.Writer) error) error { return full }
	if err := hf.Write(context.Background(), failing, "", src, hf.WriteOptions{}); !errors.Is(err, full) {
		t.Errorf("failing sink: %v", err)
	}
}

// TestDirSink: a file appears whole or not at all, and never outside.
func TestDirSink(t *testing.T) {
	dir := t.TempDir()
	sink := hf.DirSink(dir)
	ctx := context.Background()
	put := func(text string, fail error) error {
		return sink(ctx, "sub/name", func(w io.Writer) error {
			if _, err := io.WriteString(w, text); err != nil {
				return err
			}
			return fail
		})
	}
	if err := put("one", nil); err != nil {
		t.Fatal(err)
	}
	stop := errors.New("stop")
	if err := put("two", stop); !errors.Is(err, stop) {
		t.Errorf("%v, expected the writer's error", err)
	}
	if got := files(t, filepath.Join(dir, "sub")); len(got) != 1 || string(got["name"]) != "one" {
		t.Errorf("after a failed write there is %q", got)
	}
	if err := put("three", nil); err != nil || string(files(t, filepath.Join(dir, "sub"))["name"]) != "three" {
		t.Errorf("replacing: %v", err)
	}
	for _, name := range []string{"../x", "/x", ""} {
		if err := sink(ctx, name, func(io.Writer) error { return nil }); err == nil {
			t.Errorf("%q was written", name)
		}
	}
}

func TestOpenRefuses(t *testing.T) {
	cfg := configs()["llama"]
	for name, c := range map[string]struct {
		damage func(dir string) error
		file   string
	}{
		"no config":     {func(d string) error { return os.Remove(filepath.Join(d, "config.json")) }, "config.json"},
		"broken config": {func(d string) error { return os.WriteFile(filepath.Join(d, "config.json"), []byte("{"), 0o600) }, "config.json"},
		"no weights":    {func(d string) error { return os.Remove(filepath.Join(d, "model.safetensors")) }, "model.safetensors"},
		"short weights": {func(d string) error { return os.Truncate(filepath.Join(d, "model.safetensors"), 2000) }, "model.safetensors"},
		"generation": {func(d string) error {
			return os.WriteFile(filepath.Join(d, "generation_config.json"), []byte("{"), 0o600)
		}, "generation_config.json"},
		"oversized config": {func(d string) error { return os.Truncate(filepath.Join(d, "config.json"), 5<<20) }, "config.json"},
	} {
		dir := t.TempDir()
		write(t, dir, source(t, cfg), hf.WriteOptions{})
		if err := c.damage(dir); err != nil {
			t.Fatal(err)
		}
		if _, err := hf.Open(dir); err == nil || fault.KindOf(err) == fault.Internal || !strings.Contains(err.Error(), c.file) {
			t.Errorf("%s: %v, expected a fault that names %s", name, err, c.file)
		}
	}
}

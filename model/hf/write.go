package hf

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"

	"gorgonia.org/tensor"

	"trainerd/internal/fault"
	"trainerd/model"
)

// Sink takes one file at a time (storage.Writer.File, or DirSink).
type Sink func(ctx context.Context, name string, write func(io.Writer) error) error

// WriteOptions say how a directory is written.
type WriteOptions struct {
	DType      string            // "F32", "F16", "BF16"; "" or "source": as the source says
	ShardBytes int64             // 0: about 2 GB
	Carried    map[string][]byte // other files
	ConfigJSON []byte            // the original config.json, kept but for torch_dtype; nil: made from Config
}

const defaultShardBytes = 2_000_000_000

// item is a tensor of a file to be written.
type item struct {
	name  string
	shape []int
	bytes int64
}

// Write streams a model as a Hugging Face directory, names prefixed with prefix
// ("hf/"). It holds one tensor in memory at a time, and nothing of a Capture in
// the same dtype, whose memory the sink gets as it is. Config and carried files
// come first, the index last.
func Write(ctx context.Context, sink Sink, prefix string, src model.Source, o WriteOptions) error {
	cfg := src.Config()
	if err := cfg.Validate(); err != nil {
		return err
	}
	dtype := o.DType
	if dtype == "" || dtype == "source" {
		dtype = src.DType()
	}
	if torchDType[dtype] == "" {
		return fault.BadField("dtype", dtype, "source, F32, F16 or BF16")
	}
	config, err := writtenConfig(cfg, o.ConfigJSON, dtype)
	if err != nil {
		return err
	}
	if err := model.CheckTensors(src); err != nil {
		return err
	}
	shards := split(src, dtype, o.ShardBytes)
	files := map[string][]byte{configName: config}
	for name, data := range o.Carried {
		if name == configName || name == "" || strings.ContainsAny(name, `/\`) || strings.Contains(name, ".safetensors") {
			return fault.BadField("carried file", name, "a plain name that is neither config nor weights")
		}
		files[name] = data
	}
	names := make([]string, 0, len(files))
	for name := range files {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		if err := writeFile(ctx, sink, prefix+name, files[name]); err != nil {
			return err
		}
	}
	index := map[string]string{}
	total := int64(0)
	for i, items := range shards {
		name := singleName
		if len(shards) > 1 {
			name = fmt.Sprintf("model-%05d-of-%05d.safetensors", i+1, len(shards))
		}
		for _, it := range items {
			index[it.name] = name
			total += it.bytes
		}
		err := sink(ctx, prefix+name, func(w io.Writer) error { return writeSafetensors(ctx, w, src, items, dtype) })
		if err != nil {
			return fmt.Errorf("write %s: %w", prefix+name, err)
		}
	}
	if len(shards) == 1 {
		return nil
	}
	data, err := json.MarshalIndent(map[string]any{"metadata": map[string]any{"total_size": total}, "weight_map": index}, "", "  ")
	if err != nil {
		return fmt.Errorf("write %s: %w", indexName, err)
	}
	return writeFile(ctx, sink, prefix+indexName, append(data, '\n'))
}

func writeFile(ctx context.Context, sink Sink, name string, data []byte) error {
	err := sink(ctx, name, func(w io.Writer) error {
		_, err := w.Write(data)
		return err
	})
	if err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	return nil
}

// writtenConfig returns the config.json of a copy. An original must describe
// the same architecture as the source.
func writtenConfig(cfg model.Config, original []byte, dtype string) ([]byte, error) {
	if original == nil {
		return makeConfig(cfg, dtype)
	}
	old, err := ParseConfig(configName, original)
	if err != nil {
		return nil, err
	}
	// End tokens and the like may have come from elsewhere; shapes and arithmetic may not.
	plain := func(c model.Config) string {
		c.BOS, c.EOS, c.InitStd, c.MaxPositions = 0, nil, 0, 0
		return fmt.Sprintf("%+v", c)
	}
	if a, b := plain(old), plain(cfg); a != b {
		return nil, fault.New(fault.Invalid, "config_mismatch", "config.json describes another model: %s, expected %s", a, b)
	}
	return retypeConfig(original, dtype)
}

// split lists the tensors that the config needs, in canonical order, cut into files.
func split(src model.Source, dtype string, limit int64) [][]item {
	if limit <= 0 {
		limit = defaultShardBytes
	}
	var shards [][]item
	size := int64(0)
	for _, name := range src.Config().Names() {
		shape, _ := src.Shape(name)
		it := item{name: name, shape: shape, bytes: itemSize[dtype]}
		for _, d := range shape {
			it.bytes *= int64(d)
		}
		if len(shards) == 0 || size+it.bytes > limit {
			shards, size = append(shards, nil), 0
		}
		shards[len(shards)-1] = append(shards[len(shards)-1], it)
		size += it.bytes
	}
	return shards
}

// header returns the length-prefixed header of a file that holds items one
// after the other, padded so that the data starts at a multiple of 8 bytes.
func header(items []item, dtype string) ([]byte, error) {
	o := object{{"__metadata__", json.RawMessage(`{"format":"pt"}`)}}
	at := int64(0)
	for _, it := range items {
		v, err := json.Marshal(struct {
			DType   string   `json:"dtype"`
			Shape   []int    `json:"shape"`
			Offsets [2]int64 `json:"data_offsets"`
		}{dtype, it.shape, [2]int64{at, at + it.bytes}})
		if err != nil {
			return nil, err
		}
		o = append(o, member{it.name, v})
		at += it.bytes
	}
	text, err := o.compact()
	if err != nil {
		return nil, err
	}
	for len(text)%8 != 0 {
		text = append(text, ' ')
	}
	return append(binary.LittleEndian.AppendUint64(nil, uint64(len(text))), text...), nil
}

// writeSafetensors streams one file. It may run again on a sink that retries.
func writeSafetensors(ctx context.Context, w io.Writer, src model.Source, items []item, dtype string) error {
	head, err := header(items, dtype)
	if err != nil {
		return err
	}
	if c, ok := src.(*Capture); ok && c.dtype == dtype {
		if data, ok := c.stored(items); ok {
			if _, err := w.Write(head); err != nil {
				return err
			}
			_, err := w.Write(data)
			return err
		}
	}
	out := bufio.NewWriterSize(w, readBytes)
	if _, err := out.Write(head); err != nil {
		return err
	}
	buf := make([]byte, 0, readBytes)
	for _, it := range items {
		if err := ctx.Err(); err != nil {
			return err
		}
		values, err := valuesOf(src, it)
		if err != nil {
			return err
		}
		for len(values) > 0 {
			n := min(len(values), readBytes/4)
			data, overflow := encode(buf, values[:n], dtype)
			if overflow >= 0 {
				return fault.New(fault.Invalid, "dtype_overflow", "tensor %q holds %v, which does not fit in %s", it.name, values[overflow], dtype)
			}
			if _, err := out.Write(data); err != nil {
				return err
			}
			values = values[n:]
		}
	}
	return out.Flush()
}

// valuesOf is a tensor as float32: a capture's own, which is read only, or a copy.
func valuesOf(src model.Source, it item) ([]float32, error) {
	if c, ok := src.(*Capture); ok && c.dtype == "F32" {
		t := c.index[it.name]
		return c.mem.Floats[t.from : t.from+t.n], nil
	}
	host := tensor.New(tensor.WithShape(it.shape...), tensor.Of(tensor.Float32))
	if err := src.Read(it.name, host); err != nil {
		return nil, err
	}
	return host.Float32s(), nil
}

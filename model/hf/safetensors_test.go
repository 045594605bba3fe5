package hf

import (
	"bytes"
	"encoding/binary"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"gorgonia.org/tensor"

	"trainerd/internal/fault"
)

// rawFile is a safetensors file with the given header text and data bytes.
func rawFile(header string, data []byte) []byte {
	return append(append(binary.LittleEndian.AppendUint64(nil, uint64(len(header))), header...), data...)
}

// TestFormat pins the byte layout by a file written out by hand.
func TestFormat(t *testing.T) {
	data := []byte{0, 0, 0x80, 0x3f, 0, 0, 0, 0xc0, 0x80, 0x3f, 0, 0xc0, 0, 0x3c, 0, 0xc0} // 1, -2 thrice
	file := rawFile(`{"__metadata__":{"format":"pt"},"h":{"dtype":"F16","shape":[1,2],"data_offsets":[12,16]},`+
		`"a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},"b":{"dtype":"BF16","shape":[2],"data_offsets":[8,12]}} `, data)
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, singleName), file, 0o600); err != nil {
		t.Fatal(err)
	}
	w, err := openWeights(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if diff := cmp.Diff([]string{"a", "b", "h"}, w.Names()); diff != "" {
		t.Errorf("names in stored order: %s", diff)
	}
	for name, shape := range map[string][]int{"a": {2, 1}, "b": {2}, "h": {1, 2}} {
		got, ok := w.Shape(name)
		if diff := cmp.Diff(shape, got); diff != "" || !ok {
			t.Errorf("%s: shape %s", name, diff)
		}
		dst := tensor.New(tensor.WithShape(shape...), tensor.Of(tensor.Float32))
		if err := w.Read(name, dst); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff([]float32{1, -2}, dst.Float32s()); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
	}
	if w.DType() != "F32" {
		t.Errorf("dtype %s, expected F32", w.DType())
	}
	for name, dst := range map[string]*tensor.Dense{
		"a":    tensor.New(tensor.WithShape(2), tensor.Of(tensor.Float32)),
		"b":    tensor.New(tensor.WithShape(2), tensor.Of(tensor.Int32)),
		"none": tensor.New(tensor.WithShape(2), tensor.Of(tensor.Float32)),
	} {
		if err := w.Read(name, dst); fault.KindOf(err) != fault.Invalid || !strings.Contains(err.Error(), name) {
			t.Errorf("%s into %v of %v: %v", name, dst.Shape(), dst.Dtype(), err)
		}
	}
	if err := os.Truncate(filepath.Join(dir, singleName), int64(len(file)-3)); err != nil {
		t.Fatal(err)
	}
	if err := w.Read("h", tensor.New(tensor.WithShape(1, 2), tensor.Of(tensor.Float32))); fault.KindOf(err) != fault.Malformed || !strings.Contains(err.Error(), `"h"`) {
		t.Errorf("a file that became shorter: %v", err)
	}
}

// TestHeaderRefuses: each damage is a Malformed fault that names the file, and
// the tensor where there is one.
func TestHeaderRefuses(t *testing.T) {
	entry := func(dtype, shape, offsets string) string {
		return `{"x":{"dtype":"` + dtype + `","shape":` + shape + `,"data_offsets":` + offsets + `}}`
	}
	data := make([]byte, 16)
	huge := rawFile("{}", nil)
	binary.LittleEndian.PutUint64(huge, math.MaxUint64)
	for name, c := range map[string]struct {
		file []byte
		text string
	}{
		"empty":             {nil, "0 bytes"},
		"length cut":        {[]byte{1, 2, 3}, "3 bytes"},
		"header too long":   {huge, "header of"},
		"header cut":        {rawFile(entry("F32", "[4]", "[0,16]"), data)[:20], "header of"},
		"no JSON":           {rawFile("hello", data), "JSON object"},
		"a list":            {rawFile("[]", data), "JSON object"},
		"trailing text":     {rawFile(entry("F32", "[4]", "[0,16]")+"{}", data), "nothing after"},
		"unknown dtype":     {rawFile(entry("F12", "[4]", "[0,16]"), data), `"x": unknown dtype`},
		"negative size":     {rawFile(entry("F32", "[-4]", "[0,16]"), data), `"x": shape`},
		"overflowing shape": {rawFile(entry("F32", "[4294967296,4294967296]", "[0,16]"), data), `"x": shape`},
		"fractional size":   {rawFile(entry("F32", "[1.5]", "[0,16]"), data), `"x"`},
		"one offset":        {rawFile(entry("F32", "[4]", "[0]"), data), `"x": data_offsets`},
		"reversed offsets":  {rawFile(entry("F32", "[4]", "[16,0]"), data), `"x": data_offsets`},
		"beyond the file":   {rawFile(entry("F32", "[5]", "[0,20]"), data), `"x": data_offsets`},
		"shape and size":    {rawFile(entry("F32", "[3]", "[0,16]"), data), `"x": data_offsets`},
		"gap":               {rawFile(entry("F32", "[3]", "[4,16]"), data), "overlap or leave a gap"},
		"rest":              {rawFile(entry("F32", "[3]", "[0,12]"), data), "tensors end at"},
		"twice":             {rawFile(`{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"x":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}`, data), `"x" comes twice`},
		"overlap":           {rawFile(`{"x":{"dtype":"F32","shape":[3],"data_offsets":[0,12]},"y":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}`, data), `"y" starts at`},
		"metadata":          {rawFile(`{"__metadata__":{"a":1},"x":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}`, data), "__metadata__"},
	} {
		_, err := readHeader("some.safetensors", bytes.NewReader(c.file), int64(len(c.file)))
		if err == nil || fault.KindOf(err) != fault.Malformed || !strings.Contains(err.Error(), "some.safetensors") || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v, expected a malformed fault that says %q", name, err, c.text)
		}
	}
}

func TestIndexRefuses(t *testing.T) {
	for name, text := range map[string]string{
		"no JSON": "x", "no map": `{"metadata":{}}`, "a path": `{"weight_map":{"x":"../up.safetensors"}}`, "absolute": `{"weight_map":{"x":"/etc/a.safetensors"}}`,
		"other type": `{"weight_map":{"x":"model.bin"}}`, "number": `{"weight_map":{"x":1}}`, "twice": `{"weight_map":{"x":"a.safetensors","x":"b.safetensors"}}`,
		"two maps": `{"weight_map":{},"weight_map":{}}`, "a list": `{"weight_map":[]}`,
	} {
		if _, err := parseIndex("the.index", []byte(text)); fault.KindOf(err) != fault.Malformed || err == nil || !strings.Contains(err.Error(), "the.index") {
			t.Errorf("%s: %v, expected a malformed fault that names the file", name, err)
		}
	}
	dir := t.TempDir()
	write := func(name string, data []byte) {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := openWeights(dir); fault.KindOf(err) != fault.Invalid || err == nil || !strings.Contains(err.Error(), singleName) {
		t.Errorf("nothing there: %v", err)
	}
	write(indexName, []byte(`{"weight_map":{"x":"a.safetensors","y":"b.safetensors"}}`))
	write("a.safetensors", rawFile(`{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}`, make([]byte, 4)))
	if _, err := openWeights(dir); fault.KindOf(err) != fault.Invalid || err == nil || !strings.Contains(err.Error(), "b.safetensors") {
		t.Errorf("missing shard: %v", err)
	}
	write("b.safetensors", rawFile(`{"z":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}`, make([]byte, 4)))
	if _, err := openWeights(dir); fault.KindOf(err) != fault.Malformed || err == nil || !strings.Contains(err.Error(), `"y" is missing`) {
		t.Errorf("tensor in no shard: %v", err)
	}
	write("b.safetensors", rawFile(`{"y":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}`, make([]byte, 4)))
	w, err := openWeights(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if diff := cmp.Diff([]string{"x", "y"}, w.Names()); diff != "" {
		t.Error(diff)
	}
}

// FuzzHeader: whatever the bytes, readHeader returns a Malformed fault or
// entries that lie in the file and cover its data.
func FuzzHeader(f *testing.F) {
	f.Add([]byte(`{"x":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}`), make([]byte, 16))
	f.Add([]byte(`{"__metadata__":{"format":"pt"},"a":{"dtype":"BF16","shape":[],"data_offsets":[0,2]},"b":{"dtype":"F16","shape":[0,3],"data_offsets":[2,2]}} `), make([]byte, 2))
	f.Add([]byte(`{"x":{"dtype":"F32","shape":[9223372036854775807,2],"data_offsets":[0,9223372036854775807]}}`), []byte{})
	f.Add([]byte(`{}`), []byte("\xff\xff\xff\xff\xff\xff\xff\x7f{}")) // as a file of its own: a header longer than memory
	f.Fuzz(func(t *testing.T, header, data []byte) {
		if _, err := readHeader("f", bytes.NewReader(data), int64(len(data))); err != nil && fault.KindOf(err) != fault.Malformed {
			t.Fatalf("of the bytes alone: %v is no malformed fault", err)
		}
		file := rawFile(string(header), data)
		entries, err := readHeader("f", bytes.NewReader(file), int64(len(file)))
		if err != nil {
			if fault.KindOf(err) != fault.Malformed {
				t.Fatalf("%v is no malformed fault", err)
			}
			return
		}
		at := int64(8 + len(header))
		for _, e := range entries {
			size := itemSize[e.dtype]
			for _, d := range e.shape {
				size *= int64(d)
			}
			if e.from != at || e.to != at+size || e.to > int64(len(file)) {
				t.Fatalf("entry %+v in a file of %d bytes", e, len(file))
			}
			at = e.to
		}
		if at != int64(len(file)) {
			t.Fatalf("entries end at %d of %d", at, len(file))
		}
	})
}

// FuzzIndex: whatever the bytes, shards are plain file names.
func FuzzIndex(f *testing.F) {
	f.Add([]byte(`{"metadata":{"total_size":8},"weight_map":{"x":"a.safetensors","y":"b.safetensors"}}`))
	f.Add([]byte(`{"weight_map":{"x":"..\\a.safetensors"}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		shards, err := parseIndex("f", data)
		if err != nil {
			if fault.KindOf(err) != fault.Malformed {
				t.Fatalf("%v is no malformed fault", err)
			}
			return
		}
		for _, s := range shards {
			if filepath.Base(s.file) != s.file || !filepath.IsLocal(s.file) || len(s.tensors) == 0 {
				t.Fatalf("shard %q", s.file)
			}
		}
	})
}

package hf

import (
	"cmp"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"gorgonia.org/tensor"

	"trainerd/internal/fault"
	"trainerd/model"
)

// maxHeaderBytes bounds a safetensors header. A 70B model's is below 1 MB.
const maxHeaderBytes = 32 << 20

// itemSize are the element sizes of the safetensors types; this package reads the float ones.
var itemSize = map[string]int64{
	"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
	"U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}

// entry is one tensor of a file.
type entry struct {
	name     string
	dtype    string
	shape    []int
	from, to int64 // bytes of the file
}

// corrupt is the fault of a safetensors file that cannot be right.
func corrupt(file, format string, args ...any) error {
	return fault.New(fault.Malformed, "corrupt_safetensors", "%s: %w", file, fmt.Errorf(format, args...))
}

// readHeader reads and checks the header of a safetensors file of the given
// size: every tensor's bytes must fit its type and shape, and together they
// must cover the data exactly, without gap or overlap. Entries come in the
// order in which they are stored.
func readHeader(file string, r io.ReaderAt, size int64) ([]entry, error) {
	var prefix [8]byte
	if size < 8 {
		return nil, corrupt(file, "%d bytes, expected a safetensors header of at least 8", size)
	}
	if _, err := r.ReadAt(prefix[:], 0); err != nil {
		return nil, fmt.Errorf("read %s: %w", file, err)
	}
	length := binary.LittleEndian.Uint64(prefix[:])
	if length > maxHeaderBytes || int64(length) > size-8 {
		return nil, corrupt(file, "header of %d bytes, expected at most %d", length, min(maxHeaderBytes, size-8))
	}
	header := make([]byte, length)
	if _, err := r.ReadAt(header, 8); err != nil {
		return nil, fmt.Errorf("read %s: %w", file, err)
	}
	start := 8 + int64(length)
	var entries []entry
	err := eachMember(header, func(name string, dec *json.Decoder) error {
		if name == "__metadata__" {
			var meta map[string]string
			return dec.Decode(&meta)
		}
		e, err := decodeEntry(name, dec, start, size)
		entries = append(entries, e)
		return err
	})
	if err != nil {
		return nil, corrupt(file, "header: %w", err)
	}
	slices.SortStableFunc(entries, func(a, b entry) int {
		return cmp.Or(cmp.Compare(a.from, b.from), cmp.Compare(a.to, b.to))
	})
	at := start
	for _, e := range entries {
		if e.from != at {
			return nil, corrupt(file, "tensor %q starts at data byte %d, expected %d: tensors overlap or leave a gap", e.name, e.from-start, at-start)
		}
		at = e.to
	}
	if at != size {
		return nil, corrupt(file, "tensors end at data byte %d, the file at %d", at-start, size-start)
	}
	return entries, nil
}

// decodeEntry reads one tensor's description and checks it against the file's size.
func decodeEntry(name string, dec *json.Decoder, start, size int64) (entry, error) {
	var raw struct {
		DType   string  `json:"dtype"`
		Shape   []int64 `json:"shape"`
		Offsets []int64 `json:"data_offsets"`
	}
	if err := dec.Decode(&raw); err != nil {
		return entry{}, err
	}
	item, ok := itemSize[raw.DType]
	if !ok {
		return entry{}, fmt.Errorf("unknown dtype %q", raw.DType)
	}
	e := entry{name: name, dtype: raw.DType, shape: make([]int, len(raw.Shape))}
	bytes := item
	for i, d := range raw.Shape {
		if d < 0 || (d > 0 && bytes > math.MaxInt64/d) || d > math.MaxInt {
			return entry{}, fmt.Errorf("shape %v does not fit in a file", raw.Shape)
		}
		bytes *= d
		e.shape[i] = int(d)
	}
	if len(raw.Offsets) != 2 {
		return entry{}, fmt.Errorf("data_offsets %v, expected two", raw.Offsets)
	}
	from, to := raw.Offsets[0], raw.Offsets[1]
	if from < 0 || to < from || to > size-start {
		return entry{}, fmt.Errorf("data_offsets %v, expected a range within %d data bytes", raw.Offsets, size-start)
	}
	if to-from != bytes {
		return entry{}, fmt.Errorf("data_offsets %v hold %d bytes, expected %d for %s %v", raw.Offsets, to-from, bytes, raw.DType, raw.Shape)
	}
	e.from, e.to = start+from, start+to
	return e, nil
}

// weights are the tensors of one or several safetensors files, a model.Source.
type weights struct {
	cfg   model.Config
	files []*os.File
	names []string
	index map[string]place
}

type place struct {
	file *os.File
	entry
}

// openWeights opens model.safetensors, or else the shards that the index names.
func openWeights(dir string) (_ *weights, err error) {
	w := &weights{index: map[string]place{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.Close())
		}
	}()
	entries, f, err := w.open(filepath.Join(dir, singleName))
	if err == nil {
		for _, e := range entries {
			w.add(f, e)
		}
		return w, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	indexPath := filepath.Join(dir, indexName)
	data, err := readFile(indexPath, maxHeaderBytes)
	if err != nil {
		return nil, missing(err, filepath.Join(dir, singleName), "safetensors weights in this file, or "+indexName+" and its shards")
	}
	shards, err := parseIndex(indexPath, data)
	if err != nil {
		return nil, err
	}
	for _, s := range shards {
		path := filepath.Join(dir, s.file)
		entries, f, err := w.open(path)
		if err != nil {
			return nil, missing(err, path, "a shard that "+indexName+" names")
		}
		for _, e := range entries {
			if s.tensors[e.name] {
				w.add(f, e)
				delete(s.tensors, e.name)
			}
		}
		for _, name := range slices.Sorted(mapKeys(s.tensors)) {
			return nil, corrupt(path, "tensor %q is missing, %s says that it is here", name, indexName)
		}
	}
	return w, nil
}

func mapKeys(m map[string]bool) func(yield func(string) bool) {
	return func(yield func(string) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}

// open opens a safetensors file and keeps it open for w.
func (w *weights) open(path string) ([]entry, *os.File, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, nil, fmt.Errorf("open weights: %w", err)
	}
	w.files = append(w.files, f)
	info, err := f.Stat()
	if err != nil {
		return nil, nil, fmt.Errorf("open weights: %w", err)
	}
	entries, err := readHeader(path, f, info.Size())
	return entries, f, err
}

func (w *weights) add(f *os.File, e entry) {
	w.names = append(w.names, e.name)
	w.index[e.name] = place{f, e}
}

// shard is a file of an index and the tensors that are to be found in it.
type shard struct {
	file    string
	tensors map[string]bool
}

// parseIndex reads model.safetensors.index.json; shards come sorted by file name.
func parseIndex(path string, data []byte) ([]shard, error) {
	tensors := map[string]map[string]bool{}
	found := false
	err := eachMember(data, func(key string, dec *json.Decoder) error {
		var v json.RawMessage
		if err := dec.Decode(&v); err != nil || key != "weight_map" {
			return err
		}
		found = true
		return eachMember(v, func(name string, dec *json.Decoder) error {
			var file string
			if err := dec.Decode(&file); err != nil {
				return err
			}
			// A shard lies beside its index: a path could point anywhere.
			if strings.ContainsAny(file, `/\`) || !strings.HasSuffix(file, ".safetensors") {
				return fmt.Errorf("file %q, expected the name of a .safetensors file", file)
			}
			if tensors[file] == nil {
				tensors[file] = map[string]bool{}
			}
			tensors[file][name] = true
			return nil
		})
	})
	if err == nil && !found {
		err = errors.New("no weight_map")
	}
	if err != nil {
		return nil, corrupt(path, "index: %w", err)
	}
	var out []shard
	for file, t := range tensors {
		out = append(out, shard{file, t})
	}
	slices.SortFunc(out, func(a, b shard) int { return cmp.Compare(a.file, b.file) })
	return out, nil
}

func (w *weights) Config() model.Config { return w.cfg }
func (w *weights) Names() []string      { return slices.Clone(w.names) }

func (w *weights) Shape(name string) ([]int, bool) {
	p, ok := w.index[name]
	return p.shape, ok
}

// DType is the type that most bytes have.
func (w *weights) DType() string {
	best, size := "F32", int64(0)
	for _, dtype := range []string{"F32", "F16", "BF16"} {
		sum := int64(0)
		for _, p := range w.index {
			if p.dtype == dtype {
				sum += p.to - p.from
			}
		}
		if sum > size {
			best, size = dtype, sum
		}
	}
	return best
}

// readBytes is how much of a tensor is read and converted at a time.
const readBytes = 1 << 20

func (w *weights) Read(name string, dst *tensor.Dense) error {
	p, ok := w.index[name]
	if !ok {
		return fault.New(fault.Invalid, "invalid_tensor", "model directory: no tensor %q", name)
	}
	path := p.file.Name()
	switch p.dtype {
	case "F32", "F16", "BF16":
	default:
		return fault.New(fault.Invalid, "invalid_tensor", "%s: tensor %q is %s, expected F32, F16 or BF16", path, name, p.dtype)
	}
	if dst.Dtype() != tensor.Float32 || fmt.Sprint([]int(dst.Shape())) != fmt.Sprint(p.shape) {
		return fault.New(fault.Invalid, "invalid_tensor", "%s: tensor %q has shape %v, wanted as %v of %v", path, name, p.shape, dst.Dtype(), dst.Shape())
	}
	out, item := dst.Float32s(), int(itemSize[p.dtype])
	buf := make([]byte, min(int64(readBytes), p.to-p.from))
	for at := p.from; at < p.to; at += int64(len(buf)) {
		buf = buf[:min(int64(len(buf)), p.to-at)]
		if _, err := p.file.ReadAt(buf, at); err != nil {
			if errors.Is(err, io.EOF) {
				return corrupt(path, "tensor %q: the file has become shorter", name)
			}
			return fmt.Errorf("read tensor %q of %s: %w", name, path, err)
		}
		n := len(buf) / item
		decode(out[:n], buf, p.dtype)
		out = out[n:]
	}
	return nil
}

func (w *weights) Close() error {
	var errs []error
	for _, f := range w.files {
		errs = append(errs, f.Close())
	}
	w.files = nil
	return errors.Join(errs...)
}

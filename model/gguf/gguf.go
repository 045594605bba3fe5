package gguf

import (
	"fmt"
	"io"
	"os"
	"slices"

	"gorgonia.org/tensor"

	"trainerd/internal/fault"
	"trainerd/model"
)

// File is an open GGUF file, a model.Source. Read may be called from one
// goroutine at a time.
type File struct {
	path    string
	data    io.ReaderAt
	closer  io.Closer
	head    *header
	config  model.Config
	names   []string // Hugging Face names, in file order
	tensors map[string]entry
}

// entry is a tensor under its Hugging Face name.
type entry struct {
	tensorInfo
	target
}

var _ model.Source = (*File)(nil)

// Open reads the header of a GGUF file. Faults name the file and the key or tensor.
func Open(path string) (*File, error) {
	f, err := os.Open(path)
	if err != nil {
		kind := fault.Internal
		if os.IsNotExist(err) {
			kind = fault.NotFound
		}
		return nil, fault.New(kind, "open_gguf", "open gguf: %w", err)
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, fault.New(fault.Internal, "open_gguf", "stat gguf: %w", err)
	}
	if !st.Mode().IsRegular() {
		f.Close()
		return nil, fault.New(fault.Invalid, "open_gguf", "open gguf %s: expected a regular file", path)
	}
	g, err := read(path, f, st.Size())
	if err != nil {
		f.Close()
		return nil, err
	}
	g.closer = f
	return g, nil
}

// read decodes a file image of size bytes; name is used in faults.
func read(name string, data io.ReaderAt, size int64) (*File, error) {
	g := &File{path: name, data: data, tensors: map[string]entry{}}
	var err error
	if g.head, err = decodeHeader(io.NewSectionReader(data, 0, size), size); err != nil {
		return nil, g.wrap(err)
	}
	byName := make(map[string]tensorInfo, len(g.head.tensors))
	for _, t := range g.head.tensors {
		byName[t.name] = t
	}
	if g.config, err = g.head.config(byName); err != nil {
		return nil, g.wrap(err)
	}
	// The header's tensor count bounds what the config may ask for.
	if g.config.Layers > len(byName) {
		return nil, g.wrap(malformed(fmt.Sprintf("key %q", g.config.Type+".block_count"), g.config.Layers, fmt.Sprintf("no more layers than the file's %d tensors", len(byName))))
	}
	want := expected(g.config)
	for name, w := range want {
		t, ok := byName[name]
		if !ok || !slices.Equal(t.shape(), w.shape) {
			return nil, g.wrap(malformed("tensor "+quoted(name), describeTensor(t, ok), fmt.Sprintf("shape %v", w.shape)))
		}
	}
	for _, t := range g.head.tensors {
		w, ok := want[t.name]
		if !ok {
			return nil, g.wrap(unsupported("tensor "+quoted(t.name), describeTensor(t, true), "no such tensor in a "+g.config.Type+" decoder"))
		}
		g.names = append(g.names, w.name)
		g.tensors[w.name] = entry{t, w}
	}
	return g, nil
}

// wrap puts the file's name in front of a fault.
func (g *File) wrap(err error) error { return fmt.Errorf("read gguf %s: %w", g.path, err) }

// Config returns the architecture.
func (g *File) Config() model.Config {
	c := g.config
	c.EOS = slices.Clone(c.EOS)
	return c
}

// Names lists the tensors by their Hugging Face names, in file order.
func (g *File) Names() []string { return slices.Clone(g.names) }

// Shape returns a tensor's row-major shape.
func (g *File) Shape(name string) ([]int, bool) {
	t, ok := g.tensors[name]
	return slices.Clone(t.target.shape), ok
}

// DType is the type that holds the weights without loss: the stored one, or
// "F32" where most weights are quantised (a block's d*q + m has up to 15
// significant bits and its own exponent, too many for F16 or BF16).
func (g *File) DType() string {
	elements := map[string]int64{}
	for _, t := range g.head.tensors {
		elements[formats[t.kind].name] += t.elements
	}
	best := "F32"
	for _, d := range []string{"F16", "BF16"} {
		rest := int64(0)
		for name, n := range elements {
			if name != d {
				rest += n
			}
		}
		if elements[d] > rest {
			best = d
		}
	}
	return best
}

// Close closes the file.
func (g *File) Close() error {
	if g.closer == nil {
		return nil
	}
	return g.closer.Close()
}

// Read fills dst with a tensor's values as float32, in Hugging Face row order.
func (g *File) Read(name string, dst *tensor.Dense) error {
	t, ok := g.tensors[name]
	if !ok {
		return g.wrap(unsupported("tensor "+quoted(name), "nothing", "a tensor of the model"))
	}
	out, isF32 := dst.Data().([]float32)
	if !isF32 || !slices.Equal([]int(dst.Shape()), t.target.shape) || len(out) != int(t.elements) {
		return g.wrap(unsupported("tensor "+quoted(name), fmt.Sprintf("a destination of %v %v", dst.Dtype(), dst.Shape()), fmt.Sprintf("float32 %v", t.target.shape)))
	}
	return g.readInto(t, out)
}

// readInto converts a tensor in pieces of whole rows or blocks, about 1 MiB each.
func (g *File) readInto(t entry, out []float32) error {
	f := formats[t.kind]
	width := t.dims[0] // elements of a row
	rows := t.elements / width
	rowBytes := width / f.block * f.size
	step := max(1, (1<<20)/rowBytes)
	if t.permute == 0 && len(t.dims) == 1 {
		// One long row: cut it at blocks instead.
		width, rowBytes = f.block, f.size
		rows, step = t.elements/width, max(1, (1<<20)/rowBytes)
	}
	buf := make([]byte, min(step, rows)*rowBytes)
	row := make([]float32, 0)
	if t.permute > 0 {
		row = make([]float32, min(step, rows)*width)
	}
	for r := int64(0); r < rows; r += step {
		n := min(step, rows-r)
		src := buf[:n*rowBytes]
		// A full read may still report io.EOF when it ends the file.
		if got, err := g.data.ReadAt(src, g.head.dataStart+t.offset+r*rowBytes); got < len(src) {
			if err == io.EOF {
				return g.wrap(malformed("tensor "+quoted(t.target.name), "the end of the file", "the tensor's data"))
			}
			return g.wrap(fault.New(fault.Internal, "read_gguf", "tensor %q: %w", t.target.name, err))
		}
		if t.permute == 0 {
			f.decode(out[r*width:(r+n)*width], src)
			continue
		}
		part := row[:n*width]
		f.decode(part, src)
		for i := range n {
			to := int64(unpermuted(int(r+i), t.target.shape[0]/t.permute))
			copy(out[to*width:(to+1)*width], part[i*width:(i+1)*width])
		}
	}
	return nil
}

// unpermuted returns the Hugging Face row of GGUF row r of a q or k projection
// with heads of hd rows. llama.cpp's converter stores row (head, j, i) of
// [H, 2, hd/2] as (head, i, j): neighbours rotate together there.
func unpermuted(r, hd int) int {
	head, in := r/hd, r%hd
	i, j := in/2, in%2
	return head*hd + j*(hd/2) + i
}

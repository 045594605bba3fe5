package hf

import (
	"context"
	"io"

	"trainerd/model"
)

// Dir is an open model directory, a model.Source.
type Dir struct{ model.Source }

// Open reads config.json and the safetensors headers of a directory; it maps or
// reads tensor data only when asked. Faults name the file and what was expected.
func Open(dir string) (*Dir, error) { panic("not built yet") }

// Carried returns the files besides config.json and weights that a written
// directory repeats (tokenizer and generation files), by name.
func (d *Dir) Carried() (map[string][]byte, error) { panic("not built yet") }

// Sink takes one file at a time (storage.Writer.File, or DirSink).
type Sink func(ctx context.Context, name string, write func(io.Writer) error) error

// DirSink returns a Sink that writes into dir, each file atomically and fsynced.
func DirSink(dir string) Sink { panic("not built yet") }

// WriteOptions say how a directory is written.
type WriteOptions struct {
	DType      string            // "F32", "F16", "BF16"; "" or "source": as the source says
	ShardBytes int64             // 0: about 2 GB
	Carried    map[string][]byte // other files
	ConfigJSON []byte            // the original config.json, kept but for torch_dtype; nil: made from Config
}

// Write streams a model as a Hugging Face directory, names prefixed with prefix ("hf/").
func Write(ctx context.Context, sink Sink, prefix string, src model.Source, o WriteOptions) error {
	panic("not built yet")
}

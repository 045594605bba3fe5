package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"trainerd/internal/fault"
	"trainerd/model"
	"trainerd/model/gguf"
	"trainerd/model/hf"
	"trainerd/storage"
)

func newImport() *cobra.Command {
	var dtype string
	cmd := &cobra.Command{
		Use:   "import SRC DEST",
		Short: "Copy a model (GGUF file or Hugging Face directory) to a store as a Hugging Face directory",
		Long:  "Copy a model. SRC is a .gguf file or a Hugging Face directory; DEST is dir:PATH or s3://bucket/prefix.\nTensors are streamed one at a time; tokenizer and generation files go along.",
		Args:  takes(2, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			src, opts, err := openModel(args[0])
			if err != nil {
				return err
			}
			defer src.Close()
			opts.DType = dtype
			return writeModel(cmd, args[1], src, opts)
		},
	}
	cmd.Flags().StringVar(&dtype, "dtype", "source", "stored type of the weights: source, F32, F16 or BF16")
	addStoreFlags(cmd)
	return cmd
}

// openModel opens a GGUF file or a Hugging Face directory with all that a copy of it carries along.
func openModel(path string) (model.Source, hf.WriteOptions, error) {
	path = trimScheme(path)
	if strings.HasSuffix(path, ".gguf") {
		f, err := gguf.Open(path)
		if err != nil {
			return nil, hf.WriteOptions{}, err
		}
		carried, err := f.Carried()
		if err != nil {
			f.Close()
			return nil, hf.WriteOptions{}, err
		}
		return f, hf.WriteOptions{Carried: carried}, nil
	}
	d, err := hf.Open(path)
	if err != nil {
		return nil, hf.WriteOptions{}, err
	}
	carried, err := d.Carried()
	if err != nil {
		d.Close()
		return nil, hf.WriteOptions{}, err
	}
	return d, hf.WriteOptions{Carried: carried, ConfigJSON: d.ConfigJSON()}, nil
}

// addStoreFlags declares what an s3:// destination needs.
func addStoreFlags(cmd *cobra.Command) {
	o := DefaultConfig().ObjectStore
	bindFlags(cmd.Flags(), membersOf(&o))
}

// writeModel streams a model to a store.
func writeModel(cmd *cobra.Command, dest string, src model.Source, o hf.WriteOptions) error {
	con := newConsole(cmd)
	sink, err := modelSink(cmd, dest)
	if err != nil {
		return err
	}
	var total int64
	for _, n := range src.Names() {
		shape, _ := src.Shape(n)
		size := int64(4)
		if o.DType == "F16" || o.DType == "BF16" || o.DType != "F32" && src.DType() != "F32" {
			size = 2
		}
		for _, d := range shape {
			size *= int64(d)
		}
		total += size
	}
	if err := hf.Write(cmd.Context(), con.sinkWithProgress(sink, total), "", src, o); err != nil {
		return err
	}
	c := src.Config()
	fmt.Fprintf(con.out, "%s: %s, %d layers, hidden %d, vocabulary %d, %d parameters\n", dest, c.Type, c.Layers, c.Hidden, c.Vocab, parameters(src))
	return nil
}

// modelSink writes files to dir:PATH (or a bare path) or s3://bucket/prefix.
func modelSink(cmd *cobra.Command, dest string) (hf.Sink, error) {
	if !strings.HasPrefix(dest, "s3://") {
		return dirSink(cmd, trimScheme(dest))
	}
	o, err := LoadObjectStore(cmd.Flags(), os.LookupEnv)
	if err != nil {
		return nil, err
	}
	b, err := openStore(cmd.Context(), o, dest)
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context, name string, write func(io.Writer) error) error {
		pr, pw := io.Pipe()
		done := make(chan error, 1)
		go func() {
			_, err := b.Put(ctx, name, pr, -1, storage.Condition{})
			pr.CloseWithError(err)
			done <- err
		}()
		werr := write(pw)
		pw.CloseWithError(werr)
		if err := <-done; err != nil && werr == nil {
			return err
		}
		return werr
	}, nil
}

// dirSink writes into a new or empty directory: the files of two models in one
// would be a third.
func dirSink(cmd *cobra.Command, path string) (hf.Sink, error) {
	o := DefaultConfig().ObjectStore
	for _, m := range membersOf(&o) {
		if cmd.Flags().Changed(m.flag()) {
			return nil, fault.BadField(m.flag(), "set", "only with an s3:// destination")
		}
	}
	switch files, err := os.ReadDir(path); {
	case err == nil && len(files) > 0:
		return nil, fault.BadField("DEST", path, "a new or empty directory")
	case err != nil && !errors.Is(err, os.ErrNotExist):
		return nil, err
	}
	return hf.DirSink(path), nil // which makes the directory with the first file
}

func parameters(src model.Source) int64 {
	var n int64
	for _, name := range src.Names() {
		shape, _ := src.Shape(name)
		p := int64(1)
		for _, d := range shape {
			p *= int64(d)
		}
		n += p
	}
	return n
}

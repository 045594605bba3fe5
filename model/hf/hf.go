package hf

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"trainerd/internal/fault"
	"trainerd/model"
)

// Dir is an open model directory, a model.Source.
type Dir struct {
	model.Source
	path   string
	config []byte
}

// Names of the files of a model directory.
const (
	configName     = "config.json"
	generationName = "generation_config.json"
	singleName     = "model.safetensors"
	indexName      = "model.safetensors.index.json"
)

// carried are the files that a copy of a model takes along untouched.
var carried = []string{
	generationName, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
	"vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
}

// Limits of what is read into memory whole.
const (
	maxConfigBytes  = 4 << 20
	maxCarriedBytes = 256 << 20
)

// Open reads config.json and the safetensors headers of a directory; it reads
// tensor data only when asked. Faults name the file and what was expected.
func Open(dir string) (*Dir, error) {
	configPath := filepath.Join(dir, configName)
	config, err := readFile(configPath, maxConfigBytes)
	if err != nil {
		return nil, missing(err, configPath, "the config.json of a Hugging Face model directory")
	}
	cfg, err := ParseConfig(configPath, config)
	if err != nil {
		return nil, err
	}
	generationPath := filepath.Join(dir, generationName)
	switch generation, err := readFile(generationPath, maxConfigBytes); {
	case err == nil:
		if cfg.EOS, err = addGenerationEOS(cfg.EOS, generationPath, generation); err != nil {
			return nil, err
		}
	case !errors.Is(err, fs.ErrNotExist):
		return nil, err
	}
	weights, err := openWeights(dir)
	if err != nil {
		return nil, err
	}
	weights.cfg = cfg
	return &Dir{Source: weights, path: dir, config: config}, nil
}

// ConfigJSON returns the directory's config.json as it is stored.
func (d *Dir) ConfigJSON() []byte { return slices.Clone(d.config) }

// Carried returns the files besides config.json and weights that a written
// directory repeats (tokenizer and generation files), by name.
func (d *Dir) Carried() (map[string][]byte, error) {
	out := map[string][]byte{}
	for _, name := range carried {
		data, err := readFile(filepath.Join(d.path, name), maxCarriedBytes)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		out[name] = data
	}
	return out, nil
}

// readFile reads a file of at most limit bytes.
func readFile(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read model directory: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	if int64(len(data)) > limit {
		return nil, fault.New(fault.TooLarge, "file_too_large", "%s: more than %d bytes", path, limit)
	}
	return data, nil
}

// missing turns a missing file into a fault that says what was expected.
func missing(err error, path, expected string) error {
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return &fault.Error{Kind: fault.Invalid, Code: "invalid_model", Msg: "open model directory", Err: err,
		Fields: []fault.Field{{Name: path, Row: -1, Got: "no such file", Expected: expected}}}
}

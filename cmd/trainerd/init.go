package main

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"trainerd/bench"
	"trainerd/model"
	"trainerd/model/hf"
)

func newInit() *cobra.Command {
	var config, preset string
	var seed uint64
	cmd := &cobra.Command{
		Use:   "init DEST",
		Short: "Write a randomly initialised model as a Hugging Face directory",
		Long:  "Write a randomly initialised model. DEST is dir:PATH or s3://bucket/prefix.\nThe weights are a pure function of the configuration and the seed.",
		Args:  takes(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			cfg, carried, err := initConfig(config, preset)
			if err != nil {
				return err
			}
			src, err := model.NewRandom(cfg, seed)
			if err != nil {
				return err
			}
			return writeModel(cmd, args[0], src, hf.WriteOptions{Carried: carried})
		},
	}
	cmd.Flags().StringVar(&config, "config", "", "config.json of the model to make")
	cmd.Flags().StringVar(&preset, "preset", "", "bytes (a tiny byte-level model), or 135m, 0.5b, 1.5b, 7b")
	cmd.Flags().Uint64Var(&seed, "seed", 0, "seed of the weights")
	cmd.MarkFlagsOneRequired("config", "preset")
	cmd.MarkFlagsMutuallyExclusive("config", "preset")
	addStoreFlags(cmd)
	return cmd
}

func initConfig(config, preset string) (model.Config, map[string][]byte, error) {
	switch {
	case config != "":
		b, err := os.ReadFile(config)
		if err != nil {
			return model.Config{}, nil, fmt.Errorf("read configuration: %w", err)
		}
		cfg, err := hf.ParseConfig(config, b)
		return cfg, nil, err
	case preset == "bytes":
		return byteModel(), byteTokenizer(), nil
	default:
		cfg, err := bench.Shape(preset)
		if err != nil {
			return cfg, nil, fmt.Errorf("preset: %w, or bytes", err)
		}
		return cfg, nil, nil
	}
}

const (
	byteEOS   = 256
	byteVocab = 257
)

// byteModel is the demo's policy: every byte is a token, id 256 ends a completion.
func byteModel() model.Config {
	return model.Config{Type: "llama", Vocab: byteVocab, Hidden: 96, FFN: 256, Layers: 3, Heads: 4, KVHeads: 2, HeadDim: 24,
		MaxPositions: 512, RopeTheta: 10000, NormEps: 1e-5, Tied: true, InitStd: 0.05, BOS: -1, EOS: []int32{byteEOS}}
}

// byteTokenizer returns the files of a byte-level BPE without merges, whose ids are the byte values.
func byteTokenizer() map[string][]byte {
	vocab := map[string]int{"<eos>": byteEOS}
	for b, r := range byteRunes() {
		vocab[string(r)] = b
	}
	level := map[string]any{"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}
	doc := map[string]any{
		"version": "1.0", "truncation": nil, "padding": nil, "normalizer": nil,
		"added_tokens":  []any{map[string]any{"id": byteEOS, "content": "<eos>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}},
		"pre_tokenizer": level, "post_processor": nil, "decoder": level,
		"model": map[string]any{"type": "BPE", "dropout": nil, "unk_token": nil, "continuing_subword_prefix": nil, "end_of_word_suffix": nil,
			"fuse_unk": false, "byte_fallback": false, "ignore_merges": false, "vocab": vocab, "merges": []any{}},
	}
	enc := func(v any) []byte {
		b, err := json.MarshalIndent(v, "", "  ")
		if err != nil {
			panic(err) // only maps of strings, numbers and bools
		}
		return append(b, '\n')
	}
	return map[string][]byte{
		"tokenizer.json":        enc(doc),
		"tokenizer_config.json": enc(map[string]any{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "clean_up_tokenization_spaces": false}),
	}
}

// byteRunes is GPT-2's printable stand-in for each byte: itself where it is
// printable in Latin-1, else the next unused code point from 256 on.
func byteRunes() [256]rune {
	var out [256]rune
	next := rune(256)
	for b := range out {
		if b >= '!' && b <= '~' || b >= 0xA1 && b <= 0xAC || b >= 0xAE {
			out[b] = rune(b)
			continue
		}
		out[b] = next
		next++
	}
	return out
}

// trimScheme returns PATH of "dir:PATH" and of a bare path.
func trimScheme(s string) string { return strings.TrimPrefix(s, "dir:") }

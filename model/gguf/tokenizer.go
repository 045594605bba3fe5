package gguf

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"strings"
)

// Token types of tokenizer.ggml.token_type.
const (
	tokenNormal  = 1
	tokenUnknown = 2
	tokenControl = 3 // special: never made from text by merges
	tokenUser    = 4 // matched whole in text, not special
	tokenUnused  = 5 // padding of the vocabulary
	tokenByte    = 6
)

// pretokenizer is how text is cut before merging, as a tokenizer.json says it.
type pretokenizer struct {
	normalizer   any
	steps        []any
	ignoreMerges bool // a word that is a token as a whole is not merged
}

// Patterns of the Split step. The first is GPT-2's in Llama 3's form (digits in
// threes), the second Qwen2's (digits one by one).
const (
	splitLlama3 = `(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`
	splitQwen2  = `(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`
)

// pretokenizerOf knows the pre-tokenizers of the supported model families by
// the name that tokenizer.ggml.pre gives. A file without one, or with
// "default", is read as GPT-2, as transformers does.
func pretokenizerOf(pre string) (pretokenizer, error) {
	byteLevel := func(regex bool) any {
		return map[string]any{"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex}
	}
	split := func(pattern string) any {
		return map[string]any{"type": "Split", "pattern": map[string]any{"Regex": pattern}, "behavior": "Isolated", "invert": false}
	}
	switch pre {
	case "", "default", "gpt-2", "gpt2":
		return pretokenizer{steps: []any{byteLevel(true)}}, nil
	case "smollm":
		digits := map[string]any{"type": "Digits", "individual_digits": true}
		return pretokenizer{steps: []any{digits, byteLevel(true)}}, nil
	case "qwen2":
		return pretokenizer{normalizer: map[string]any{"type": "NFC"}, steps: []any{split(splitQwen2), byteLevel(false)}}, nil
	case "llama-bpe", "llama3", "llama-v3":
		return pretokenizer{steps: []any{split(splitLlama3), byteLevel(false)}, ignoreMerges: true}, nil
	}
	return pretokenizer{}, unsupported(`key "tokenizer.ggml.pre"`, quoted(pre), `"smollm", "qwen2", "llama-bpe", "gpt-2" or "default"`)
}

// addedToken is an entry of tokenizer.json's added_tokens.
type addedToken struct {
	ID         int    `json:"id"`
	Content    string `json:"content"`
	SingleWord bool   `json:"single_word"`
	LStrip     bool   `json:"lstrip"`
	RStrip     bool   `json:"rstrip"`
	Normalized bool   `json:"normalized"`
	Special    bool   `json:"special"`
}

// vocabulary is the tokenizer part of the metadata, checked.
type vocabulary struct {
	tokens []string
	types  []int64 // empty: all normal
	merges []string
	added  []addedToken
}

// Carried returns the Hugging Face files made from the metadata: tokenizer.json,
// tokenizer_config.json (with the chat template), special_tokens_map.json, generation_config.json.
func (g *File) Carried() (map[string][]byte, error) {
	files, err := g.carried()
	if err != nil {
		return nil, g.wrap(err)
	}
	return files, nil
}

func (g *File) carried() (map[string][]byte, error) {
	kind, err := g.head.text("tokenizer.ggml.model", "")
	if err != nil {
		return nil, err
	}
	if kind != "gpt2" {
		return nil, unsupported(`key "tokenizer.ggml.model"`, quoted(kind), `"gpt2", a byte-level BPE`)
	}
	v, err := g.vocabulary()
	if err != nil {
		return nil, err
	}
	special, err := g.specials(v)
	if err != nil {
		return nil, err
	}
	tok, err := g.tokenizerJSON(v, special)
	if err != nil {
		return nil, err
	}
	files := map[string][]byte{"tokenizer.json": tok}
	config := map[string]any{
		"tokenizer_class":              "PreTrainedTokenizerFast",
		"clean_up_tokenization_spaces": false,
		"model_max_length":             g.config.MaxPositions,
	}
	names := map[string]any{}
	for name, id := range special {
		config[name], names[name] = v.tokens[id], v.tokens[id]
	}
	if template, err := g.head.text("tokenizer.chat_template", ""); err != nil {
		return nil, err
	} else if template != "" {
		config["chat_template"] = template
	}
	if files["tokenizer_config.json"], err = indented(config); err != nil {
		return nil, err
	}
	if files["special_tokens_map.json"], err = indented(names); err != nil {
		return nil, err
	}
	files["generation_config.json"], err = g.generationJSON(special)
	return files, err
}

// vocabulary reads and checks tokens, types and merges.
func (g *File) vocabulary() (*vocabulary, error) {
	v := &vocabulary{}
	var err error
	if v.tokens, err = g.head.strings("tokenizer.ggml.tokens"); err != nil {
		return nil, err
	}
	if len(v.tokens) == 0 || len(v.tokens) > g.config.Vocab {
		return nil, malformed(`key "tokenizer.ggml.tokens"`, fmt.Sprintf("%d tokens", len(v.tokens)), fmt.Sprintf("1 to %d, the embedding's rows", g.config.Vocab))
	}
	if raw, ok := g.head.meta["tokenizer.ggml.token_type"]; ok {
		types, ok := raw.([]int64)
		if !ok || len(types) != len(v.tokens) {
			return nil, malformed(`key "tokenizer.ggml.token_type"`, describe(raw), fmt.Sprintf("%d integers", len(v.tokens)))
		}
		v.types = types
	}
	index := make(map[string]int, len(v.tokens))
	for i, t := range v.tokens {
		if first, twice := index[t]; twice {
			return nil, malformed(fmt.Sprintf(`key "tokenizer.ggml.tokens" element %d`, i), quoted(t), fmt.Sprintf("a token other than element %d", first))
		}
		index[t] = i
		if k := v.kind(i); k == tokenControl || k == tokenUser || k == tokenUnknown {
			v.added = append(v.added, addedToken{ID: i, Content: t, Special: k != tokenUser})
		}
	}
	if v.merges, err = g.head.strings("tokenizer.ggml.merges"); err != nil {
		return nil, err
	}
	if len(v.merges) == 0 {
		return nil, malformed(`key "tokenizer.ggml.merges"`, "nothing", "the merges of a byte-level BPE")
	}
	for i, m := range v.merges {
		left, right, ok := strings.Cut(m, " ")
		if _, l := index[left]; ok && l {
			if _, r := index[right]; r {
				if _, both := index[left+right]; both {
					continue
				}
			}
		}
		return nil, malformed(fmt.Sprintf(`key "tokenizer.ggml.merges" element %d`, i), quoted(m), "two tokens whose concatenation is a token")
	}
	return v, nil
}

func (v *vocabulary) kind(i int) int64 {
	if len(v.types) == 0 {
		return tokenNormal
	}
	return v.types[i]
}

// specials maps Hugging Face's names of special tokens to ids.
func (g *File) specials(v *vocabulary) (map[string]int, error) {
	out := map[string]int{}
	for key, name := range map[string]string{"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"} {
		key = "tokenizer.ggml." + key + "_token_id"
		id, err := g.head.integer(key, -1)
		if err != nil {
			return nil, err
		}
		if id == -1 || id == math.MaxUint32 {
			continue
		}
		if id < 0 || id >= int64(len(v.tokens)) {
			return nil, malformed("key "+quoted(key), id, fmt.Sprintf("an id below %d", len(v.tokens)))
		}
		out[name] = int(id)
	}
	return out, nil
}

// tokenizerJSON writes the file that the tokenizers library reads.
func (g *File) tokenizerJSON(v *vocabulary, special map[string]int) ([]byte, error) {
	name, err := g.head.text("tokenizer.ggml.pre", "")
	if err != nil {
		return nil, err
	}
	pre, err := pretokenizerOf(name)
	if err != nil {
		return nil, err
	}
	post, err := g.postProcessor(v, special, name)
	if err != nil {
		return nil, err
	}
	ids := make(map[string]int, len(v.tokens))
	for i, t := range v.tokens {
		if v.kind(i) != tokenUnused {
			ids[t] = i
		}
	}
	split := any(map[string]any{"type": "Sequence", "pretokenizers": pre.steps})
	if len(pre.steps) == 1 {
		split = pre.steps[0]
	}
	return indented(map[string]any{
		"version": "1.0", "truncation": nil, "padding": nil,
		"added_tokens":   v.added,
		"normalizer":     pre.normalizer,
		"pre_tokenizer":  split,
		"post_processor": post,
		"decoder":        map[string]any{"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
		"model": map[string]any{
			"type": "BPE", "dropout": nil, "unk_token": nil, "continuing_subword_prefix": nil, "end_of_word_suffix": nil,
			"fuse_unk": false, "byte_fallback": false, "ignore_merges": pre.ignoreMerges,
			"vocab": ids, "merges": v.merges,
		},
	})
}

// postProcessor adds the tokens that begin and end a text, where the file asks for them.
// llama.cpp adds a beginning to the Llama 3 family also where the key is absent.
func (g *File) postProcessor(v *vocabulary, special map[string]int, pre string) (any, error) {
	bos, err := g.head.flag("tokenizer.ggml.add_bos_token", strings.HasPrefix(pre, "llama"))
	if err != nil {
		return nil, err
	}
	eos, err := g.head.flag("tokenizer.ggml.add_eos_token", false)
	if err != nil {
		return nil, err
	}
	single, pair, tokens := []any{}, []any{}, map[string]any{}
	ask := func(want bool, name string) (token any, err error) {
		if !want {
			return nil, nil
		}
		id, ok := special[name]
		if !ok {
			key := fmt.Sprintf("tokenizer.ggml.%s_token_id", strings.TrimSuffix(name, "_token"))
			return nil, malformed("key "+quoted(key), "nothing", "the id that the file asks to add to every text")
		}
		text := v.tokens[id]
		tokens[text] = map[string]any{"id": text, "ids": []int{id}, "tokens": []string{text}}
		return text, nil
	}
	first, err := ask(bos, "bos_token")
	if err != nil {
		return nil, err
	}
	last, err := ask(eos, "eos_token")
	if err != nil {
		return nil, err
	}
	byteLevel := map[string]any{"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true}
	if first == nil && last == nil {
		return byteLevel, nil
	}
	for i, sequence := range []string{"A", "B"} {
		part := []any{}
		if first != nil {
			part = append(part, map[string]any{"SpecialToken": map[string]any{"id": first, "type_id": i}})
		}
		part = append(part, map[string]any{"Sequence": map[string]any{"id": sequence, "type_id": i}})
		if last != nil {
			part = append(part, map[string]any{"SpecialToken": map[string]any{"id": last, "type_id": i}})
		}
		if i == 0 {
			single = part
		}
		pair = append(pair, part...)
	}
	template := map[string]any{"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}
	return map[string]any{"type": "Sequence", "processors": []any{byteLevel, template}}, nil
}

// generationJSON names the tokens that begin, end and pad a completion.
func (g *File) generationJSON(special map[string]int) ([]byte, error) {
	out := map[string]any{}
	if g.config.BOS >= 0 {
		out["bos_token_id"] = g.config.BOS
	}
	switch len(g.config.EOS) {
	case 0:
	case 1:
		out["eos_token_id"] = g.config.EOS[0]
	default:
		out["eos_token_id"] = g.config.EOS
	}
	if id, ok := special["pad_token"]; ok {
		out["pad_token_id"] = id
	}
	return indented(out)
}

// indented writes JSON as the libraries that read it do: two spaces, no HTML escapes.
func indented(v any) ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if err := e.Encode(v); err != nil {
		return nil, fmt.Errorf("encode tokenizer: %w", err)
	}
	return b.Bytes(), nil
}

package tokenizer

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"trainerd/internal/fault"
)

// maxFileBytes bounds tokenizer.json; the largest in use have about 35 MB.
const maxFileBytes = 128 << 20

// file is tokenizer.json as far as it is understood.
type file struct {
	AddedTokens []struct {
		ID         int32  `json:"id"`
		Content    string `json:"content"`
		SingleWord bool   `json:"single_word"`
		LStrip     bool   `json:"lstrip"`
		RStrip     bool   `json:"rstrip"`
		Normalized bool   `json:"normalized"`
		Special    bool   `json:"special"`
	} `json:"added_tokens"`
	Normalizer   *component `json:"normalizer"`
	PreTokenizer *component `json:"pre_tokenizer"`
	Decoder      *component `json:"decoder"`
	Model        struct {
		Type         string            `json:"type"`
		Dropout      *float64          `json:"dropout"`
		Unk          *string           `json:"unk_token"`
		Prefix       *string           `json:"continuing_subword_prefix"`
		Suffix       *string           `json:"end_of_word_suffix"`
		ByteFallback bool              `json:"byte_fallback"`
		IgnoreMerges bool              `json:"ignore_merges"`
		Vocab        map[string]int32  `json:"vocab"`
		Merges       []json.RawMessage `json:"merges"` // "a b" or ["a","b"]
	} `json:"model"`
}

// component is a normalizer, pre-tokenizer or decoder; which members count depends on Type.
type component struct {
	Type             string       `json:"type"`
	Normalizers      []*component `json:"normalizers"`
	PreTokenizers    []*component `json:"pretokenizers"`
	Decoders         []*component `json:"decoders"`
	IndividualDigits bool         `json:"individual_digits"`
	AddPrefixSpace   bool         `json:"add_prefix_space"`
	UseRegex         *bool        `json:"use_regex"` // absent: true
	Pattern          *struct {
		Regex  string
		String string
	} `json:"pattern"`
	Behavior string `json:"behavior"`
	Invert   bool   `json:"invert"`
}

// Load reads tokenizer.json (and tokenizer_config.json for the chat template's special tokens) of a directory.
func Load(dir string) (*Tokenizer, error) {
	path := filepath.Join(dir, "tokenizer.json")
	data, err := readFile(path)
	if err != nil {
		return nil, err
	}
	config, err := readFile(filepath.Join(dir, "tokenizer_config.json"))
	if err != nil && fault.KindOf(err) != fault.NotFound {
		return nil, err
	}
	t, err := Parse(data, config)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return t, nil
}

func readFile(path string) ([]byte, error) {
	st, err := os.Stat(path)
	switch {
	case os.IsNotExist(err):
		return nil, fault.New(fault.NotFound, "no_tokenizer", "read tokenizer: %w", err)
	case err != nil:
		return nil, fault.New(fault.Internal, "read_tokenizer", "read tokenizer: %w", err)
	case st.Size() > maxFileBytes:
		return nil, fault.New(fault.TooLarge, "tokenizer_too_large", "read tokenizer %s: %d bytes, expected at most %d", path, st.Size(), maxFileBytes)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fault.New(fault.Internal, "read_tokenizer", "read tokenizer: %w", err)
	}
	return data, nil
}

// Parse makes a tokenizer from the bytes of tokenizer.json and, when not nil,
// of tokenizer_config.json.
func Parse(tokenizerJSON, configJSON []byte) (*Tokenizer, error) {
	var f file
	if err := json.Unmarshal(tokenizerJSON, &f); err != nil {
		return nil, fault.New(fault.Malformed, "bad_tokenizer", "parse tokenizer.json: %w", err)
	}
	t := &Tokenizer{ids: map[string]int32{}, text: map[int32]string{}, special: map[int32]bool{}, named: map[string]string{}}
	if err := t.setModel(&f); err != nil {
		return nil, err
	}
	if err := t.setAdded(&f); err != nil {
		return nil, err
	}
	if err := t.setNormalizer(f.Normalizer, "normalizer"); err != nil {
		return nil, err
	}
	var err error
	if t.steps, err = stepsOf(f.PreTokenizer, "pre_tokenizer"); err != nil {
		return nil, err
	}
	if n := len(t.steps); n == 0 || !t.steps[n-1].last {
		return nil, refuse("pre_tokenizer", kindOf(f.PreTokenizer), "one that ends with ByteLevel")
	}
	if d := f.Decoder; d == nil || d.Type != "ByteLevel" && !(d.Type == "Sequence" && len(d.Decoders) == 1 && d.Decoders[0].Type == "ByteLevel") {
		return nil, refuse("decoder", kindOf(d), "ByteLevel")
	}
	for id, text := range t.text {
		t.vocabEnd = max(t.vocabEnd, id+1)
		t.ids[text] = id
	}
	return t, t.setNamed(configJSON)
}

func (t *Tokenizer) setModel(f *file) error {
	m := &f.Model
	switch {
	case m.Type != "BPE" && m.Type != "": // files from before the member existed hold BPE
		return refuse("model.type", m.Type, "BPE")
	case m.Dropout != nil && *m.Dropout != 0:
		return refuse("model.dropout", *m.Dropout, "none")
	case m.Prefix != nil && *m.Prefix != "":
		return refuse("model.continuing_subword_prefix", *m.Prefix, "none")
	case m.Suffix != nil && *m.Suffix != "":
		return refuse("model.end_of_word_suffix", *m.Suffix, "none")
	case m.ByteFallback:
		return refuse("model.byte_fallback", true, "false: a byte-level vocabulary")
	case len(m.Vocab) == 0:
		return refuse("model.vocab", "nothing", "tokens")
	}
	for text, id := range m.Vocab {
		if id < 0 {
			return refuse("model.vocab", fmt.Sprintf("id %d of %q", id, text), "ids from 0")
		}
		if other, twice := t.text[id]; twice {
			return refuse("model.vocab", fmt.Sprintf("id %d for %q and %q", id, other, text), "an id of its own for each token")
		}
		t.text[id] = text
	}
	t.model = bpe{whole: m.IgnoreMerges, vocab: m.Vocab, merges: make(map[pair]merge, len(m.Merges))}
	for i, raw := range m.Merges {
		left, right, err := mergeOf(raw)
		if err != nil {
			return refuse(fmt.Sprintf("model.merges[%d]", i), string(raw), `"left right" or ["left","right"]`)
		}
		l, okL := m.Vocab[left]
		r, okR := m.Vocab[right]
		id, ok := m.Vocab[left+right]
		if !okL || !okR || !ok {
			return refuse(fmt.Sprintf("model.merges[%d]", i), string(raw), "two tokens whose concatenation is a token")
		}
		// A pair listed twice keeps its last rank, as a map filled in order does.
		t.model.merges[pair{l, r}] = merge{rank: int32(i), id: id}
	}
	for c := range 256 {
		t.model.byteID[c] = -1
		if id, ok := m.Vocab[string(byteRune[c])]; ok {
			t.model.byteID[c] = id
		}
	}
	return nil
}

func mergeOf(raw json.RawMessage) (left, right string, err error) {
	if bytes.HasPrefix(bytes.TrimSpace(raw), []byte("[")) {
		var two []string
		if err := json.Unmarshal(raw, &two); err != nil || len(two) != 2 {
			return "", "", fmt.Errorf("not a pair")
		}
		return two[0], two[1], nil
	}
	var s string
	if err := json.Unmarshal(raw, &s); err != nil {
		return "", "", err
	}
	left, right, ok := strings.Cut(s, " ")
	if !ok || strings.Contains(right, " ") {
		return "", "", fmt.Errorf("not a pair")
	}
	return left, right, nil
}

func (t *Tokenizer) setAdded(f *file) error {
	for i, a := range f.AddedTokens {
		at := fmt.Sprintf("added_tokens[%d]", i)
		switch {
		case a.Content == "":
			return refuse(at+".content", `""`, "text")
		case a.SingleWord || a.LStrip || a.RStrip:
			return refuse(at, fmt.Sprintf("%q with single_word, lstrip or rstrip", a.Content), "a token matched as it is")
		case a.ID < 0:
			return refuse(at+".id", a.ID, "0 or more")
		}
		if other, taken := t.text[a.ID]; taken && other != a.Content {
			return refuse(at+".id", fmt.Sprintf("%d, which is %q", a.ID, other), "an id of its own")
		}
		t.text[a.ID] = a.Content
		if a.Special {
			t.special[a.ID] = true
		}
		m := &t.raw
		if a.Normalized {
			m = &t.normed
		}
		if m.byFirst == nil {
			m.byFirst = map[byte][]match{}
		}
		m.byFirst[a.Content[0]] = append(m.byFirst[a.Content[0]], match{a.Content, a.ID})
	}
	for _, m := range []matcher{t.raw, t.normed} {
		for _, list := range m.byFirst {
			slices.SortStableFunc(list, func(a, b match) int { return len(b.text) - len(a.text) })
		}
	}
	return nil
}

func (t *Tokenizer) setNormalizer(n *component, at string) error {
	switch {
	case n == nil:
	case n.Type == "NFC":
		t.nfc = true
	case n.Type == "Sequence":
		for i, part := range n.Normalizers {
			if err := t.setNormalizer(part, fmt.Sprintf("%s.normalizers[%d]", at, i)); err != nil {
				return err
			}
		}
	default:
		return refuse(at, n.Type, "NFC or none")
	}
	return nil
}

// setNamed reads the roles of special tokens; each is a string or an object with "content".
func (t *Tokenizer) setNamed(configJSON []byte) error {
	if configJSON == nil {
		return nil
	}
	var members map[string]json.RawMessage
	if err := json.Unmarshal(configJSON, &members); err != nil {
		return fault.New(fault.Malformed, "bad_tokenizer", "parse tokenizer_config.json: %w", err)
	}
	for _, role := range []string{"bos_token", "eos_token", "pad_token", "unk_token"} {
		raw, ok := members[role]
		if !ok || string(raw) == "null" {
			continue
		}
		var text string
		var object struct{ Content string }
		if json.Unmarshal(raw, &text) != nil {
			if err := json.Unmarshal(raw, &object); err != nil {
				return refuse("tokenizer_config.json "+role, string(raw), "a string or an object with content")
			}
			text = object.Content
		}
		t.named[role] = text
	}
	return nil
}

func kindOf(c *component) string {
	if c == nil {
		return "null"
	}
	return c.Type
}

// refuse is a fault about a member of the file that is not understood.
func refuse(member string, got any, expected string) error {
	e := fault.BadField(member, got, expected)
	e.Code = "unsupported_tokenizer"
	return e
}

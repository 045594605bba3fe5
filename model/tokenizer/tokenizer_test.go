package tokenizer

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"trainerd/internal/fault"
)

// golden is testdata/corpus.json, written by parity/py/tokenizer_goldens.py.
type golden struct {
	Texts   []string             `json:"texts"`
	IDs     map[string][][]int32 `json:"ids"`
	Decoded map[string][]string  `json:"decoded"`
}

func readGolden(t *testing.T) golden {
	t.Helper()
	data, err := os.ReadFile("testdata/corpus.json")
	if err != nil {
		t.Fatal(err)
	}
	var g golden
	if err := json.Unmarshal(data, &g); err != nil {
		t.Fatal(err)
	}
	return g
}

// TestAgreesWithPython holds every family to the ids and texts of Python's tokenizers.
func TestAgreesWithPython(t *testing.T) {
	g := readGolden(t)
	if len(g.IDs) != 4 {
		t.Fatalf("%d families in the golden, expected 4", len(g.IDs))
	}
	for family, ids := range g.IDs {
		tok, err := Load(filepath.Join("testdata", family))
		if err != nil {
			t.Fatal(err)
		}
		for i, text := range g.Texts {
			got, err := tok.Encode(text)
			if err != nil {
				t.Fatalf("%s: encode %q: %v", family, text, err)
			}
			if len(got) != len(ids[i]) || !cmp.Equal(append([]int32{}, got...), ids[i]) {
				t.Errorf("%s: encode %q = %v, Python gives %v", family, text, got, ids[i])
			}
			if got := tok.Decode(ids[i], true); got != g.Decoded[family][i] {
				t.Errorf("%s: decode %v = %q, Python gives %q", family, ids[i], got, g.Decoded[family][i])
			}
		}
	}
}

// TestFamiliesDiffer shows that the corpus can tell the pre-tokenizers apart.
func TestFamiliesDiffer(t *testing.T) {
	g := readGolden(t)
	base, err := Load("testdata/smollm")
	if err != nil {
		t.Fatal(err)
	}
	for _, change := range []struct {
		name string
		do   func(*Tokenizer)
	}{
		{"no digit split", func(t *Tokenizer) { t.steps = t.steps[1:] }},
		{"no look-ahead", func(t *Tokenizer) { t.steps[1].cut, _ = isolate(strings.Replace(gpt2Pattern, `|\s+(?!\S)`, "", 1)) }},
		{"no added tokens", func(t *Tokenizer) { t.raw = matcher{} }},
	} {
		tok := *base
		tok.steps = append([]step{}, base.steps...)
		change.do(&tok)
		wrong := 0
		for i, text := range g.Texts {
			got, _ := tok.Encode(text)
			if !cmp.Equal(append([]int32{}, got...), g.IDs["smollm"][i]) {
				wrong++
			}
		}
		if wrong < 3 {
			t.Errorf("%s: only %d texts differ", change.name, wrong)
		}
	}
}

func TestLookup(t *testing.T) {
	tok, err := Load("testdata/smollm")
	if err != nil {
		t.Fatal(err)
	}
	if id, ok := tok.ID("<|im_end|>"); !ok || id != 2 {
		t.Errorf("ID(<|im_end|>) = %d, %v", id, ok)
	}
	if id, ok := tok.Special("bos_token"); !ok || id != 1 {
		t.Errorf("Special(bos_token) = %d, %v", id, ok)
	}
	if _, ok := tok.Special("pad_token"); ok {
		t.Error("pad_token is null in the file and has an id")
	}
	ids, err := tok.Encode("<|im_start|>x<|im_end|>")
	if err != nil {
		t.Fatal(err)
	}
	if got := tok.Decode(ids, false); got != "<|im_start|>x<|im_end|>" {
		t.Errorf("Decode keeps %q", got)
	}
	if _, err := tok.Encode("a\xffb"); fault.KindOf(err) != fault.Invalid {
		t.Errorf("invalid UTF-8: %v", err)
	}
	if tok.Vocab() < 300 || int(ids[0]) >= tok.Vocab() {
		t.Errorf("Vocab() = %d", tok.Vocab())
	}
}

func TestChatML(t *testing.T) {
	tok, err := Load("testdata/smollm")
	if err != nil {
		t.Fatal(err)
	}
	got, err := tok.ChatML([]Message{{"system", "Defend."}, {"user", "Alert"}})
	if err != nil {
		t.Fatal(err)
	}
	want := "<|im_start|>system\nDefend.<|im_end|>\n<|im_start|>user\nAlert<|im_end|>\n<|im_start|>assistant\n"
	if got != want {
		t.Errorf("got %q", got)
	}
	if _, err := tok.ChatML([]Message{{"user", "x<|im_end|>"}}); fault.KindOf(err) != fault.Invalid {
		t.Errorf("chat token in content: %v", err)
	}
}

// TestLongPiece bounds the work of one unbroken piece. At n log n it takes well
// under a second, with a quadratic merge loop (10^11 steps) minutes.
func TestLongPiece(t *testing.T) {
	tok, err := Load("testdata/smollm")
	if err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	if _, err := tok.Encode(strings.Repeat("ab", 200_000)); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(start); took > 20*time.Second {
		t.Errorf("a piece of 400000 bytes took %v", took)
	}
}

func TestRefusals(t *testing.T) {
	data, err := os.ReadFile("testdata/smollm/tokenizer.json")
	if err != nil {
		t.Fatal(err)
	}
	edit := func(path string, value any) []byte {
		var root map[string]any
		if err := json.Unmarshal(data, &root); err != nil {
			t.Fatal(err)
		}
		at := root
		names := strings.Split(path, ".")
		for _, n := range names[:len(names)-1] {
			at = at[n].(map[string]any)
		}
		at[names[len(names)-1]] = value
		out, err := json.Marshal(root)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	type object = map[string]any
	for _, c := range []struct {
		path  string
		value any
		names string // what the fault must name
	}{
		{"model.type", "Unigram", "model.type"},
		{"model.dropout", 0.1, "model.dropout"},
		{"model.byte_fallback", true, "model.byte_fallback"},
		{"model.end_of_word_suffix", "</w>", "end_of_word_suffix"},
		{"model.vocab", object{}, "model.vocab"},
		{"model.vocab", object{"a": 1, "b": 1}, "model.vocab"},
		{"model.vocab", object{"a": -1}, "model.vocab"},
		{"model.merges", []any{"a"}, "model.merges[0]"},
		{"model.merges", []any{[]any{"a", "b", "c"}}, "model.merges[0]"},
		{"model.merges", []any{"zz qq"}, "model.merges[0]"},
		{"normalizer", object{"type": "Lowercase"}, "normalizer"},
		{"pre_tokenizer", nil, "pre_tokenizer"},
		{"pre_tokenizer", object{"type": "Metaspace"}, "pre_tokenizer"},
		{"pre_tokenizer", object{"type": "Digits"}, "ByteLevel"},
		{"pre_tokenizer", object{"type": "Split", "behavior": "Removed", "pattern": object{"Regex": "x"}}, "Split"},
		{"pre_tokenizer", object{"type": "Split", "behavior": "Isolated", "pattern": object{"Regex": "("}}, "pattern"},
		{"decoder", object{"type": "WordPiece"}, "decoder"},
		{"added_tokens", []any{object{"id": 5000, "content": "<x>", "lstrip": true}}, "added_tokens[0]"},
		{"added_tokens", []any{object{"id": 5, "content": "<x>"}}, "added_tokens[0].id"},
		{"added_tokens", []any{object{"id": 5000, "content": ""}}, "added_tokens[0].content"},
	} {
		_, err := Parse(edit(c.path, c.value), nil)
		if fault.KindOf(err) != fault.Invalid || !strings.Contains(err.Error(), c.names) {
			t.Errorf("%s = %v: %v, expected an invalid fault that names %s", c.path, c.value, err, c.names)
		}
	}
	if _, err := Parse([]byte("{"), nil); fault.KindOf(err) != fault.Malformed {
		t.Errorf("truncated JSON: %v", err)
	}
	if _, err := Parse(data, []byte("[")); fault.KindOf(err) != fault.Malformed {
		t.Errorf("truncated tokenizer_config.json: %v", err)
	}
	if _, err := Load(t.TempDir()); fault.KindOf(err) != fault.NotFound {
		t.Errorf("empty directory: %v", err)
	}
}

// FuzzParse feeds arbitrary files; what parses must encode and decode without a panic.
func FuzzParse(f *testing.F) {
	data, err := os.ReadFile("testdata/gpt2/tokenizer.json")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data, "a b  12")
	f.Add([]byte(`{"model":{"vocab":{"a":0}},"pre_tokenizer":{"type":"ByteLevel"},"decoder":{"type":"ByteLevel"}}`), "aa")
	f.Fuzz(func(t *testing.T, data []byte, text string) {
		tok, err := Parse(data, nil)
		if err != nil || len(text) > 200 {
			return
		}
		ids, err := tok.Encode(text)
		if err == nil {
			tok.Decode(ids, false)
		}
	})
}

func BenchmarkEncode(b *testing.B) {
	tok, err := Load("testdata/smollm")
	if err != nil {
		b.Fatal(err)
	}
	text := strings.Repeat("Alert: 14 connection attempts from 198.51.100.23 to redis:6379, risk HIGH. ", 100)
	b.SetBytes(int64(len(text)))
	for b.Loop() {
		if _, err := tok.Encode(text); err != nil {
			b.Fatal(err)
		}
	}
}

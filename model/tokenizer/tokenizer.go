package tokenizer

import (
	"fmt"
	"strings"
	"unicode/utf8"

	"golang.org/x/text/unicode/norm"

	"trainerd/internal/fault"
)

// Tokenizer is immutable and safe for concurrent use.
type Tokenizer struct {
	nfc      bool
	steps    []step
	model    bpe
	ids      map[string]int32  // every token, added ones included, by its text in the file
	text     map[int32]string  // the reverse
	special  map[int32]bool    // added tokens that Decode may skip
	raw      matcher           // added tokens matched in the text as given
	normed   matcher           // added tokens matched after the normalizer
	named    map[string]string // "eos_token" and the like, from tokenizer_config.json
	vocabEnd int32             // greatest id + 1
}

// Encode returns the ids of a text; special tokens written out in it are
// recognised. Nothing is added: no beginning or end of text. Bytes that the
// vocabulary lacks (of characters its training text never had) are left out, as
// Python's tokenizers does.
func (t *Tokenizer) Encode(text string) ([]int32, error) {
	if !utf8.ValidString(text) {
		return nil, fault.New(fault.Invalid, "not_utf8", "encode text: expected valid UTF-8")
	}
	var out []int32
	t.raw.split(text, func(plain string, added int32) {
		if added >= 0 {
			out = append(out, added)
			return
		}
		if t.nfc {
			plain = norm.NFC.String(plain)
		}
		t.normed.split(plain, func(plain string, added int32) {
			if added >= 0 {
				out = append(out, added)
				return
			}
			for _, piece := range t.pieces(plain) {
				out = t.model.encode(out, piece)
			}
		})
	})
	return out, nil
}

// Decode returns the text of ids, special tokens included unless skipSpecial.
// Ids outside the vocabulary add nothing; bytes that are no UTF-8 become U+FFFD.
func (t *Tokenizer) Decode(ids []int32, skipSpecial bool) string {
	var b []byte
	for _, id := range ids {
		if skipSpecial && t.special[id] {
			continue
		}
		b = appendBytes(b, t.text[id])
	}
	return strings.ToValidUTF8(string(b), "\uFFFD")
}

// ID returns the id of a token by its exact text.
func (t *Tokenizer) ID(token string) (int32, bool) {
	id, ok := t.ids[token]
	return id, ok
}

// Vocab returns the greatest id + 1. A model's embedding may have more rows.
func (t *Tokenizer) Vocab() int { return int(t.vocabEnd) }

// Special returns the id of a token by its role in tokenizer_config.json:
// "bos_token", "eos_token", "pad_token" or "unk_token".
func (t *Tokenizer) Special(role string) (int32, bool) {
	text, ok := t.named[role]
	if !ok {
		return 0, false
	}
	return t.ID(text)
}

// Message is one turn of a chat.
type Message struct {
	Role    string // "system", "user" or "assistant"
	Content string
}

// ChatML renders messages in the format of SmolLM2 and Qwen and opens the
// assistant's turn. It is an error for a vocabulary without that format's
// tokens, and for content that holds one of them.
func (t *Tokenizer) ChatML(messages []Message) (string, error) {
	const start, end = "<|im_start|>", "<|im_end|>"
	for _, token := range []string{start, end} {
		if _, ok := t.ids[token]; !ok {
			return "", fault.New(fault.Invalid, "no_chatml", "render chat: the vocabulary has no token %s", token)
		}
	}
	var b strings.Builder
	for i, m := range messages {
		if strings.Contains(m.Role+m.Content, start) || strings.Contains(m.Role+m.Content, end) {
			return "", fault.BadField(fmt.Sprintf("messages[%d]", i), "a chat token in the text", "text without "+start+" and "+end)
		}
		b.WriteString(start + m.Role + "\n" + m.Content + end + "\n")
	}
	b.WriteString(start + "assistant\n")
	return b.String(), nil
}

// matcher finds added tokens, the longest at the leftmost position.
type matcher struct {
	byFirst map[byte][]match // longest first
}

type match struct {
	text string
	id   int32
}

// split calls yield with the runs between added tokens (id -1) and the tokens.
func (m matcher) split(text string, yield func(plain string, id int32)) {
	if len(m.byFirst) == 0 {
		if text != "" {
			yield(text, -1)
		}
		return
	}
	from := 0
	for i := 0; i < len(text); {
		id, n := m.at(text[i:])
		if n == 0 {
			i++
			continue
		}
		if i > from {
			yield(text[from:i], -1)
		}
		yield(text[i:i+n], id)
		i += n
		from = i
	}
	if from < len(text) {
		yield(text[from:], -1)
	}
}

func (m matcher) at(text string) (id int32, n int) {
	for _, c := range m.byFirst[text[0]] {
		if strings.HasPrefix(text, c.text) {
			return c.id, len(c.text)
		}
	}
	return 0, 0
}

// Package tokenizer turns text into token ids and back, from a Hugging Face
// tokenizer.json (byte-level BPE), for clients of the server and the demos. The
// server itself speaks token ids only.
package tokenizer

// Tokenizer is immutable and safe for concurrent use.
type Tokenizer struct{}

// Load reads tokenizer.json (and tokenizer_config.json for the chat template's special tokens) of a directory.
func Load(dir string) (*Tokenizer, error) { panic("not built yet") }

// Encode returns the ids of a text; special tokens written out in it are recognised.
func (t *Tokenizer) Encode(text string) ([]int32, error) { panic("not built yet") }

// Decode returns the text of ids, special tokens included unless skipSpecial.
func (t *Tokenizer) Decode(ids []int32, skipSpecial bool) string { panic("not built yet") }

// ID returns the id of a token by its exact text.
func (t *Tokenizer) ID(token string) (int32, bool) { panic("not built yet") }

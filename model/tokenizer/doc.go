// Package tokenizer turns text into token ids and back, from a Hugging Face
// tokenizer.json (byte-level BPE), for clients of the server and the demos. The
// server itself speaks token ids only.
//
// It covers the byte-level BPE of the GPT-2, SmolLM2, Qwen2/3 and Llama 3
// families: normalizer none or NFC; pre-tokenizers Digits, Split (isolated) and
// ByteLevel; decoder ByteLevel. A file that asks for anything else is refused
// when it is loaded, since leaving a step out would give other ids silently.
//
// The ids agree with Python's tokenizers library on the corpus of
// testdata/corpus.json. The module github.com/sugarme/tokenizer was measured on
// it first: it cannot compile the Qwen2 and Llama 3 patterns (look-ahead) and gave
// other ids for 79 and 100 of 228 texts with the SmolLM2 and GPT-2 families.
//
// Read tokenizer.go, then load.go (the file), pretokenize.go, bpe.go.
package tokenizer

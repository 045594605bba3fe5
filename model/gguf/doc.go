// Package gguf reads GGUF model files (versions 2 and 3, little-endian; types
// F32, F16, BF16, Q8_0, Q4_0, Q4_1; architectures llama, qwen2, qwen3) as a
// model.Source with Hugging Face tensor names, and writes out the tokenizer
// that a GGUF carries as tokenizer.json.
//
// It converts on the way in: quantised blocks become float32, and the row
// permutation that llama.cpp applies to the q and k projections of the llama
// architecture (its RoPE pairs neighbours, Hugging Face's pairs halves) is
// undone. It does not write GGUF and does not compute on quantised weights.
//
// A header is input from outside: every count, length and offset is checked
// against a limit and against the file's size before memory is taken for it.
//
// Read gguf.go (the Source), then header.go (the container), quant.go (block
// formats), config.go (metadata to model.Config), tokenizer.go.
package gguf

// Package gguf reads GGUF model files (F32, F16, BF16, Q8_0, Q4_0, Q4_1) as a
// model.Source with Hugging Face tensor names, and writes out the tokenizer
// that a GGUF carries as tokenizer.json.
package gguf

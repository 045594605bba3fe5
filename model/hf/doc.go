// Package hf reads and writes Hugging Face model directories: config.json,
// safetensors (one file, or shards and index) and the files that are carried
// through untouched (generation_config.json, tokenizer files).
//
// What it writes loads in transformers and vLLM unchanged.
package hf

package gguf

import "trainerd/model"

// File is an open GGUF file, a model.Source.
type File struct{ model.Source }

// Open reads the header of a GGUF file. Faults name the file and the key or tensor.
func Open(path string) (*File, error) { panic("not built yet") }

// Carried returns the Hugging Face files made from the metadata: tokenizer.json,
// tokenizer_config.json (with the chat template), special_tokens_map.json, generation_config.json.
func (f *File) Carried() (map[string][]byte, error) { panic("not built yet") }

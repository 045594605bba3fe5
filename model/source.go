package model

import "gorgonia.org/tensor"

// Source gives weights by their Hugging Face names ("model.embed_tokens.weight",
// "model.layers.0.self_attn.q_proj.weight", ...), one tensor at a time, so that
// a model larger than memory can be converted or loaded.
type Source interface {
	Config() Config
	// Names lists the tensors, in the order in which they are stored.
	Names() []string
	// Shape returns a tensor's shape, and false when there is no such tensor.
	Shape(name string) ([]int, bool)
	// Read fills dst (float32, row-major, of the tensor's shape). A missing
	// tensor or another shape is an Invalid fault that names file and tensor.
	Read(name string, dst *tensor.Dense) error
	// DType is the stored type of most weights, "F32", "F16" or "BF16".
	DType() string
	Close() error
}

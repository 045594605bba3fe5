// Package model is the policy: a decoder-only transformer (Llama/SmolLM2,
// Qwen2/2.5, Qwen3) with forward, backward, optimizer and sampler, written once
// over kernels.Device.
//
// It knows packed micro-batches in which a prompt stands once and the
// completions of its group attend to it; it knows nothing of rewards, groups,
// jobs or files. Weights come from a Source (model/hf, model/gguf) and leave
// through Model.Export.
//
// Read config.go, then batch.go, then model.go.
package model

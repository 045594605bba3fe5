// Package model is the policy: a decoder-only transformer (Llama/SmolLM2,
// Qwen2/2.5, Qwen3) with forward, backward, optimizer and sampler, written once
// over kernels.Device.
//
// It knows packed micro-batches in which a prompt stands once and the
// completions of its group attend to it; it knows nothing of rewards, groups,
// jobs or files. Weights come from a Source (model/hf, model/gguf) and leave
// through Model.Export.
//
// # Files
//
// Read config.go, then batch.go, then model.go. Then, by what they do:
//
//	layout.go    where each tensor lies in the flat buffers, and its Hugging Face name
//	memory.go    the plan: the real code, run on a device that only counts
//	body.go      embedding and layers, forward and backward
//	head.go      final norm and LM head on the rows that predict
//	recompute.go what the backward pass computes again, and as how little of it fits
//	train.go     Score and ForwardBackward; accumulate.go, where gradients go
//	optim.go     OptimStep
//	generate.go  which sequences decode together; decode.go, the cache and one step of it
//	state.go     optimizer state in and out
//	source.go    random, exported and gradient tensors as a Source
//
// # What holds
//
//   - No memory is taken after Load: scratch is one arena of the planned size.
//   - The gradient does not depend on how a step is cut into micro-batches,
//     head chunks or segments, but for rounding; the same calls give the same bits.
//   - Where the device computes in bfloat16, each weight is a bfloat16 and a
//     signed 16-bit remainder: together the exact float32 master.
package model

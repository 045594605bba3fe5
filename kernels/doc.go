// Package kernels is the arithmetic of trainerd: a sealed Device interface of
// buffers and fused operations, and what is shared by its implementations.
//
// kernels/cpu is the reference device (float32, pure Go and Go assembly);
// kernels/cuda, behind the build tag "cuda", is the fast one. Every operation
// is tested on every device present against a float64 reference by
// kernels/kerneltest. Only the packages model and sagrpo call a device.
//
// # Letters
//
//	T  tokens of a packed micro-batch        N  predicted tokens (rows of the LM head)
//	d  hidden size                           V  vocabulary size
//	H  query heads                           KV key/value heads (H is a multiple of KV)
//	hd head dimension                        F  feed-forward size
//	W  H*hd + 2*KV*hd, a row of packed q|k|v
//
// All matrices are row-major and contiguous. Weights are [out, in] as in
// Hugging Face files, so y = x·Wᵀ is Gemm with TransB.
//
// # Order and errors
//
// Operations are enqueued in call order and return nothing; Sync waits and
// returns the first error, which names operation and shapes. Shapes that do
// not fit are a programmer's error and panic. No operation uses float atomics
// or an order that depends on the number of workers: the same device, inputs
// and calls give the same bits.
//
// Read device.go first, then plan.go (memory) and surrogate.go (the loss of one token).
package kernels

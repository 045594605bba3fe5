// Package cuda is the NVIDIA device: bfloat16 weights and activations, float32
// accumulation, matrix products by cuBLASLt and everything else by the kernels
// of the .cu files here, which KERNELS.md describes.
//
// # Layers
//
// The operations (rows.go, linear.go, norm.go, attention.go, head.go, optim.go
// and so on) are plain Go in every build: they check shapes and turn each call
// into a few launches. One goroutine, locked to an OS thread, owns the CUDA
// context and runs those launches in order (queue.go). It speaks to the card
// through the small interface driver (driver.go), of which there are two:
// driver_cuda.go on gorgonia.org/cu (build tag cuda), and the emulator
// (build tag cudaemu), which runs the same kernels on the CPU so that all of
// this can be tested where there is no GPU. Both compute matrix products by
// lt.c; choices.go says by which of cuBLASLt's algorithms, or by gemm.cu.
//
// # Memory
//
// Persistent buffers are allocations of their own, an arena is one allocation
// used as a stack; both are aligned to 256 bytes. Reductions share a workspace
// that the device takes when it is opened, as cuBLASLt does, so that a memory
// plan (kernels.NewPlanner) counts everything else to the byte.
//
// # Errors
//
// A failed launch or copy is kept with the operation's name and shapes; what was
// queued behind it is dropped until Sync has returned it. After an error that
// CUDA calls sticky (an illegal address, say) the context is lost and every call
// fails with the code "device_lost": close the device and open it anew.
//
// Read device.go first, then queue.go.
package cuda

// What gorgonia.org/cu lacks: launches from a packed block of parameters, large
// dynamic shared memory, pinned memory, stream capture, and matrix products by
// cuBLASLt, which is loaded at run time so that the program starts without it.
// Functions return 0 or a CUresult (cuBLASLt: a cublasStatus_t, or a negative
// number where the library has no such function).
#pragma once
#include <cuda.h>
#include <stddef.h>
#include <stdint.h>

// Result of cuInit, or -1 with the reason when there is no driver.
int trainerd_driver_status(char *text, int n);

int tr_allow_shared(CUfunction f, int bytes);
int tr_launch(CUfunction f, unsigned gx, unsigned gy, unsigned bx, unsigned by, unsigned shared, CUstream stream, void *args, size_t size);
int tr_pinned(void **p, size_t n);
void tr_unpin(void *p);

int tr_capture_begin(CUstream stream);
int tr_capture_end(CUstream stream, CUgraphExec *exec);
int tr_replay(CUgraphExec exec, CUstream stream);
void tr_discard(CUgraphExec exec);

// lt is cuBLASLt: its functions and one handle.
typedef struct lt lt;
// lt_open loads the newest library it finds; on failure text says why.
lt *lt_open(char *text, int n);
void lt_close(lt *l);

// lt_shape is a product that algorithms are chosen for; see product in driver.go.
typedef struct {
	int64_t m, n, k, lda, ldb, ldc;
	int trans_a, trans_b, float32_c, has_bias;
	int align_a, align_b, align_c; // bytes that the addresses are multiples of, at most 256
	size_t workspace;
} lt_shape;
typedef struct lt_plan lt_plan;
// lt_plan_make asks for the best algorithms by the library's own heuristics; bias is any address of the alignment to come.
int lt_plan_make(lt *l, const lt_shape *s, CUdeviceptr bias, lt_plan **out);
int lt_plan_run(lt *l, lt_plan *p, CUdeviceptr a, CUdeviceptr b, CUdeviceptr c, int accumulate, CUdeviceptr bias, CUdeviceptr workspace, CUstream stream);
void lt_plan_free(lt *l, lt_plan *p);

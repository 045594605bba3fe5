// Matrix products by cuBLASLt, which is loaded at run time so that the program
// starts without it. Functions return 0 or a cublasStatus_t.
#pragma once
#include <stddef.h>
#include <stdint.h>

// lt is cuBLASLt: its functions and one handle.
typedef struct lt lt;
// lt_open loads the named library, or with NULL the newest it finds; on failure text says why.
lt *lt_open(const char *file, char *text, int n);
void lt_close(lt *l);
size_t lt_version(lt *l);

// lt_shape is a product; see product in driver.go.
typedef struct {
	int64_t m, n, k, lda, ldb, ldc;
	int trans_a, trans_b, float32_c, has_bias;
	int align_a, align_b, align_c; // bytes that the addresses are multiples of, at most 256
	size_t workspace;
} lt_shape;

// lt_plan is a shape with its descriptors.
typedef struct lt_plan lt_plan;
// lt_plan_make describes a product; bias is any address of the alignment to come.
int lt_plan_make(lt *l, const lt_shape *s, uint64_t bias, lt_plan **out);
void lt_plan_free(lt *l, lt_plan *p);

// lt_algo is how to compute a product, as the library writes it down: to be used with the same version only.
typedef struct { uint64_t data[8]; } lt_algo;
// lt_plan_algos gives up to max algorithms, the best first by the library's own heuristics.
int lt_plan_algos(lt *l, lt_plan *p, lt_algo *out, int max, int *found);
// lt_plan_check says whether an algorithm fits the plan and its workspace.
int lt_plan_check(lt *l, lt_plan *p, const lt_algo *a);
int lt_plan_run(lt *l, lt_plan *p, const lt_algo *algo, uint64_t a, uint64_t b, uint64_t c, int accumulate, uint64_t bias, uint64_t workspace, void *stream);

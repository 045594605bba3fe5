//go:build cuda || cudaemu

#include "lt.h"

#include <cublasLt.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct lt {
	void *library;
	cublasLtHandle_t handle;
	__typeof__(&cublasLtCreate) create;
	__typeof__(&cublasLtDestroy) destroy;
	__typeof__(&cublasLtGetVersion) version;
	__typeof__(&cublasLtMatmul) matmul;
	__typeof__(&cublasLtMatmulAlgoGetHeuristic) heuristic;
	__typeof__(&cublasLtMatmulAlgoCheck) check;
	__typeof__(&cublasLtMatmulDescCreate) desc_create;
	__typeof__(&cublasLtMatmulDescDestroy) desc_destroy;
	__typeof__(&cublasLtMatmulDescSetAttribute) desc_set;
	__typeof__(&cublasLtMatrixLayoutCreate) layout_create;
	__typeof__(&cublasLtMatrixLayoutDestroy) layout_destroy;
	__typeof__(&cublasLtMatmulPreferenceCreate) pref_create;
	__typeof__(&cublasLtMatmulPreferenceDestroy) pref_destroy;
	__typeof__(&cublasLtMatmulPreferenceSetAttribute) pref_set;
};

_Static_assert(sizeof(lt_algo) == sizeof(cublasLtMatmulAlgo_t), "an algorithm is 64 bytes");

lt *lt_open(const char *file, char *text, int n) {
	static const char *const files[] = {"libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"};
	lt *l = calloc(1, sizeof *l);
	char first[256] = "";
	size_t count = file ? 1 : sizeof files / sizeof *files;
	for (size_t i = 0; i < count && !l->library; i++) {
		const char *name = file ? file : files[i];
		l->library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
		if (!l->library && !*first) {
			const char *e = dlerror();
			snprintf(first, sizeof first, "%s", e ? e : name);
		}
	}
	if (!l->library) {
		snprintf(text, n, "%s", first);
		free(l);
		return NULL;
	}
	struct {
		const char *name;
		void **to;
	} wanted[] = {
		{"cublasLtCreate", (void **)&l->create},
		{"cublasLtDestroy", (void **)&l->destroy},
		{"cublasLtGetVersion", (void **)&l->version},
		{"cublasLtMatmul", (void **)&l->matmul},
		{"cublasLtMatmulAlgoGetHeuristic", (void **)&l->heuristic},
		{"cublasLtMatmulAlgoCheck", (void **)&l->check},
		{"cublasLtMatmulDescCreate", (void **)&l->desc_create},
		{"cublasLtMatmulDescDestroy", (void **)&l->desc_destroy},
		{"cublasLtMatmulDescSetAttribute", (void **)&l->desc_set},
		{"cublasLtMatrixLayoutCreate", (void **)&l->layout_create},
		{"cublasLtMatrixLayoutDestroy", (void **)&l->layout_destroy},
		{"cublasLtMatmulPreferenceCreate", (void **)&l->pref_create},
		{"cublasLtMatmulPreferenceDestroy", (void **)&l->pref_destroy},
		{"cublasLtMatmulPreferenceSetAttribute", (void **)&l->pref_set},
	};
	for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
		if (!(*wanted[i].to = dlsym(l->library, wanted[i].name))) {
			snprintf(text, n, "libcublasLt has no %s", wanted[i].name);
			dlclose(l->library);
			free(l);
			return NULL;
		}
	}
	cublasStatus_t s = l->create(&l->handle);
	if (s) {
		snprintf(text, n, "cublasLtCreate: status %d", (int)s);
		dlclose(l->library);
		free(l);
		return NULL;
	}
	return l;
}

// lt_close keeps the library loaded: the next device opened needs it again.
void lt_close(lt *l) {
	l->destroy(l->handle);
	free(l);
}

size_t lt_version(lt *l) { return l->version(); }

struct lt_plan {
	cublasLtMatmulDesc_t desc;
	cublasLtMatrixLayout_t a, b, c;
	lt_shape shape;
};

void lt_plan_free(lt *l, lt_plan *p) {
	if (p->desc) l->desc_destroy(p->desc);
	if (p->a) l->layout_destroy(p->a);
	if (p->b) l->layout_destroy(p->b);
	if (p->c) l->layout_destroy(p->c);
	free(p);
}

int lt_plan_make(lt *l, const lt_shape *s, uint64_t bias, lt_plan **out) {
	lt_plan *p = calloc(1, sizeof *p);
	p->shape = *s;
	int32_t ta = s->trans_a ? CUBLAS_OP_T : CUBLAS_OP_N, tb = s->trans_b ? CUBLAS_OP_T : CUBLAS_OP_N, bias_type = CUDA_R_16BF;
	cudaDataType_t ct = s->float32_c ? CUDA_R_32F : CUDA_R_16BF;
	uint32_t epilogue = CUBLASLT_EPILOGUE_BIAS;
	int r = l->desc_create(&p->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F);
	if (!r) r = l->desc_set(p->desc, CUBLASLT_MATMUL_DESC_TRANSA, &ta, sizeof ta);
	if (!r) r = l->desc_set(p->desc, CUBLASLT_MATMUL_DESC_TRANSB, &tb, sizeof tb);
	if (s->has_bias) {
		if (!r) r = l->desc_set(p->desc, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue);
		if (!r) r = l->desc_set(p->desc, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &bias_type, sizeof bias_type);
		if (!r) r = l->desc_set(p->desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof bias);
	}
	if (!r) r = l->layout_create(&p->a, CUDA_R_16BF, s->trans_a ? s->k : s->m, s->trans_a ? s->m : s->k, s->lda);
	if (!r) r = l->layout_create(&p->b, CUDA_R_16BF, s->trans_b ? s->n : s->k, s->trans_b ? s->k : s->n, s->ldb);
	if (!r) r = l->layout_create(&p->c, ct, s->m, s->n, s->ldc);
	if (r) {
		lt_plan_free(l, p);
		return r;
	}
	*out = p;
	return 0;
}

enum { most = 16 };

// Partial sums over k are added in float32 or not made at all.
int lt_plan_algos(lt *l, lt_plan *p, lt_algo *out, int max, int *found) {
	cublasLtMatmulHeuristicResult_t best[most];
	cublasLtMatmulPreference_t pref = NULL;
	int n = 0, r = l->pref_create(&pref);
	uint64_t workspace = p->shape.workspace;
	uint32_t scheme = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE, a = p->shape.align_a, b = p->shape.align_b, c = p->shape.align_c;
	if (!r) r = l->pref_set(pref, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace);
	if (!r) r = l->pref_set(pref, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &scheme, sizeof scheme);
	if (!r) r = l->pref_set(pref, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &a, sizeof a);
	if (!r) r = l->pref_set(pref, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &b, sizeof b);
	if (!r) r = l->pref_set(pref, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &c, sizeof c);
	if (!r) r = l->pref_set(pref, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &c, sizeof c);
	if (!r) r = l->heuristic(l->handle, p->desc, p->a, p->b, p->c, p->c, pref, max < most ? max : most, best, &n);
	if (pref) l->pref_destroy(pref);
	*found = 0;
	for (int i = 0; !r && i < n; i++)
		if (best[i].state == CUBLAS_STATUS_SUCCESS && best[i].workspaceSize <= p->shape.workspace) memcpy(&out[(*found)++], &best[i].algo, sizeof *out);
	return r;
}

int lt_plan_check(lt *l, lt_plan *p, const lt_algo *a) {
	cublasLtMatmulAlgo_t algo;
	memcpy(&algo, a, sizeof algo);
	cublasLtMatmulHeuristicResult_t result;
	memset(&result, 0, sizeof result);
	int r = l->check(l->handle, p->desc, p->a, p->b, p->c, p->c, &algo, &result);
	if (!r) r = result.state;
	if (!r && result.workspaceSize > p->shape.workspace) r = CUBLAS_STATUS_NOT_SUPPORTED;
	return r;
}

int lt_plan_run(lt *l, lt_plan *p, const lt_algo *algo, uint64_t a, uint64_t b, uint64_t c, int accumulate, uint64_t bias, uint64_t workspace, void *stream) {
	float one = 1, beta = accumulate ? 1 : 0;
	if (bias) {
		int r = l->desc_set(p->desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof bias);
		if (r) return r;
	}
	cublasLtMatmulAlgo_t with;
	memcpy(&with, algo, sizeof with);
	return l->matmul(l->handle, p->desc, &one, (const void *)a, p->a, (const void *)b, p->b, &beta, (const void *)c, p->c, (void *)c, p->c, &with, (void *)workspace,
	                 p->shape.workspace, (cudaStream_t)stream);
}

//go:build cuda

#include "shim.h"

#include <cublasLt.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int tr_allow_shared(CUfunction f, int bytes) { return cuFuncSetAttribute(f, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, bytes); }

int tr_launch(CUfunction f, unsigned gx, unsigned gy, unsigned bx, unsigned by, unsigned shared, CUstream stream, void *args, size_t size) {
	void *extra[] = {CU_LAUNCH_PARAM_BUFFER_POINTER, args, CU_LAUNCH_PARAM_BUFFER_SIZE, &size, CU_LAUNCH_PARAM_END};
	return cuLaunchKernel(f, gx, gy, 1, bx, by, 1, shared, stream, NULL, extra);
}

int tr_pinned(void **p, size_t n) { return cuMemHostAlloc(p, n, CU_MEMHOSTALLOC_PORTABLE); }
void tr_unpin(void *p) { cuMemFreeHost(p); }

int tr_capture_begin(CUstream stream) { return cuStreamBeginCapture(stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL); }

int tr_capture_end(CUstream stream, CUgraphExec *exec) {
	CUgraph graph;
	int r = cuStreamEndCapture(stream, &graph);
	if (r) return r;
	r = cuGraphInstantiateWithFlags(exec, graph, 0);
	cuGraphDestroy(graph);
	return r;
}
int tr_replay(CUgraphExec exec, CUstream stream) { return cuGraphLaunch(exec, stream); }
void tr_discard(CUgraphExec exec) { cuGraphExecDestroy(exec); }

struct lt {
	void *library;
	cublasLtHandle_t handle;
	__typeof__(&cublasLtCreate) create;
	__typeof__(&cublasLtDestroy) destroy;
	__typeof__(&cublasLtMatmul) matmul;
	__typeof__(&cublasLtMatmulAlgoGetHeuristic) heuristic;
	__typeof__(&cublasLtMatmulDescCreate) desc_create;
	__typeof__(&cublasLtMatmulDescDestroy) desc_destroy;
	__typeof__(&cublasLtMatmulDescSetAttribute) desc_set;
	__typeof__(&cublasLtMatrixLayoutCreate) layout_create;
	__typeof__(&cublasLtMatrixLayoutDestroy) layout_destroy;
	__typeof__(&cublasLtMatmulPreferenceCreate) pref_create;
	__typeof__(&cublasLtMatmulPreferenceDestroy) pref_destroy;
	__typeof__(&cublasLtMatmulPreferenceSetAttribute) pref_set;
};

lt *lt_open(char *text, int n) {
	static const char *const files[] = {"libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"};
	lt *l = calloc(1, sizeof *l);
	char first[256] = "";
	for (size_t i = 0; i < sizeof files / sizeof *files && !l->library; i++) {
		l->library = dlopen(files[i], RTLD_NOW | RTLD_LOCAL);
		if (!l->library && !*first) {
			const char *e = dlerror();
			snprintf(first, sizeof first, "%s", e ? e : files[i]);
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
		{"cublasLtMatmul", (void **)&l->matmul},
		{"cublasLtMatmulAlgoGetHeuristic", (void **)&l->heuristic},
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

enum { kept = 8 };

struct lt_plan {
	cublasLtMatmulDesc_t desc;
	cublasLtMatrixLayout_t a, b, c;
	cublasLtMatmulHeuristicResult_t best[kept];
	int found, use;
	size_t workspace;
};

void lt_plan_free(lt *l, lt_plan *p) {
	if (p->desc) l->desc_destroy(p->desc);
	if (p->a) l->layout_destroy(p->a);
	if (p->b) l->layout_destroy(p->b);
	if (p->c) l->layout_destroy(p->c);
	free(p);
}

// choose fills in the algorithms. Partial sums over k are added in float32 or not made at all.
static int choose(lt *l, const lt_shape *s, lt_plan *p) {
	cublasLtMatmulPreference_t pref = NULL;
	int r = l->pref_create(&pref);
	uint32_t scheme = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE, a = s->align_a, b = s->align_b, c = s->align_c;
	if (!r) r = l->pref_set(pref, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &p->workspace, sizeof p->workspace);
	if (!r) r = l->pref_set(pref, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &scheme, sizeof scheme);
	if (!r) r = l->pref_set(pref, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &a, sizeof a);
	if (!r) r = l->pref_set(pref, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &b, sizeof b);
	if (!r) r = l->pref_set(pref, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &c, sizeof c);
	if (!r) r = l->pref_set(pref, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &c, sizeof c);
	if (!r) r = l->heuristic(l->handle, p->desc, p->a, p->b, p->c, p->c, pref, kept, p->best, &p->found);
	if (pref) l->pref_destroy(pref);
	if (!r && p->found == 0) r = CUBLAS_STATUS_NOT_SUPPORTED;
	return r;
}

int lt_plan_make(lt *l, const lt_shape *s, CUdeviceptr bias, lt_plan **out) {
	lt_plan *p = calloc(1, sizeof *p);
	p->workspace = s->workspace;
	cublasOperation_t ta = s->trans_a ? CUBLAS_OP_T : CUBLAS_OP_N, tb = s->trans_b ? CUBLAS_OP_T : CUBLAS_OP_N;
	cudaDataType_t ct = s->float32_c ? CUDA_R_32F : CUDA_R_16BF, bias_type = CUDA_R_16BF;
	cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_BIAS;
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
	if (!r) r = choose(l, s, p);
	if (r) {
		lt_plan_free(l, p);
		return r;
	}
	*out = p;
	return 0;
}

int lt_plan_run(lt *l, lt_plan *p, CUdeviceptr a, CUdeviceptr b, CUdeviceptr c, int accumulate, CUdeviceptr bias, CUdeviceptr workspace, CUstream stream) {
	float one = 1, beta = accumulate ? 1 : 0;
	int r = CUBLAS_STATUS_NOT_SUPPORTED;
	if (bias) {
		r = l->desc_set(p->desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof bias);
		if (r) return r;
	}
	// An algorithm that turns out not to be supported is passed over for good.
	for (; p->use < p->found; p->use++) {
		if (p->best[p->use].state != CUBLAS_STATUS_SUCCESS) continue;
		r = l->matmul(l->handle, p->desc, &one, (const void *)a, p->a, (const void *)b, p->b, &beta, (const void *)c, p->c, (void *)c, p->c, &p->best[p->use].algo,
		              (void *)workspace, p->workspace, (cudaStream_t)stream);
		if (r != CUBLAS_STATUS_NOT_SUPPORTED && r != CUBLAS_STATUS_INVALID_VALUE) return r;
	}
	return r ? r : CUBLAS_STATUS_NOT_SUPPORTED;
}

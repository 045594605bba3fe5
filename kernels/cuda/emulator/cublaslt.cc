// A strict stand-in for libcublasLt: the functions that lt.c loads, with the
// checks that NVIDIA's documentation and header name, and products on the CPU.
// Where the real library would crash or read what it should not, this one refuses
// and says why on stderr, so that lt.c and what calls it are tested as they are.
//
// It offers up to six algorithms, which differ in the order of their sums and so
// in bits. TRAINERD_CUBLASLT, read by cublasLtCreate, sets how it behaves; parts
// are divided by semicolons:
//   cost=9,4,7   what each algorithm costs on a clock of its own, which standin_clock reads
//   offer=3      how many algorithms it offers, in all
//   refuse=0,2   algorithms that are offered and then turn out not to be supported
//   fail=1       algorithms that end in an execution error
//   version=N    what cublasLtGetVersion says
#include <cublasLt.h>

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <functional>
#include <string>
#include <vector>

namespace {

enum : uint64_t { kHandle = 0x68616e646c65, kDesc = 0x64657363, kLayout = 0x6c61796f7574, kPref = 0x70726566, kAlgo = 0x616c676f };
enum { kAlgorithms = 6 };

struct Behaviour {
	std::vector<int> cost = std::vector<int>(kAlgorithms, 10), refuse, fail;
	int offer = kAlgorithms;
	size_t version = CUBLAS_VERSION;
} behaviour;
uint64_t clock_now;

struct Handle { uint64_t magic = kHandle; };
struct Desc {
	uint64_t magic = kDesc;
	int32_t compute, scale, transa = CUBLAS_OP_N, transb = CUBLAS_OP_N, bias_type = -1;
	uint32_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
	const void *bias = nullptr;
};
struct Layout {
	uint64_t magic = kLayout;
	int32_t type;
	uint64_t rows, cols;
	int64_t ld;
};
struct Pref {
	uint64_t magic = kPref;
	uint64_t workspace = 0;
	uint32_t scheme = CUBLASLT_REDUCTION_SCHEME_MASK, align[4] = {256, 256, 256, 256};
};
// Algo is what the opaque 64 bytes hold.
struct Algo {
	uint64_t magic, id, align, workspace, kind, reserved[2], sum;
};
static_assert(sizeof(Algo) == sizeof(cublasLtMatmulAlgo_t), "an algorithm is 64 bytes");

cublasStatus_t refuse(cublasStatus_t status, const char *format, ...) {
	va_list args;
	va_start(args, format);
	fputs("cublaslt stand-in: ", stderr);
	vfprintf(stderr, format, args);
	fputc('\n', stderr);
	va_end(args);
	return status;
}

template <class T, class H>
T *as(H handle, uint64_t magic) {
	T *t = reinterpret_cast<T *>(handle);
	return t && t->magic == magic ? t : nullptr;
}

std::vector<int> numbers(const std::string &text, const char *key) {
	std::vector<int> out;
	size_t at = (";" + text).find(std::string(";") + key + "=");
	if (at == std::string::npos) return out;
	const char *p = text.c_str() + at + strlen(key) + 1;
	for (char *end; *p && *p != ';'; p = *end == ',' ? end + 1 : end) out.push_back(int(strtol(p, &end, 10)));
	return out;
}

size_t size_of(int32_t type) { return type == CUDA_R_16BF || type == CUDA_R_16F ? 2 : 4; }

struct Shape {
	int64_t m, n, k;
	Layout *a, *b, *c, *d;
	Desc *desc;
};

// Whether the descriptors make a product that the documentation's table of
// supported types lists; fills in the shape.
cublasStatus_t shape_of(cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d, Shape *s) {
	s->desc = as<Desc>(desc, kDesc);
	s->a = as<Layout>(a, kLayout), s->b = as<Layout>(b, kLayout), s->c = as<Layout>(c, kLayout), s->d = as<Layout>(d, kLayout);
	if (!s->desc || !s->a || !s->b || !s->c || !s->d) return refuse(CUBLAS_STATUS_INVALID_VALUE, "a descriptor is missing or of another kind");
	if (s->desc->compute != CUBLAS_COMPUTE_32F || s->desc->scale != CUDA_R_32F)
		return refuse(CUBLAS_STATUS_NOT_SUPPORTED, "compute type %d with scale type %d", s->desc->compute, s->desc->scale);
	if (s->a->type != s->b->type || s->c->type != s->d->type) return refuse(CUBLAS_STATUS_NOT_SUPPORTED, "A and B, or C and D, of two types");
	int32_t in = s->a->type, out = s->d->type;
	bool listed = (in == CUDA_R_16BF && (out == CUDA_R_16BF || out == CUDA_R_32F)) || (in == CUDA_R_16F && (out == CUDA_R_16F || out == CUDA_R_32F)) || (in == CUDA_R_32F && out == CUDA_R_32F);
	if (!listed) return refuse(CUBLAS_STATUS_NOT_SUPPORTED, "inputs of type %d with outputs of type %d", in, out);
	if (in != CUDA_R_16BF) return refuse(CUBLAS_STATUS_NOT_SUPPORTED, "type %d: listed, and not computed by this stand-in", in);
	bool ta = s->desc->transa == CUBLAS_OP_T, tb = s->desc->transb == CUBLAS_OP_T;
	s->m = ta ? s->a->cols : s->a->rows, s->k = ta ? s->a->rows : s->a->cols, s->n = tb ? s->b->rows : s->b->cols;
	int64_t k = tb ? s->b->cols : s->b->rows;
	if (k != s->k || int64_t(s->d->rows) != s->m || int64_t(s->d->cols) != s->n || s->c->rows != s->d->rows || s->c->cols != s->d->cols)
		return refuse(CUBLAS_STATUS_INVALID_VALUE, "op(A) is %ld x %ld, op(B) %ld x %ld, D %lu x %lu", long(s->m), long(s->k), long(k), long(s->n), (unsigned long)s->d->rows, (unsigned long)s->d->cols);
	for (Layout *l : {s->a, s->b, s->c, s->d})
		if (l->rows == 0 || l->cols == 0 || l->ld < int64_t(l->rows))
			return refuse(CUBLAS_STATUS_INVALID_VALUE, "a matrix of %lu x %lu with leading dimension %ld", (unsigned long)l->rows, (unsigned long)l->cols, long(l->ld));
	if (s->desc->epilogue == CUBLASLT_EPILOGUE_BIAS) {
		// "Bias vector elements are the same type as the elements of output matrix", for all types but int8 and fp8.
		if (s->desc->bias_type != -1 && s->desc->bias_type != out) return refuse(CUBLAS_STATUS_NOT_SUPPORTED, "a bias of type %d on a D of type %d", s->desc->bias_type, out);
		if (!s->desc->bias) return refuse(CUBLAS_STATUS_INVALID_VALUE, "a bias epilogue without a pointer");
		if (reinterpret_cast<uintptr_t>(s->desc->bias) % 16) return refuse(CUBLAS_STATUS_NOT_SUPPORTED, "a bias that is not 16-byte aligned, at which some versions crash");
	} else if (s->desc->epilogue != CUBLASLT_EPILOGUE_DEFAULT) {
		return refuse(CUBLAS_STATUS_NOT_SUPPORTED, "epilogue %u", s->desc->epilogue);
	}
	return CUBLAS_STATUS_SUCCESS;
}

uint64_t kind_of(const Shape &s) {
	return uint64_t(s.d->type) << 16 | uint64_t(s.desc->transa) << 8 | uint64_t(s.desc->transb) << 4 | s.desc->epilogue << 24;
}

uint64_t sum_of(const Algo &a) {
	uint64_t h = 1469598103934665603u;
	for (uint64_t x : {a.magic, a.id, a.align, a.workspace, a.kind}) h = (h ^ x) * 1099511628211u;
	return h;
}

// The widest access that the leading dimensions allow, in bytes.
uint64_t widest(const Shape &s) {
	uint64_t most = 16;
	for (const Layout *l : {s.a, s.b, s.d})
		while (l->ld * size_of(l->type) % most) most /= 2;
	return most;
}

uint64_t workspace_of(int id, const Shape &s) {
	switch (id) {
	case 1: return uint64_t(s.m) * s.n * 4 * 2; // split over k in two
	case 4: return uint64_t(s.m) * s.n * 4 * 4;
	}
	return 0;
}

cublasStatus_t check(const Shape &s, const cublasLtMatmulAlgo_t *algo, Algo *a) {
	if (!algo) return refuse(CUBLAS_STATUS_INVALID_VALUE, "no algorithm");
	memcpy(a, algo, sizeof *a);
	if (a->magic != kAlgo || a->id >= kAlgorithms || a->sum != sum_of(*a)) return refuse(CUBLAS_STATUS_INVALID_VALUE, "an algorithm that no heuristic gave");
	if (a->kind != kind_of(s)) return refuse(CUBLAS_STATUS_INVALID_VALUE, "an algorithm of another combination of types, transpositions and epilogue");
	if (a->align > widest(s)) return refuse(CUBLAS_STATUS_NOT_SUPPORTED, "an algorithm of %lu-byte accesses for leading dimensions that allow %lu", (unsigned long)a->align, (unsigned long)widest(s));
	return CUBLAS_STATUS_SUCCESS;
}

float bf(uint16_t x) {
	uint32_t b = uint32_t(x) << 16;
	float f;
	memcpy(&f, &b, 4);
	return f;
}
uint16_t to_bf(float x) {
	uint32_t b;
	memcpy(&b, &x, 4);
	if (x != x) return 0x7fff;
	return uint16_t((b + 0x7fff + (b >> 16 & 1)) >> 16);
}

// op(X) as rows of the product's inner dimension.
std::vector<float> rows(const uint16_t *x, int64_t n, int64_t k, int64_t ld, bool k_first) {
	std::vector<float> out(n * k);
	for (int64_t i = 0; i < n; i++)
		for (int64_t j = 0; j < k; j++) out[i * k + j] = bf(k_first ? x[i * ld + j] : x[j * ld + i]);
	return out;
}

float dot(const float *x, const float *y, int64_t from, int64_t to, int64_t step) {
	float sum = 0;
	if (step < 0)
		for (int64_t l = to - 1; l >= from; l--) sum += x[l] * y[l];
	else
		for (int64_t l = from; l < to; l += step) sum += x[l] * y[l];
	return sum;
}

float inner(int id, const float *x, const float *y, int64_t k) {
	switch (id) {
	case 1: return dot(x, y, 0, k / 2, 1) + dot(x, y, k / 2, k, 1);
	case 2: return dot(x, y, 0, k, -1);
	case 3: return dot(x, y, 0, k, 2) + dot(x, y, 1, k, 2);
	case 4: return (dot(x, y, 0, k / 4, 1) + dot(x, y, k / 4, k / 2, 1)) + (dot(x, y, k / 2, k - k / 4, 1) + dot(x, y, k - k / 4, k, 1));
	case 5: return dot(x, y, 0, k, 3) + dot(x, y, 1, k, 3) + dot(x, y, 2, k, 3);
	}
	return dot(x, y, 0, k, 1);
}

bool has(const std::vector<int> &v, int x) { return std::find(v.begin(), v.end(), x) != v.end(); }

template <class T>
cublasStatus_t set(T *to, const void *buf, size_t n, const char *what) {
	if (!buf || n != sizeof *to) return refuse(CUBLAS_STATUS_INVALID_VALUE, "%s is %zu bytes, got %zu", what, sizeof *to, n);
	memcpy(to, buf, n);
	return CUBLAS_STATUS_SUCCESS;
}

bool overlap(const void *a, size_t an, const void *b, size_t bn) {
	auto x = reinterpret_cast<uintptr_t>(a), y = reinterpret_cast<uintptr_t>(b);
	return x < y + bn && y < x + an;
}
// On the stream of the driver's stand-in, where that is loaded, work is done when its turn comes.
void on_stream(cudaStream_t stream, std::function<void()> work) {
	auto enqueue = reinterpret_cast<void (*)(void *, void (*)(void *), void *)>(dlsym(RTLD_DEFAULT, "standin_enqueue"));
	if (!stream || !enqueue) return work();
	enqueue(stream, [](void *f) {
		auto g = static_cast<std::function<void()> *>(f);
		(*g)();
		delete g;
	}, new std::function<void()>(std::move(work)));
}
bool on_card(const void *p, size_t n) {
	auto inside = reinterpret_cast<int (*)(const void *, size_t)>(dlsym(RTLD_DEFAULT, "standin_inside"));
	return !inside || inside(p, n);
}

size_t extent(const Layout *l) { return ((l->cols - 1) * l->ld + l->rows) * size_of(l->type); }

} // namespace

extern "C" {

// Units that all products together have cost.
uint64_t standin_clock(void) { return clock_now; }

cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle) {
	if (!handle) return CUBLAS_STATUS_INVALID_VALUE;
	behaviour = Behaviour();
	const char *e = getenv("TRAINERD_CUBLASLT");
	std::string text = e ? e : "";
	auto cost = numbers(text, "cost"), offer = numbers(text, "offer"), version = numbers(text, "version");
	for (size_t i = 0; i < cost.size() && i < kAlgorithms; i++) behaviour.cost[i] = cost[i];
	if (!offer.empty()) behaviour.offer = std::min<int>(offer[0], kAlgorithms);
	if (!version.empty()) behaviour.version = version[0];
	behaviour.refuse = numbers(text, "refuse"), behaviour.fail = numbers(text, "fail");
	*handle = reinterpret_cast<cublasLtHandle_t>(new Handle);
	return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) {
	Handle *h = as<Handle>(handle, kHandle);
	if (!h) return CUBLAS_STATUS_NOT_INITIALIZED;
	h->magic = 0;
	delete h;
	return CUBLAS_STATUS_SUCCESS;
}
size_t cublasLtGetVersion(void) { return behaviour.version; }

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *desc, cublasComputeType_t compute, cudaDataType_t scale) {
	if (!desc) return CUBLAS_STATUS_INVALID_VALUE;
	Desc *d = new Desc;
	d->compute = compute, d->scale = scale;
	*desc = reinterpret_cast<cublasLtMatmulDesc_t>(d);
	return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t desc) {
	Desc *d = as<Desc>(desc, kDesc);
	if (!d) return refuse(CUBLAS_STATUS_INVALID_VALUE, "destroy of what is no product");
	d->magic = 0;
	delete d;
	return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t attr, const void *buf, size_t n) {
	Desc *d = as<Desc>(desc, kDesc);
	if (!d) return refuse(CUBLAS_STATUS_INVALID_VALUE, "an attribute of what is no product");
	int32_t trans = 0;
	switch (attr) {
	case CUBLASLT_MATMUL_DESC_TRANSA:
	case CUBLASLT_MATMUL_DESC_TRANSB: {
		cublasStatus_t s = set(&trans, buf, n, "a transposition");
		if (s) return s;
		if (trans != CUBLAS_OP_N && trans != CUBLAS_OP_T) return refuse(CUBLAS_STATUS_INVALID_VALUE, "transposition %d", trans);
		(attr == CUBLASLT_MATMUL_DESC_TRANSA ? d->transa : d->transb) = trans;
		return CUBLAS_STATUS_SUCCESS;
	}
	case CUBLASLT_MATMUL_DESC_EPILOGUE: return set(&d->epilogue, buf, n, "the epilogue");
	case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE: return set(&d->bias_type, buf, n, "the bias type");
	case CUBLASLT_MATMUL_DESC_BIAS_POINTER: return set(&d->bias, buf, n, "the bias pointer");
	default: return refuse(CUBLAS_STATUS_INVALID_VALUE, "attribute %d of a product", int(attr));
	}
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *layout, cudaDataType type, uint64_t rows, uint64_t cols, int64_t ld) {
	if (!layout) return CUBLAS_STATUS_INVALID_VALUE;
	Layout *l = new Layout;
	l->type = type, l->rows = rows, l->cols = cols, l->ld = ld;
	*layout = reinterpret_cast<cublasLtMatrixLayout_t>(l);
	return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
	Layout *l = as<Layout>(layout, kLayout);
	if (!l) return refuse(CUBLAS_STATUS_INVALID_VALUE, "destroy of what is no layout");
	l->magic = 0;
	delete l;
	return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *pref) {
	if (!pref) return CUBLAS_STATUS_INVALID_VALUE;
	*pref = reinterpret_cast<cublasLtMatmulPreference_t>(new Pref);
	return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t pref) {
	Pref *p = as<Pref>(pref, kPref);
	if (!p) return refuse(CUBLAS_STATUS_INVALID_VALUE, "destroy of what is no preference");
	p->magic = 0;
	delete p;
	return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t pref, cublasLtMatmulPreferenceAttributes_t attr, const void *buf, size_t n) {
	Pref *p = as<Pref>(pref, kPref);
	if (!p) return refuse(CUBLAS_STATUS_INVALID_VALUE, "an attribute of what is no preference");
	switch (attr) {
	case CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES: return set(&p->workspace, buf, n, "the workspace limit");
	case CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK: return set(&p->scheme, buf, n, "the reduction mask");
	case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES: return set(&p->align[0], buf, n, "an alignment");
	case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES: return set(&p->align[1], buf, n, "an alignment");
	case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES: return set(&p->align[2], buf, n, "an alignment");
	case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES: return set(&p->align[3], buf, n, "an alignment");
	default: return refuse(CUBLAS_STATUS_INVALID_VALUE, "attribute %d of a preference", int(attr));
	}
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c,
                                              cublasLtMatrixLayout_t d, cublasLtMatmulPreference_t pref, int asked, cublasLtMatmulHeuristicResult_t results[], int *found) {
	Pref *p = as<Pref>(pref, kPref);
	if (!as<Handle>(handle, kHandle)) return CUBLAS_STATUS_NOT_INITIALIZED;
	if (!p || !results || !found || asked <= 0) return refuse(CUBLAS_STATUS_INVALID_VALUE, "a heuristic without preference or room");
	*found = 0;
	Shape s;
	if (cublasStatus_t r = shape_of(desc, a, b, c, d, &s)) return r;
	for (uint32_t x : p->align)
		if (x == 0 || x & (x - 1)) return refuse(CUBLAS_STATUS_INVALID_VALUE, "a minimum alignment of %u", x);
	uint64_t most = widest(s);
	for (uint32_t x : p->align) most = std::min<uint64_t>(most, x);
	for (int id = 0; id < behaviour.offer && *found < asked; id++) {
		uint64_t workspace = workspace_of(id, s);
		if (workspace > p->workspace || (workspace && !(p->scheme & CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE))) continue;
		if (most < 16 && id % 2) continue; // fewer of them for what is not aligned
		Algo x = {kAlgo, uint64_t(id), most, workspace, kind_of(s), {0, 0}, 0};
		x.sum = sum_of(x);
		cublasLtMatmulHeuristicResult_t *r = &results[(*found)++];
		memset(r, 0, sizeof *r);
		memcpy(&r->algo, &x, sizeof x);
		r->workspaceSize = workspace, r->state = CUBLAS_STATUS_SUCCESS, r->wavesCount = 1;
	}
	return *found ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED;
}

cublasStatus_t cublasLtMatmulAlgoCheck(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c,
                                       cublasLtMatrixLayout_t d, const cublasLtMatmulAlgo_t *algo, cublasLtMatmulHeuristicResult_t *result) {
	if (!as<Handle>(handle, kHandle)) return CUBLAS_STATUS_NOT_INITIALIZED;
	if (!result) return CUBLAS_STATUS_INVALID_VALUE;
	Shape s;
	Algo x;
	if (cublasStatus_t r = shape_of(desc, a, b, c, d, &s)) return r;
	if (cublasStatus_t r = check(s, algo, &x)) return r;
	result->workspaceSize = workspace_of(int(x.id), s), result->state = CUBLAS_STATUS_SUCCESS, result->wavesCount = 1;
	return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, const void *alpha, const void *A, cublasLtMatrixLayout_t a, const void *B, cublasLtMatrixLayout_t b,
                              const void *beta, const void *C, cublasLtMatrixLayout_t c, void *D, cublasLtMatrixLayout_t d, const cublasLtMatmulAlgo_t *algo, void *workspace,
                              size_t bytes, cudaStream_t stream) {
	if (!as<Handle>(handle, kHandle)) return CUBLAS_STATUS_NOT_INITIALIZED;
	Shape s;
	Algo x;
	if (cublasStatus_t r = shape_of(desc, a, b, c, d, &s)) return r;
	if (!alpha || !beta || !A || !B || !D) return refuse(CUBLAS_STATUS_INVALID_VALUE, "a pointer is missing");
	float by, keep;
	memcpy(&by, alpha, 4), memcpy(&keep, beta, 4);
	if (keep != 0 && !C) return refuse(CUBLAS_STATUS_INVALID_VALUE, "beta %g without C", keep);
	if (C == D && s.c->ld != s.d->ld) return refuse(CUBLAS_STATUS_INVALID_VALUE, "C in place of D with another layout");
	if (overlap(D, extent(s.d), A, extent(s.a)) || overlap(D, extent(s.d), B, extent(s.b)) || (C && C != D && overlap(D, extent(s.d), C, extent(s.c))))
		return refuse(CUBLAS_STATUS_INVALID_VALUE, "D overlaps an input");
	if (cublasStatus_t r = check(s, algo, &x)) return r;
	for (const void *p : {A, B, C ? C : D, const_cast<const void *>(D)})
		if (reinterpret_cast<uintptr_t>(p) % x.align)
			return refuse(CUBLAS_STATUS_EXECUTION_FAILED, "an address that is no multiple of %lu bytes, which the algorithm was told it is", (unsigned long)x.align);
	uint64_t need = workspace_of(int(x.id), s);
	if (bytes < need) return refuse(CUBLAS_STATUS_INVALID_VALUE, "a workspace of %zu bytes, %lu wanted", bytes, (unsigned long)need);
	if (bytes && (!workspace || reinterpret_cast<uintptr_t>(workspace) % 256)) return refuse(CUBLAS_STATUS_INVALID_VALUE, "a workspace that is not 256-byte aligned");
	if (!on_card(A, extent(s.a)) || !on_card(B, extent(s.b)) || !on_card(D, extent(s.d)) || (bytes && !on_card(workspace, bytes)))
		return refuse(CUBLAS_STATUS_EXECUTION_FAILED, "a matrix outside the card's memory");
	if (has(behaviour.refuse, int(x.id))) return CUBLAS_STATUS_NOT_SUPPORTED;
	if (has(behaviour.fail, int(x.id))) return CUBLAS_STATUS_EXECUTION_FAILED;
	const uint16_t *bias = s.desc->epilogue == CUBLASLT_EPILOGUE_BIAS ? static_cast<const uint16_t *>(s.desc->bias) : nullptr;
	// What descriptors say now is what counts.
	int64_t m = s.m, n = s.n, k = s.k, lda = s.a->ld, ldb = s.b->ld, ldc = s.c->ld, ldd = s.d->ld;
	bool ta = s.desc->transa == CUBLAS_OP_T, tb = s.desc->transb == CUBLAS_OP_T, wide = s.d->type == CUDA_R_32F;
	int id = int(x.id);
	on_stream(stream, [=] {
		clock_now += behaviour.cost[id];
		memset(workspace, 0xff, std::min<size_t>(need, 1 << 16)); // what was there is gone
		auto ra = rows(static_cast<const uint16_t *>(A), m, k, lda, ta), rb = rows(static_cast<const uint16_t *>(B), n, k, ldb, !tb);
		for (int64_t j = 0; j < n; j++) {
			for (int64_t i = 0; i < m; i++) {
				float v = by * inner(id, &ra[i * k], &rb[j * k], k);
				if (wide) {
					if (keep != 0) v += keep * static_cast<const float *>(C)[j * ldc + i];
					static_cast<float *>(D)[j * ldd + i] = v;
					continue;
				}
				if (keep != 0) v += keep * bf(static_cast<const uint16_t *>(C)[j * ldc + i]);
				if (bias) v += bf(bias[i]);
				static_cast<uint16_t *>(D)[j * ldd + i] = to_bf(v);
			}
		}
	});
	return CUBLAS_STATUS_SUCCESS;
}

} // extern "C"

// A strict stand-in for the driver, libcuda.so.1: the functions that driver_cuda.go
// and shim.c call, on one card of compute capability 9.0 whose memory is the host's and whose kernels run on
// the emulator. So the program that is built for a card runs without one.
//
// A stream does nothing before it is waited for: whoever reuses host memory, or
// frees device memory, before a copy is done gets wrong numbers here. Refused
// with a word on stderr: calls from a thread without the context, copies from or to
// host memory that is not page-locked, when they are asked for or when they are done,
// host memory registered twice, not from a page on, or still when the context goes, addresses
// outside allocations, launches beyond the limits of CUDA or the shared memory that
// was asked for. A kernel that is given a pointer to no allocation ends in an illegal
// address, which loses the context as on a card.
#include <cuda.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <sys/mman.h>
#include <time.h>
#include <vector>

extern "C" int emulated_launch(const char *name, unsigned gx, unsigned gy, unsigned bx, unsigned by, unsigned shared, const void *args, size_t size);
extern "C" int emulated_has(const char *name);
extern "C" bool (*emulated_valid)(const void *);

namespace {

const size_t kMemory = size_t(8) << 30, kPage = 4096;
const unsigned kSharedDefault = 48 << 10, kSharedMost = 163 << 10; // the most of sm_80, so that every kernel may run there

struct Event {
	bool timing, recorded = false, done = false;
	double at = 0;
	unsigned long long turn = 0; // of the recording that counts
};
struct Stream {
	struct Context *context;
	std::deque<std::function<void()>> work;
};
struct Allocation {
	size_t bytes, mapped;
	void *map;
};
struct Context {
	CUresult sticky = CUDA_SUCCESS;
	std::vector<Stream *> streams;
	std::map<CUdeviceptr, Allocation> memory;
	std::map<char *, size_t> pinned, registered;
	size_t used = 0;
};
struct Kernel {
	std::string name;
	unsigned shared = kSharedDefault;
};

// One lock: the emulator's state is the process's.
std::recursive_mutex lock;
thread_local Context *current;
Context *running; // whose kernel runs

CUresult refuse(CUresult r, const char *format, ...) {
	va_list args;
	va_start(args, format);
	fputs("cuda stand-in: ", stderr);
	vfprintf(stderr, format, args);
	fputc('\n', stderr);
	va_end(args);
	return r;
}

bool inside(Context *c, CUdeviceptr p, size_t n) {
	auto it = c->memory.upper_bound(p);
	if (it == c->memory.begin()) return false;
	--it;
	return p + n <= it->first + it->second.bytes;
}
bool within(const std::map<char *, size_t> &spans, const void *p, size_t n) {
	auto at = static_cast<char *>(const_cast<void *>(p));
	auto it = spans.upper_bound(at);
	if (it == spans.begin()) return false;
	--it;
	return at + n <= it->first + it->second;
}
bool locked(Context *c, const void *p, size_t n) { return within(c->pinned, p, n) || within(c->registered, p, n); }
bool overlaps(const std::map<char *, size_t> &spans, char *p, size_t n) {
	for (auto &s : spans)
		if (p < s.first + s.second && s.first < p + n) return true;
	return false;
}

double now() {
	timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}

// Every entry: the lock, a context on this thread, and no sticky error.
#define ENTER                                                                                                            \
	std::lock_guard<std::recursive_mutex> held(lock);                                                                      \
	if (!current) return refuse(CUDA_ERROR_INVALID_CONTEXT, "%s on a thread that has no context", __func__);               \
	if (current->sticky) return current->sticky;
#define STREAM(s)                                                                                                        \
	Stream *stream = reinterpret_cast<Stream *>(s);                                                                        \
	if (!stream || stream->context != current) return refuse(CUDA_ERROR_INVALID_HANDLE, "%s on a stream of no or of another context", __func__);

CUresult drain(Stream *s, const bool *until) {
	while (!s->work.empty() && !s->context->sticky && !(until && *until)) {
		auto f = std::move(s->work.front());
		s->work.pop_front();
		f();
	}
	return s->context->sticky;
}

} // namespace

extern "C" {

// For the stand-in of cuBLASLt.
void standin_enqueue(void *stream, void (*run)(void *), void *with) {
	std::lock_guard<std::recursive_mutex> held(lock);
	reinterpret_cast<Stream *>(stream)->work.push_back([=] { run(with); });
}
int standin_inside(const void *p, size_t n) {
	std::lock_guard<std::recursive_mutex> held(lock);
	return current && inside(current, reinterpret_cast<CUdeviceptr>(p), n);
}

CUresult cuInit(unsigned) {
	emulated_valid = [](const void *p) { return inside(running, reinterpret_cast<CUdeviceptr>(p), 0); };
	return CUDA_SUCCESS;
}
CUresult cuDriverGetVersion(int *v) { return *v = CUDA_VERSION, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *n) { return *n = 1, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *d, int n) { return *d = 0, n == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE; }
CUresult cuDeviceGetName(char *name, int n, CUdevice) { return snprintf(name, n, "stand-in"), CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *v, CUdevice_attribute a, CUdevice) {
	switch (a) {
	case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *v = 9; break;
	case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *v = 0; break;
	case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *v = 1; break;
	default: return refuse(CUDA_ERROR_INVALID_VALUE, "attribute %d", int(a));
	}
	return CUDA_SUCCESS;
}

CUresult cuCtxCreate(CUcontext *c, unsigned, CUdevice) {
	std::lock_guard<std::recursive_mutex> held(lock);
	current = new Context;
	*c = reinterpret_cast<CUcontext>(current);
	return CUDA_SUCCESS;
}
CUresult cuCtxDestroy(CUcontext context) {
	std::lock_guard<std::recursive_mutex> held(lock);
	Context *c = reinterpret_cast<Context *>(context);
	CUresult r = c->sticky;
	if (!r && !c->registered.empty()) r = refuse(CUDA_ERROR_INVALID_VALUE, "a context that is destroyed while %zu spans of host memory are registered", c->registered.size());
	for (Stream *s : c->streams) {
		if (!r) r = drain(s, nullptr);
		delete s;
	}
	for (auto &m : c->memory)
		if (m.second.map) munmap(m.second.map, m.second.mapped);
	for (auto &p : c->pinned) munmap(p.first, p.second);
	if (current == c) current = nullptr;
	delete c;
	return r;
}

CUresult cuModuleLoadFatBinary(CUmodule *m, const void *image) {
	ENTER
	unsigned magic;
	memcpy(&magic, image, 4);
	if (magic != 0xba55ed50) return refuse(CUDA_ERROR_INVALID_IMAGE, "an image that starts with %08x", magic);
	*m = reinterpret_cast<CUmodule>(new char);
	return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction *f, CUmodule, const char *name) {
	ENTER
	if (!emulated_has(name)) return CUDA_ERROR_NOT_FOUND;
	Kernel *k = new Kernel;
	k->name = name;
	*f = reinterpret_cast<CUfunction>(k);
	return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) {
	ENTER
	if (a != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES || v < 0 || unsigned(v) > kSharedMost) return refuse(CUDA_ERROR_INVALID_VALUE, "attribute %d of a kernel is %d", int(a), v);
	reinterpret_cast<Kernel *>(f)->shared = v;
	return CUDA_SUCCESS;
}
CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, CUstream s, void **params, void **extra) {
	ENTER
	STREAM(s)
	Kernel *k = reinterpret_cast<Kernel *>(f);
	const char *name = k->name.c_str();
	if (!gx || !gy || gz != 1 || gx > 0x7fffffffu || gy > 65535) return refuse(CUDA_ERROR_INVALID_VALUE, "%s on a grid of (%u,%u,%u)", name, gx, gy, gz);
	if (!bx || !by || bz != 1 || bx * by > 1024) return refuse(CUDA_ERROR_INVALID_VALUE, "%s in blocks of (%u,%u,%u)", name, bx, by, bz);
	if (shared > k->shared) return refuse(CUDA_ERROR_INVALID_VALUE, "%s with %u bytes of shared memory, allowed %u", name, shared, k->shared);
	if (params || !extra || extra[0] != CU_LAUNCH_PARAM_BUFFER_POINTER || extra[2] != CU_LAUNCH_PARAM_BUFFER_SIZE || extra[4] != CU_LAUNCH_PARAM_END)
		return refuse(CUDA_ERROR_INVALID_VALUE, "%s without a block of parameters", name);
	std::string block(static_cast<const char *>(extra[1]), *static_cast<size_t *>(extra[3]));
	Context *c = current;
	stream->work.push_back([=] {
		running = c;
		switch (int r = emulated_launch(k->name.c_str(), gx, gy, bx, by, shared, block.data(), block.size())) {
		case 0: break;
		case 3: c->sticky = CUDA_ERROR_ILLEGAL_ADDRESS; break;
		default: c->sticky = refuse(CUDA_ERROR_LAUNCH_FAILED, "%s does not take its %zu bytes of parameters (%d)", k->name.c_str(), block.size(), r);
		}
	});
	return CUDA_SUCCESS;
}

CUresult cuMemGetInfo(size_t *free, size_t *total) {
	ENTER
	*free = kMemory - current->used, *total = kMemory;
	return CUDA_SUCCESS;
}
CUresult cuMemAlloc(CUdeviceptr *p, size_t n) {
	ENTER
	if (!n) return refuse(CUDA_ERROR_INVALID_VALUE, "an allocation of no bytes");
	if (n > kMemory - current->used) return CUDA_ERROR_OUT_OF_MEMORY;
	// It ends at a page that cannot be touched.
	size_t bytes = (n + 255) / 256 * 256, room = (bytes + kPage - 1) / kPage * kPage;
	char *m = static_cast<char *>(mmap(nullptr, room + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
	if (m == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
	mprotect(m + room, kPage, PROT_NONE);
	if (n < 1 << 20) memset(m, 0xff, room);
	*p = reinterpret_cast<CUdeviceptr>(m + room - bytes);
	current->memory[*p] = {bytes, room + kPage, m};
	current->used += bytes;
	return CUDA_SUCCESS;
}
CUresult cuMemFree(CUdeviceptr p) {
	ENTER
	auto it = current->memory.find(p);
	if (it == current->memory.end() || !it->second.map) return refuse(CUDA_ERROR_INVALID_VALUE, "free of what is no allocation");
	for (Stream *s : current->streams)
		if (CUresult r = drain(s, nullptr)) return r;
	munmap(it->second.map, it->second.mapped);
	current->used -= it->second.bytes;
	current->memory.erase(it);
	return CUDA_SUCCESS;
}
CUresult cuMemHostAlloc(void **p, size_t n, unsigned flags) {
	ENTER
	if (flags & ~unsigned(CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP)) return refuse(CUDA_ERROR_INVALID_VALUE, "host memory with flags %u", flags);
	*p = mmap(nullptr, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (*p == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
	current->pinned[static_cast<char *>(*p)] = n;
	// The card may address it. It is no allocation of the card's: no map of its own.
	if (flags & CU_MEMHOSTALLOC_DEVICEMAP) {
		current->memory[reinterpret_cast<CUdeviceptr>(*p)] = {n, 0, nullptr};
		if (n < 1 << 20) memset(*p, 0xff, n);
	}
	return CUDA_SUCCESS;
}
CUresult cuMemHostGetDevicePointer(CUdeviceptr *at, void *p, unsigned flags) {
	ENTER
	auto it = current->memory.find(reinterpret_cast<CUdeviceptr>(p));
	if (flags || it == current->memory.end() || it->second.map) return refuse(CUDA_ERROR_INVALID_VALUE, "the card's address of host memory that is not mapped for it");
	*at = it->first;
	return CUDA_SUCCESS;
}
CUresult cuMemFreeHost(void *p) {
	ENTER
	auto it = current->pinned.find(static_cast<char *>(p));
	if (it == current->pinned.end()) return refuse(CUDA_ERROR_INVALID_VALUE, "free of host memory that is not page-locked");
	// Real drivers need not wait here: whoever frees memory that work is to use would be lucky.
	if (current->memory.erase(reinterpret_cast<CUdeviceptr>(p)))
		for (Stream *s : current->streams)
			if (!s->work.empty()) refuse(CUDA_ERROR_INVALID_VALUE, "free of mapped host memory before the stream is done"), abort();
	munmap(p, it->second);
	current->pinned.erase(it);
	return CUDA_SUCCESS;
}

CUresult cuMemHostRegister(void *p, size_t n, unsigned flags) {
	ENTER
	char *at = static_cast<char *>(p);
	unsigned char here;
	if (!n || flags & ~unsigned(CU_MEMHOSTREGISTER_PORTABLE)) return refuse(CUDA_ERROR_INVALID_VALUE, "%zu bytes of host memory to be registered with flags %u", n, flags);
	if (reinterpret_cast<size_t>(p) % kPage) return refuse(CUDA_ERROR_INVALID_VALUE, "host memory to be registered that does not start at a page");
	if (overlaps(current->pinned, at, n) || overlaps(current->registered, at, n)) return refuse(CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED, "host memory that is page-locked already");
	for (char *q = at; q < at + n; q += kPage)
		if (mincore(q, 1, &here)) return refuse(CUDA_ERROR_INVALID_VALUE, "memory to be registered that is not there");
	current->registered[at] = n;
	return CUDA_SUCCESS;
}
CUresult cuMemHostUnregister(void *p) {
	ENTER
	if (!current->registered.erase(static_cast<char *>(p))) return refuse(CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED, "host memory to be unregistered that is not registered, or does not start there");
	return CUDA_SUCCESS;
}

CUresult cuMemsetD8Async(CUdeviceptr p, unsigned char v, size_t n, CUstream s) {
	ENTER
	STREAM(s)
	if (!inside(current, p, n)) return refuse(CUDA_ERROR_INVALID_VALUE, "a fill of %zu bytes outside an allocation", n);
	stream->work.push_back([=] { memset(reinterpret_cast<void *>(p), v, n); });
	return CUDA_SUCCESS;
}
CUresult cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, size_t n, CUstream s) {
	ENTER
	STREAM(s)
	if (!inside(current, to, n) || !inside(current, from, n)) return refuse(CUDA_ERROR_INVALID_VALUE, "a copy of %zu bytes outside an allocation", n);
	stream->work.push_back([=] { memmove(reinterpret_cast<void *>(to), reinterpret_cast<void *>(from), n); });
	return CUDA_SUCCESS;
}
CUresult cuMemcpyHtoDAsync(CUdeviceptr to, const void *from, size_t n, CUstream s) {
	ENTER
	STREAM(s)
	if (!inside(current, to, n) || !locked(current, from, n)) return refuse(CUDA_ERROR_INVALID_VALUE, "an upload of %zu bytes outside an allocation, or not from page-locked memory", n);
	stream->work.push_back([=] { memcpy(reinterpret_cast<void *>(to), from, n); });
	return CUDA_SUCCESS;
}
CUresult cuMemcpyDtoHAsync(void *to, CUdeviceptr from, size_t n, CUstream s) {
	ENTER
	STREAM(s)
	if (!inside(current, from, n) || !locked(current, to, n)) return refuse(CUDA_ERROR_INVALID_VALUE, "a download of %zu bytes outside an allocation, or not to page-locked memory", n);
	Context *c = current;
	stream->work.push_back([=] {
		if (locked(c, to, n)) memcpy(to, reinterpret_cast<void *>(from), n);
		else c->sticky = refuse(CUDA_ERROR_ILLEGAL_ADDRESS, "%zu bytes that arrive in host memory which is no longer page-locked", n);
	});
	return CUDA_SUCCESS;
}

CUresult cuStreamCreate(CUstream *s, unsigned) {
	ENTER
	Stream *n = new Stream{current, {}};
	current->streams.push_back(n);
	*s = reinterpret_cast<CUstream>(n);
	return CUDA_SUCCESS;
}
CUresult cuStreamSynchronize(CUstream s) {
	ENTER
	STREAM(s)
	return drain(stream, nullptr);
}
CUresult cuEventCreate(CUevent *e, unsigned flags) {
	ENTER
	Event *n = new Event;
	n->timing = !(flags & CU_EVENT_DISABLE_TIMING);
	*e = reinterpret_cast<CUevent>(n);
	return CUDA_SUCCESS;
}
CUresult cuEventRecord(CUevent e, CUstream s) {
	ENTER
	STREAM(s)
	Event *v = reinterpret_cast<Event *>(e);
	v->recorded = true, v->done = false;
	auto turn = ++v->turn;
	stream->work.push_back([=] {
		if (v->turn == turn) v->done = true, v->at = now();
	});
	return CUDA_SUCCESS;
}
CUresult cuEventSynchronize(CUevent e) {
	ENTER
	Event *v = reinterpret_cast<Event *>(e);
	if (!v->recorded) return CUDA_SUCCESS;
	for (Stream *s : current->streams)
		if (CUresult r = drain(s, &v->done)) return r;
	return CUDA_SUCCESS;
}
CUresult cuEventElapsedTime(float *ms, CUevent from, CUevent to) {
	ENTER
	Event *a = reinterpret_cast<Event *>(from), *b = reinterpret_cast<Event *>(to);
	if (!a->timing || !b->timing || !a->recorded || !b->recorded) return refuse(CUDA_ERROR_INVALID_HANDLE, "the time between events without one");
	if (!a->done || !b->done) return CUDA_ERROR_NOT_READY;
	*ms = float(b->at - a->at);
	return CUDA_SUCCESS;
}

} // extern "C"

//go:build cuda

#include "shim.h"

int tr_allow_shared(CUfunction f, int bytes) { return cuFuncSetAttribute(f, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, bytes); }

int tr_launch(CUfunction f, unsigned gx, unsigned gy, unsigned bx, unsigned by, unsigned shared, CUstream stream, void *args, size_t size) {
	void *extra[] = {CU_LAUNCH_PARAM_BUFFER_POINTER, args, CU_LAUNCH_PARAM_BUFFER_SIZE, &size, CU_LAUNCH_PARAM_END};
	return cuLaunchKernel(f, gx, gy, 1, bx, by, 1, shared, stream, NULL, extra);
}

int tr_pinned(void **p, size_t n) { return cuMemHostAlloc(p, n, CU_MEMHOSTALLOC_PORTABLE); }
void tr_unpin(void *p) { cuMemFreeHost(p); }

int tr_mapped(void **p, CUdeviceptr *at, size_t n) {
	int r = cuMemHostAlloc(p, n, CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP);
	if (r) return r;
	r = cuMemHostGetDevicePointer(at, *p, 0);
	if (r) cuMemFreeHost(*p);
	return r;
}

int tr_register(void *p, size_t n) { return cuMemHostRegister(p, n, CU_MEMHOSTREGISTER_PORTABLE); }
int tr_unregister(void *p) { return cuMemHostUnregister(p); }

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

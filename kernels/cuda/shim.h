// What gorgonia.org/cu lacks: launches from a packed block of parameters, large
// dynamic shared memory, pinned memory and stream capture. Functions return 0 or a
// CUresult.
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
// Page-locked memory with an address for the card; tr_unpin frees it too.
int tr_mapped(void **p, CUdeviceptr *at, size_t n);
// Memory that was mapped by somebody else.
int tr_register(void *p, size_t n);
int tr_unregister(void *p);

int tr_capture_begin(CUstream stream);
int tr_capture_end(CUstream stream, CUgraphExec *exec);
int tr_replay(CUgraphExec exec, CUstream stream);
void tr_discard(CUgraphExec exec);

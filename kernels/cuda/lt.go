//go:build cuda || cudaemu

package cuda

/*
#cgo LDFLAGS: -ldl
#include "lt.h"
#include <stdlib.h>
*/
import "C"

import (
	"errors"
	"fmt"
	"unsafe"
)

const (
	// offered is how many algorithms cuBLASLt is asked for.
	offered = 8
	// plansKept bounds the descriptors that are kept: token counts of micro-batches differ without end.
	plansKept = 4096
)

// blas is cuBLASLt with the descriptors of the shapes in use.
type blas struct {
	lt    *C.lt
	plans map[planKey]*C.lt_plan
}

// openBlas loads a library; "" finds the newest installed one.
func openBlas(file string) (*blas, error) {
	var name *C.char
	if file != "" {
		name = C.CString(file)
		defer C.free(unsafe.Pointer(name))
	}
	var text [512]C.char
	lt := C.lt_open(name, &text[0], C.int(len(text)))
	if lt == nil {
		return nil, errors.New(C.GoString(&text[0]))
	}
	return &blas{lt: lt, plans: map[planKey]*C.lt_plan{}}, nil
}

func (b *blas) version() int { return int(C.lt_version(b.lt)) }

func (b *blas) close() {
	b.forget()
	C.lt_close(b.lt)
}

func (b *blas) forget() {
	for _, p := range b.plans {
		C.lt_plan_free(b.lt, p)
	}
	clear(b.plans)
}

// planKey is what descriptors and the choice of an algorithm depend on.
type planKey struct {
	m, n, k, lda, ldb, ldc           int
	transA, transB, float32C, bias   bool
	alignA, alignB, alignC, alignBia uint8 // powers of two
}

// plan describes a product to the library.
func (b *blas) plan(p product) (*C.lt_plan, error) {
	key := planKey{p.m, p.n, p.k, p.lda, p.ldb, p.ldc, p.transA, p.transB, p.float32C, p.bias != 0, power(p.a), power(p.b), power(p.c), power(p.bias)}
	if plan := b.plans[key]; plan != nil {
		return plan, nil
	}
	if len(b.plans) >= plansKept {
		b.forget()
	}
	s := C.lt_shape{
		m: C.int64_t(p.m), n: C.int64_t(p.n), k: C.int64_t(p.k), lda: C.int64_t(p.lda), ldb: C.int64_t(p.ldb), ldc: C.int64_t(p.ldc),
		trans_a: C.int(flag32(p.transA)), trans_b: C.int(flag32(p.transB)), float32_c: C.int(flag32(p.float32C)), has_bias: C.int(flag32(p.bias != 0)),
		align_a: 1 << key.alignA, align_b: 1 << key.alignB, align_c: 1 << key.alignC, workspace: C.size_t(p.workspaceBytes),
	}
	var plan *C.lt_plan
	if r := C.lt_plan_make(b.lt, &s, C.uint64_t(p.bias), &plan); r != 0 {
		return nil, fmt.Errorf("describe %v: %w", p, status(r))
	}
	b.plans[key] = plan
	return plan, nil
}

func (b *blas) algorithms(p product) ([]algorithm, error) {
	plan, err := b.plan(p)
	if err != nil {
		return nil, err
	}
	var out [offered]algorithm
	var found C.int
	if r := C.lt_plan_algos(b.lt, plan, (*C.lt_algo)(unsafe.Pointer(&out[0])), offered, &found); r != 0 {
		return nil, fmt.Errorf("ask for algorithms of %v: %w", p, status(r))
	}
	if found == 0 {
		return nil, fmt.Errorf("no algorithm for %v: %w", p, errUnsupported)
	}
	return out[:found], nil
}

func (b *blas) admits(p product, a algorithm) error {
	plan, err := b.plan(p)
	if err != nil {
		return err
	}
	if r := C.lt_plan_check(b.lt, plan, (*C.lt_algo)(unsafe.Pointer(&a))); r != 0 {
		return fmt.Errorf("check an algorithm for %v: %w", p, status(r))
	}
	return nil
}

func (b *blas) run(p product, a algorithm, stream unsafe.Pointer) error {
	plan, err := b.plan(p)
	if err != nil {
		return err
	}
	r := C.lt_plan_run(b.lt, plan, (*C.lt_algo)(unsafe.Pointer(&a)), C.uint64_t(p.a), C.uint64_t(p.b), C.uint64_t(p.c), C.int(flag32(p.accumulate)),
		C.uint64_t(p.bias), C.uint64_t(p.workspace), stream)
	if r != 0 {
		return fmt.Errorf("compute %v: %w", p, status(r))
	}
	return nil
}

// status is a cublasStatus_t that is not success.
func status(r C.int) error {
	switch r {
	case 7, 8, 15: // invalid value, architecture mismatch, not supported: refused before anything ran
		return fmt.Errorf("%w (status %d)", errUnsupported, int(r))
	}
	return fmt.Errorf("cuBLASLt fails with status %d", int(r))
}

package cuda

import (
	"errors"
	"fmt"
	"time"
)

// address is a place in device memory; 0 is none.
type address = uint64

// size2 is the extent of a grid or a block.
type size2 struct{ x, y int }

// driver is one card as the owner's thread sees it. Copies, launches and products
// are enqueued on one stream in call order; none of its methods is called from
// another goroutine.
type driver interface {
	// alloc returns memory aligned to 256 bytes; n is positive.
	alloc(n int64) (address, error)
	// mapped returns page-locked host memory, aligned like alloc's, at the address by
	// which the card reaches it over the bus. All methods take such addresses.
	mapped(n int64) (address, error)
	// free gives back what alloc or mapped gave.
	free(address) error
	memory() (free, total int64, err error)
	// pinned returns page-locked host memory that lives until close.
	pinned(n int) ([]byte, error)
	// register locks the pages of memory of somebody else's, so that copies may go
	// there, and unregister lets them go.
	register(host []byte) error
	unregister(host []byte) error

	// has says whether there is code of a kernel for this card.
	has(kernel string) bool
	// launch runs a kernel; args are address, int32, int64 or float32, in the kernel's order.
	launch(kernel string, grid, block size2, shared int, args ...any) error
	// product computes by one of the library's algorithms. An error that wraps
	// errUnsupported means that nothing was done.
	product(product, algorithm) error
	// algorithms lists the ways to compute a product, the library's favourite first.
	algorithms(product) ([]algorithm, error)
	// admits says whether an algorithm from another day fits a product.
	admits(product, algorithm) error
	// elapsed is the time on the card of what run enqueues; it waits for it.
	elapsed(run func() error) (time.Duration, error)
	// library names the versions that algorithms belong to.
	library() versions

	// fill sets n bytes to the value.
	fill(dst address, value byte, n int64) error
	move(dst, src address, n int64) error
	// upload and download copy from and to memory given by pinned or known by register.
	upload(dst address, src []byte) error
	download(dst []byte, src address) error

	// mark notes the stream's present end under a small number, wait waits for that note.
	mark(event int) error
	wait(event int) error
	// sync waits for the stream; an asynchronous failure shows here at the latest.
	sync() error
	// lost reports whether an error means that the context can only be closed.
	lost(error) bool
	close() error
}

// algorithm is how cuBLASLt computes a product, in its own writing: a block that is
// to be used with the same version of the library only.
type algorithm [8]uint64

// versions are the driver's and cuBLASLt's, as they number themselves.
type versions struct{ driver, cublasLt int }

// errUnsupported is what a driver's product, algorithms and admits wrap when
// cuBLASLt does not compute a product so, or at all.
var errUnsupported = errors.New("cuBLASLt does not support this")

// product is a matrix product as cuBLASLt sees it, all matrices in column-major
// order: C[m,n] = op(A)[m,k]·op(B)[k,n] (+ C) (+ bias[m] on every column).
// A and B are bf16.
type product struct {
	a, b, c        address
	m, n, k        int
	lda, ldb, ldc  int // elements between columns
	transA, transB bool
	float32C       bool // C is float32, otherwise bf16
	accumulate     bool
	bias           address // bf16[m]; 0: none
	workspace      address
	workspaceBytes int64
}

func (p product) String() string {
	return fmt.Sprintf("a product, columns first, m %d n %d k %d, lda %d ldb %d ldc %d, transposed %v %v, float32 result %v, bias %v",
		p.m, p.n, p.k, p.lda, p.ldb, p.ldc, p.transA, p.transB, p.float32C, p.bias != 0)
}

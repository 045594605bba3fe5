package cuda

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
	free(address) error
	memory() (free, total int64, err error)
	// pinned returns page-locked host memory that lives until close.
	pinned(n int) ([]byte, error)

	// launch runs a kernel; args are address, int32, int64 or float32, in the kernel's order.
	launch(kernel string, grid, block size2, shared int, args ...any) error
	product(product) error
	// fill sets n bytes to the value.
	fill(dst address, value byte, n int64) error
	move(dst, src address, n int64) error
	// upload and download copy from and to memory given by pinned.
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

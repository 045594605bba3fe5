package simd

// geometry is the shape of a level's micro-kernel and packed panels.
type geometry struct {
	mr      int // rows of a tile
	nr      int // columns of a tile, and of a packed panel of B
	lanes   int // columns of a vector
	aStride int // elements from one step of a packed panel of A to the next, >= mr
}

// The AVX-512 tile fills 28 of 32 registers, AVX2's 12 of 16: enough
// independent sums to hide the latency of a multiply-add on two ports, with few
// loads per product. aStride is a whole number of 8-lane stores.
var geometries = [...]geometry{
	Portable: {mr: 4, nr: 4, lanes: 4, aStride: 4},
	AVX2:     {mr: 6, nr: 16, lanes: 8, aStride: 8},
	AVX512:   {mr: 14, nr: 32, lanes: 16, aStride: 16},
}

// maxTile is the most elements of a tile.
const maxTile = 14 * 32

// kBlock is the most steps that a tile is summed over in registers. Longer sums
// go through C in blocks of nearly equal length: C = (C + block 0) + block 1 ...
// The cut depends on k alone. At 384 the panel of B is the size of a 48 KiB
// first-level cache and streams from the second at 9 bytes per cycle.
const kBlock = 384

// kBlocks returns how many blocks k steps are cut into.
func kBlocks(k int) int { return (k + kBlock - 1) / kBlock }

// kRange returns block i of blocks.
func kRange(k, blocks, i int) (from, to int) { return i * k / blocks, (i + 1) * k / blocks }

// strip is one side of a tile product: an offset into a slice, the elements
// between steps and, for rows of A read in place, between rows.
type strip struct {
	x    []float32
	step int
	rows bool // A only: step is the distance of rows, not of steps
}

// tile computes c[0:rows, 0:cols] (+)= A·B over k steps; rows <= mr, cols <= nr.
// a and b begin at the tile's first row, column and step. AVX-512 reads and writes
// no column past cols; the other levels read B, not C, to the end of the last
// vector, so their B is a packed panel or whole vectors. Portable code takes packed
// panels only.
func tile(level Level, rows, cols, k int, a strip, b strip, c []float32, ldc int, load bool) {
	g := &geometries[level]
	nv := (cols + g.lanes - 1) / g.lanes
	var add uint32
	if load {
		add = 1
	}
	switch level {
	case AVX512:
		mask := uint32(0xffff) >> uint(nv*16-cols)
		gemm512(a.rows, rows, nv, k, &a.x[0], 4*a.step, &b.x[0], 4*b.step, &c[0], 4*ldc, mask, add)
	case AVX2:
		if cols == nv*8 {
			gemm2(a.rows, rows, nv, k, &a.x[0], 4*a.step, &b.x[0], 4*b.step, &c[0], 4*ldc, add)
			return
		}
		var edge [6 * 16]float32
		gemm2(a.rows, rows, nv, k, &a.x[0], 4*a.step, &b.x[0], 4*b.step, &edge[0], 4*16, 0)
		storeEdge(edge[:], 16, rows, cols, c, ldc, load)
	default:
		var edge [4 * 4]float32
		tileGo(&edge, k, a.x, a.step, b.x, b.step)
		storeEdge(edge[:], 4, rows, cols, c, ldc, load)
	}
}

// storeEdge writes the part of a tile that lies inside C.
func storeEdge(edge []float32, stride, rows, cols int, c []float32, ldc int, load bool) {
	for i := range rows {
		dst, src := c[i*ldc:i*ldc+cols], edge[i*stride:i*stride+cols]
		if !load {
			copy(dst, src)
			continue
		}
		for j, v := range src {
			dst[j] += v
		}
	}
}

// tileGo is the portable micro-kernel: 4x4 sums in registers.
func tileGo(out *[16]float32, k int, a []float32, lda int, b []float32, ldb int) {
	var c00, c01, c02, c03, c10, c11, c12, c13, c20, c21, c22, c23, c30, c31, c32, c33 float32
	for p := range k {
		x, y := a[p*lda:p*lda+4:p*lda+4], b[p*ldb:p*ldb+4:p*ldb+4]
		b0, b1, b2, b3 := y[0], y[1], y[2], y[3]
		v := x[0]
		c00 += v * b0
		c01 += v * b1
		c02 += v * b2
		c03 += v * b3
		v = x[1]
		c10 += v * b0
		c11 += v * b1
		c12 += v * b2
		c13 += v * b3
		v = x[2]
		c20 += v * b0
		c21 += v * b1
		c22 += v * b2
		c23 += v * b3
		v = x[3]
		c30 += v * b0
		c31 += v * b1
		c32 += v * b2
		c33 += v * b3
	}
	*out = [16]float32{c00, c01, c02, c03, c10, c11, c12, c13, c20, c21, c22, c23, c30, c31, c32, c33}
}

package simd

// Prefetch asks for rows of a matrix, ld elements apart, to be brought into a
// near cache: short pieces of rows far apart, as those of one head's keys,
// are a pattern that hardware does not foresee.
func Prefetch(x []float32, ld, rows, cols int) {
	if active == Portable || rows <= 0 || cols <= 0 {
		return
	}
	_ = x[(rows-1)*ld+cols-1]
	prefetchRows(rows, (cols+15)/16, &x[0], 4*ld)
}

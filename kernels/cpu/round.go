package cpu

import (
	"sync/atomic"

	"trainerd/kernels"
	"trainerd/kernels/cpu/internal/simd"
)

var _ kernels.Rounder = (*device)(nil)

// DownloadRounded implements kernels.Rounder. The float32 weights of this device
// are its masters, so that there is no remainder.
func (d *device) DownloadRounded(dst []uint16, p, rem kernels.Buffer) (finite bool, err error) {
	const op = "download rounded"
	must(rem == nil, op, "a remainder beside float32 weights")
	x := floats(op, "p", p, len(dst))
	const least = 3e38 // below all that round to infinity, 3.3961775e38 and more
	var infinite atomic.Bool
	d.blocks(len(x), grain, func(from, to int) {
		simd.F32ToBF16(dst[from:to], x[from:to])
		// The sum is in float64 and a quarter of the price of looking at every value.
		if !(simd.SumSquares(x[from:to]) < least*least) && !kernels.Finite16(dst[from:to]) {
			infinite.Store(true)
		}
	})
	return !infinite.Load(), nil
}

// DownloadMasters implements kernels.Rounder.
func (d *device) DownloadMasters(dst []float32, p, rem kernels.Buffer) error {
	const op = "download masters"
	must(rem == nil, op, "a remainder beside float32 weights")
	from := floats(op, "p", p, len(dst))
	d.blocks(len(dst), grain, func(a, b int) { copy(dst[a:b], from[a:b]) })
	return nil
}

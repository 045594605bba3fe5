package cpu

import "testing"

// TestHeadScratchHoldsFewerRows: a plan for n rows has room for every smaller
// number, whose chunks may be larger: 384 rows are cut into two of 192, 256 are one.
func TestHeadScratchHoldsFewerRows(t *testing.T) {
	d := &device{}
	for _, v := range []int{1, 7, 256, 49152, 151936, 2 << 20} {
		for _, n := range []int{1, 2, 17, 256, 341, 342, 384, 600, 1100, 2048} {
			head, draw := d.HeadScratch(n, 8, v, true), d.DrawScratch(n, 8, v)
			for m := 1; m <= n; m++ {
				if need := int64(headChunk(m, v)) * int64(v) * 4; need > head || need > draw {
					t.Fatalf("vocabulary %d: %d rows need %d bytes, the plan for %d rows has %d and %d", v, m, need, n, head, draw)
				}
			}
		}
	}
}

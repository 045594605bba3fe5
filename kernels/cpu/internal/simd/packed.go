package simd

import "trainerd/kernels/hostmem"

// packed is a buffer of packed panels. Large ones lie in huge pages outside the
// collector's heap: their panels are read in an order that small pages' entries
// do not stay cached for, which cost products 2 to 4 % of their time.
type packed struct {
	x      []float32
	span   *hostmem.Span
	mapped bool // whether it may leave the heap: its owner must live as long as the process
}

// hugeFrom is how many elements a buffer has that leaves the heap.
const hugeFrom = 1 << 18

// grow makes x n elements long. What it held is lost.
func (p *packed) grow(n int) {
	if cap(p.x) >= n {
		p.x = p.x[:n]
		return
	}
	if p.span != nil {
		p.span.Free()
	}
	p.x, p.span = nil, nil
	if p.mapped && n >= hugeFrom {
		if s, err := hostmem.Take(max(4*int64(n), hostmem.Large), hostmem.Huge); err == nil {
			p.x, _ = hostmem.Floats(s.Bytes, len(s.Bytes)/4)
			p.x, p.span = p.x[:n], s
			return
		}
	}
	p.x = make([]float32, n)
}

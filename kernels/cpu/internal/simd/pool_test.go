package simd

import (
	"sync/atomic"
	"testing"
)

func TestPoolRunsEachTaskOnce(t *testing.T) {
	for _, workers := range []int{1, 2, 3, 7} {
		p := NewPool(workers)
		for _, n := range []int{0, 1, 2, 5, 1000} {
			counts := make([]atomic.Int32, n)
			p.For(n, func(i int) {
				counts[i].Add(1)
				p.For(3, func(int) {}) // nested: runs in place
			})
			for i := range counts {
				if c := counts[i].Load(); c != 1 {
					t.Fatalf("%d workers: task %d of %d ran %d times", workers, i, n, c)
				}
			}
		}
		p.Close()
		ran := 0
		p.For(4, func(int) { ran++ })
		if ran != 4 {
			t.Fatalf("a closed pool ran %d of 4 tasks", ran)
		}
		p.Close()
	}
}

func TestPoolPassesPanicOn(t *testing.T) {
	p := NewPool(3)
	defer p.Close()
	for range 20 {
		func() {
			defer func() {
				if v := recover(); v != "boom" {
					t.Fatalf("recovered %v, want boom", v)
				}
			}()
			p.For(50, func(i int) {
				if i == 13 {
					panic("boom")
				}
			})
		}()
	}
	var n atomic.Int32
	p.For(10, func(int) { n.Add(1) })
	if n.Load() != 10 {
		t.Fatalf("after a panic the pool ran %d of 10 tasks", n.Load())
	}
}

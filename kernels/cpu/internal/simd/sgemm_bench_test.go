//go:build unix

package simd

import (
	"fmt"
	"math"
	"math/rand/v2"
	"runtime"
	"syscall"
	"testing"
	"time"
)

// BenchmarkSgemm times products of a 135M model's training step on all
// processors: x·Wᵀ, dy·W and dyᵀ·x. Run with -cpu to choose the workers.
func BenchmarkSgemm(b *testing.B) {
	for _, s := range [][3]int{{1024, 1536, 576}, {953, 576, 1536}, {953, 3072, 576}, {448, 49152, 576}} {
		for form, trans := range [][2]bool{{false, true}, {false, false}, {true, false}} {
			name := fmt.Sprintf("%s/%dx%dx%d", [...]string{"NT", "NN", "TN"}[form], s[0], s[1], s[2])
			m, n, k := s[0], s[1], s[2]
			switch form {
			case 1: // the gradient of x: [m,k] = [m,n]·[n,k]
				n, k = k, n
			case 2: // the gradient of W: [n,k] = [m,n]ᵀ·[m,k]
				m, n, k = n, k, m
			}
			b.Run(name, func(b *testing.B) { benchSgemm(b, trans[0], trans[1], m, n, k, true) })
		}
	}
}

// BenchmarkSgemmSmall times blocks on one goroutine, as attention uses them.
func BenchmarkSgemmSmall(b *testing.B) {
	for form, trans := range [][2]bool{{false, true}, {false, false}, {true, false}} {
		for _, s := range [][3]int{{64, 64, 64}, {64, 512, 64}, {64, 64, 512}} {
			b.Run(fmt.Sprintf("%s/%dx%dx%d", [...]string{"NT", "NN", "TN"}[form], s[0], s[1], s[2]), func(b *testing.B) {
				benchSgemm(b, trans[0], trans[1], s[0], s[1], s[2], false)
			})
		}
	}
}

// BenchmarkSgemmNarrow times decoding: few rows by a weight, in cache and not.
func BenchmarkSgemmNarrow(b *testing.B) {
	for _, m := range []int{1, 7, 16, 28, 56} {
		for _, n := range []int{1536, 49152} {
			b.Run(fmt.Sprintf("%dx%dx576", m, n), func(b *testing.B) { benchSgemm(b, false, true, m, n, 576, true) })
		}
	}
}

func benchSgemm(b *testing.B, transA, transB bool, m, n, k int, parallel bool) {
	r := rand.New(rand.NewPCG(1, 2))
	ar, ac, br, bc := m, k, k, n
	if transA {
		ar, ac = ac, ar
	}
	if transB {
		br, bc = bc, br
	}
	x, y, z := matrix(r, ar, ac, ac), matrix(r, br, bc, bc), make([]float32, m*n)
	var pool *Pool
	var s Scratch
	if parallel {
		pool = NewPool(runtime.GOMAXPROCS(0))
		defer pool.Close()
	}
	call := func() {
		if parallel {
			Sgemm(transA, transB, m, n, k, x, ac, y, bc, z, n, false, pool)
		} else {
			SgemmSerial(transA, transB, m, n, k, x, ac, y, bc, z, n, false, &s)
		}
	}
	call()
	b.ResetTimer()
	best, leastCPU := time.Duration(math.MaxInt64), time.Duration(math.MaxInt64)
	for range b.N {
		start, cpu := time.Now(), cpuTime()
		call()
		best, leastCPU = min(best, time.Since(start)), min(leastCPU, cpuTime()-cpu)
	}
	flop := 2 * float64(m) * float64(n) * float64(k)
	b.ReportMetric(flop*float64(b.N)/b.Elapsed().Seconds()/1e9, "GFLOP/s")
	// On a machine that others load too, compare the best call, or with one worker
	// the best by the processor time that it took.
	b.ReportMetric(flop/best.Seconds()/1e9, "best-GFLOP/s")
	b.ReportMetric(flop/leastCPU.Seconds()/1e9, "cpu-GFLOP/s")
}

// cpuTime is the processor time of this process so far.
func cpuTime() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		panic(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

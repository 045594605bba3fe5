package bench

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sort"
	"time"

	"gorgonia.org/tensor"

	"trainerd/kernels"
)

// GemmResult is one line of output of Gemm. Shape is MxKxN; B is transposed, as weights are.
type GemmResult struct {
	Name    string  `json:"name"`
	Device  string  `json:"device"`
	Workers int     `json:"workers"`
	Shape   string  `json:"shape"`
	GFLOPS  float64 `json:"gflop_s"`
}

var gemmShapes = [][3]int{{1024, 1536, 576}, {953, 3072, 576}, {953, 576, 1536}, {448, 49152, 576}} // M, N, K

// Gemm times x·Wᵀ at the shapes of a 135M step and reports the median rate.
func Gemm(ctx context.Context, dev kernels.Device, repeats int, emit func(GemmResult) error) error {
	if repeats < 1 {
		return fmt.Errorf("repeats is %d, expected 1 or more", repeats)
	}
	info := dev.Info()
	for _, s := range gemmShapes {
		m, n, k := s[0], s[1], s[2]
		g := kernels.Gemm{M: m, N: n, K: k, TransB: true}
		for _, b := range []struct {
			to *kernels.Buffer
			n  int
		}{{&g.A, m * k}, {&g.B, n * k}, {&g.C, m * n}} {
			buf, err := dev.Alloc("bench", info.Compute, b.n)
			if err != nil {
				return err
			}
			defer dev.Free(buf)
			dev.Upload(buf, randomTensor(b.n))
			*b.to = buf
		}
		var times []float64
		for i := range repeats + 2 {
			if err := ctx.Err(); err != nil {
				return err
			}
			start := time.Now()
			dev.Gemm(g)
			if err := dev.Sync(); err != nil {
				return err
			}
			if i >= 2 {
				times = append(times, time.Since(start).Seconds())
			}
		}
		sort.Float64s(times)
		if err := emit(GemmResult{Name: "gemm", Device: info.Name, Workers: info.Workers, Shape: fmt.Sprintf("%dx%dx%d", m, k, n),
			GFLOPS: 2 * float64(m) * float64(n) * float64(k) / times[len(times)/2] / 1e9}); err != nil {
			return err
		}
	}
	return nil
}

func randomTensor(n int) *tensor.Dense {
	r := rand.New(rand.NewPCG(1, uint64(n)))
	x := make([]float32, n)
	for i := range x {
		x[i] = float32(r.NormFloat64())
	}
	return tensor.New(tensor.WithShape(n), tensor.WithBacking(x))
}

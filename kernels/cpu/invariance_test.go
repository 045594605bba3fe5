package cpu

import (
	"math"
	"math/rand/v2"
	"runtime"
	"testing"

	"gorgonia.org/tensor"

	"trainerd/kernels"
)

// step runs every operation whose work is divided among workers, on inputs that
// depend on the seed alone, and returns the bits of all results.
func step(t *testing.T, dev kernels.Device, seed uint64) []uint32 {
	t.Helper()
	rng := rand.New(rand.NewPCG(seed, 1))
	var bits []uint32
	alloc := func(n int) kernels.Buffer {
		b, err := dev.Alloc("test", kernels.F32, n)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { dev.Free(b) })
		return b
	}
	random := func(n int) kernels.Buffer {
		x := make([]float32, n)
		for i := range x {
			x[i] = float32(rng.NormFloat64())
		}
		b := alloc(n)
		dev.Upload(b, tensor.New(tensor.WithShape(n), tensor.WithBacking(x)))
		return b
	}
	uniform := func(n int) kernels.Buffer {
		x := make([]float32, n)
		for i := range x {
			x[i] = rng.Float32()
		}
		b := alloc(n)
		dev.Upload(b, tensor.New(tensor.WithShape(n), tensor.WithBacking(x)))
		return b
	}
	take := func(b kernels.Buffer) kernels.Buffer {
		x := make([]float32, b.Len())
		if err := dev.Download(tensor.New(tensor.WithShape(len(x)), tensor.WithBacking(x)), b); err != nil {
			t.Fatal(err)
		}
		for _, v := range x {
			bits = append(bits, math.Float32bits(v))
		}
		return b
	}
	index := func(n, below int) kernels.Buffer {
		x := make([]int32, n)
		for i := range x {
			x[i] = int32(rng.IntN(below))
		}
		b, err := dev.Alloc("test", kernels.I32, n)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { dev.Free(b) })
		dev.Upload(b, tensor.New(tensor.WithShape(n), tensor.WithBacking(x)))
		return b
	}
	a, err := dev.NewArena(16 << 20)
	if err != nil {
		t.Fatal(err)
	}
	defer dev.FreeArena(a)

	const rows, h, kv, hd, f, v = 333, 6, 2, 16, 160, 1500
	const d, w = h * hd, (h + 2*kv) * hd
	segments := []kernels.Segment{{QLen: 200, KLen: 200}, {Q: 200, QLen: 70, K: 200, KLen: 70, PrefixLen: 200}, {Q: 270, QLen: 63, K: 270, KLen: 63, PrefixLen: 200}}
	layout := dev.Layout(a, segments)

	x, weight := random(rows*d), random(d)
	out, rstd := alloc(rows*d), alloc(rows)
	dev.RMSNorm(kernels.Norm{Out: out, Rstd: rstd, X: x, Add: random(rows * d), Sum: x, W: weight, T: rows, D: d, Eps: 1e-5})
	take(out)
	dx, dw := alloc(rows*d), alloc(d)
	dev.RMSNormBackward(kernels.NormBackward{DX: dx, DW: dw, DY: random(rows * d), X: x, W: weight, Rstd: rstd, T: rows, D: d})
	take(dx)
	take(dw)

	qkv, pos, qw, kw, heads := random(rows*w), index(rows, 500), random(hd), random(hd), alloc(rows*(h+kv))
	rotated := alloc(rows * w)
	dev.Rope(kernels.Rope{Out: rotated, In: qkv, Pos: pos, T: rows, H: h, KV: kv, HD: hd, Theta: 1e4, QW: qw, KW: kw, Rstd: heads, Eps: 1e-6})
	o, lse := alloc(rows*d), alloc(rows*h)
	q, k, val := kernels.Strided{Buf: rotated, Stride: w}, kernels.Strided{Buf: rotated, Off: d, Stride: w}, kernels.Strided{Buf: rotated, Off: (h + kv) * hd, Stride: w}
	dev.Attention(kernels.Attention{Out: o, LSE: lse, Q: q, K: k, V: val, PK: k, PV: val, Layout: layout, T: rows, H: h, KV: kv, HD: hd, Scratch: a})
	take(o)
	take(lse)
	dqkv := alloc(rows * w)
	dev.AttentionBackward(kernels.AttentionBackward{DQKV: dqkv, DOut: random(rows * d), Out: o, LSE: lse, QKV: rotated, Layout: layout, T: rows, H: h, KV: kv, HD: hd, Scratch: a})
	take(dqkv)
	dqw, dkw := alloc(hd), alloc(hd)
	dev.RopeBackward(kernels.RopeBackward{D: dqkv, In: qkv, Pos: pos, T: rows, H: h, KV: kv, HD: hd, Theta: 1e4, QW: qw, KW: kw, DQW: dqw, DKW: dkw, Rstd: heads})
	take(dqkv)
	take(dqw)
	take(dkw)

	gu, act := random(rows*2*f), alloc(rows*f)
	dev.SwiGLU(act, gu, rows, f)
	take(act)
	dev.SwiGLUBackward(gu, random(rows*f), gu, rows, f)
	take(gu)
	product := alloc(d * f)
	dev.Gemm(kernels.Gemm{A: out, B: act, C: product, M: d, N: f, K: rows, TransA: true})
	take(product)
	bias := alloc(f)
	dev.BiasBackward(bias, act, rows, f, false)
	take(bias)

	head := kernels.Head{Hidden: out, W: random(v * d), Targets: index(rows, v), LogProb: alloc(rows), Entropy: alloc(rows), N: rows, D: d, V: v, Temperature: 0.9, Scratch: a}
	grad := kernels.HeadGrad{DLogProb: random(rows), DEntropy: random(rows), DHidden: alloc(rows * d), DW: alloc(v * d)}
	dev.LogProbBackward(head, grad)
	for _, b := range []kernels.Buffer{head.LogProb, head.Entropy, grad.DHidden, grad.DW} {
		take(b)
	}
	draw := kernels.Draw{Hidden: out, W: head.W, U: uniform(rows), Tokens: index(rows, 2), LogProb: alloc(rows), N: rows, D: d, V: v, Temperature: 0.7, TopP: 0.9, Scratch: a}
	dev.Sample(draw)
	take(draw.LogProb)

	sum, coef := alloc(1), alloc(1)
	dev.Zero(sum)
	dev.SumSquares(sum, grad.DW)
	take(sum)
	dev.ClipCoef(coef, sum, 1, 1)
	m, s := alloc(v*d), alloc(v*d)
	dev.Zero(m)
	dev.Zero(s)
	dev.AdamW(kernels.AdamW{P: head.W, G: grad.DW, M: m, V: s, Coef: coef, LR: 1e-3, Beta1: 0.9, Beta2: 0.95, Eps: 1e-8, WeightDecay: 0.1, Step: 3})
	take(head.W)

	typed := func(t2 kernels.DType, n int) kernels.Buffer {
		b, err := dev.Alloc("test", t2, n)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { dev.Free(b) })
		dev.Zero(b)
		return b
	}
	kept := typed(kernels.BF16, v*d)
	for i := range 2 {
		dev.AddGrad(kernels.AddGrad{Dst: kept, Src: grad.DW, Fresh: i == 0, Key: kernels.RoundingKey(seed, uint64(i)), First: 256})
	}
	take(kept)
	dev.Zero(sum)
	dev.SumSquares(sum, kept)
	take(sum)
	compact := kernels.AdamW{P: head.W, G: kept, M: typed(kernels.I8, v*d), Scale: alloc(kernels.MomentBlocks(v * d)), V: typed(kernels.BF16, v*d), Coef: coef,
		LR: 1e-3, Beta1: 0.9, Beta2: 0.95, Eps: 1e-8, WeightDecay: 0.1, Seed: seed, First: 256}
	dev.Zero(compact.Scale)
	for compact.Step = 1; compact.Step <= 3; compact.Step++ { // the third sees what the first two have rounded
		dev.AdamW(compact)
	}
	take(head.W)
	take(compact.Scale)
	take(compact.V)
	return bits
}

// TestWorkersChangeNothing: bit for bit the same results with any number of workers and any GOMAXPROCS.
func TestWorkersChangeNothing(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	want := step(t, open(t, 1), seed)
	for _, workers := range []int{2, 3, 5} {
		for _, procs := range []int{1, 4} {
			before := runtime.GOMAXPROCS(procs)
			got := step(t, open(t, workers), seed)
			runtime.GOMAXPROCS(before)
			if len(got) != len(want) {
				t.Fatalf("%d results, expected %d", len(got), len(want))
			}
			for i := range want {
				if got[i] != want[i] {
					t.Fatalf("workers %d, GOMAXPROCS %d: result %d has bits %08x, expected %08x", workers, procs, i, got[i], want[i])
				}
			}
		}
	}
}

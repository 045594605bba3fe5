package cpu

import (
	"math/rand/v2"
	"testing"

	"gorgonia.org/tensor"

	"trainerd/kernels"
)

// SmolLM2-135M, one group of 7 completions of 64 tokens behind a prompt of 512:
// the last token of a completion is predicted but not read.
const (
	benchT, benchN       = 953, 448
	benchD, benchF       = 576, 1536
	benchH, benchKV      = 9, 3
	benchHD, benchV      = 64, 49152
	benchW               = (benchH + 2*benchKV) * benchHD
	benchLayers          = 30
	benchPrompt, benchOf = 512, 7
)

type benchmark struct {
	*testing.B
	dev kernels.Device
}

func newBenchmark(b *testing.B) benchmark { return benchmark{b, open(b, 0)} }

// random takes a buffer of small normal numbers.
func (b benchmark) random(n int) kernels.Buffer {
	x := make([]float32, n)
	rng := rand.New(rand.NewPCG(1, uint64(n)))
	for i := range x {
		x[i] = float32(rng.NormFloat64()) * 0.3
	}
	buf, err := b.dev.Alloc("bench", kernels.F32, n)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { b.dev.Free(buf) })
	b.dev.Upload(buf, tensor.New(tensor.WithShape(n), tensor.WithBacking(x)))
	return buf
}

func (b benchmark) index(n, below int) kernels.Buffer {
	x := make([]int32, n)
	for i := range x {
		x[i] = int32(i * 7919 % below)
	}
	buf, err := b.dev.Alloc("bench", kernels.I32, n)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { b.dev.Free(buf) })
	b.dev.Upload(buf, tensor.New(tensor.WithShape(n), tensor.WithBacking(x)))
	return buf
}

func (b benchmark) arena(bytes int64) kernels.Arena {
	a, err := b.dev.NewArena(bytes)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { b.dev.FreeArena(a) })
	return a
}

// measure runs f b.N times and reports billions of operations (or bytes) a
// second of elapsed time, and the processor time of all cores an operation took:
// on a machine that others use too, the latter is the one to compare.
func (b benchmark) measure(each float64, unit string, f func()) {
	f()
	before := processorTime()
	for b.Loop() {
		f()
	}
	b.ReportMetric((processorTime()-before).Seconds()*1e3/float64(b.N), "cpu-ms/op")
	b.ReportMetric(each*float64(b.N)/b.Elapsed().Seconds()/1e9, unit)
}

func (b benchmark) layout(a kernels.Arena) (l kernels.Layout, pairs float64) {
	const n = (benchT - benchPrompt) / benchOf
	segments := []kernels.Segment{{QLen: benchPrompt, KLen: benchPrompt}}
	pairs = benchPrompt * (benchPrompt + 1) / 2
	for i := range int32(benchOf) {
		at := benchPrompt + i*n
		segments = append(segments, kernels.Segment{Q: at, QLen: n, K: at, KLen: n, PrefixLen: benchPrompt})
		pairs += n*benchPrompt + n*(n+1)/2
	}
	return b.dev.Layout(a, segments), pairs
}

func BenchmarkGemm(bb *testing.B) {
	for _, c := range []struct {
		name    string
		m, n, k int
		ta, tb  bool
	}{
		{"qkv", benchT, benchW, benchD, false, true},
		{"qkv dx", benchT, benchD, benchW, false, false},
		{"qkv dw", benchW, benchD, benchT, true, false},
		{"gate up", benchT, 2 * benchF, benchD, false, true},
		{"gate up dx", benchT, benchD, 2 * benchF, false, false},
		{"gate up dw", 2 * benchF, benchD, benchT, true, false},
		{"down", benchT, benchD, benchF, false, true},
		{"out", benchT, benchD, benchD, false, true},
	} {
		bb.Run(c.name, func(bb *testing.B) {
			b := newBenchmark(bb)
			g := kernels.Gemm{A: b.random(c.m * c.k), B: b.random(c.k * c.n), C: b.random(c.m * c.n), M: c.m, N: c.n, K: c.k, TransA: c.ta, TransB: c.tb}
			b.measure(2*float64(c.m)*float64(c.n)*float64(c.k), "GFLOP/s", func() { b.dev.Gemm(g) })
		})
	}
}

func BenchmarkAttention(bb *testing.B) {
	b := newBenchmark(bb)
	a := b.arena(1 << 20)
	scratch := b.arena(b.dev.(kernels.Scratcher).AttentionScratch(benchT, benchH, benchKV, benchHD, true))
	layout, pairs := b.layout(a)
	qkv, out, lse := b.random(benchT*benchW), b.random(benchT*benchD), b.random(benchT*benchH)
	view := func(at int) kernels.Strided { return kernels.Strided{Buf: qkv, Off: at * benchHD, Stride: benchW} }
	x := kernels.Attention{
		Out: out, LSE: lse, Q: view(0), K: view(benchH), V: view(benchH + benchKV), PK: view(benchH), PV: view(benchH + benchKV),
		Layout: layout, T: benchT, H: benchH, KV: benchKV, HD: benchHD, Scratch: scratch,
	}
	bb.Run("forward", func(bb *testing.B) {
		benchmark{bb, b.dev}.measure(4*pairs*benchH*benchHD, "GFLOP/s", func() { b.dev.Attention(x) })
	})
	g := kernels.AttentionBackward{
		DQKV: b.random(benchT * benchW), DOut: b.random(benchT * benchD), Out: out, LSE: lse, QKV: qkv,
		Layout: layout, T: benchT, H: benchH, KV: benchKV, HD: benchHD, Scratch: scratch,
	}
	bb.Run("backward", func(bb *testing.B) {
		benchmark{bb, b.dev}.measure(10*pairs*benchH*benchHD, "GFLOP/s", func() { b.dev.AttentionBackward(g) })
	})
	bb.Run("decode", func(bb *testing.B) { // 56 sequences behind one prompt, 32 tokens each so far
		const n = 56
		var segments []kernels.Segment
		for i := range int32(n) {
			segments = append(segments, kernels.Segment{Q: i, QLen: 1, K: benchPrompt + i%7*63, KLen: 32, PrefixLen: benchPrompt})
		}
		y := x
		y.T, y.LSE, y.Out, y.Layout = n, nil, out.Slice(0, n*benchD), b.dev.Layout(a, segments)
		benchmark{bb, b.dev}.measure(4*n*(benchPrompt+32)*benchH*benchHD, "GFLOP/s", func() { b.dev.Attention(y) })
	})
}

func BenchmarkHead(bb *testing.B) {
	b := newBenchmark(bb)
	a := b.arena(b.dev.(kernels.Scratcher).HeadScratch(benchN, benchD, benchV, true))
	h := kernels.Head{
		Hidden: b.random(benchN * benchD), W: b.random(benchV * benchD), Targets: b.index(benchN, benchV), LogProb: b.random(benchN),
		Entropy: b.random(benchN), N: benchN, D: benchD, V: benchV, Temperature: 1, Scratch: a,
	}
	flops := 2.0 * benchN * benchD * benchV
	bb.Run("forward", func(bb *testing.B) {
		benchmark{bb, b.dev}.measure(flops, "GFLOP/s", func() { b.dev.LogProb(h) })
	})
	g := kernels.HeadGrad{DLogProb: b.random(benchN), DHidden: b.random(benchN * benchD), DW: b.random(benchV * benchD)}
	bb.Run("backward", func(bb *testing.B) {
		benchmark{bb, b.dev}.measure(3*flops, "GFLOP/s", func() { b.dev.LogProbBackward(h, g) })
	})
	bb.Run("rows", func(bb *testing.B) { // what is left without the products
		z := anyFloats("bench", "z", a.Alloc(kernels.F32, headChunk(benchN, benchV)*benchV))
		dev := b.dev.(*device)
		for i := range z {
			z[i] = float32(i%97) * 0.1
		}
		benchmark{bb, b.dev}.measure(float64(len(z)), "Glogit/s", func() {
			dev.each(len(z)/benchV, func(_, i int) {
				row := z[i*benchV:][:benchV]
				stats(row, 5, 1).gradient(row, 1, 0)
			})
		})
	})
	bb.Run("sample", func(bb *testing.B) {
		const n = 56
		d := kernels.Draw{
			Hidden: h.Hidden.Slice(0, n*benchD), W: h.W, U: b.random(n), Tokens: b.index(n, 2), LogProb: b.random(n),
			N: n, D: benchD, V: benchV, Temperature: 1, TopP: 0.95, Scratch: b.arena(b.dev.(kernels.Scratcher).DrawScratch(n, benchD, benchV)),
		}
		benchmark{bb, b.dev}.measure(2*n*benchD*benchV, "GFLOP/s", func() { b.dev.Sample(d) })
	})
}

// BenchmarkRest times what is neither a product nor attention, once as a layer does it.
func BenchmarkRest(bb *testing.B) {
	b := newBenchmark(bb)
	x, y, z, w, rstd := b.random(benchT*benchD), b.random(benchT*benchD), b.random(benchT*benchD), b.random(benchD), b.random(benchT)
	qkv, pos, gu, act, dw := b.random(benchT*benchW), b.index(benchT, 1024), b.random(benchT*2*benchF), b.random(benchT*benchF), b.random(benchD)
	dgu := b.random(benchT * 2 * benchF)
	run := func(name string, bytes float64, f func()) {
		bb.Run(name, func(bb *testing.B) {
			benchmark{bb, b.dev}.measure(bytes, "GB/s", f)
		})
	}
	run("rmsnorm", 4*4*benchT*benchD, func() {
		b.dev.RMSNorm(kernels.Norm{Out: y, Rstd: rstd, X: x, Add: z, Sum: z, W: w, T: benchT, D: benchD, Eps: 1e-5})
	})
	b.dev.Zero(z)
	run("rmsnorm backward", 4*4*benchT*benchD, func() {
		b.dev.RMSNormBackward(kernels.NormBackward{DX: z, DW: dw, DY: y, X: x, W: w, Rstd: rstd, T: benchT, D: benchD})
	})
	run("rope", 2*4*benchT*benchW, func() {
		b.dev.Rope(kernels.Rope{Out: qkv, In: qkv, Pos: pos, T: benchT, H: benchH, KV: benchKV, HD: benchHD, Theta: 1e5})
	})
	run("rope backward", 2*4*benchT*benchW, func() {
		b.dev.RopeBackward(kernels.RopeBackward{D: qkv, Pos: pos, T: benchT, H: benchH, KV: benchKV, HD: benchHD, Theta: 1e5})
	})
	run("swiglu", 3*4*benchT*benchF, func() { b.dev.SwiGLU(act, gu, benchT, benchF) })
	run("swiglu backward", 5*4*benchT*benchF, func() { b.dev.SwiGLUBackward(dgu, act, gu, benchT, benchF) })
	const n = 16 << 20
	p, g, m, v, one := b.random(n), b.random(n), b.random(n), b.random(n), b.random(1)
	b.dev.Zero(v)
	run("adamw", 7*4*n, func() {
		b.dev.AdamW(kernels.AdamW{P: p, G: g, M: m, V: v, Coef: one, LR: 1e-6, Beta1: 0.9, Beta2: 0.95, Eps: 1e-8, Step: 5})
	})
	run("sum of squares", 4*n, func() {
		b.dev.Zero(one)
		b.dev.SumSquares(one, g)
	})
}

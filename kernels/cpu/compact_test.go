package cpu

import (
	"math"
	"math/rand/v2"
	"sort"
	"testing"

	"gorgonia.org/tensor"

	"trainerd/kernels"
)

// keeper rounds a block's moments to what a format keeps of them; unit draws from [0,1).
type keeper func(m []float64, unit func() float64)

// Formats of first moments, by block of kernels.MomentBlock. Each has 127
// values above zero, evenly spaced or powers of such, but the dynamic one of
// Dettmers et al. 2022, which spreads them over seven decades.
var firstFormats = map[string]keeper{
	"exact":              func([]float64, func() float64) {},
	"linear, nearest":    codebook(powerCodes(1), false),
	"linear, by chance":  codebook(powerCodes(1), true),
	"dynamic, nearest":   codebook(dynamicCodes(), false),
	"dynamic, by chance": codebook(dynamicCodes(), true),
	"square, nearest":    codebook(powerCodes(2), false),
	"square, by chance":  codebook(powerCodes(2), true),
	"cube, nearest":      codebook(powerCodes(3), false),
	"cube, by chance":    codebook(powerCodes(3), true),
	"fourth, nearest":    codebook(powerCodes(4), false),
	"fourth, by chance":  codebook(powerCodes(4), true),
}

// powerCodes are powers of 128 evenly spaced values.
func powerCodes(power float64) []float64 {
	x := make([]float64, 128)
	for i := range x {
		x[i] = math.Pow(float64(i)/127, power)
	}
	return x
}

// dynamicCodes are 2^(6-e) values over [10^-(e+1), 10^-e] for each e.
func dynamicCodes() []float64 {
	x := []float64{0, 1}
	for e := range 7 {
		n := 1 << (6 - e)
		for i := range n {
			x = append(x, math.Pow(10, -float64(e))*(0.1+0.9*(float64(i)+0.5)/float64(n)))
		}
	}
	sort.Float64s(x)
	return x
}

func codebook(codes []float64, chance bool) keeper {
	return func(m []float64, unit func() float64) {
		peak := 0.0
		for _, x := range m {
			peak = max(peak, math.Abs(x))
		}
		if peak == 0 {
			return
		}
		for i, x := range m {
			a := math.Abs(x) / peak
			at := min(sort.SearchFloat64s(codes, a), len(codes)-1)
			low, high := codes[max(at-1, 0)], codes[at]
			share := 0.5
			if chance {
				share = unit()
			}
			if high > low && (a-low)/(high-low) <= share {
				high = low
			}
			m[i] = math.Copysign(high*peak, x)
		}
	}
}

// secondFormats of second moments.
var secondFormats = map[string]keeper{
	"exact":           func([]float64, func() float64) {},
	"bf16, nearest":   halves16(false),
	"bf16, by chance": halves16(true),
}

func halves16(chance bool) keeper {
	return func(v []float64, unit func() float64) {
		for i, x := range v {
			bits := math.Float32bits(float32(x))
			add := uint32(0x7fff) + bits>>16&1
			if chance {
				add = uint32(unit() * 65536)
			}
			v[i] = float64(math.Float32frombits((bits + add) &^ 0xffff))
		}
	}
}

// gradientStream makes gradients whose sizes span four decades within every
// block, each with a drift of a third of its noise.
func gradientStream(n int) func() []float32 {
	rng := rand.New(rand.NewPCG(1, 2))
	size, drift := make([]float64, n), make([]float64, n)
	for i := range size {
		size[i] = math.Pow(10, -4*rng.Float64())
		drift[i] = rng.NormFloat64() / 3
	}
	return func() []float32 {
		g := make([]float32, n)
		for i := range g {
			g[i] = float32(size[i] * (drift[i] + rng.NormFloat64()))
		}
		return g
	}
}

// course runs AdamW in float64 with moments kept in the formats and returns how
// far each weight went, in units of the learning rate.
func course(n, steps int, beta1, beta2 float64, first, second keeper) []float64 {
	next, rng := gradientStream(n), rand.New(rand.NewPCG(3, 4))
	m, v, p := make([]float64, n), make([]float64, n), make([]float64, n)
	for step := 1; step <= steps; step++ {
		for i, g := range next() {
			m[i] = beta1*m[i] + (1-beta1)*float64(g)
			v[i] = beta2*v[i] + (1-beta2)*float64(g)*float64(g)
			p[i] -= m[i] / (1 - math.Pow(beta1, float64(step))) / (math.Sqrt(v[i]/(1-math.Pow(beta2, float64(step)))) + 1e-8)
		}
		for from := 0; from < n; from += kernels.MomentBlock {
			first(m[from:min(n, from+kernels.MomentBlock)], rng.Float64)
		}
		second(v, rng.Float64)
	}
	return p
}

// apart is the distance of two courses as a share of the second's length.
func apart(a, b []float64) float64 {
	d, l := 0.0, 0.0
	for i := range b {
		d += (a[i] - b[i]) * (a[i] - b[i])
		l += b[i] * b[i]
	}
	return math.Sqrt(d / l)
}

// TestCompactMomentsFollowFloat32 says why compact moments are what they are:
// after 200 steps, how far from the course of exact moments each choice ends.
// Fourth powers have to be the closest but for those rounded to nearest, which
// gradients with noise forgive and others do not (kerneltest's case of moments
// that stall). The device's steps must do as well as the choice in float64, within
// the quarter that other random bits make of it. The seeds are fixed.
func TestCompactMomentsFollowFloat32(t *testing.T) {
	const n, steps = 8 * kernels.MomentBlock, 200
	for _, beta2 := range []float64{0.95, 0.999} {
		exact := course(n, steps, 0.9, beta2, firstFormats["exact"], secondFormats["exact"])
		second := apart(course(n, steps, 0.9, beta2, firstFormats["exact"], secondFormats["bf16, by chance"]), exact)
		both := apart(course(n, steps, 0.9, beta2, firstFormats["fourth, by chance"], secondFormats["bf16, by chance"]), exact)
		device := apart(deviceCourse(t, n, steps, 0.9, beta2), exact)
		t.Logf("beta2 %v: bf16 second moments %.4f off, with compact first ones %.4f, on the device %.4f", beta2, second, both, device)
		if device > 1.25*both {
			t.Errorf("beta2 %v: the device is %v off, expected %v", beta2, device, both)
		}
		if beta2 != 0.95 {
			continue // first moments do not depend on it
		}
		off := map[string]float64{}
		for name, f := range firstFormats {
			off[name] = apart(course(n, steps, 0.9, beta2, f, secondFormats["exact"]), exact)
			t.Logf("first moments %-18s: %.4f off", name, off[name])
		}
		for name, d := range off {
			if best := off["fourth, by chance"]; d < best && name != "exact" && name != "fourth, nearest" {
				t.Errorf("%s is %v off, fourth powers by chance %v", name, d, best)
			}
		}
	}
}

// deviceCourse is course on the device with compact moments.
func deviceCourse(t *testing.T, n, steps int, beta1, beta2 float64) []float64 {
	t.Helper()
	dev, next := open(t, 2), gradientStream(n)
	alloc := func(k kernels.DType, n int) kernels.Buffer {
		b, err := dev.Alloc("test", k, n)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { dev.Free(b) })
		dev.Zero(b)
		return b
	}
	x := kernels.AdamW{P: alloc(kernels.F32, n), G: alloc(kernels.F32, n), M: alloc(kernels.I8, n), Scale: alloc(kernels.F32, kernels.MomentBlocks(n)),
		V: alloc(kernels.BF16, n), Coef: alloc(kernels.F32, 1), LR: 1, Beta1: beta1, Beta2: beta2, Eps: 1e-8, Seed: 5}
	dev.Upload(x.Coef, tensor.New(tensor.WithShape(1), tensor.WithBacking([]float32{1})))
	for x.Step = 1; x.Step <= int64(steps); x.Step++ {
		dev.Upload(x.G, tensor.New(tensor.WithShape(n), tensor.WithBacking(next())))
		dev.AdamW(x)
	}
	p := make([]float32, n)
	if err := dev.Download(tensor.New(tensor.WithShape(n), tensor.WithBacking(p)), x.P); err != nil {
		t.Fatal(err)
	}
	out := make([]float64, n)
	for i, v := range p {
		out[i] = float64(v)
	}
	return out
}

//go:build cudaemu

package cuda

import (
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"gorgonia.org/tensor"

	"trainerd/kernels"
	"trainerd/kernels/kerneltest"
)

// behave opens a device whose cuBLASLt behaves as told; see emulator/cublaslt.cc.
func behave(t *testing.T, how string, o Options) *Device {
	t.Helper()
	t.Setenv("TRAINERD_CUBLASLT", how)
	return emulatorWith(t, o)
}

// TestWithoutCublasLt: every product that the library refuses is computed by the kernel of our own.
func TestWithoutCublasLt(t *testing.T) {
	if err := setBudget("2e5"); err != nil {
		t.Fatal(err)
	}
	for _, how := range []string{"offer=0", "refuse=0,1,2,3,4,5"} {
		t.Run(how, func(t *testing.T) { kerneltest.Run(t, behave(t, how, Options{Log: slog.New(slog.DiscardHandler)})) })
	}
}

// products computes some products, one of them twice into the same float32 gradient, and returns their bits.
func products(t *testing.T, d *Device) []float32 {
	t.Helper()
	var out []float32
	rng := rand.New(rand.NewPCG(1, 2))
	numbers := func(n int) []float32 {
		x := make([]float32, n)
		for i := range x {
			x[i] = float32(rng.NormFloat64())
		}
		return x
	}
	take := func(k kernels.DType, n int) kernels.Buffer {
		b, err := d.Alloc("test", k, n)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { d.Free(b) })
		d.Upload(b, tensor.New(tensor.WithShape(n), tensor.WithBacking(numbers(n))))
		return b
	}
	for _, c := range []struct {
		m, n, k int
		bias    bool
		out     kernels.DType
	}{{24, 40, 200, true, kernels.BF16}, {64, 32, 336, false, kernels.F32}, {7, 9, 301, false, kernels.F32}} {
		g := kernels.Gemm{A: take(kernels.BF16, c.m*c.k), B: take(kernels.BF16, c.k*c.n), C: take(c.out, c.m*c.n), M: c.m, N: c.n, K: c.k, Accumulate: true}
		if c.bias {
			g.Bias = take(kernels.BF16, c.n)
		}
		d.Gemm(g)
		d.Gemm(g)
		x := make([]float32, c.m*c.n)
		if err := d.Download(tensor.New(tensor.WithShape(len(x)), tensor.WithBacking(x)), g.C); err != nil {
			t.Fatal(err)
		}
		out = append(out, x...)
	}
	if err := d.Sync(); err != nil {
		t.Fatal(err)
	}
	return out
}

// TestTimedChoice: the fastest algorithm is taken, trials leave no trace in
// results that are added to, and the next process takes the same from the file.
func TestTimedChoice(t *testing.T) {
	file := filepath.Join(t.TempDir(), "choices.json")
	var warned strings.Builder
	timed := Options{Timed: true, Choices: file, Log: slog.New(slog.NewTextHandler(&warned, nil))}
	// An algorithm alone: the others turn out not to be supported. Where alignment
	// rules out the odd ones, 2 is the fastest in both costs below.
	first, want := products(t, behave(t, "", Options{})), products(t, behave(t, "refuse=0,2,3,4,5", Options{}))
	third := products(t, behave(t, "refuse=0,1,3,4,5", Options{}))
	if slices.Equal(first, want) || slices.Equal(want, third) {
		t.Fatal("the stand-in's algorithms give the same bits: this test shows nothing")
	}
	aligned := 24*40 + 64*32
	want = append(want[:aligned:aligned], third[aligned:]...)
	if got := products(t, behave(t, "cost=9,4,7,9,9,9", timed)); !slices.Equal(got, want) {
		t.Error("the fastest algorithm was not taken, or its trials changed a result")
	}
	if got := products(t, behave(t, "cost=1,9,7,9,9,9", timed)); !slices.Equal(got, want) {
		t.Error("another process on the same machine takes other algorithms")
	}
	if got := products(t, behave(t, "cost=9,4,7,9,9,9", Options{Choices: file})); !slices.Equal(got, first) {
		t.Error("without timing it is not the library's favourite that is taken")
	}
	if warned.Len() > 0 {
		t.Errorf("unexpected warnings: %s", &warned)
	}

	// Another version of the library chooses anew and keeps what the first one chose.
	if got := products(t, behave(t, "cost=1,9,9,9,9,9;version=140000", timed)); !slices.Equal(got, first) {
		t.Error("a choice of another version was taken")
	}
	if got := products(t, behave(t, "cost=1,9,9,9,9,9", timed)); !slices.Equal(got, want) {
		t.Error("the choices of the first version are gone")
	}

	// A file that is damaged is chosen anew, with a warning.
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	at := strings.Index(string(b), `"algorithm":"`) + len(`"algorithm":"`)
	b[at] ^= 1
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if got := products(t, behave(t, "cost=1,9,9,9,9,9", timed)); !slices.Equal(got, first) {
		t.Error("a damaged file was believed")
	}
	if !strings.Contains(warned.String(), "chosen anew") {
		t.Errorf("no warning about the damaged file: %q", &warned)
	}
	if all, err := readMachines(file); err != nil || len(all) != 1 {
		t.Errorf("the file was not written anew: %d machines, %v", len(all), err)
	}
}

// TestFingerprintOfBits: where the bits of products differ so do the fingerprints,
// and the choices of a file that is lost are a difference.
func TestFingerprintOfBits(t *testing.T) {
	file := filepath.Join(t.TempDir(), "choices.json")
	run := func(how string, o Options) (kernels.Fingerprint, []float32) {
		d := behave(t, how, o)
		bits := products(t, d)
		return d.Fingerprint(), bits
	}
	timed := Options{Timed: true, Choices: file}
	was, bits := run("cost=9,4,7,9,9,9", timed)
	if len(was.Choices) != 3 {
		t.Fatalf("three products are computed by %d choices: %v", len(was.Choices), was.Choices)
	}
	if is, again := run("cost=1,9,9,9,9,9", timed); !slices.Equal(bits, again) || is.Since(was) != nil {
		t.Errorf("the same file: bits equal %v, differences %v", slices.Equal(bits, again), is.Since(was))
	}
	for _, c := range []struct {
		name, how string
		o         Options
	}{
		{"first", "", Options{}},
		{"another version", "cost=1,9,9,9,9,9;version=140000", timed},
		{"another file", "cost=1,9,9,9,9,9", Options{Timed: true}},
	} {
		is, other := run(c.how, c.o)
		if slices.Equal(bits, other) {
			t.Fatalf("%s: the bits are the same: this test shows nothing", c.name)
		}
		if is.Since(was) == nil {
			t.Errorf("%s: other bits and the same fingerprint %+v", c.name, is)
		}
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if fresh := behave(t, "", timed).Fingerprint(); len(fresh.Since(was)) != 3 {
		t.Errorf("the file is lost: %v, expected all three choices", fresh.Since(was))
	}
}

// TestFailedProduct: an error of the card is an error, not a reason to compute in another way.
func TestFailedProduct(t *testing.T) {
	for _, o := range []Options{{}, {Timed: true}} {
		d := behave(t, "fail=0,1,2,3,4,5", o)
		x, err := d.Alloc("test", kernels.BF16, 64)
		if err != nil {
			t.Fatal(err)
		}
		d.Zero(x)
		c, err := d.Alloc("test", kernels.BF16, 64)
		if err != nil {
			t.Fatal(err)
		}
		d.Gemm(kernels.Gemm{A: x, B: x, C: c, M: 8, N: 8, K: 8})
		if err := d.Sync(); err == nil || !strings.Contains(err.Error(), "gemm (M 8 N 8 K 8)") || !strings.Contains(err.Error(), "status 13") {
			t.Errorf("%+v: Sync gives %v, expected the operation and the status", o, err)
		}
	}
}

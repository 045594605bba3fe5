package cpu

import (
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unsafe"

	"gorgonia.org/tensor"

	"trainerd/internal/fault"
	"trainerd/kernels"
)

func TestAllocationsAreAligned(t *testing.T) {
	dev := open(t, 1)
	a, err := dev.NewArena(1 << 12)
	if err != nil {
		t.Fatal(err)
	}
	defer dev.FreeArena(a)
	for _, n := range []int{1, 3, 100, 1 << 16, 3 << 20} {
		b, err := dev.Alloc("test", kernels.F32, n)
		if err != nil {
			t.Fatal(err)
		}
		for _, x := range []kernels.Buffer{b, a.Alloc(kernels.F32, min(n, 100))} {
			if at := uintptr(unsafe.Pointer(&x.(*buffer).f[0])); at%alignment != 0 {
				t.Errorf("%d elements at %#x, expected a multiple of %d", n, at, alignment)
			}
		}
		x := b.(*buffer).f
		x[0], x[n-1] = 1, 2 // both ends are there
		dev.Free(b)
	}
}

func TestAllocRefusesWhatIsNotThere(t *testing.T) {
	dev := open(t, 1)
	want := dev.Info().MemTotal/4 + 1 // elements of 4 bytes: more than there can be
	_, err := dev.Alloc("weights", kernels.F32, int(want))
	if fault.KindOf(err) != fault.TooLarge {
		t.Fatalf("error %v, expected too_large", err)
	}
	for _, part := range []string{"weights", fmt.Sprint(kernels.Round(4*want, alignment)), "free"} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("error %q does not name %q", err, part)
		}
	}
	if _, err := dev.NewArena(4 * want); fault.KindOf(err) != fault.TooLarge {
		t.Errorf("arena: error %v, expected too_large", err)
	}
}

func TestArenaIsAStack(t *testing.T) {
	dev := open(t, 1)
	a, err := dev.NewArena(256)
	if err != nil {
		t.Fatal(err)
	}
	defer dev.FreeArena(a)
	a.Alloc(kernels.I32, 1) // takes a whole line of 64
	mark := a.Mark()
	a.Alloc(kernels.F32, 17)
	if got := a.Mark(); got != 64+128 {
		t.Errorf("height %d, expected 192", got)
	}
	func() {
		defer func() {
			var full *kernels.OutOfArena
			if err, ok := recover().(error); !ok || !errors.As(err, &full) || full.Want != 128 || full.Height != 192 || full.Capacity != 256 {
				t.Errorf("panic %v, expected 128 wanted at 192 of 256", full)
			}
		}()
		a.Alloc(kernels.F32, 17)
	}()
	a.Release(mark)
	a.Alloc(kernels.F32, 48)
	if a.Mark() != 256 || a.Peak() != 256 {
		t.Errorf("height %d, peak %d, expected 256", a.Mark(), a.Peak())
	}
}

// TestShapeErrorsPanic: the text names the operation and what does not fit.
func TestShapeErrorsPanic(t *testing.T) {
	dev := open(t, 2)
	buf := func(typ kernels.DType, n int) kernels.Buffer {
		b, err := dev.Alloc("test", typ, n)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { dev.Free(b) })
		return b
	}
	f, i := func(n int) kernels.Buffer { return buf(kernels.F32, n) }, func(n int) kernels.Buffer { return buf(kernels.I32, n) }
	a, err := dev.NewArena(1 << 16)
	if err != nil {
		t.Fatal(err)
	}
	defer dev.FreeArena(a)
	rows := i(3)
	dev.Upload(rows, tensor.New(tensor.WithShape(3), tensor.WithBacking([]int32{0, 9, 1})))
	for _, c := range []struct {
		want string // parts, by " ... "
		run  func()
	}{
		{"gemm ... A holds 5 elements, expected 6", func() { dev.Gemm(kernels.Gemm{A: f(5), B: f(12), C: f(8), M: 2, N: 4, K: 3}) }},
		{"gemm ... C is i32, expected f32", func() { dev.Gemm(kernels.Gemm{A: f(6), B: f(12), C: i(8), M: 2, N: 4, K: 3}) }},
		{"gather ... rows[1] is 9, expected [0,5)", func() { dev.Gather(f(6), f(10), rows, 2) }},
		{"upload ... dst holds 4 elements, expected 3", func() {
			dev.Upload(f(4), tensor.New(tensor.WithShape(3), tensor.WithBacking([]float32{1, 2, 3})))
		}},
		{"rmsnorm ... Sum is nil", func() { dev.RMSNorm(kernels.Norm{Out: f(4), X: f(4), Add: f(4), W: f(2), T: 2, D: 2}) }},
		{"rope ... H 3 KV 2", func() { dev.Rope(kernels.Rope{T: 1, H: 3, KV: 2, HD: 4}) }},
		{"rope ... hd 5", func() { dev.Rope(kernels.Rope{T: 1, H: 2, KV: 2, HD: 5}) }},
		{"attention ... segment 0 ... of 2 query rows", func() {
			s := kernels.Strided{Buf: f(24), Stride: 12}
			dev.Attention(kernels.Attention{Out: f(8), Q: s, K: s, V: s, Layout: dev.Layout(a, []kernels.Segment{{QLen: 3, KLen: 3}}), T: 2, H: 1, KV: 1, HD: 4, Scratch: a})
		}},
		{"attention ... rows [0,9) of K", func() {
			s := kernels.Strided{Buf: f(24), Stride: 12}
			dev.Attention(kernels.Attention{Out: f(8), Q: s, K: s, V: s, Layout: dev.Layout(a, []kernels.Segment{{QLen: 2, KLen: 9}}), T: 2, H: 1, KV: 1, HD: 4, Scratch: a})
		}},
		{"log-prob ... Targets[1] is 9, expected [0,4)", func() {
			dev.LogProb(kernels.Head{Hidden: f(6), W: f(8), Targets: rows, LogProb: f(3), N: 3, D: 2, V: 4, Temperature: 1, Scratch: a})
		}},
		{"log-prob ... temperature 0", func() {
			dev.LogProb(kernels.Head{Hidden: f(6), W: f(8), Targets: i(3), LogProb: f(3), N: 3, D: 2, V: 4, Scratch: a})
		}},
		{"sample ... top-p 1.5", func() {
			dev.Sample(kernels.Draw{Hidden: f(6), W: f(8), U: f(3), Tokens: i(3), LogProb: f(3), N: 3, D: 2, V: 4, Temperature: 1, TopP: 1.5, Scratch: a})
		}},
		{"adamw ... Step 0", func() { dev.AdamW(kernels.AdamW{P: f(2), G: f(2), M: f(2), V: f(2), Coef: f(1)}) }},
		{"slice ... [2,5) of a buffer of 4", func() { f(4).Slice(2, 5) }},
		{"gemm ... A is bf16, expected f32", func() {
			dev.Gemm(kernels.Gemm{A: buf(kernels.BF16, 6), B: f(12), C: f(8), M: 2, N: 4, K: 3})
		}},
		{"adamw ... M is 2 f32, expected 2 i8", func() {
			dev.AdamW(kernels.AdamW{P: f(2), G: f(2), M: f(2), Scale: f(1), V: buf(kernels.BF16, 2), Coef: f(1), Step: 1})
		}},
		{"adamw ... Scale holds 1 elements, expected 2", func() {
			dev.AdamW(kernels.AdamW{P: f(129), G: f(129), M: buf(kernels.I8, 129), Scale: f(1), V: buf(kernels.BF16, 129), Coef: f(1), Step: 1})
		}},
		{"free ... is a slice", func() { dev.Free(f(4).Slice(0, 2)) }},
	} {
		func() {
			defer func() {
				text := fmt.Sprint(recover())
				for _, part := range strings.Split(c.want, " ... ") {
					if !strings.Contains(text, part) {
						t.Errorf("panic %q, expected %q in it", text, part)
					}
				}
			}()
			c.run()
		}()
	}
}

func TestNewRefusesNegativeWorkers(t *testing.T) {
	if _, err := New(-1); err == nil || !strings.Contains(err.Error(), "-1 workers") {
		t.Errorf("error %v, expected one that names -1 workers", err)
	}
}

func TestInfo(t *testing.T) {
	info := open(t, 3).Info()
	if info.Workers != 3 || info.Compute != kernels.F32 || info.GradType != kernels.F32 || info.Model == "" {
		t.Errorf("info %+v", info)
	}
	if info.MemFree <= 0 || info.MemFree > info.MemTotal {
		t.Errorf("%d bytes free of %d", info.MemFree, info.MemTotal)
	}
}

func TestMeminfo(t *testing.T) {
	dir := write(t, map[string]string{"meminfo": "MemTotal:       2000 kB\nMemFree:  5 kB\nMemAvailable:   1500 kB\n"})
	if total, free := meminfo(filepath.Join(dir, "meminfo")); total != 2000<<10 || free != 1500<<10 {
		t.Errorf("%d, %d", total, free)
	}
	if total, free := meminfo(filepath.Join(dir, "absent")); total != math.MaxInt64 || free != math.MaxInt64 {
		t.Errorf("without the file: %d, %d", total, free)
	}
}

// TestCgroups reads both versions' files, with a limit on an outer group.
func TestCgroups(t *testing.T) {
	dir := write(t, map[string]string{
		"self":                                "12:memory:/a/b\n5:cpu,cpuacct:/x\n0::/u/v\n",
		"fs/memory/a/b/memory.limit_in_bytes": "9223372036854771712\n",
		"fs/memory/a/b/memory.usage_in_bytes": "10\n",
		"fs/memory/a/memory.limit_in_bytes":   "1000\n",
		"fs/memory/a/memory.usage_in_bytes":   "700\n",
		"fs/memory/a/memory.stat":             "cache 1\ntotal_inactive_file 300\n",
		"fs/u/v/memory.max":                   "max\n",
		"fs/u/v/memory.current":               "5\n",
		"fs/u/memory.max":                     "5000\n",
		"fs/u/memory.current":                 "2000\n",
		"fs/u/memory.stat":                    "anon 1\ninactive_file 500\n",
	})
	type pair struct{ limit, used int64 }
	var got []pair
	for _, g := range cgroups(filepath.Join(dir, "self"), filepath.Join(dir, "fs")) {
		if limit, used, ok := g.read(); ok {
			got = append(got, pair{limit, used})
		}
	}
	if want := []pair{{1000, 400}, {5000, 1500}}; fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("limits and use %v, expected %v", got, want)
	}
}

// write makes a directory of small files.
func write(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// TestMemoryLimit: a limited device is full when its limit is reached, and what
// is freed can be taken again.
func TestMemoryLimit(t *testing.T) {
	dev, err := New(1, Memory(1024))
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	a, err := dev.NewArena(512)
	if err != nil {
		t.Fatal(err)
	}
	b, err := dev.Alloc("weights", kernels.F32, 100) // 448 bytes
	if err != nil {
		t.Fatal(err)
	}
	if i := dev.Info(); i.MemTotal != 1024 || i.MemFree != 64 {
		t.Errorf("%d of %d free, expected 64 of 1024", i.MemFree, i.MemTotal)
	}
	if _, err := dev.Alloc("weights", kernels.F32, 17); fault.KindOf(err) != fault.TooLarge {
		t.Errorf("128 bytes of 64 give %v", err)
	}
	dev.Free(b)
	dev.FreeArena(a)
	if free := dev.Info().MemFree; free != 1024 {
		t.Errorf("%d free after everything was freed", free)
	}
	if _, err := New(1, Memory(-1)); err == nil {
		t.Error("a negative limit is taken")
	}
}

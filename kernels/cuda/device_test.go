package cuda

import (
	"errors"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"gorgonia.org/tensor"

	"trainerd/internal/fault"
	"trainerd/kernels"
)

// recorder is a driver that computes nothing and keeps what it is asked to do.
type recorder struct {
	hostBytes int64 // of mapped
	next      address
	launches  []launched
	products  []product
	freed     int
	fail      map[string]error // by kernel
	room      int64            // bytes that alloc gives in all
	gone      error            // the error that counts as sticky
	lacks     bool             // code for this card
}

type launched struct {
	kernel      string
	grid, block size2
	shared      int
	kinds       string // p, l, i or f for each parameter
}

func (r *recorder) alloc(n int64) (address, error) {
	if n > r.room {
		return 0, errNoMemory
	}
	r.room -= n
	r.next += address(kernels.Round(n, alignment))
	return r.next, nil
}
func (r *recorder) mapped(n int64) (address, error) {
	r.hostBytes += n
	r.next += address(kernels.Round(n, alignment))
	return r.next, nil
}
func (r *recorder) free(address) error                     { r.freed++; return nil }
func (r *recorder) memory() (free, total int64, err error) { return r.room, 1 << 40, nil }
func (r *recorder) pinned(n int) ([]byte, error)           { return make([]byte, n), nil }
func (r *recorder) register([]byte) error                  { return nil }
func (r *recorder) unregister([]byte) error                { return nil }
func (r *recorder) admits(product, algorithm) error        { return nil }
func (r *recorder) library() versions                      { return versions{} }
func (r *recorder) fill(address, byte, int64) error        { return nil }
func (r *recorder) move(dst, src address, n int64) error   { return nil }
func (r *recorder) upload(dst address, src []byte) error   { return nil }
func (r *recorder) mark(int) error                         { return nil }
func (r *recorder) wait(int) error                         { return nil }
func (r *recorder) sync() error                            { return nil }
func (r *recorder) has(string) bool                        { return !r.lacks }
func (r *recorder) lost(err error) bool                    { return r.gone != nil && errors.Is(err, r.gone) }
func (r *recorder) close() error                           { return nil }
func (r *recorder) download(dst []byte, src address) error {
	for i := range dst {
		dst[i] = 0x7f // what flags hold that nothing has lowered
	}
	return nil
}

func (r *recorder) product(p product, _ algorithm) error {
	r.products = append(r.products, p)
	return nil
}
func (r *recorder) algorithms(product) ([]algorithm, error) { return []algorithm{{1}}, nil }
func (r *recorder) elapsed(run func() error) (time.Duration, error) {
	return time.Microsecond, run()
}

func (r *recorder) launch(kernel string, grid, block size2, shared int, args ...any) error {
	l := launched{kernel: kernel, grid: grid, block: block, shared: shared}
	for _, a := range args {
		l.kinds += map[string]string{"uint64": "p", "int64": "l", "int32": "i", "float32": "f"}[fmt.Sprintf("%T", a)]
	}
	r.launches = append(r.launches, l)
	return r.fail[kernel]
}

func record(t *testing.T) (*Device, *recorder) {
	t.Helper()
	return recordWith(t, Options{})
}

func recordWith(t *testing.T, o Options) (*Device, *recorder) {
	t.Helper()
	r := &recorder{next: 1 << 20, room: 1 << 40, fail: map[string]error{}}
	d, err := newDevice(kernels.Info{Name: "cuda:0", Model: "recorder"}, o, func() (driver, error) { return r, nil })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.Close() })
	return d, r
}

// signature is what a kernel's declaration says of its parameters and block.
type signature struct {
	kinds   string
	threads int // the most of a block
}

// signatures reads the declarations in the .cu files.
func signatures(t *testing.T) map[string]signature {
	t.Helper()
	out := map[string]signature{}
	files, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	re := regexp.MustCompile(`extern "C" (?:__cluster_dims__\(8, 1, 1\) )?__global__ void\s+(?:__launch_bounds__\((\d+)[^)]*\)\s*(?://.*\n\s*)?)?(\w+)\(([^)]*)\)`)
	for _, f := range files {
		if !strings.HasSuffix(f.Name(), ".cu") {
			continue
		}
		text, err := os.ReadFile(f.Name())
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range re.FindAllStringSubmatch(string(text), -1) {
			s := signature{threads: 1024}
			if m[1] != "" {
				s.threads, _ = strconv.Atoi(m[1])
			}
			for _, p := range strings.Split(m[3], ",") {
				switch {
				case strings.Contains(p, "*"):
					s.kinds += "p"
				case strings.Contains(p, "long long"):
					s.kinds += "l"
				case strings.Contains(p, "float "):
					s.kinds += "f"
				case strings.Contains(p, "int "):
					s.kinds += "i"
				default:
					t.Errorf("%s: %s has a parameter %q that this test cannot read", f.Name(), m[2], p)
				}
			}
			out[m[2]] = s
		}
	}
	if len(out) < 40 {
		t.Fatalf("only %d kernels were found in the .cu files", len(out))
	}
	return out
}

// everything calls each operation at shapes that take every kernel.
func everything(t *testing.T, d kernels.Device, a kernels.Arena) {
	buffer := func(k kernels.DType, n int) kernels.Buffer {
		b, err := d.Alloc("test", k, n)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	bf := func(n int) kernels.Buffer { return buffer(kernels.BF16, n) }
	f32 := func(n int) kernels.Buffer { return buffer(kernels.F32, n) }
	d.Upload(bf(6), tensor.New(tensor.WithShape(6), tensor.WithBacking(make([]float32, 6))))
	d.Copy(bf(8), f32(8))
	d.Copy(f32(8), bf(8))
	if r, ok := d.(kernels.Rounder); ok { // the planner is none, and they take no scratch
		_, err := r.DownloadRounded(make([]uint16, 3), bf(3), buffer(kernels.I16, 3))
		if err := errors.Join(err, r.DownloadMasters(make([]float32, 3), bf(3), buffer(kernels.I16, 3))); err != nil {
			t.Fatal(err)
		}
	}
	d.Lerp(bf(8), bf(8), 0.5)
	d.Lerp(f32(8), f32(8), 0.5)
	d.Gather(bf(30), bf(100), buffer(kernels.I32, 3), 10)
	d.Gather(f32(30), f32(100), buffer(kernels.I32, 3), 10)
	s := d.Scatter(a, kernels.ScatterIndex{Dst: []int32{0, 3}, Start: []int32{0, 1, 3}, Src: []int32{2, 0, 1}})
	d.ScatterAdd(bf(100), bf(30), s, 10, true)
	d.ScatterAdd(f32(100), bf(30), s, 10, false)
	d.BiasBackward(f32(40), bf(40*70), 70, 40, true)
	d.BiasBackward(bf(40), bf(40*70), 70, 40, false)
	d.Gemm(kernels.Gemm{A: bf(6), B: bf(12), C: bf(8), M: 2, N: 4, K: 3, Bias: bf(4)})
	d.Gemm(kernels.Gemm{A: bf(0), B: bf(0), C: bf(8), M: 2, N: 4})
	for _, width := range []int{64, 2048} {
		d.RMSNorm(kernels.Norm{Out: bf(5 * width), Rstd: f32(5), X: bf(5 * width), Add: bf(5 * width), Sum: bf(5 * width), W: bf(width), T: 5, D: width, Eps: 1e-6})
		d.RMSNormBackward(kernels.NormBackward{DX: bf(5 * width), DW: f32(width), DY: bf(5 * width), X: bf(5 * width), W: bf(width), Rstd: f32(5), T: 5, D: width})
	}
	for _, hd := range []int{64, 128, 80} {
		h, kv, n := 4, 2, 700
		w := (h + 2*kv) * hd
		r := kernels.Rope{Out: bf(n * w), In: bf(n * w), Pos: buffer(kernels.I32, n), T: n, H: h, KV: kv, HD: hd, Theta: 1e4, QW: bf(hd), KW: bf(hd), Rstd: f32(n * (h + kv))}
		d.Rope(r)
		d.RopeBackward(kernels.RopeBackward{D: bf(n * w), In: r.In, Pos: r.Pos, T: n, H: h, KV: kv, HD: hd, Theta: 1e4, QW: r.QW, KW: r.KW, DQW: f32(hd), DKW: f32(hd), Rstd: r.Rstd})
		mark := a.Mark()
		segments := []kernels.Segment{{QLen: 650, KLen: 650}}
		for i := range int32(10) {
			segments = append(segments, kernels.Segment{Q: 650 + 5*i, QLen: 5, K: 650 + 5*i, KLen: 5, PrefixLen: 650})
		}
		l := d.Layout(a, segments)
		qkv := bf(n * w)
		q := func(off int) kernels.Strided { return kernels.Strided{Buf: qkv, Off: off * hd, Stride: w} }
		x := kernels.Attention{Out: bf(n * h * hd), LSE: f32(n * h), Q: q(0), K: q(h), V: q(h + kv), PK: q(h), PV: q(h + kv), Layout: l, T: n, H: h, KV: kv, HD: hd, Scratch: a}
		d.Attention(x)
		d.AttentionBackward(kernels.AttentionBackward{DQKV: bf(n * w), DOut: bf(n * h * hd), Out: x.Out, LSE: x.LSE, QKV: qkv, Layout: l, T: n, H: h, KV: kv, HD: hd, Scratch: a})
		a.Release(mark)
	}
	d.SwiGLU(bf(40), bf(80), 4, 10)
	d.SwiGLUBackward(bf(80), bf(40), bf(80), 4, 10)
	for _, v := range []int{50, clusterFrom + 1} {
		head := kernels.Head{Hidden: bf(9 * 16), W: bf(v * 16), Targets: buffer(kernels.I32, 9), LogProb: f32(9), Entropy: f32(9), N: 9, D: 16, V: v, Temperature: 1, Scratch: a}
		d.LogProb(head)
		d.LogProbBackward(head, kernels.HeadGrad{Surrogate: &kernels.Surrogate{}, Tokens: kernels.SurrogateTokens{Adv: f32(9), Weight: f32(9)}, DHidden: bf(9 * 16), DW: f32(v * 16)})
	}
	d.Sample(kernels.Draw{Hidden: bf(9 * 16), W: bf(50 * 16), U: f32(9), Tokens: buffer(kernels.I32, 9), LogProb: f32(9), N: 9, D: 16, V: 50, Temperature: 1, TopP: 0.9, Scratch: a})
	d.Advantages(kernels.Advantages{Out: make([]float64, 7), R: make([]float64, 7), Start: []int32{0, 7}})
	d.SumSquares(f32(1), f32(100))
	d.SumSquares(f32(1), bf(100))
	d.ClipCoef(f32(1), f32(1), 1, 1)
	d.AdamW(kernels.AdamW{P: bf(8), Rem: buffer(kernels.I16, 8), G: f32(8), M: f32(8), V: f32(8), Coef: f32(1), Step: 1})
	d.AdamW(kernels.AdamW{P: bf(8), Rem: buffer(kernels.I16, 8), G: bf(8), M: f32(8), V: f32(8), Coef: f32(1), Step: 1})
	d.AdamW(kernels.AdamW{P: f32(8), G: f32(8), M: f32(8), V: f32(8), Coef: f32(1), Step: 1})
	for _, g := range []kernels.Buffer{f32(8), bf(8)} {
		d.AdamW(kernels.AdamW{P: bf(8), Rem: buffer(kernels.I16, 8), G: g, M: buffer(kernels.I8, 8), Scale: f32(1), V: bf(8), Coef: f32(1), Step: 1})
	}
	d.AddGrad(kernels.AddGrad{Dst: bf(8), Src: f32(8)})
}

// TestLaunchesFitTheKernels: every launch names a kernel that exists, with
// parameters of its kinds in its order, and a block of the size it was compiled for.
func TestLaunchesFitTheKernels(t *testing.T) {
	want, used := signatures(t), map[string]bool{}
	for _, attention := range []string{AttentionMMA, AttentionWgmma} {
		t.Run(attention, func(t *testing.T) { launchesFit(t, attention, want, used) })
	}
	for k := range want {
		switch k {
		case "copy_bytes", "zero_bytes", "split_master", "first_not_finite_f32":
			// for graphs, tests and diagnosis; no operation needs them
		default:
			if !used[k] {
				t.Errorf("%s was not launched: this test lost it", k)
			}
		}
	}
}

func launchesFit(t *testing.T, attention string, want map[string]signature, used map[string]bool) {
	d, r := recordWith(t, Options{Attention: attention})
	planner := kernels.NewPlanner(d)
	planned, err := planner.NewArena(0)
	if err != nil {
		t.Fatal(err)
	}
	everything(t, planner, planned)
	a, err := d.NewArena(planned.Peak())
	if err != nil {
		t.Fatal(err)
	}
	everything(t, d, a) // panics with OutOfArena where the plan was short
	if err := d.Sync(); err != nil {
		t.Fatal(err)
	}
	for _, l := range r.launches {
		used[l.kernel] = true
		s, ok := want[l.kernel]
		if !ok {
			t.Errorf("%s is launched and is in no .cu file", l.kernel)
			continue
		}
		if s.kinds != l.kinds {
			t.Errorf("%s is launched with parameters %s, expected %s", l.kernel, l.kinds, s.kinds)
		}
		threads := l.block.x * l.block.y
		if threads < 32 || threads%32 != 0 || threads > s.threads {
			t.Errorf("%s is launched with %d threads, expected whole warps and at most %d", l.kernel, threads, s.threads)
		}
		if l.grid.x < 1 || l.grid.y < 1 || l.grid.y > 65535 || l.shared > 99840 {
			t.Errorf("%s is launched on a grid of (%d,%d) with %d bytes of shared memory", l.kernel, l.grid.x, l.grid.y, l.shared)
		}
	}
}

// TestAttentionSetting: what the card cannot do is refused by the setting's name, before anything is taken.
func TestAttentionSetting(t *testing.T) {
	for _, c := range []struct {
		set   string
		lacks bool
		want  string // in the error; "": none
		print string
	}{
		{"", true, "", ""}, {AttentionMMA, true, "", ""}, {AttentionWgmma, false, "", AttentionWgmma},
		{AttentionWgmma, true, "compute capability 9.0", ""}, {"hand", false, "expected mma or wgmma", ""},
	} {
		r := &recorder{next: 1 << 20, room: 1 << 40, lacks: c.lacks}
		d, err := newDevice(kernels.Info{Name: "cuda:0", Model: "recorder"}, Options{Attention: c.set}, func() (driver, error) { return r, nil })
		if c.want != "" {
			if e, ok := fault.As(err); err == nil || !ok || e.Kind != fault.Invalid || !strings.Contains(err.Error(), "cuda_attention") || !strings.Contains(err.Error(), c.want) || r.room != 1<<40 {
				t.Errorf("%q (card lacks it: %v) gives %v and takes %d bytes, expected cuda_attention: %s", c.set, c.lacks, err, 1<<40-r.room, c.want)
			}
			continue
		}
		if err != nil {
			t.Errorf("%q: %v", c.set, err)
			continue
		}
		if got := d.Fingerprint().Attention; got != c.print {
			t.Errorf("%q: the fingerprint says %q, expected %q", c.set, got, c.print)
		}
		_ = d.Close()
	}
}

// TestColumnMajor computes a row-major product through the column-major one, for all transpositions.
func TestColumnMajor(t *testing.T) {
	const m, n, k = 2, 3, 4
	at := func(x []int, ld int, place [2]int) int { return x[place[1]*ld+place[0]] } // row and column
	for _, transA := range []bool{false, true} {
		for _, transB := range []bool{false, true} {
			a, b := make([]int, m*k), make([]int, k*n)
			for i := range a {
				a[i] = i + 1
			}
			for i := range b {
				b[i] = 10 - i
			}
			x := matrices{a: 1, b: 2, c: 3, m: m, n: n, k: k, transA: transA, transB: transB}
			x.contiguous()
			p := x.columnMajor()
			if p.a != 2 || p.b != 1 || p.c != 3 || p.m != n || p.n != m || p.k != k {
				t.Fatalf("operands %d, %d, %d of m %d n %d k %d", p.a, p.b, p.c, p.m, p.n, p.k)
			}
			for i := range m {
				for j := range n {
					want, got := 0, 0
					for l := range k {
						av, bv := a[i*k+l], b[l*n+j]
						if transA {
							av = a[l*m+i]
						}
						if transB {
							bv = b[j*k+l]
						}
						want += av * bv
						first, second := [2]int{j, l}, [2]int{l, i}
						if p.transA {
							first = [2]int{l, j}
						}
						if p.transB {
							second = [2]int{i, l}
						}
						got += at(b, p.lda, first) * at(a, p.ldb, second)
					}
					if got != want {
						t.Errorf("transA %v transB %v: C[%d,%d] is %d, expected %d", transA, transB, i, j, got, want)
					}
				}
			}
		}
	}
}

func TestErrorsNameTheOperationAndAreReturnedOnce(t *testing.T) {
	d, r := record(t)
	r.fail["swiglu_bf16"] = errors.New("boom")
	x, err := d.Alloc("test", kernels.BF16, 80)
	if err != nil {
		t.Fatal(err)
	}
	d.SwiGLU(x.Slice(0, 40), x, 4, 10)
	before := len(r.launches)
	d.SumSquares(mustAlloc(t, d, kernels.F32, 1), x)
	if err := d.Sync(); err == nil || !strings.Contains(err.Error(), "swiglu (T 4 F 10)") || !strings.Contains(err.Error(), "boom") {
		t.Fatalf("sync gives %v, expected the operation, its shapes and the cause", err)
	}
	if n := len(r.launches); n > before+1 {
		t.Errorf("%d launches ran behind the failed one", n-before-1)
	}
	if err := d.Sync(); err != nil {
		t.Errorf("the error came twice: %v", err)
	}
}

// mustAlloc may fail behind an earlier error, which is what some tests want to see.
func mustAlloc(t *testing.T, d *Device, k kernels.DType, n int) kernels.Buffer {
	t.Helper()
	b, err := d.Alloc("test", k, n)
	if err != nil {
		return &buffer{t: k, n: n, at: 1 << 30}
	}
	return b
}

func TestLostDeviceStaysLostAndCloses(t *testing.T) {
	d, r := record(t)
	r.gone = errors.New("illegal address")
	r.fail["swiglu_bf16"] = r.gone
	x := mustAlloc(t, d, kernels.BF16, 80)
	d.SwiGLU(x.Slice(0, 40), x, 4, 10)
	for range 2 {
		if err := d.Sync(); err == nil || !errors.Is(err, r.gone) {
			t.Fatalf("sync gives %v, expected the device to stay lost", err)
		}
	}
	if _, err := d.Alloc("weights", kernels.F32, 8); err == nil {
		t.Error("a lost device allocates")
	}
	d.Free(x)
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if r.freed == 0 {
		t.Error("Free did not reach the driver behind the error")
	}
}

func TestTooLittleMemory(t *testing.T) {
	d, r := record(t)
	_ = d.Sync()
	r.room = 1000
	_, err := d.Alloc("weights", kernels.F32, 1<<20)
	if err == nil || !strings.Contains(err.Error(), "allocate weights on cuda:0: 4194304 bytes wanted, 1000 free") {
		t.Errorf("too much gives %v", err)
	}
	if _, err := d.NewArena(256); err != nil {
		t.Errorf("what fits is refused after it: %v", err)
	}
	if err := d.Sync(); err != nil {
		t.Errorf("a refused allocation broke the device: %v", err)
	}
}

func TestOpenSaysWhatIsMissing(t *testing.T) {
	for _, c := range []struct {
		f    found
		want string
	}{
		{found{status: -1, why: "libcuda.so.1: cannot open"}, "open cuda:0: no NVIDIA driver: libcuda.so.1: cannot open"},
		{found{status: 100}, "cuInit gives 100: no CUDA card is visible"},
		{found{status: 4711}, "cuInit gives 4711"},
		{found{driver: 12080, built: 13000, cards: 1}, "the driver supports CUDA 12.8, this binary was built with CUDA 13.0: expected a driver for CUDA 13.0 or newer"},
		{found{driver: 13000, built: 13000}, "sees no card"},
		{found{index: 7, driver: 13000, built: 13000, cards: 1}, "got cuda:7, expected cuda:0, the only card of this machine"},
		{found{index: 7, driver: 13010, built: 13000, cards: 2}, "got cuda:7, expected cuda:0 to cuda:1"},
	} {
		if err := c.f.checkDriver(); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v gives %v, expected %q", c.f, err, c.want)
		}
	}
	if err := (found{driver: 13000, built: 12080, cards: 1}).checkDriver(); err != nil {
		t.Errorf("a newer driver is refused: %v", err)
	}
	if err := (found{model: "Tesla T4", major: 7, minor: 5}).checkCard(); err == nil || !strings.Contains(err.Error(), "Tesla T4 has compute capability 7.5") {
		t.Errorf("an old card gives %v", err)
	}
	if err := (found{model: "X", major: 8}).checkCard(); err != nil {
		t.Errorf("8.0 is refused: %v", err)
	}
	cause := errors.New("no binary")
	if err := (found{model: "X", major: 13}).noCode("fatbin/rows.fatbin", cause); !errors.Is(err, cause) || !strings.Contains(err.Error(), "fatbin/rows.fatbin holds no code for X (compute capability 13.0)") {
		t.Errorf("a fatbin without code gives %v", err)
	}
}

// TestPack: parameters lie as in a C struct.
func TestPack(t *testing.T) {
	got := pack(nil, []any{int32(1), address(2), float32(1), int32(3), int32(4), int64(5)})
	want := []byte{1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x80, 0x3f, 3, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0}
	if string(got) != string(want) {
		t.Errorf("packed %v, expected %v", got, want)
	}
}

// TestScheduleRoom: the room a layout takes holds the schedules of groups as they are packed.
func TestScheduleRoom(t *testing.T) {
	for _, c := range []struct{ h, kv, groups, prompt, size, completion int }{
		{14, 2, 4, 1536, 7, 384}, {28, 4, 1, 2048, 7, 100}, {64, 1, 2, 30, 3, 9}, {32, 32, 3, 700, 8, 1}, {9, 3, 64, 1, 7, 2}, {8, 8, 1, 16000, 4, 70},
	} {
		var segments []kernels.Segment
		t0 := int32(0)
		for range c.groups {
			p := t0
			segments = append(segments, kernels.Segment{Q: p, QLen: int32(c.prompt), K: p, KLen: int32(c.prompt)})
			t0 += int32(c.prompt)
			for range c.size {
				segments = append(segments, kernels.Segment{Q: t0, QLen: int32(c.completion), K: t0, KLen: int32(c.completion), Prefix: p, PrefixLen: int32(c.prompt)})
				t0 += int32(c.completion)
			}
		}
		s := NewSchedule(segments, c.h, c.kv, true)
		if room := layoutInts(len(segments), int(t0)); s.Ints() > room {
			t.Errorf("%+v: a schedule of %d ints, room for %d", c, s.Ints(), room)
		}
		if s.PartRows > MaxPartRows(c.kv) || s.Slots > MaxSlots {
			t.Errorf("%+v: %d partial rows and %d slots, over their bounds", c, s.PartRows, s.Slots)
		}
	}
}

package cuda

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"trainerd/kernels"
)

// laboratory is a recorder whose library offers some algorithms with given times.
type laboratory struct {
	*recorder
	took    []time.Duration // of algorithm {i+1}
	now     time.Duration
	trials  int
	refused map[int]bool // by admits
	ran     []int
}

func (l *laboratory) algorithms(product) ([]algorithm, error) {
	var out []algorithm
	for i := range l.took {
		out = append(out, algorithm{uint64(i + 1)})
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("nothing: %w", errUnsupported)
	}
	return out, nil
}

func (l *laboratory) product(p product, a algorithm) error {
	l.ran = append(l.ran, int(a[0]))
	l.now += l.took[a[0]-1]
	return nil
}

func (l *laboratory) admits(p product, a algorithm) error {
	if l.refused[p.n] {
		return errUnsupported
	}
	return nil
}

func (l *laboratory) elapsed(run func() error) (time.Duration, error) {
	l.trials++
	before := l.now
	err := run()
	return l.now - before, err
}

func (l *laboratory) library() versions { return versions{13000, 130100} }

func newLaboratory(t *testing.T, o Options, took ...time.Duration) (*Device, *laboratory) {
	t.Helper()
	l := &laboratory{recorder: &recorder{next: 1 << 20, room: 1 << 40, fail: map[string]error{}}, took: took}
	d, err := newDevice(kernels.Info{Name: "cuda:0", Model: "laboratory"}, o, func() (driver, error) { return l, nil })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.Close() })
	return d, l
}

// tokens runs a product of some rows with fixed other sizes and returns the last algorithm that ran.
func (l *laboratory) tokens(t *testing.T, d *Device, rows int, accumulate bool) int {
	t.Helper()
	bf := func(n int) kernels.Buffer { return mustAlloc(t, d, kernels.BF16, n) }
	d.Gemm(kernels.Gemm{A: bf(rows * 64), B: bf(64 * 128), C: bf(rows * 128), M: rows, N: 128, K: 64, Accumulate: accumulate})
	if err := d.Sync(); err != nil {
		t.Fatal(err)
	}
	if len(l.ran) == 0 {
		return 0
	}
	return l.ran[len(l.ran)-1]
}

// TestOneChoicePerClass: token counts of one rung share a choice, and a choice is made once.
func TestOneChoicePerClass(t *testing.T) {
	d, l := newLaboratory(t, Options{Timed: true}, 5*time.Microsecond, 3*time.Microsecond, 4*time.Microsecond)
	for _, rows := range []int{1030, 1500, 1030, 1536} {
		if got := l.tokens(t, d, rows, true); got != 2 {
			t.Errorf("%d rows ran by algorithm %d, expected the fastest, 2", rows, got)
		}
	}
	if want := 3 * trials; l.trials != want {
		t.Errorf("%d trials for one class, expected %d", l.trials, want)
	}
	l.tokens(t, d, 1537, false)
	if want := 6 * trials; l.trials != want {
		t.Errorf("%d trials for two classes, expected %d", l.trials, want)
	}
	// What the choice does not fit takes the library's favourite, without trials.
	l.refused = map[int]bool{1500: true, 1400: true}
	if got := l.tokens(t, d, 1400, false); got != 1 {
		t.Errorf("a shape that the choice does not fit ran by algorithm %d, expected the favourite", got)
	}
	if want := 6 * trials; l.trials != want {
		t.Errorf("%d trials, expected %d", l.trials, want)
	}
}

// TestCloseTimes: a gain within the noise does not change the favourite.
func TestCloseTimes(t *testing.T) {
	d, l := newLaboratory(t, Options{Timed: true}, 1000, 980, 1100)
	if got := l.tokens(t, d, 64, false); got != 1 {
		t.Errorf("algorithm %d was taken for a gain of 2 %%", got)
	}
}

// TestOwnKernelTakesTheRest: empty sums, a bias at an odd place, and what the library has nothing for.
func TestOwnKernelTakesTheRest(t *testing.T) {
	var warned strings.Builder
	d, l := newLaboratory(t, Options{Log: slog.New(slog.NewTextHandler(&warned, nil))}, time.Microsecond)
	bf := func(n int) kernels.Buffer { return mustAlloc(t, d, kernels.BF16, n) }
	d.Gemm(kernels.Gemm{A: bf(0), B: bf(0), C: bf(8), M: 2, N: 4})
	d.Gemm(kernels.Gemm{A: bf(6), B: bf(12), C: bf(8), M: 2, N: 4, K: 3, Bias: bf(5).Slice(1, 5)})
	if l.tokens(t, d, 3, false); len(l.ran) != 1 {
		t.Errorf("the library ran %d products, expected the last one alone", len(l.ran))
	}
	if warned.Len() > 0 {
		t.Errorf("warned of what is never the library's: %s", &warned)
	}
	l.took = nil
	l.tokens(t, d, 5, false)
	l.tokens(t, d, 6, false)
	if n := strings.Count(warned.String(), "refuses a product"); n != 1 {
		t.Errorf("%d warnings of one kind of product, expected 1: %s", n, &warned)
	}
	var own int
	for _, x := range l.launches {
		if x.kernel == "gemm_simple" {
			own++
		}
	}
	if own != 4 || len(l.ran) != 1 {
		t.Errorf("%d products by the own kernel, %d by the library, expected 4 and 1", own, len(l.ran))
	}
}

func TestRungs(t *testing.T) {
	for n := 1; n < 5000; n++ {
		r := rungOf(n)
		if r < n || n > 2 && float64(r) >= 1.5*float64(n) || rungOf(r) != r {
			t.Fatalf("the rung of %d is %d, whose own is %d", n, r, rungOf(r))
		}
	}
}

// TestChoicesFile: what is written is read, by the same machine alone, and nothing else is.
func TestChoicesFile(t *testing.T) {
	name := filepath.Join(t.TempDir(), "choices.json")
	c := newChoices(Options{Timed: true, Choices: name}, "A", versions{13000, 130100})
	c.classes[class{m: 8, n: 2, k: 3, transA: true, align: [6]uint8{1, 2, 3, 4, 0, 1}}] = choice{algorithm: algorithm{1, 1 << 63, 3}, took: 1500}
	c.classes[class{m: 8, n: 2, k: 4, bias: true}] = choice{own: true}
	if err := c.write(); err != nil {
		t.Fatal(err)
	}
	same := newChoices(Options{Timed: true, Choices: name}, "A", versions{13000, 130100})
	if diff := cmp.Diff(c.classes, same.classes, cmp.AllowUnexported(class{}, choice{})); diff != "" {
		t.Errorf("read back (-written +read):\n%s", diff)
	}
	for _, other := range []struct {
		card string
		v    versions
	}{{"B", versions{13000, 130100}}, {"A", versions{13010, 130100}}, {"A", versions{13000, 130200}}} {
		o := newChoices(Options{Timed: true, Choices: name}, other.card, other.v)
		if len(o.classes) != 0 {
			t.Errorf("%+v takes the choices of another machine", other)
		}
		if err := o.write(); err != nil {
			t.Fatal(err)
		}
	}
	if all, err := readMachines(name); err != nil || len(all) != 4 {
		t.Errorf("%d machines in the file, %v, expected 4", len(all), err)
	}
	left, err := filepath.Glob(name + ".*")
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	for i := range b {
		bad := append([]byte(nil), b...)
		bad[i] ^= 1
		got, err := parseMachines(bad)
		if err == nil && len(got) != 4 {
			t.Errorf("byte %d changed: %d machines and no error", i, len(got))
		}
	}
}

// TestTwoProcessesChooseAlike: what one of them has recorded counts for the other,
// and neither writes the other's choices away.
func TestTwoProcessesChooseAlike(t *testing.T) {
	o := Options{Timed: true, Choices: filepath.Join(t.TempDir(), "choices.json")}
	a, la := newLaboratory(t, o, 5, 3)
	b, lb := newLaboratory(t, o, 3, 5) // where the other algorithm is faster
	if got := la.tokens(t, a, 64, false); got != 2 {
		t.Fatalf("the first takes %d", got)
	}
	if got := lb.tokens(t, b, 64, false); got != 2 || lb.trials != 0 {
		t.Errorf("the second takes %d after %d trials, expected what the first recorded", got, lb.trials)
	}
	if got := lb.tokens(t, b, 1000, false); got != 1 {
		t.Errorf("the second takes %d for another class, expected its fastest", got)
	}
	if got := la.tokens(t, a, 1000, false); got != 1 {
		t.Errorf("the first takes %d, expected what the second recorded", got)
	}
	if all, err := readMachines(o.Choices); err != nil || len(all) != 1 || len(all[0].Products) != 2 {
		t.Errorf("the file holds %+v, %v", all, err)
	}
}

// FuzzChoices: no file makes the reader panic, and what it accepts it writes back alike.
func FuzzChoices(f *testing.F) {
	machines := `[{"card":"A","driver":13000,"cublaslt":130100,"products":[{"m":1,"n":2,"k":3,"algorithm":"own","us":1}]}]`
	f.Add([]byte(machines), true)
	f.Add([]byte(`[{"products":[{"algorithm":"00"}]}]`), true)
	f.Add([]byte(`{"format":"trainerd gemm choices 1"}`), false)
	f.Fuzz(func(t *testing.T, b []byte, whole bool) {
		if whole {
			b = fmt.Appendf(nil, `{"format":%q,"sum":%q,"machines":%s}`, fileFormat, sumOf(b), b)
		}
		all, err := parseMachines(b)
		if err != nil {
			return
		}
		for _, e := range all {
			got, err := e.choices()
			if err != nil {
				continue
			}
			c := choices{here: e.machine, classes: got}
			again, err := c.entries().choices()
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(got, again, cmp.AllowUnexported(class{}, choice{}), cmpopts.IgnoreFields(choice{}, "took")); diff != "" {
				t.Fatal(diff)
			}
		}
	})
}

package cuda

import (
	"errors"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"trainerd/kernels"
)

// counter is a recorder whose clock advances by 1 s with every stamp and by 10 s with every launch.
type counter struct {
	*recorder
	now   float64
	at    []float64
	stuck error
}

func (c *counter) stopwatch() stopwatch { return c }
func (c *counter) start()               { c.at = nil }
func (c *counter) stamp() error         { c.now++; c.at = append(c.at, c.now); return c.stuck }
func (c *counter) read() (between []float64, whole float64, err error) {
	for i := 1; i < len(c.at); i++ {
		between = append(between, c.at[i]-c.at[i-1])
	}
	return between, c.at[len(c.at)-1] - c.at[0], nil
}

func (c *counter) launch(kernel string, grid, block size2, shared int, args ...any) error {
	c.now += 10
	return c.recorder.launch(kernel, grid, block, shared, args...)
}

func TestProfile(t *testing.T) {
	c := &counter{recorder: &recorder{next: 1 << 20, room: 1 << 40, fail: map[string]error{}}}
	d, err := newDevice(kernels.Info{Name: "cuda:0"}, Options{}, func() (driver, error) { return c, nil })
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	x, err := d.Alloc("test", kernels.BF16, 64)
	if err != nil {
		t.Fatal(err)
	}
	f, _ := d.Alloc("test", kernels.F32, 64)

	d.StartProfile(true)
	d.SumSquares(f.Slice(0, 1), x) // two launches
	d.Copy(x, f)
	d.Copy(x, f)
	if err := d.Sync(); err != nil { // host only
		t.Fatal(err)
	}
	if c.at == nil {
		t.Fatal("nothing was stamped")
	}
	p, err := d.StopProfile()
	if err != nil {
		t.Fatal(err)
	}
	// Stamps: start, three pairs, stop. A pair holds its second stamp's second.
	if s, n := p.Phase(kernels.PhaseOptimizer); s != 21 || n != 1 {
		t.Errorf("optimizer: %v s in %d calls, expected 21 s in 1", s, n)
	}
	if s, n := p.Phase(kernels.PhaseElementwise); s != 22 || n != 2 {
		t.Errorf("elementwise: %v s in %d calls, expected 22 s in 2", s, n)
	}
	if p.Gaps != 4 || math.Abs(p.Total()+p.Gaps-p.Span) > 1e-12 {
		t.Errorf("gaps %v, operations %v, span %v", p.Gaps, p.Total(), p.Span)
	}

	d.StartProfile(false)
	d.Copy(x, f)
	if p, err = d.StopProfile(); err != nil || p.Span != 11 || len(p.Ops) != 0 {
		t.Errorf("the span alone: %+v, %v", p, err)
	}

	before := len(c.at)
	d.Copy(x, f)
	if err := d.Sync(); err != nil || len(c.at) != before {
		t.Errorf("%d stamps without a profile, %v", len(c.at)-before, err)
	}

	if _, err := d.StopProfile(); err == nil || !strings.Contains(err.Error(), "none was started") {
		t.Errorf("stopping what was not started: %v", err)
	}
	if err := d.Sync(); err != nil {
		t.Errorf("the error was not taken: %v", err)
	}
	c.fail["cast_f32_bf16"] = errors.New("out of luck")
	d.StartProfile(true)
	d.Copy(x, f)
	if _, err := d.StopProfile(); err == nil || !strings.Contains(err.Error(), "out of luck") {
		t.Errorf("a profile of an operation that fails: %v", err)
	}
	delete(c.fail, "cast_f32_bf16")
	before = len(c.at)
	d.Copy(x, f)
	if err := d.Sync(); err != nil || len(c.at) != before {
		t.Errorf("after a profile that failed: %v, and %d stamps", err, len(c.at)-before)
	}
	c.stuck = errors.New("no more events")
	d.StartProfile(true)
	if _, err := d.StopProfile(); err == nil || !strings.Contains(err.Error(), "no more events") {
		t.Errorf("a stamp that fails: %v", err)
	}
}

// TestProfileNeedsAClock: the recorder has none.
func TestProfileNeedsAClock(t *testing.T) {
	d, _ := record(t)
	d.StartProfile(true)
	if _, err := d.StopProfile(); err == nil || !strings.Contains(err.Error(), "no clock") {
		t.Errorf("got %v", err)
	}
}

// TestLabelsHavePhases reads the sources: a label that no phase knows is filed under "other".
func TestLabelsHavePhases(t *testing.T) {
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	label := regexp.MustCompile(`(?:\bof\(|const op = |d\.head\(|d\.fill\()"([^"]+)"`)
	found := 0
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range label.FindAllStringSubmatch(string(text), -1) {
			found++
			if _, known := kernels.PhaseOf(m[1]); !known && !hostOnly(m[1]) {
				t.Errorf("%s: operations named %q have no phase: add it to kernels/profile.go", name, m[1])
			}
		}
	}
	if found < 30 {
		t.Fatalf("only %d labels were found", found)
	}
}

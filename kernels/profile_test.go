package kernels

import (
	"go/ast"
	"go/parser"
	"go/token"
	"math"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestTimedTimesEveryOperation reads the sources: a method of Device that Timed
// does not time would be counted as a gap.
func TestTimedTimesEveryOperation(t *testing.T) {
	none := []string{"Info", "Alloc", "Free", "NewArena", "FreeArena", "Sync", "Close", "Sealed"}
	device, err := parser.ParseFile(token.NewFileSet(), "device.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	timed, err := parser.ParseFile(token.NewFileSet(), "timed.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	has := map[string]string{} // method of Timed to the name that it times
	for _, d := range timed.Decls {
		f, ok := d.(*ast.FuncDecl)
		if !ok || f.Recv == nil {
			continue
		}
		ast.Inspect(f.Body, func(n ast.Node) bool {
			c, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			if s, ok := c.Fun.(*ast.SelectorExpr); ok && s.Sel.Name == "time" && len(c.Args) == 2 {
				if l, ok := c.Args[0].(*ast.BasicLit); ok {
					has[f.Name.Name] = strings.Trim(l.Value, `"`)
				}
			}
			return true
		})
	}
	operations := 0
	ast.Inspect(device, func(n ast.Node) bool {
		s, ok := n.(*ast.TypeSpec)
		if !ok || s.Name.Name != "Device" {
			return true
		}
		for _, m := range s.Type.(*ast.InterfaceType).Methods.List {
			name := m.Names[0].Name
			if slices.Contains(none, name) {
				continue
			}
			operations++
			op, ok := has[name]
			if !ok {
				t.Errorf("Timed does not time %s: add it to timed.go, and its name to profile.go", name)
			} else if _, known := PhaseOf(op); !known {
				t.Errorf("%s is timed as %q, which no phase knows: add it to profile.go", name, op)
			}
		}
		return false
	})
	if operations < 25 {
		t.Fatalf("only %d operations were found in device.go", operations)
	}
}

// TestTimedAddsUp runs operations that take known times of a clock.
func TestTimedAddsUp(t *testing.T) {
	clock := time.Unix(0, 0)
	took := map[string]time.Duration{"gemm": 5 * time.Millisecond, "rmsnorm": time.Millisecond, "zero": 2 * time.Millisecond}
	d := NewTimed(&slow{PlanDevice: NewPlanner(&PlanDevice{bytes: map[string]int64{}}).(*PlanDevice), clock: &clock, took: took})
	d.now = func() time.Time { return clock }
	if _, err := d.StopProfile(); err == nil {
		t.Error("a profile that was not started has ended")
	}
	d.Gemm(Gemm{}) // before the start: not counted
	d.StartProfile(true)
	clock = clock.Add(7 * time.Millisecond)
	for range 3 {
		d.Gemm(Gemm{})
		d.RMSNorm(Norm{})
		clock = clock.Add(time.Millisecond)
	}
	d.Zero(nil)
	clock = clock.Add(3 * time.Millisecond)
	p, err := d.StopProfile()
	if err != nil {
		t.Fatal(err)
	}
	ms := func(name string, got, want float64) {
		t.Helper()
		if math.Abs(got-want/1e3) > 1e-12 {
			t.Errorf("%s: %v s, expected %v ms", name, got, want)
		}
	}
	ms("span", p.Span, 7+3*(5+1+1)+2+3)
	ms("gaps", p.Gaps, 7+3+3)
	g, calls := p.Phase(PhaseGemm)
	ms("gemm", g, 15)
	e, _ := p.Phase(PhaseElementwise)
	ms("elementwise", e, 5)
	ms("total and gaps", p.Total()+p.Gaps, p.Span*1e3)
	if calls != 3 {
		t.Errorf("%d products, expected 3", calls)
	}
	d.StartProfile(false)
	d.Gemm(Gemm{})
	if p, _ := d.StopProfile(); len(p.Ops) != 0 || p.Span != 5e-3 || p.Gaps != p.Span {
		t.Errorf("a profile of the span alone is %+v", p)
	}
}

// slow is a device whose operations take time of a clock.
type slow struct {
	*PlanDevice
	clock *time.Time
	took  map[string]time.Duration
}

func (s *slow) Gemm(Gemm)    { *s.clock = s.clock.Add(s.took["gemm"]) }
func (s *slow) RMSNorm(Norm) { *s.clock = s.clock.Add(s.took["rmsnorm"]) }
func (s *slow) Zero(Buffer)  { *s.clock = s.clock.Add(s.took["zero"]) }

package archtest

import (
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

const module = "trainerd"

// rule says which packages of this module, and which outside ones that are
// reserved to somebody, the packages under a folder may import. The longest
// matching folder decides.
type rule struct {
	dir  string
	may  []string // folders; a folder allows what lies below it. internal/fault, document, crashpoint, durable and checked always are
	uses []string // reserved outside modules
}

var rules = []rule{
	{dir: "internal/fault"},
	{dir: "internal/archtest"},
	{dir: "internal/crashpoint"},
	{dir: "internal/document"},
	{dir: "internal/tracing", uses: []string{"go.opentelemetry.io/otel/sdk", "go.opentelemetry.io/otel/exporters"}},
	{dir: "internal/durable"},
	{dir: "internal/checked"},
	{dir: "internal/plot"},
	{dir: "internal/crashtest"}, // only its tests import anything
	{dir: "internal/faulttest", uses: []string{"github.com/minio/minio-go"}}, // only its tests do
	{dir: "kernels", may: []string{"kernels"}, uses: []string{"gorgonia.org/tensor"}},
	{dir: "kernels/cuda", may: []string{"kernels"}, uses: []string{"gorgonia.org/tensor", "gorgonia.org/cu"}},
	{dir: "model", may: []string{"model", "kernels"}, uses: []string{"gorgonia.org/tensor"}},
	{dir: "rollout", may: []string{"rollout"}},
	{dir: "rollout/arrowio", may: []string{"rollout"}, uses: []string{"github.com/apache/arrow"}},
	{dir: "rollout/spool"},
	{dir: "storage", may: []string{"storage"}},
	{dir: "storage/s3", may: []string{"storage"}, uses: []string{"github.com/minio/minio-go"}},
	{dir: "sagrpo", may: []string{"model", "rollout", "kernels"}, uses: []string{"gorgonia.org/tensor"}},
	{dir: "trainer", may: []string{"sagrpo", "model", "rollout", "storage", "kernels"}},
	{dir: "server", may: []string{"trainer", "rollout", "storage"}, uses: []string{"github.com/labstack/echo"}},
	{dir: "server/access", may: []string{"storage"}, uses: []string{"github.com/labstack/echo"}},
	{dir: "client", may: []string{"rollout", "storage"}},
	{dir: "secloop", may: []string{"client", "rollout", "model/tokenizer"}},
	{dir: "secloop/sensor", may: []string{"secloop"}},
	{dir: "secloop/scenario", may: []string{"secloop"}},
	{dir: "secloop/blue", may: []string{"secloop/scenario"}},
	{dir: "secloop/red", may: []string{"secloop/scenario"}},
	{dir: "secloop/sim", may: []string{"secloop"}},
	{dir: "secloop/field", may: []string{"secloop"}, uses: []string{"github.com/vishvananda", "github.com/google/nftables"}},
	{dir: "secloop/loop", may: []string{"secloop", "client", "rollout", "model/tokenizer", "internal/plot"}},
	{dir: "parity", may: []string{"sagrpo", "model", "rollout", "kernels"}, uses: []string{"gorgonia.org/tensor"}},
	{dir: "bench", may: []string{"sagrpo", "model", "rollout", "storage", "kernels", "trainer", "server", "client", "internal/plot"}, uses: []string{"gorgonia.org/tensor"}},
	{dir: "cmd/trainerd", may: []string{"bench", "client", "internal", "kernels", "model", "rollout", "sagrpo", "secloop", "server", "storage", "trainer"}, uses: []string{"gorgonia.org/tensor"}},
}

// reserved are the outside modules that only named packages may import.
var reserved = []string{"gorgonia.org/tensor", "gorgonia.org/cu", "github.com/apache/arrow", "github.com/minio/minio-go", "github.com/labstack/echo",
	"github.com/vishvananda", "github.com/google/nftables", "go.opentelemetry.io/otel/sdk", "go.opentelemetry.io/otel/exporters"}

// testsMay are what test files may import on top: a test of an upper layer
// stands on a real device, a real store and real files.
var testsMay = []string{"kernels", "model", "rollout", "storage", "sagrpo", "trainer", "server", "client", "gorgonia.org/tensor", "github.com/apache/arrow"}

func TestImportsPointOneWay(t *testing.T) {
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	files := 0
	err = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, path)
		if d.IsDir() {
			if strings.HasPrefix(d.Name(), ".") && rel != "." || d.Name() == "testdata" || d.Name() == "gen" {
				return filepath.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(path, ".go") {
			return nil
		}
		files++
		r, ok := ruleFor(filepath.ToSlash(filepath.Dir(rel)))
		if !ok {
			t.Errorf("%s: no rule for this folder; add it to docs/architecture.md and here", rel)
			return nil
		}
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		isTest := strings.HasSuffix(path, "_test.go") || strings.HasSuffix(filepath.Dir(path), "test")
		for _, imp := range f.Imports {
			p, _ := strconv.Unquote(imp.Path.Value)
			if !allowed(r, p, isTest) {
				t.Errorf("%s imports %s, which %s may not", rel, p, r.dir)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if files < 20 {
		t.Fatalf("only %d files were read from %s", files, root)
	}
}

func ruleFor(dir string) (rule, bool) {
	var best rule
	found := false
	for _, r := range rules {
		if below(dir, r.dir) && (!found || len(r.dir) > len(best.dir)) {
			best, found = r, true
		}
	}
	return best, found
}

func allowed(r rule, path string, isTest bool) bool {
	if in, ok := strings.CutPrefix(path, module+"/"); ok {
		if below(in, "internal/fault") || below(in, "internal/crashpoint") || below(in, "internal/document") || below(in, "internal/durable") || below(in, "internal/checked") || below(in, r.dir) {
			return true
		}
		for _, m := range r.may {
			if below(in, m) {
				return true
			}
		}
		return isTest && anyBelow(in, testsMay)
	}
	for _, res := range reserved {
		if below(path, res) {
			return anyBelow(path, r.uses) || isTest && anyBelow(path, testsMay)
		}
	}
	return true
}

func anyBelow(path string, dirs []string) bool {
	for _, d := range dirs {
		if below(path, d) {
			return true
		}
	}
	return false
}

func below(path, dir string) bool { return path == dir || strings.HasPrefix(path, dir+"/") }

// TestRulesCanFail shows that the rules refuse what they should.
func TestRulesCanFail(t *testing.T) {
	for _, c := range []struct {
		dir, path string
		want      bool
	}{
		{"server", "trainerd/model", false},
		{"secloop", "trainerd/trainer", false},
		{"rollout", "github.com/apache/arrow/go/v17/arrow", false},
		{"rollout/arrowio", "github.com/apache/arrow/go/v17/arrow", true},
		{"kernels/cpu", "gorgonia.org/cu", false},
		{"kernels/cuda", "gorgonia.org/cu", true},
		{"model/hf", "trainerd/model", true},
		{"model", "trainerd/rollout", false},
		{"storage", "trainerd/internal/fault", true},
		{"secloop/red", "trainerd/secloop/blue", false},
		{"secloop/sim", "github.com/google/nftables", false},
		{"secloop/field", "github.com/google/nftables", true},
		{"server/access", "trainerd/trainer", false},
		{"trainer", "go.opentelemetry.io/otel/sdk/trace", false},
		{"trainer", "go.opentelemetry.io/otel/trace", true},
	} {
		r, ok := ruleFor(c.dir)
		if !ok {
			t.Fatalf("no rule for %s", c.dir)
		}
		if got := allowed(r, c.path, false); got != c.want {
			t.Errorf("%s importing %s: allowed %v, expected %v", c.dir, c.path, got, c.want)
		}
	}
}

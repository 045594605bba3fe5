package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"go.yaml.in/yaml/v3"

	"trainerd/client"
)

// series are the names that a scrape has, with the labels of each.
type series map[string]map[string]bool

// scraped reads /metrics of a server on which everything has happened that a
// series needs in order to be there.
func scraped(t *testing.T) series {
	t.Helper()
	p, c := boot(t, nil)
	j := newJob(t, c)
	if _, err := c.Submit(t.Context(), j.ID, pairs("g", 1), ""); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Wait(t.Context(), j.ID, time.Millisecond, func(j client.Job) bool { return j.PolicyStep == 1 || j.Final() }); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Pause(t.Context(), j.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Submit(t.Context(), j.ID, pairs("h", 1), ""); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Cancel(t.Context(), j.ID); err != nil { // its groups are refused
		t.Fatal(err)
	}
	res, err := http.Get(p.URL() + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	raw, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	parser := expfmt.NewTextParser(model.LegacyValidation)
	families, err := parser.TextToMetricFamilies(bytes.NewReader(raw))
	if err != nil {
		t.Fatal(err)
	}
	out := series{}
	for name, f := range families {
		names := []string{name}
		if f.GetType().String() == "HISTOGRAM" {
			names = []string{name + "_bucket", name + "_sum", name + "_count"}
		}
		for _, n := range names {
			out[n] = map[string]bool{"instance": true, "job": true} // which Prometheus adds
			for _, m := range f.Metric {
				for _, l := range m.Label {
					out[n][l.GetName()] = true
				}
			}
			if strings.HasSuffix(n, "_bucket") {
				out[n]["le"] = true
			}
		}
	}
	return out
}

var (
	quoted   = regexp.MustCompile(`"(\\.|[^"\\])*"`)
	matchers = regexp.MustCompile(`([a-zA-Z_:][a-zA-Z0-9_:]*)?\{([^}]*)\}`)
	matcher  = regexp.MustCompile(`^\s*([a-zA-Z_]\w*)\s*(=~|!~|!=|=)\s*§(\d+)\s*$`)
	ranges   = regexp.MustCompile(`\[[^\]]*\]`)
	grouping = regexp.MustCompile(`\b(by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)`)
	words    = regexp.MustCompile(`[a-zA-Z_:][a-zA-Z0-9_:]*`)
)

// notSeries are the words of PromQL that the rules and panels use.
var notSeries = []string{"and", "or", "unless", "sum", "max", "min", "rate", "increase", "delta", "changes", "histogram_quantile", "absent", "bool"}

// checkExpr holds an expression to a scrape: each series in it and each of the
// labels that it matches or groups by is there. It is no parser of PromQL: the
// brackets must match and that is all it knows of the grammar.
func checkExpr(expr string, have series) (used []string, errs []error) {
	bad := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf("%s in %s", fmt.Sprintf(format, args...), expr))
	}
	var texts []string
	rest := quoted.ReplaceAllStringFunc(expr, func(s string) string {
		texts = append(texts, s)
		return fmt.Sprintf("§%d", len(texts)-1)
	})
	for _, pair := range []string{"()", "{}", "[]"} {
		if strings.Count(rest, pair[:1]) != strings.Count(rest, pair[1:]) {
			bad("unmatched %s", pair)
		}
	}
	labels := map[string]bool{}
	for _, m := range matchers.FindAllStringSubmatch(rest, -1) {
		for _, part := range strings.Split(m[2], ",") {
			l := matcher.FindStringSubmatch(part)
			if l == nil {
				bad("matcher %q", part)
			} else if !have[m[1]][l[1]] {
				bad("%s has no label %s", m[1], l[1])
			}
		}
	}
	rest = matchers.ReplaceAllString(rest, "$1")
	rest = ranges.ReplaceAllString(rest, "")
	for _, m := range grouping.FindAllStringSubmatch(rest, -1) {
		for _, l := range words.FindAllString(m[2], -1) {
			labels[l] = true
		}
	}
	rest = grouping.ReplaceAllString(rest, "")
	for _, w := range words.FindAllString(rest, -1) {
		if slices.Contains(notSeries, w) {
			continue
		}
		if have[w] == nil {
			bad("no series %s", w)
			continue
		}
		used = append(used, w)
	}
	for l := range labels {
		if !slices.ContainsFunc(used, func(u string) bool { return have[u][l] }) {
			bad("no series with the label %s", l)
		}
	}
	if len(used) == 0 {
		bad("no series")
	}
	return used, errs
}

func TestCheckExprCanFail(t *testing.T) {
	have := series{"trainerd_step": {"job": true, "instance": true}, "x_bucket": {"le": true}}
	for expr, ok := range map[string]bool{
		`sum by (job) (rate(trainerd_step{job=~"a|{b}"}[5m])) > 0.5`: true,
		`histogram_quantile(0.9, sum by (le) (rate(x_bucket[5m])))`:  true,
		`trainerd_steps > 1`:                      false,
		`trainerd_step{state="x"}`:                false,
		`trainerd_step{job}`:                      false,
		`sum by (reason) (trainerd_step)`:         false,
		`sum(trainerd_step`:                       false,
		`1 > 0`:                                   false,
		`trainerd_step and on(cluster) x_bucket`:  false,
		`trainerd_step and on(instance) x_bucket`: true,
	} {
		if _, errs := checkExpr(expr, have); (len(errs) == 0) != ok {
			t.Errorf("%s: %v", expr, errs)
		}
	}
}

// TestAlertRules holds every rule to a real scrape.
func TestAlertRules(t *testing.T) {
	have := scraped(t)
	var file struct {
		Groups []struct {
			Name  string
			Rules []struct {
				Alert, Expr, For    string
				Labels, Annotations map[string]string
			}
		}
	}
	d := yaml.NewDecoder(bytes.NewReader(read(t, deploy+"prometheus/alerts.yaml")))
	d.KnownFields(true)
	if err := d.Decode(&file); err != nil {
		t.Fatal(err)
	}
	names := map[string]bool{}
	for _, g := range file.Groups {
		for _, r := range g.Rules {
			if names[r.Alert] || !strings.HasPrefix(r.Alert, "Trainerd") {
				t.Errorf("alert %q", r.Alert)
			}
			names[r.Alert] = true
			if _, errs := checkExpr(r.Expr, have); len(errs) > 0 {
				t.Errorf("%s: %v", r.Alert, errs)
			}
			if r.For != "" {
				if _, err := time.ParseDuration(r.For); err != nil {
					t.Errorf("%s: %v", r.Alert, err)
				}
			}
			if s := r.Labels["severity"]; s != "critical" && s != "warning" || r.Annotations["summary"] == "" || r.Annotations["description"] == "" {
				t.Errorf("%s: labels %v, annotations %v", r.Alert, r.Labels, r.Annotations)
			}
		}
	}
	if len(names) < 8 {
		t.Errorf("only %d rules", len(names))
	}
	var scrape struct {
		Rules []string `yaml:"rule_files"`
	}
	if err := yaml.Unmarshal(read(t, deploy+"prometheus/scrape.yaml"), &scrape); err != nil || !slices.Equal(scrape.Rules, []string{"alerts.yaml"}) {
		t.Errorf("%+v, %v", scrape, err)
	}
}

// TestDashboard holds every panel to a real scrape.
func TestDashboard(t *testing.T) {
	have := scraped(t)
	type panel struct {
		ID          int
		Type, Title string
		Datasource  struct{ Type, UID string }
		GridPos     struct{ X, Y, W, H int }
		Targets     []struct{ Expr, RefID string }
	}
	var board struct {
		Title, UID string
		Templating struct {
			List []struct {
				Name  string
				Query json.RawMessage
			}
		}
		Panels []panel
	}
	if err := json.Unmarshal(read(t, deploy+"grafana/trainerd.json"), &board); err != nil {
		t.Fatal(err)
	}
	variables := map[string]bool{}
	for _, v := range board.Templating.List {
		variables[v.Name] = true
		if m := regexp.MustCompile(`label_values\((\w+)`).FindSubmatch(v.Query); m != nil && have[string(m[1])] == nil {
			t.Errorf("variable %s: no series %s", v.Name, m[1])
		}
	}
	shown := map[string]bool{}
	for i, p := range board.Panels {
		for _, q := range board.Panels[:i] {
			a, b := p.GridPos, q.GridPos
			if p.ID == q.ID || a.X < b.X+b.W && b.X < a.X+a.W && a.Y < b.Y+b.H && b.Y < a.Y+a.H {
				t.Errorf("panels %q and %q share an id or a place", p.Title, q.Title)
			}
		}
		if p.Type == "row" {
			continue
		}
		if len(p.Targets) == 0 || p.Datasource.UID != "${datasource}" || p.GridPos.X+p.GridPos.W > 24 {
			t.Errorf("panel %q: %d queries of %s", p.Title, len(p.Targets), p.Datasource.UID)
		}
		for _, target := range p.Targets {
			for _, v := range regexp.MustCompile(`\$(\w+)`).FindAllStringSubmatch(target.Expr, -1) {
				if !variables[v[1]] {
					t.Errorf("panel %q: no variable $%s", p.Title, v[1])
				}
			}
			used, errs := checkExpr(target.Expr, have)
			if len(errs) > 0 {
				t.Errorf("panel %q: %v", p.Title, errs)
			}
			for _, u := range used {
				shown[u] = true
			}
		}
	}
	if len(shown) < 25 {
		t.Errorf("only %d series are shown", len(shown))
	}
}

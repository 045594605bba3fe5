package server_test

import (
	"bytes"
	"io"
	"net/http"
	"regexp"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"trainerd/client"
	"trainerd/server/servertest"
)

// scrape reads /metrics as Prometheus does.
func scrape(t *testing.T, url string) map[string]*dto.MetricFamily {
	t.Helper()
	res, err := http.Get(url + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	raw, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != http.StatusOK {
		t.Fatalf("%d, %v", res.StatusCode, err)
	}
	parser := expfmt.NewTextParser(model.LegacyValidation)
	families, err := parser.TextToMetricFamilies(bytes.NewReader(raw))
	if err != nil {
		t.Fatalf("the scrape does not parse: %v", err)
	}
	problems, err := promlint.New(bytes.NewReader(raw)).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
	return families
}

// TestMetricsConform scrapes a server with a job that trained, was refused
// something and published, and holds names and texts to Prometheus' conventions.
func TestMetricsConform(t *testing.T) {
	e := servertest.Start(t, servertest.Options{Wrap: described(t)})
	c, ctx := connect(t, e)
	j := create(t, c, ctx, e.JobDocument(3, nil))
	if _, err := c.Submit(ctx, j.ID, servertest.Batch("a", 2, 3, 0, 1), ""); err != nil {
		t.Fatal(err)
	}
	await(t, c, ctx, j.ID, "step 1", func(j client.Job) bool { return j.PolicyStep == 1 })
	exchange(t, http.MethodGet, e.URL+"/nowhere", nil, nil)
	exchange(t, "BREW", e.URL+"/nowhere", nil, nil)
	families := scrape(t, e.URL)
	value := func(name string, labels ...string) float64 {
		t.Helper()
		f := families[name]
		if f == nil {
			t.Fatalf("no %s in the scrape", name)
		}
		for _, m := range f.Metric {
			var has []string
			for _, l := range m.Label {
				has = append(has, l.GetName()+"="+l.GetValue())
			}
			if strings.Join(has, ",") == strings.Join(labels, ",") {
				return m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
		t.Fatalf("%s has no %v: %v", name, labels, f.Metric)
		return 0
	}
	for name, want := range map[string]float64{"trainerd_steps_total": 1, "trainerd_step": 1, "trainerd_groups_trained_total": 2, "trainerd_rollouts_total": 6, "trainerd_queue_rollouts": 0} {
		if got := value(name, "job="+j.ID); got != want {
			t.Errorf("%s is %v, expected %v", name, got, want)
		}
	}
	if got := value("trainerd_http_requests_total", "method=GET", "route=none", "status=404"); got != 1 {
		t.Errorf("%v requests to no route", got)
	}
	if got := value("trainerd_http_requests_total", "method=other", "route=none", "status=404"); got != 1 {
		t.Errorf("%v requests of an unknown method", got)
	}
	ours := regexp.MustCompile(`^(trainerd|go|process)_`)
	for name, f := range families {
		if !ours.MatchString(name) || f.GetHelp() == "" {
			t.Errorf("%s: help %q", name, f.GetHelp())
		}
		for _, m := range f.Metric {
			for _, l := range m.Label { // what strangers choose must not become a label
				if l.GetName() != "job" && len(l.GetValue()) > 80 || strings.Contains(l.GetValue(), "nowhere") {
					t.Errorf("%s has label %s=%q", name, l.GetName(), l.GetValue())
				}
			}
		}
	}
}

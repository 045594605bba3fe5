package server_test

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"trainerd/client"
	"trainerd/server/servertest"
)

func TestNodes(t *testing.T) {
	const n = 2
	e := servertest.Start(t, servertest.Options{Wrap: described(t)})
	c, ctx := connect(t, e)
	j := create(t, c, ctx, e.JobDocument(n, nil))
	await(t, c, ctx, j.ID, "step 0", func(j client.Job) bool { return j.PolicyStep == 0 })
	man, err := c.Checkpoint(ctx, j.ID, 0)
	if err != nil {
		t.Fatal(err)
	}
	digest, err := man.Digest()
	if err != nil {
		t.Fatal(err)
	}
	report := func(node string, r client.NodeReport) {
		t.Helper()
		if err := c.ReportNode(ctx, j.ID, node, r); err != nil {
			t.Fatal(err)
		}
	}
	report("a", client.NodeReport{Step: 0, Digest: digest, State: "serving"})
	report("b", client.NodeReport{Step: 0, Digest: strings.Repeat("0", 64), State: "failed", Message: "exit status 1"})
	report("c", client.NodeReport{Step: -1, State: "loading", TTL: time.Second})
	step(t, c, e, j.ID, n, 1)
	step(t, c, e, j.ID, n, 2)
	report("d", client.NodeReport{Step: 2, Digest: strings.Repeat("0", 64), State: "serving"})
	by := func() map[string]client.Node {
		t.Helper()
		all, err := c.Nodes(ctx, j.ID)
		if err != nil {
			t.Fatal(err)
		}
		out := map[string]client.Node{}
		for _, n := range all {
			out[n.Name] = n
		}
		return out
	}
	await(t, c, ctx, j.ID, "silence", func(client.Job) bool { return by()["c"].Silent })
	got := by()
	if len(got) != 4 {
		t.Fatalf("%+v", got)
	}
	is := func(p *bool, want bool) bool { return p != nil && *p == want }
	if a := got["a"]; a.LagSteps != 2 || a.LagSeconds <= 0 || !is(a.Matches, true) || a.Silent || a.State != "serving" || a.LastSeen.IsZero() {
		t.Errorf("a: %+v", a)
	}
	if b := got["b"]; !is(b.Matches, false) || b.Message != "exit status 1" || b.State != "failed" {
		t.Errorf("b: %+v", b)
	}
	if c := got["c"]; c.Matches != nil || c.LagSteps != 3 || c.Step != -1 {
		t.Errorf("c: %+v", c)
	}
	if d := got["d"]; d.LagSteps != 0 || d.LagSeconds != 0 || !is(d.Matches, false) {
		t.Errorf("d: %+v", d)
	}
	res, err := http.Get(e.URL + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	raw, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	text := string(raw)
	for _, line := range []string{`trainerd_node_lag_steps{job="` + j.ID + `",node="a"} 2`, `trainerd_nodes{job="` + j.ID + `",state="silent"} 1`,
		`trainerd_nodes{job="` + j.ID + `",state="failed"} 1`, `trainerd_node_lag_seconds{job="` + j.ID + `",node="d"} 0`} {
		if !strings.Contains(text, line+"\n") {
			t.Errorf("/metrics has no line %s", line)
		}
	}
	if strings.Contains(text, `node="c"`) {
		t.Error("/metrics shows the lag of a silent node")
	}
}

func TestNodeReportsAreChecked(t *testing.T) {
	e := servertest.Start(t, servertest.Options{Wrap: described(t)})
	c, ctx := connect(t, e)
	j := create(t, c, ctx, e.JobDocument(2, nil))
	digest := strings.Repeat("a", 64)
	for _, tc := range []struct {
		node, body, field string
	}{
		{"n", `{"step":-1,"state":"loading"}`, ""},
		{"n", `{"step":3,"state":"serving","digest":"` + digest + `","ttl":"1h","message":"m"}`, ""},
		{"a%20b", `{"step":-1,"state":"loading"}`, "node"},
		{"a%3Fb", `{"step":-1,"state":"loading"}`, "node"},
		{strings.Repeat("n", 129), `{"step":-1,"state":"loading"}`, "node"},
		{"n", `{"state":"serving"}`, "step"},
		{"n", `{"step":-2,"state":"serving"}`, "step"},
		{"n", `{"step":1,"state":"serving"}`, "digest"},
		{"n", `{"step":-1,"state":"serving","digest":"` + digest + `"}`, "digest"},
		{"n", `{"step":1,"state":"serving","digest":"` + strings.ToUpper(digest) + `"}`, "digest"},
		{"n", `{"step":-1,"state":"happy"}`, "state"},
		{"n", `{"step":-1,"state":"failed","message":"` + strings.Repeat("m", 1025) + `"}`, "message"},
		{"n", `{"step":-1,"state":"loading","ttl":"2h"}`, "ttl"},
		{"n", `{"step":-1,"state":"loading","ttl":"x"}`, "ttl"},
	} {
		want := 204
		if tc.field != "" {
			want = 422
		}
		status, p := exchange(t, http.MethodPut, e.URL+"/v1/jobs/"+j.ID+"/nodes/"+tc.node, []byte(tc.body), map[string]string{"Content-Type": "application/json"})
		if status != want || tc.field != "" && (len(p.Errors) != 1 || p.Errors[0].Name != tc.field) {
			t.Errorf("%s %s: status %d, %+v", tc.node, tc.body, status, p)
		}
	}
	quick, err := client.New(e.URL, client.Options{Retries: -1})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 511 { // and n
		if err := quick.ReportNode(ctx, j.ID, fmt.Sprintf("m%d", i), client.NodeReport{Step: -1, State: "loading", TTL: time.Hour}); err != nil {
			t.Fatalf("node %d: %v", i, err)
		}
	}
	more := client.NodeReport{Step: -1, State: "loading"}
	if err := quick.ReportNode(ctx, j.ID, "one-more", more); client.Code(err) != "too_many_nodes" {
		t.Errorf("node over the limit: %v", err)
	}
	// One that has fallen silent makes room.
	if err := quick.ReportNode(ctx, j.ID, "m7", client.NodeReport{Step: -1, State: "stopped", TTL: time.Second}); err != nil {
		t.Fatal(err)
	}
	await(t, c, ctx, j.ID, "room", func(client.Job) bool { return quick.ReportNode(ctx, j.ID, "one-more", more) == nil })
	all, err := c.Nodes(ctx, j.ID)
	if err != nil || len(all) != 512 {
		t.Errorf("%d nodes, %v", len(all), err)
	}
}

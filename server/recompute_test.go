package server_test

import (
	"encoding/json"
	"net/http"
	"reflect"
	"strings"
	"testing"

	"trainerd/client"
	"trainerd/server/servertest"
)

// TestRecomputeIsChosen: on a device with room for part of the activations a
// job with recompute auto computes some again, with the bits of one that keeps
// all; one that insists is refused, and told what would fit.
func TestRecomputeIsChosen(t *testing.T) {
	const n = 3
	type planned struct {
		MemoryPlan struct {
			Total     int64  `json:"total"`
			Recompute string `json:"recompute"`
			More      int    `json:"recompute_more"`
		} `json:"memory_plan"`
	}
	document := func(recompute string) map[string]any {
		job := wholeJob(n, 1)
		job["batch"].(map[string]any)["max_tokens_per_micro_batch"] = 512
		job["sampling"] = map[string]any{"max_sequences": 0}
		if recompute != "" {
			job["batch"].(map[string]any)["recompute"] = recompute
		}
		return job
	}
	at := func(j client.Job) bool { return j.PolicyStep == 6 && j.State == "waiting" }
	run := func(e *servertest.Env, recompute string) (p planned, weights map[string]string) {
		t.Helper()
		c, ctx := connect(t, e)
		j := create(t, c, ctx, e.JobDocument(n, document(recompute)))
		feed(t, c, ctx, j.ID, n, 0, 2, 1)
		j = await(t, c, ctx, j.ID, "six steps", at)
		if err := json.Unmarshal(j.Document, &p); err != nil {
			t.Fatal(err)
		}
		return p, bits(t, c, ctx, j.ID)
	}
	e := servertest.Start(t, servertest.Options{Wrap: described(t)})
	most, want := run(e, "")
	least, same := run(e, "layers")
	if most.MemoryPlan.Recompute != "cheap" || most.MemoryPlan.More != 0 || least.MemoryPlan.Recompute != "layers" || least.MemoryPlan.Total >= most.MemoryPlan.Total {
		t.Fatalf("with room for everything %+v, with layers %+v", most, least)
	}
	if !reflect.DeepEqual(same, want) {
		t.Error("recomputing layers changes bits")
	}
	between, same := run(e, "mlp")
	if p := between.MemoryPlan; p.Recompute != "mlp" || p.Total >= most.MemoryPlan.Total || p.Total <= least.MemoryPlan.Total || !reflect.DeepEqual(same, want) {
		t.Errorf("with mlp %+v, bits as before: %v", p, reflect.DeepEqual(same, want))
	}
	room := between.MemoryPlan.Total
	e = servertest.Start(t, servertest.Options{ModelDir: e.ModelDir, DeviceMemory: room})
	got, same := run(e, "")
	if !reflect.DeepEqual(got, between) {
		t.Errorf("%+v on %d bytes, expected %+v", got, room, between)
	}
	if !reflect.DeepEqual(same, want) {
		t.Error("recomputing a part changes bits")
	}

	for _, tc := range []struct {
		recompute, field, expected string
		memory                     int64
	}{
		{"cheap", "batch.recompute", "auto", room},
		{"", "optimizer.gradients", "bfloat16", least.MemoryPlan.Total - 4096},
	} {
		e := servertest.Start(t, servertest.Options{ModelDir: e.ModelDir, DeviceMemory: tc.memory})
		raw, err := json.Marshal(e.JobDocument(n, document(tc.recompute)))
		if err != nil {
			t.Fatal(err)
		}
		status, p := exchange(t, http.MethodPost, e.URL+"/v1/jobs", raw, map[string]string{"Content-Type": "application/json"})
		if status != 422 || p.Code != "does_not_fit" || len(p.Errors) == 0 || p.Errors[0].Name != tc.field || p.Errors[0].Expected != tc.expected || !strings.Contains(p.Detail, "scratch") {
			t.Errorf("recompute %q on %d bytes: %d, %+v", tc.recompute, tc.memory, status, p)
		}
	}
}

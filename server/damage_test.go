package server_test

import (
	"encoding/json"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"trainerd/client"
	"trainerd/server/servertest"
)

// TestDamagedSources names a source that is there but broken: a GGUF file where
// a directory belongs, an index whose shards are not there, and checkpoints of
// another job with a broken manifest or broken weights. Each is refused by name,
// and no job is kept.
func TestDamagedSources(t *testing.T) {
	e := servertest.Start(t, servertest.Options{Wrap: described(t)})
	c, ctx := connect(t, e)
	j := create(t, c, ctx, e.JobDocument(3, nil))
	await(t, c, ctx, j.ID, "step 0", func(j client.Job) bool { return j.PolicyStep >= 0 })
	found, err := filepath.Glob(filepath.Join(e.StoreDir, "jobs", j.ID, "checkpoints", "00000000-*"))
	if err != nil || len(found) != 1 {
		t.Fatalf("%v, %v", found, err)
	}
	manifest, weights := filepath.Join(found[0], "manifest.json"), filepath.Join(found[0], "hf", "model.safetensors")
	whole := map[string][]byte{}
	for _, path := range []string{manifest, weights} {
		if whole[path], err = os.ReadFile(path); err != nil {
			t.Fatal(err)
		}
	}
	write := func(path string, b []byte) {
		t.Helper()
		if err := os.WriteFile(path, b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	sharded := servertest.WriteModel(t, servertest.TinyConfig(), 1, "F32")
	if err := os.Remove(filepath.Join(sharded, "model.safetensors")); err != nil {
		t.Fatal(err)
	}
	write(filepath.Join(sharded, "model.safetensors.index.json"), []byte(`{"weight_map":{"model.norm.weight":"model-00001-of-00002.safetensors"}}`))
	gguf := filepath.Join(t.TempDir(), "model.gguf")
	write(gguf, []byte("GGUF"))

	for _, tc := range []struct {
		name, source string
		path         string // "": as it is
		damage       func([]byte) []byte
		status       int
		want         string // named by detail or fields
	}{
		{"a GGUF file", "dir:" + gguf, "", nil, 422, "model.gguf"},
		{"a shard that is missing", "dir:" + sharded, "", nil, 422, "model-00001-of-00002.safetensors"},
		{"a manifest cut", "job:" + j.ID + "@0", manifest, func(b []byte) []byte { return b[:len(b)/2] }, 422, "manifest.json"},
		{"a manifest with an unknown member", "job:" + j.ID + "@0", manifest, func(b []byte) []byte { return append([]byte(`{"what":1,`), b[1:]...) }, 422, "what"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if tc.path != "" {
				write(tc.path, tc.damage(append([]byte(nil), whole[tc.path]...)))
				defer write(tc.path, whole[tc.path])
			}
			d := e.JobDocument(3, nil)
			d["model"] = map[string]any{"source": tc.source}
			raw, err := json.Marshal(d)
			if err != nil {
				t.Fatal(err)
			}
			status, p := exchange(t, http.MethodPost, e.URL+"/v1/jobs", raw, map[string]string{"Content-Type": "application/json"})
			said := p.Detail
			for _, f := range p.Errors {
				said += " " + f.Name + " " + f.Got
			}
			if status != tc.status || !strings.Contains(said, tc.want) {
				t.Errorf("status %d %s: %q, expected %d that names %s", status, p.Code, said, tc.status, tc.want)
			}
		})
	}
	if jobs, err := c.Jobs(ctx); err != nil || len(jobs) != 1 {
		t.Errorf("%d jobs, %v: expected the first alone", len(jobs), err)
	}
	if left, err := os.ReadDir(filepath.Join(e.DataDir, "jobs")); err != nil || len(left) != 1 {
		t.Errorf("%d job directories, %v: expected the first alone", len(left), err)
	}

	write(weights, append(append([]byte(nil), whole[weights][:len(whole[weights])-1]...), whole[weights][len(whole[weights])-1]^1))
	d := e.JobDocument(3, nil)
	d["model"] = map[string]any{"source": "job:" + j.ID + "@0"}
	second, err := c.CreateJob(ctx, d, "")
	if err != nil {
		t.Fatal(err)
	}
	if second, err = c.Wait(ctx, second.ID, 5*time.Millisecond, client.Job.Final); err != nil {
		t.Fatal(err)
	}
	if second.State != "failed" || second.LastError == nil || !strings.Contains(second.LastError.Message, "hf/model.safetensors") {
		t.Errorf("of damaged weights: %s, %+v", second.State, second.LastError)
	}
}

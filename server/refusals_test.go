package server_test

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"maps"
	"math"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/apache/arrow/go/v17/arrow"
	"github.com/apache/arrow/go/v17/arrow/array"
	"github.com/apache/arrow/go/v17/arrow/ipc"
	"github.com/apache/arrow/go/v17/arrow/memory"

	"trainerd/client"
	"trainerd/rollout"
	"trainerd/rollout/arrowio"
	"trainerd/server"
	"trainerd/server/servertest"
	"trainerd/trainer"
)

// problem is a refusal as it came over the wire.
type problem struct {
	Type, Title, Code, Detail string
	Status                    int
	RequestID                 string `json:"request_id"`
	Errors                    []struct {
		Name, Got, Expected string
		Row                 *int
	}
	retryAfter string
}

// exchange sends a request and returns its status and, of a refusal, the document.
func exchange(t *testing.T, method, url string, body []byte, header map[string]string) (int, problem) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, url, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for k, v := range header {
		req.Header.Set(k, v)
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	raw, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	var p problem
	if res.StatusCode >= 400 {
		if kind := res.Header.Get("Content-Type"); kind != "application/problem+json" {
			t.Errorf("%s %s: content type %q", method, url, kind)
		}
		if err := json.Unmarshal(raw, &p); err != nil {
			t.Fatalf("%s %s: %v in %q", method, url, err, raw)
		}
		if p.Status != res.StatusCode || p.RequestID == "" || p.RequestID != res.Header.Get("X-Request-Id") || p.Type != "urn:trainerd:problem:"+p.Code {
			t.Errorf("%s %s: inconsistent problem %+v", method, url, p)
		}
		p.retryAfter = res.Header.Get("Retry-After")
	}
	return res.StatusCode, p
}

// want checks a refusal: status, code, and a field by name and row (-1: no row).
func (p problem) want(t *testing.T, status int, code, field string, row int) {
	t.Helper()
	if p.Status != status || p.Code != code {
		t.Errorf("got %d %s (%s), expected %d %s", p.Status, p.Code, p.Detail, status, code)
		return
	}
	if field == "" {
		return
	}
	for _, e := range p.Errors {
		got := -1
		if e.Row != nil {
			got = *e.Row
		}
		if e.Name == field && got == row {
			return
		}
	}
	t.Errorf("no error names %s (row %d): %+v", field, row, p.Errors)
}

func encode(t *testing.T, b *rollout.Batch, codec string) []byte {
	t.Helper()
	var buf bytes.Buffer
	if err := arrowio.Encode(&buf, b, codec); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

var arrowHeader = map[string]string{"Content-Type": arrowio.ContentType}

func TestRolloutRefusals(t *testing.T) {
	const n = 3
	e := servertest.Start(t, servertest.Options{Wrap: described(t), Limits: trainer.Limits{MaxBatchBytes: 64 << 10, MaxBatchRows: 100}})
	c, ctx := connect(t, e)
	j := create(t, c, ctx, e.JobDocument(n, nil))
	url := e.URL + "/v1/jobs/" + j.ID + "/rollouts"

	valid := func() *rollout.Batch { return servertest.Batch("x", 2, n, 0, 9) }
	with := func(f func(b *rollout.Batch)) []byte {
		b := valid()
		f(b)
		return encode(t, b, "")
	}
	whole := encode(t, valid(), "")
	long := &rollout.Batch{HasReward: true} // 512 KiB of zeros compress to almost nothing
	for range 4 {
		long.Rollouts = append(long.Rollouts, rollout.Rollout{GroupID: "x", Prompt: []int32{2}, Completion: make([]int32, 32<<10), PolicyStep: 0})
	}
	bomb := encode(t, long, "zstd")
	if len(bomb) > 32<<10 {
		t.Fatalf("the bomb has %d bytes", len(bomb))
	}
	chunked := func(body []byte) io.Reader { return struct{ io.Reader }{bytes.NewReader(body)} } // no declared length

	for _, tc := range []struct {
		name   string
		body   []byte
		header map[string]string
		status int
		code   string
		field  string
		row    int
	}{
		{"truncated", whole[:len(whole)/2], nil, 400, "malformed_arrow", "", 0},
		{"empty body", nil, nil, 400, "malformed_arrow", "", 0},
		{"not arrow", []byte("group_id,reward\na,1\n"), nil, 400, "malformed_arrow", "", 0},
		{"wrong column type", wrongType(t), nil, 422, "wrong_type", "prompt_tokens", -1},
		{"nan reward", with(func(b *rollout.Batch) { b.Rollouts[4].Reward = math.NaN() }), nil, 422, "invalid_row", "reward", 4},
		{"infinite reward", with(func(b *rollout.Batch) { b.Rollouts[1].Reward = math.Inf(-1) }), nil, 422, "invalid_row", "reward", 1},
		{"a reward that no gradient survives", with(func(b *rollout.Batch) { b.Rollouts[2].Reward = 1e300 }), nil, 422, "invalid_row", "reward", 2},
		{"the same composed", with(func(b *rollout.Batch) { components(b, "format"); b.Rollouts[1].Components[0] = -2e12 }), nil, 422, "invalid_row", "reward_format", 1},
		{"empty completion", with(func(b *rollout.Batch) { b.Rollouts[2].Completion = nil }), nil, 422, "invalid_row", "completion_tokens", 2},
		{"token outside the vocabulary", with(func(b *rollout.Batch) { b.Rollouts[3].Completion = []int32{5, 64} }), nil, 422, "token_out_of_range", "completion_tokens", 3},
		{"negative token", with(func(b *rollout.Batch) { b.Rollouts[0].Completion = []int32{-1} }), nil, 422, "token_out_of_range", "completion_tokens", 0},
		{"unequal prompts", with(func(b *rollout.Batch) { b.Rollouts[1].Prompt = []int32{9, 9} }), nil, 422, "unequal_prompts", "prompt_tokens", 1},
		{"longer than a micro-batch", with(func(b *rollout.Batch) { b.Rollouts[5].Completion = slices.Repeat([]int32{7}, 65) }), nil, 422, "invalid_row", "completion_tokens", 5},
		{"policy step of the future", with(func(b *rollout.Batch) { b.Rollouts[3].PolicyStep = 99 }), nil, 422, "invalid_row", "policy_step", 3},
		{"component without a weight", with(func(b *rollout.Batch) { components(b, "beauty") }), nil, 422, "", "reward_beauty", -1},
		{"too many rows of a group", encode(t, servertest.Batch("y", 1, n+1, 0, 1), ""), nil, 409, "group_closed", "group_id", n},
		{"too many rows", encode(t, servertest.Batch("y", 40, n, 0, 1), ""), nil, 413, "too_many_rows", "", 0},
		{"decompression bomb", bomb, nil, 413, "body_too_large", "", 0},
		{"oversize body", make([]byte, 64<<10+1), nil, 413, "body_too_large", "body", -1},
		{"no media type", whole, map[string]string{"Content-Type": ""}, 415, "unsupported_media_type", "", 0},
		{"json", []byte("{}"), map[string]string{"Content-Type": "application/json"}, 415, "unsupported_media_type", "", 0},
		{"unknown codec", whole, map[string]string{"Content-Type": arrowio.ContentType + `; codecs="brotli"`}, 415, "unsupported_media_type", "", 0},
		{"compressed body", whole, map[string]string{"Content-Type": arrowio.ContentType, "Content-Encoding": "gzip"}, 415, "unsupported_media_type", "", 0},
		{"broken idempotency key", whole, map[string]string{"Content-Type": arrowio.ContentType, "Idempotency-Key": "a b"}, 422, "invalid_field", "Idempotency-Key", -1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			header := tc.header
			if header == nil {
				header = arrowHeader
			}
			_, p := exchange(t, http.MethodPost, url, tc.body, header)
			if tc.code == "" {
				tc.code = p.Code
			}
			p.want(t, tc.status, tc.code, tc.field, tc.row)
		})
	}
	t.Run("oversize body without a length", func(t *testing.T) {
		req, _ := http.NewRequestWithContext(ctx, http.MethodPost, url, chunked(make([]byte, 65<<10)))
		req.Header.Set("Content-Type", arrowio.ContentType)
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		if res.StatusCode != http.StatusRequestEntityTooLarge {
			t.Errorf("status %d, expected 413", res.StatusCode)
		}
	})
	t.Run("bit flips", func(t *testing.T) {
		seed := rand.Uint64()
		rng := rand.New(rand.NewPCG(seed, 1))
		refused := 0
		for range 60 {
			body := bytes.Clone(whole)
			bit := rng.IntN(8 * len(body))
			body[bit/8] ^= 1 << (bit % 8)
			// A flip in a value or in padding is a valid body: such bodies are not sent, they would be kept.
			limits := rollout.Limits{MaxBytes: 64 << 10, MaxRows: 100, MaxTokens: 1 << 20, MaxPromptTokens: 64, MaxCompletionTokens: 64, MaxSequence: 64, Vocab: 64}
			if _, err := arrowio.DecodeBytes(body, rollout.Schema{Objective: "sa_grpo"}, limits); err == nil {
				continue
			}
			refused++
			if status, p := exchange(t, http.MethodPost, url, body, arrowHeader); status != 400 && status != 422 && status != 413 && status != 409 {
				t.Errorf("seed %d bit %d: status %d (%s), expected a refusal", seed, bit, status, p.Code)
			}
		}
		if refused < 10 {
			t.Errorf("seed %d: only %d of 60 flips are refused", seed, refused)
		}
	})

	// None of it was kept, and what was refused can still be sent mended.
	j, err := c.Job(ctx, j.ID)
	if err != nil {
		t.Fatal(err)
	}
	if j.Counts.Batches != 0 || j.Counts.Rollouts != 0 || j.Queue != (client.Queue{}) || j.Step != 0 {
		t.Errorf("something was kept: %+v %+v", j.Counts, j.Queue)
	}
	if r, err := c.SubmitArrow(ctx, j.ID, whole, ""); err != nil || r.Rows != 2*n || r.Batch != 1 {
		t.Errorf("the whole batch after all: %+v, %v", r, err)
	}
}

// TestUnknownMembersNameTheKnown: who misspells a member of a request is told how it is spelt.
func TestUnknownMembersNameTheKnown(t *testing.T) {
	e := servertest.Start(t, servertest.Options{Wrap: described(t)})
	c, ctx := connect(t, e)
	base := e.URL + "/v1/jobs/" + create(t, c, ctx, e.JobDocument(2, nil)).ID
	for _, tc := range []struct{ method, path, known string }{
		{"POST", "/sample", "one of prompts, n, max_tokens, temperature, top_p, seed, stop"},
		{"POST", "/checkpoints", "one of snapshot"},
		{"POST", "/checkpoints/0/leases", "one of holder, ttl"},
		{"PUT", "/nodes/a", "one of step, digest, state, message, ttl"},
	} {
		status, p := exchange(t, tc.method, base+tc.path, []byte(`{"snapshots":true}`), map[string]string{"Content-Type": "application/json"})
		if status != 422 || len(p.Errors) != 1 || p.Errors[0].Name != "snapshots" || p.Errors[0].Expected != tc.known {
			t.Errorf("%s: %d %+v, expected %q", tc.path, status, p, tc.known)
		}
	}
}

// TestAfterNothing: the policy_step of a job that has published nothing yet is good for waiting.
func TestAfterNothing(t *testing.T) {
	e := servertest.Start(t, servertest.Options{Wrap: described(t)})
	c, ctx := connect(t, e)
	j := create(t, c, ctx, e.JobDocument(2, nil))
	if status, p := exchange(t, http.MethodGet, e.URL+"/v1/jobs/"+j.ID+"/checkpoints/latest?after=-1&wait=20s", nil, nil); status != 200 {
		t.Errorf("after=-1: %d %+v, expected the checkpoint of step 0", status, p)
	}
	if status, _ := exchange(t, http.MethodGet, e.URL+"/v1/jobs/"+j.ID+"/checkpoints/latest?after=-2", nil, nil); status != 422 {
		t.Errorf("after=-2: %d, expected 422", status)
	}
}

// TestQueriesAreStrict: a parameter that a route does not have, or has twice, is refused; each that
// openapi.json describes is known, and no other.
func TestQueriesAreStrict(t *testing.T) {
	e := servertest.Start(t, servertest.Options{Wrap: described(t)})
	c, ctx := connect(t, e)
	base := "/v1/jobs/" + create(t, c, ctx, e.JobDocument(2, nil)).ID
	for query, want := range map[string][3]string{
		"/checkpoints/latest?wiat=5s":                  {"wiat", "an unknown query parameter", "one of after, wait"},
		"/checkpoints/latest?wait=1s&wait=2s":          {"wait", "it more than once", "it once"},
		"/steps?page=2":                                {"page", "an unknown query parameter", "one of after, limit"},
		"?verbose":                                     {"verbose", "an unknown query parameter", "no query"},
		"/checkpoints/0/files/hf/config.json?wait=20s": {"wait", "an unknown query parameter", "one of redirect"},
	} {
		status, p := exchange(t, http.MethodGet, e.URL+base+query, nil, nil)
		if status != 422 || len(p.Errors) != 1 || [3]string{p.Errors[0].Name, p.Errors[0].Got, p.Errors[0].Expected} != want {
			t.Errorf("%s: %d %+v, expected %q", query, status, p, want)
		}
	}
	for path, item := range loadDescription(t).Paths.Map() {
		for method, op := range item.Operations() {
			for _, param := range op.Parameters {
				if param.Value.In != "query" || method == http.MethodHead { // whose answers have no body
					continue
				}
				at := strings.NewReplacer("/v1/jobs/{job}", base, "{step}", "0", "{name}", "hf/config.json").Replace(path)
				_, p := exchange(t, method, e.URL+at+"?"+param.Value.Name+"=x", nil, nil)
				for _, f := range p.Errors {
					if f.Got == "an unknown query parameter" {
						t.Errorf("%s %s: %s is described and unknown", method, path, f.Name)
					}
				}
			}
		}
	}
}

// TestUnequalPromptsSayWhere: prompts of one length that differ are told apart.
func TestUnequalPromptsSayWhere(t *testing.T) {
	e := servertest.Start(t, servertest.Options{Wrap: described(t)})
	c, ctx := connect(t, e)
	j := create(t, c, ctx, e.JobDocument(2, nil))
	b := servertest.Batch("x", 1, 2, 0, 9)
	b.Rollouts[0].Prompt, b.Rollouts[1].Prompt = []int32{3, 4, 5}, []int32{3, 9, 5}
	status, p := exchange(t, http.MethodPost, e.URL+"/v1/jobs/"+j.ID+"/rollouts", encode(t, b, ""), arrowHeader)
	if status != 422 || len(p.Errors) != 1 || p.Errors[0].Got != "3 tokens that differ at 1 (9, not 4)" {
		t.Errorf("%d %+v, expected the place where the prompts differ", status, p)
	}
}

// components turns plain rewards into one component.
func components(b *rollout.Batch, name string) {
	b.HasReward, b.Components = false, []string{name}
	for i := range b.Rollouts {
		b.Rollouts[i].Components = []float64{b.Rollouts[i].Reward}
	}
}

// wrongType writes a stream whose prompt_tokens are text.
func wrongType(t *testing.T) []byte {
	t.Helper()
	schema := arrow.NewSchema([]arrow.Field{
		{Name: "group_id", Type: arrow.BinaryTypes.String}, {Name: "prompt_tokens", Type: arrow.BinaryTypes.String},
		{Name: "completion_tokens", Type: arrow.ListOf(arrow.PrimitiveTypes.Int32)}, {Name: "reward", Type: arrow.PrimitiveTypes.Float64},
	}, nil)
	b := array.NewRecordBuilder(memory.DefaultAllocator, schema)
	defer b.Release()
	b.Field(0).(*array.StringBuilder).Append("g")
	b.Field(1).(*array.StringBuilder).Append("hello")
	list := b.Field(2).(*array.ListBuilder)
	list.Append(true)
	list.ValueBuilder().(*array.Int32Builder).Append(3)
	b.Field(3).(*array.Float64Builder).Append(1)
	rec := b.NewRecord()
	defer rec.Release()
	var buf bytes.Buffer
	w := ipc.NewWriter(&buf, ipc.WithSchema(schema))
	if err := w.Write(rec); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func TestJobRefusals(t *testing.T) {
	e := servertest.Start(t, servertest.Options{Wrap: described(t), DeviceMemory: 4 << 30})
	doc := func(path string, value any) map[string]any {
		d := e.JobDocument(3, nil)
		at := d
		parts := strings.Split(path, ".")
		for _, p := range parts[:len(parts)-1] {
			next, _ := at[p].(map[string]any)
			next = maps.Clone(next)
			if next == nil {
				next = map[string]any{}
			}
			at[p] = next
			at = next
		}
		at[parts[len(parts)-1]] = value
		return d
	}
	broken := func(name string, change func(dir string)) map[string]any {
		dir := servertest.WriteModel(t, servertest.TinyConfig(), 3, "F32")
		change(dir)
		return doc("model.source", "dir:"+dir)
	}
	for _, tc := range []struct {
		name   string
		doc    any
		status int
		code   string
		field  string
		file   string // that the detail names
	}{
		{"unknown field", doc("objektive", 1), 422, "invalid_job", "objektive", ""},
		{"unknown nested field", doc("batch.group_per_step", 1), 422, "invalid_job", "batch.group_per_step", ""},
		{"unknown objective field", doc("objective.epsilon", 0.2), 422, "invalid_job", "objective.epsilon", ""},
		{"wrong type", doc("batch.groups_per_step", "four"), 422, "invalid_job", "batch.groups_per_step", ""},
		{"no source", doc("model", map[string]any{}), 422, "invalid_job", "model.source", ""},
		{"unknown scheme", doc("model.source", "http://x/y"), 422, "invalid_job", "model.source", ""},
		{"unknown objective", doc("objective.name", "ppo"), 422, "invalid_job", "objective.name", ""},
		{"publishes too seldom", doc("checkpoint.publish_every_steps", 5), 422, "invalid_job", "checkpoint.publish_every_steps", ""},
		{"incomplete without a timeout", doc("batch.incomplete", "train"), 422, "invalid_job", "batch.incomplete", ""},
		{"standard deviation of one", doc("objective", map[string]any{"name": "grpo", "group_size": 1}), 422, "invalid_job", "objective.group_size", ""},
		{"no S3 here", doc("model.source", "s3://bucket/prefix"), 422, "invalid_field", "model.source", ""},
		{"no such checkpoint", doc("model.source", "job:job-0123456789abcdef@latest"), 422, "invalid_field", "model.source", ""},
		{"missing directory", doc("model.source", "dir:/nonexistent/model"), 422, "", "model.source", ""},
		{"missing weights", broken("", func(dir string) { os.Remove(filepath.Join(dir, "model.safetensors")) }), 422, "", "model.source", "model.safetensors"},
		{"cut weights", broken("", func(dir string) { truncate(t, filepath.Join(dir, "model.safetensors")) }), 422, "", "model.source", "model.safetensors"},
		{"corrupt header", broken("", func(dir string) { scribble(t, filepath.Join(dir, "model.safetensors")) }), 422, "", "model.source", "model.safetensors"},
		{"unsupported config", broken("", func(dir string) {
			os.WriteFile(filepath.Join(dir, "config.json"), []byte(`{"model_type":"mamba"}`), 0o644)
		}), 422, "unsupported_config", "model.source", "config.json"},
		{"does not fit", doc("batch.max_tokens_per_micro_batch", 1<<19), 422, "does_not_fit", "batch.max_tokens_per_micro_batch", ""},
		{"does not fit without recomputing", doc("batch", map[string]any{"max_tokens_per_micro_batch": 1 << 14, "recompute": "cheap"}), 422, "does_not_fit", "batch.recompute", ""},
		{"not an object", []int{1}, 422, "invalid_job", "body", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if strings.HasPrefix(tc.name, "does not fit") {
				// Gate and up of a layer: 2^19 tokens * 2*1024 * 4 bytes = 4 GiB, of 2^14 tokens 128 MiB, times 64 layers.
				cfg := servertest.TinyConfig()
				cfg.Hidden, cfg.Heads, cfg.KVHeads, cfg.FFN, cfg.Layers = 16, 2, 1, 1<<10, 64
				tc.doc.(map[string]any)["model"] = map[string]any{"source": "dir:" + servertest.WriteModel(t, cfg, 1, "BF16")}
			}
			raw, err := json.Marshal(tc.doc)
			if err != nil {
				t.Fatal(err)
			}
			_, p := exchange(t, http.MethodPost, e.URL+"/v1/jobs", raw, map[string]string{"Content-Type": "application/json"})
			if tc.code == "" {
				tc.code = p.Code
			}
			p.want(t, tc.status, tc.code, tc.field, -1)
			if tc.file != "" && !strings.Contains(p.Detail, tc.file) {
				t.Errorf("detail does not name %s: %q", tc.file, p.Detail)
			}
		})
	}
	t.Run("syntax", func(t *testing.T) {
		_, p := exchange(t, http.MethodPost, e.URL+"/v1/jobs", []byte(`{"model":`), map[string]string{"Content-Type": "application/json"})
		p.want(t, 400, "malformed_json", "", 0)
	})
	t.Run("all at once", func(t *testing.T) {
		raw := []byte(`{"model":{"source":"x"},"seed":-1,"batch":{"groups_per_step":0,"what":1},"optimizer":{"lr":-1},"max_steps":1.5}`)
		_, p := exchange(t, http.MethodPost, e.URL+"/v1/jobs", raw, map[string]string{"Content-Type": "application/json"})
		for _, f := range []string{"model.source", "seed", "batch.groups_per_step", "batch.what", "optimizer.lr", "max_steps"} {
			p.want(t, 422, "invalid_job", f, -1)
		}
	})
	c, ctx := connect(t, e)
	if jobs, err := c.Jobs(ctx); err != nil || len(jobs) != 0 {
		t.Errorf("%d jobs were kept, %v", len(jobs), err)
	}
	if left, err := os.ReadDir(filepath.Join(e.DataDir, "jobs")); err != nil || len(left) != 0 {
		t.Errorf("%d job directories were kept, %v", len(left), err)
	}
}

func truncate(t *testing.T, path string) {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, info.Size()/2); err != nil {
		t.Fatal(err)
	}
}

func scribble(t *testing.T, path string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte("{{{{"), 12); err != nil {
		t.Fatal(err)
	}
}

func TestProtocolRefusals(t *testing.T) {
	e := servertest.Start(t, servertest.Options{Wrap: described(t)})
	c, ctx := connect(t, e)
	j := create(t, c, ctx, e.JobDocument(3, nil))
	base := "/v1/jobs/" + j.ID
	asJSON := map[string]string{"Content-Type": "application/json"}
	for _, tc := range []struct {
		method, path, body string
		header             map[string]string
		status             int
		code, field        string
		row                int
	}{
		{"GET", "/nowhere", "", nil, 404, "route_not_found", "", -1},
		{"GET", "/v1/jobs/nobody", "", nil, 404, "job_not_found", "job", -1},
		{"PUT", base, "", nil, 405, "method_not_allowed", "", -1},
		{"GET", base + "/batches/1", "", nil, 404, "batch_not_found", "batch", -1},
		{"GET", base + "/batches/one", "", nil, 404, "batch_not_found", "batch", -1},
		{"GET", base + "/steps?limit=0", "", nil, 422, "invalid_field", "limit", -1},
		{"GET", base + "/steps", "", map[string]string{"Accept": "text/csv"}, 406, "not_acceptable", "", -1},
		{"GET", base + "/events", "", map[string]string{"Last-Event-ID": "x"}, 422, "invalid_field", "Last-Event-ID", -1},
		{"GET", base + "/checkpoints/9", "", nil, 404, "checkpoint_not_found", "step", -1},
		{"GET", base + "/checkpoints/0/files/hf/none", "", nil, 404, "file_not_found", "name", -1},
		{"GET", base + "/checkpoints/0/files/../../../../etc/passwd", "", nil, 404, "", "", -1},
		{"GET", base + "/checkpoints/latest?wait=soon", "", nil, 422, "invalid_field", "wait", -1},
		{"POST", base + "/sample", `{"prompts":[[1,2]],"what":1}`, asJSON, 422, "invalid_request", "what", -1},
		{"POST", base + "/sample", `{"prompts":"hello"}`, asJSON, 422, "invalid_request", "prompts", -1},
		{"POST", base + "/sample", `{"prompts":[]}`, asJSON, 422, "invalid_request", "prompts", -1},
		{"POST", base + "/sample", `{"prompts":[[1],[]]}`, asJSON, 422, "invalid_request", "prompts", 1},
		{"POST", base + "/sample", `{"prompts":[[1],[64]]}`, asJSON, 422, "invalid_request", "prompts", 1},
		{"POST", base + "/sample", `{"prompts":[[1]],"max_tokens":128}`, asJSON, 422, "invalid_request", "prompts", 0},
		{"POST", base + "/sample", `{"prompts":[[1]],"top_p":0,"temperature":-1,"n":0}`, asJSON, 422, "invalid_request", "top_p", -1},
		{"POST", base + "/sample", `{"prompts":[[1]],"stop":[99]}`, asJSON, 422, "invalid_request", "stop", -1},
		{"POST", base + "/sample", `{"prompts":[[1]],"n":100000}`, asJSON, 422, "invalid_request", "n", -1},
		{"POST", base + "/sample", `{"prompts":[[1]]} x`, asJSON, 400, "malformed_json", "", -1},
		{"POST", base + "/logprobs", `x`, arrowHeader, 400, "malformed_arrow", "", -1},
		{"POST", base + "/checkpoints", `{"when":1}`, asJSON, 422, "invalid_request", "when", -1},
	} {
		t.Run(tc.method+" "+tc.path+" "+tc.body, func(t *testing.T) {
			_, p := exchange(t, tc.method, e.URL+tc.path, []byte(tc.body), tc.header)
			if tc.code == "" {
				tc.code = p.Code
			}
			p.want(t, tc.status, tc.code, tc.field, tc.row)
		})
	}
}

func TestIdempotencyAndFullQueue(t *testing.T) {
	const n = 3
	e := servertest.Start(t, servertest.Options{Wrap: described(t), Limits: trainer.Limits{MaxQueuedRollouts: 4 * n, MaxBatchRows: 100}})
	c, ctx := connect(t, e)

	raw, err := json.Marshal(e.JobDocument(n, nil))
	if err != nil {
		t.Fatal(err)
	}
	keyed := map[string]string{"Content-Type": "application/json", "Idempotency-Key": "job-1"}
	var ids []string
	for i, status := range []int{201, 200} {
		j, err := c.CreateJob(ctx, json.RawMessage(raw), "job-1")
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, j.ID)
		if got, _ := exchange(t, http.MethodPost, e.URL+"/v1/jobs", raw, keyed); got != 200 {
			t.Errorf("repetition %d: status %d, expected 200 (first %d)", i, got, status)
		}
	}
	if ids[0] != ids[1] {
		t.Errorf("one key made jobs %v", ids)
	}
	_, p := exchange(t, http.MethodPost, e.URL+"/v1/jobs", append(raw, '\n'), keyed)
	p.want(t, 422, "idempotency_key_reused", "Idempotency-Key", -1)

	id := ids[0]
	await(t, c, ctx, id, "step 0", func(j client.Job) bool { return j.PolicyStep >= 0 })
	if _, err := c.Pause(ctx, id); err != nil {
		t.Fatal(err)
	}
	body := encode(t, servertest.Batch("a", 2, n, 0, 1), "lz4")
	first, err := c.SubmitArrow(ctx, id, body, "k1")
	if err != nil {
		t.Fatal(err)
	}
	second, err := c.SubmitArrow(ctx, id, body, "k1")
	if err != nil || first != second {
		t.Errorf("same key and body: %+v then %+v, %v", first, second, err)
	}
	other := map[string]string{"Content-Type": arrowio.ContentType, "Idempotency-Key": "k1"}
	url := e.URL + "/v1/jobs/" + id + "/rollouts"
	_, p = exchange(t, http.MethodPost, url, encode(t, servertest.Batch("b", 1, n, 0, 2), ""), other)
	p.want(t, 422, "idempotency_key_reused", "Idempotency-Key", -1)

	if _, err := c.Submit(ctx, id, servertest.Batch("b", 2, n, 0, 2), ""); err != nil {
		t.Fatal(err)
	}
	_, p = exchange(t, http.MethodPost, url, encode(t, servertest.Batch("c", 1, n, 0, 3), ""), arrowHeader)
	p.want(t, 429, "queue_full", "", -1)
	if p.retryAfter == "" {
		t.Error("429 without Retry-After")
	}
	_, p = exchange(t, http.MethodPost, url, encode(t, servertest.Batch("c", 5, n, 0, 3), ""), arrowHeader)
	p.want(t, 413, "batch_too_large", "limits.max_queued_rollouts", -1)
	j, err := c.Job(ctx, id)
	if err != nil || j.Counts.Batches != 2 || j.Queue.Rollouts != 4*n {
		t.Errorf("%+v %+v, %v", j.Counts, j.Queue, err)
	}
	// Once there is room, the client's repetition succeeds by itself.
	if _, err := c.Resume(ctx, id); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Submit(ctx, id, servertest.Batch("c", 1, n, 0, 3), ""); err != nil {
		t.Errorf("after the queue has drained: %v", err)
	}
}

// TestUploadsAreBounded holds one body half-way and sends another: together they
// are over what the server keeps in memory.
func TestUploadsAreBounded(t *testing.T) {
	// With room for the job's document, which may be counted for an instant after its answer was read.
	e := servertest.Start(t, servertest.Options{Wrap: described(t), ServerLimits: server.Limits{MaxUploadBytes: 12 << 10}})
	c, ctx := connect(t, e)
	j := create(t, c, ctx, e.JobDocument(3, nil))
	url := e.URL + "/v1/jobs/" + j.ID + "/rollouts"
	body := encode(t, servertest.Batch("x", 4, 3, 0, 9), "")
	if len(body) > 8<<10 {
		t.Fatalf("the batch has %d bytes", len(body))
	}
	pr, pw := io.Pipe()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, pr)
	if err != nil {
		t.Fatal(err)
	}
	req.ContentLength = 8 << 10 // never sent whole
	req.Header.Set("Content-Type", arrowio.ContentType)
	sent := make(chan error, 1)
	go func() {
		res, err := http.DefaultClient.Do(req)
		if err == nil {
			res.Body.Close()
		}
		sent <- err
	}()
	if _, err := pw.Write(body[:100]); err != nil {
		t.Fatal(err)
	}
	var p problem
	for status := 0; status != 429; { // the first body may not have been seen yet
		if status, p = exchange(t, http.MethodPost, url, make([]byte, 5<<10), arrowHeader); ctx.Err() != nil {
			t.Fatal("the second body was never refused")
		}
	}
	p.want(t, 429, "uploads_full", "", -1)
	pw.CloseWithError(io.ErrUnexpectedEOF)
	<-sent
	if _, err := c.SubmitArrow(ctx, j.ID, body, ""); err != nil {
		t.Errorf("once the first is gone: %v", err)
	}
}

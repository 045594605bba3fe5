package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"trainerd/model/hf"
	"trainerd/model/tokenizer"
	"trainerd/rollout/arrowio"
)

// describe runs inspect and returns what it found.
func describe(t *testing.T, path string) map[string]any {
	t.Helper()
	out, _, err := command(t, "inspect", "--as-json", path)
	if err != nil {
		t.Fatal(err)
	}
	var d map[string]any
	if err := json.Unmarshal([]byte(out), &d); err != nil {
		t.Fatalf("%v in %q", err, out)
	}
	return d
}

// has checks members of a description.
func has(t *testing.T, got map[string]any, want map[string]any) {
	t.Helper()
	for k, v := range want {
		if got[k] != v {
			t.Errorf("%s is %v, expected %v", k, got[k], v)
		}
	}
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func write(t *testing.T, path string, b []byte) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestInitIsAFunctionOfItsSeed(t *testing.T) {
	dir := t.TempDir()
	for name, seed := range map[string]string{"a": "5", "again": "5", "b": "6"} {
		out, log, err := command(t, "init", "--preset", "bytes", "--seed", seed, "dir:"+filepath.Join(dir, name))
		if err != nil || !strings.Contains(out, "llama, 3 layers, hidden 96, vocabulary 257") || !strings.Contains(log, "model.safetensors") {
			t.Fatalf("%q %q %v", out, log, err)
		}
	}
	weights := func(name string) []byte { return read(t, filepath.Join(dir, name, "model.safetensors")) }
	if !bytes.Equal(weights("a"), weights("again")) {
		t.Error("the same seed gave other weights")
	}
	if bytes.Equal(weights("a"), weights("b")) {
		t.Error("another seed gave the same weights")
	}
	codec, err := tokenizer.Load(filepath.Join(dir, "a"))
	if err != nil {
		t.Fatal(err)
	}
	text := "\x00 {\"tool\":\"ä\"}\n\x7f"
	ids, err := codec.Encode(text)
	if err != nil || len(ids) != len(text) {
		t.Fatalf("%v, %v", ids, err)
	}
	for i := range ids {
		if ids[i] != int32(text[i]) {
			t.Errorf("byte %d is token %d, expected %d", i, ids[i], text[i])
		}
	}
	// A model made of its own config.json has the same shape.
	if _, _, err := command(t, "init", "--config", filepath.Join(dir, "a", "config.json"), filepath.Join(dir, "c")); err != nil {
		t.Fatal(err)
	}
	has(t, describe(t, filepath.Join(dir, "c")), map[string]any{"parameters": describe(t, filepath.Join(dir, "a"))["parameters"], "other_files": 0.0})
}

func TestImport(t *testing.T) {
	dir := t.TempDir()
	gguf := "../../model/gguf/testdata/qwen2.gguf"
	from := describe(t, gguf)
	has(t, from, map[string]any{"kind": "model", "type": "qwen2"})
	if _, _, err := command(t, "import", gguf, "dir:"+filepath.Join(dir, "gguf")); err != nil {
		t.Fatal(err)
	}
	got := describe(t, "dir:"+filepath.Join(dir, "gguf"))
	has(t, got, map[string]any{"type": "qwen2", "parameters": from["parameters"], "layers": from["layers"], "tied": from["tied"]})
	if _, err := tokenizer.Load(filepath.Join(dir, "gguf")); err != nil {
		t.Errorf("the tokenizer of the copy: %v", err)
	}
	// A copy of a directory has the type that is asked for and the same other files.
	if _, _, err := command(t, "import", "--dtype", "F16", filepath.Join(dir, "gguf"), filepath.Join(dir, "half")); err != nil {
		t.Fatal(err)
	}
	has(t, describe(t, filepath.Join(dir, "half")), map[string]any{"dtype": "F16", "parameters": got["parameters"], "other_files": got["other_files"]})
	if a, b := read(t, filepath.Join(dir, "gguf", "tokenizer.json")), read(t, filepath.Join(dir, "half", "tokenizer.json")); !bytes.Equal(a, b) {
		t.Error("tokenizer.json was changed by a copy")
	}
}

// TestBadSources gives what is broken to import and to inspect: both name the
// file, and import leaves no destination behind.
func TestBadSources(t *testing.T) {
	dir := t.TempDir()
	gguf := read(t, "../../model/gguf/testdata/llama.gguf")
	whole := tinyModel(t)
	variant := func(name string, change func(dir string)) string {
		to := filepath.Join(dir, name)
		if err := os.CopyFS(to, os.DirFS(whole)); err != nil {
			t.Fatal(err)
		}
		change(to)
		return to
	}
	weights := read(t, filepath.Join(whole, "model.safetensors"))
	long := bytes.Clone(weights)
	long[6] = 0xff // a header of 2^55 bytes
	version := bytes.Clone(gguf)
	version[4] = 99
	for _, tc := range []struct{ name, src, want string }{
		{"missing gguf", filepath.Join(dir, "none.gguf"), "none.gguf"},
		{"empty gguf", write(t, filepath.Join(dir, "empty.gguf"), nil), "empty.gguf"},
		{"gguf that is none", write(t, filepath.Join(dir, "text.gguf"), []byte(strings.Repeat("not a model ", 99))), "text.gguf"},
		{"gguf cut in its header", write(t, filepath.Join(dir, "head.gguf"), gguf[:len(gguf)/20]), "head.gguf"},
		{"gguf cut in its data", write(t, filepath.Join(dir, "cut.gguf"), gguf[:len(gguf)-100]), "cut.gguf"},
		{"gguf of another version", write(t, filepath.Join(dir, "version.gguf"), version), "version.gguf"},
		{"missing directory", filepath.Join(dir, "nowhere"), "nowhere"},
		{"no config", variant("noconfig", func(d string) { os.Remove(filepath.Join(d, "config.json")) }), "config.json"},
		{"unsupported config", variant("mamba", func(d string) { write(t, filepath.Join(d, "config.json"), []byte(`{"model_type":"mamba"}`)) }), "config.json"},
		{"no weights", variant("noweights", func(d string) { os.Remove(filepath.Join(d, "model.safetensors")) }), "model.safetensors"},
		{"safetensors cut", variant("cut", func(d string) { write(t, filepath.Join(d, "model.safetensors"), weights[:len(weights)-64]) }), "model.safetensors"},
		{"safetensors cut in its header", variant("cuthead", func(d string) { write(t, filepath.Join(d, "model.safetensors"), weights[:50]) }), "model.safetensors"},
		{"safetensors of an absurd header", variant("absurd", func(d string) { write(t, filepath.Join(d, "model.safetensors"), long) }), "model.safetensors"},
		{"shard that is missing", variant("shard", func(d string) {
			os.Remove(filepath.Join(d, "model.safetensors"))
			write(t, filepath.Join(d, "model.safetensors.index.json"), []byte(`{"weight_map":{"model.norm.weight":"model-00001-of-00001.safetensors"}}`))
		}), "model-00001-of-00001.safetensors"},
		{"other shapes than the config's", variant("shapes", func(d string) {
			path := filepath.Join(d, "config.json")
			write(t, path, bytes.Replace(read(t, path), []byte(`"hidden_size": 16`), []byte(`"hidden_size": 32`), 1))
		}), "model.embed_tokens.weight"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dest := filepath.Join(t.TempDir(), "dest")
			_, _, err := command(t, "import", tc.src, "dir:"+dest)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("import: %v, expected an error that names %s", err, tc.want)
			}
			if exists(dest) {
				t.Error("import left a destination")
			}
			if _, _, err := command(t, "inspect", tc.src); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("inspect: %v, expected an error that names %s", err, tc.want)
			}
		})
	}
}

func TestDestinationsAndFlagsAreRefused(t *testing.T) {
	dir := t.TempDir()
	model := tinyModel(t)
	full := filepath.Dir(write(t, filepath.Join(dir, "full", "notes.txt"), []byte("mine")))
	for _, tc := range []struct {
		args []string
		want string
	}{
		{[]string{"import", model, full}, "empty directory"},
		{[]string{"import", model, write(t, filepath.Join(dir, "file"), nil)}, "file"},
		{[]string{"import", model, "ftp://x", "--dtype", "F8"}, "dtype"},
		{[]string{"import", "--dtype", "F8", model, filepath.Join(dir, "f8")}, "F8"},
		{[]string{"import", "--s3-region", "eu", model, filepath.Join(dir, "eu")}, "s3-region"},
		{[]string{"import", model}, "import SRC DEST"},
		{[]string{"pull", "job-x"}, "arguments: got 1, expected: trainerd pull JOB DIR"},
		{[]string{"inspect"}, "trainerd inspect"},
		{[]string{"init", "--preset", "bytes", "a", "b"}, "trainerd init DEST"},
		{[]string{"init", filepath.Join(dir, "x")}, "preset"},
		{[]string{"init", "--preset", "huge", filepath.Join(dir, "x")}, "huge"},
		{[]string{"init", "--preset", "bytes", "--config", "c.json", filepath.Join(dir, "x")}, "config"},
		{[]string{"init", "--config", filepath.Join(dir, "none.json"), filepath.Join(dir, "x")}, "none.json"},
		{[]string{"init", "--preset", "bytes", "s3:///nothing"}, "s3:///nothing"},
		{[]string{"inspect", filepath.Join(dir, "none")}, "none"},
		{[]string{"pull", "--step", "one", "job-x", dir}, "one"},
		{[]string{"pull", "--server", "nowhere", "job-x", dir}, "nowhere"},
		{[]string{"pull", "--server", "http://127.0.0.1:1", "job-x", filepath.Join(dir, "pulled")}, "get the newest checkpoint: "},
		{[]string{"demo", "--steps", "0"}, "steps"},
		{[]string{"demo", "--eval-every", "0"}, "eval-every"},
		{[]string{"demo", "--smollm2", "x.gguf", "--control"}, "control"},
		{[]string{"demo", "--smollm2", "x.gguf", "--lr", "1"}, "lr"},
		{[]string{"demo", "--smollm2", filepath.Join(dir, "none.gguf"), "--keep", filepath.Join(dir, "keep")}, "none.gguf"},
		{[]string{"bench", "step", "--device", "tpu"}, "tpu"},
		{[]string{"bench", "step", "--device", "cuda:0", "--workers", "2"}, "workers"},
		{[]string{"bench", "step", "--device", "cpu", "--shape", "9t"}, "9t"},
		{[]string{"bench", "step", "--device", "cpu", "--shape", "smoke", "--load", "smoke", "--moments", "thin"}, "thin"},
		{[]string{"bench", "step", "--device", "cpu", "--shape", "smoke", "--load", "smoke", "--recompute", "some"}, "some"},
		{[]string{"bench", "score", "--device", "cpu", "--load", "heavy"}, "heavy"},
		{[]string{"bench", "decode", "--device", "cpu", "--sequences", "9"}, "9 sequences"},
		{[]string{"bench", "growth", "--device", "cpu", "--group-size", "3"}, "group size 3"},
		{[]string{"bench", "kernels", "--device", "cpu", "--only", "magic"}, "magic"},
		{[]string{"bench", "kernels", "--device", "cpu", "--max-tokens", "100"}, "max-tokens"},
		{[]string{"bench", "checkpoint", "--device", "cpu", "--shape", "9t"}, "9t"},
		{[]string{"bench", "ingest", "--batch", "30", "--group-size", "8"}, "batch"},
		{[]string{"serve", "--no-such-flag"}, "no-such-flag"},
		{[]string{"serve", "--listen", "0.0.0.0:0"}, "insecure"},
		{[]string{"train"}, "train"},
	} {
		t.Run(strings.Join(tc.args, " "), func(t *testing.T) {
			out, _, err := command(t, tc.args...)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("%v, expected an error that names %q", err, tc.want)
			}
			if out != "" {
				t.Errorf("it printed %q", out)
			}
		})
	}
	if string(read(t, filepath.Join(full, "notes.txt"))) != "mine" {
		t.Error("a foreign file was changed")
	}
	for _, left := range []string{"f8", "eu", "x"} {
		if exists(filepath.Join(dir, left)) {
			t.Errorf("%s was left", left)
		}
	}
}

// TestHelp runs --help of every command: each says what it does and what each flag is for.
func TestHelp(t *testing.T) {
	root := newRoot()
	for _, path := range []string{"", "serve", "import", "init", "inspect", "pull", "demo", "bench", "bench step", "bench gemm", "bench checkpoint", "bench ingest", "bench kernels", "bench score", "bench decode", "bench growth"} {
		args := append(strings.Fields(path), "--help")
		out, _, err := command(t, args...)
		c, _, ferr := root.Find(strings.Fields(path))
		if err != nil || ferr != nil || !strings.Contains(out, "Usage:") || c.Short == "" {
			t.Errorf("%q: %v %v %q", path, err, ferr, out)
		}
		for _, line := range strings.Split(c.LocalFlags().FlagUsages(), "\n") {
			if f := strings.Fields(line); len(f) > 0 && len(f) < 3 {
				t.Errorf("%q: flag without words: %q", path, line)
			}
		}
	}
	out, _, err := command(t, "--version")
	if err != nil || !strings.Contains(out, engineVersion()) {
		t.Errorf("%q, %v", out, err)
	}
}

func TestInspectArrow(t *testing.T) {
	var buf bytes.Buffer
	if err := arrowio.Encode(&buf, pairs("g", 3), "zstd"); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	path := write(t, filepath.Join(dir, "batch.arrow"), buf.Bytes())
	has(t, describe(t, path), map[string]any{"kind": "rollouts", "rows": 6.0, "groups": 3.0, "prompt_tokens": 24.0, "completion_tokens": 24.0, "reward_mean": 0.5})
	for name, b := range map[string][]byte{"cut.arrow": buf.Bytes()[:buf.Len()/2], "empty.arrow": nil, "text.arrow": []byte("group_id,reward\n")} {
		if out, _, err := command(t, "inspect", write(t, filepath.Join(dir, name), b)); err == nil || !strings.Contains(err.Error(), name) || out != "" {
			t.Errorf("%s: %q, %v", name, out, err)
		}
	}
}

// TestPull follows a checkpoint from the server into a directory that inspect
// knows, and a checkpoint in the store through damage.
func TestPull(t *testing.T) {
	p, c := boot(t, nil)
	j := newJob(t, c)
	dir := filepath.Join(t.TempDir(), "policy")
	pull := func(args ...string) (string, error) {
		out, _, err := command(t, append([]string{"pull", "--server", p.URL(), j.ID, dir}, args...)...)
		return out, err
	}
	if out, err := pull(); err != nil || !strings.Contains(out, "step 0 of job "+j.ID) {
		t.Fatalf("%q, %v", out, err)
	}
	has(t, describe(t, dir), map[string]any{"kind": "model", "type": "llama", "job": j.ID, "step": 0.0})
	if _, err := pull("--step", "1"); err == nil || !strings.Contains(err.Error(), "1") {
		t.Errorf("a step that is not there: %v", err)
	}
	has(t, describe(t, dir), map[string]any{"step": 0.0}) // and the directory stays as it was
	waited := make(chan error, 1)
	go func() {
		_, err := pull("--step", "1", "--wait", "20s")
		waited <- err
	}()
	if _, err := c.Submit(t.Context(), j.ID, pairs("g", 1), ""); err != nil {
		t.Fatal(err)
	}
	if err := <-waited; err != nil {
		t.Fatal(err)
	}
	has(t, describe(t, dir), map[string]any{"step": 1.0})
	if _, err := hf.Open(dir); err != nil {
		t.Error(err)
	}
	before := read(t, filepath.Join(dir, "model.safetensors"))
	if _, err := pull("--step", "0"); err != nil { // back again, in place of the other
		t.Fatal(err)
	}
	if bytes.Equal(before, read(t, filepath.Join(dir, "model.safetensors"))) {
		t.Error("steps 0 and 1 have the same weights")
	}

	store := strings.TrimPrefix(p.Config.Store, "dir:")
	found, err := filepath.Glob(filepath.Join(store, "jobs", j.ID, "checkpoints", "00000001-*"))
	if err != nil || len(found) != 1 {
		t.Fatalf("%v, %v", found, err)
	}
	has(t, describe(t, found[0]), map[string]any{"kind": "checkpoint", "job": j.ID, "step": 1.0, "digests": "all match"})
	has(t, describe(t, filepath.Join(found[0], "manifest.json")), map[string]any{"kind": "checkpoint"})
	weights := filepath.Join(found[0], "hf", "model.safetensors")
	whole := read(t, weights)
	flipped := bytes.Clone(whole)
	flipped[len(flipped)-1] ^= 1
	for name, damage := range map[string][]byte{"flipped": flipped, "cut": whole[:len(whole)-1]} {
		write(t, weights, damage)
		if _, _, err := command(t, "inspect", found[0]); err == nil || !strings.Contains(err.Error(), "damaged: hf/model.safetensors") {
			t.Errorf("%s: inspect says %v", name, err)
		}
		if name == "cut" {
			continue // the server breaks off, and the client tries again for a while
		}
		if _, err := pull("--step", "1"); err == nil || !strings.Contains(err.Error(), "hf/model.safetensors") {
			t.Errorf("%s: pull says %v", name, err)
		}
		has(t, describe(t, dir), map[string]any{"step": 0.0})
	}
	write(t, weights, whole)
	manifest := filepath.Join(found[0], "manifest.json")
	m := read(t, manifest)
	for name, b := range map[string][]byte{"cut": m[:len(m)/2], "empty": nil, "unknown member": append([]byte(`{"what":1,`), m[1:]...)} {
		write(t, manifest, b)
		if _, _, err := command(t, "inspect", found[0]); err == nil || !strings.Contains(err.Error(), "manifest.json") {
			t.Errorf("manifest %s: inspect says %v", name, err)
		}
	}
	if _, _, err := command(t, "pull", "--server", p.URL(), "job-0123456789abcdef", dir); err == nil || !strings.Contains(err.Error(), "job-0123456789abcdef") {
		t.Errorf("a job that is not there: %v", err)
	}
}

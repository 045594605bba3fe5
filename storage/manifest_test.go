package storage

import (
	"bytes"
	"encoding/json"
	"math"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"trainerd/internal/fault"
)

const digest = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"

func sample() Manifest {
	parent := int64(4)
	return Manifest{Version: 1, Job: "job-1", Step: 5, Attempt: 2, Prefix: "jobs/job-1/checkpoints/00000005-2",
		Parent: &parent, Engine: "v0.1.0", Created: time.Date(2026, 1, 2, 3, 4, 5, 6000, time.UTC), Snapshot: true,
		Files: []File{{"hf/config.json", 10, digest}, {"hf/model.safetensors", 1 << 40, digest}, {"state/rng", 0, digest}},
		Extra: map[string]any{"loss": 0.25}}
}

func TestManifestRoundTrip(t *testing.T) {
	data, err := EncodeManifest(sample())
	if err != nil {
		t.Fatal(err)
	}
	got, err := DecodeManifest(data)
	if diff := cmp.Diff(sample(), got); err != nil || diff != "" {
		t.Errorf("%v %s", err, diff)
	}
}

func TestManifestRefusals(t *testing.T) {
	at := func(i int64) *int64 { return &i }
	for _, test := range []struct {
		name   string
		change func(*Manifest)
		names  string
	}{
		{"version", func(m *Manifest) { m.Version = 2 }, "manifest.version"},
		{"job", func(m *Manifest) { m.Job = "a/b" }, "job"},
		{"step", func(m *Manifest) { m.Step = -1 }, "manifest.step"},
		{"attempt", func(m *Manifest) { m.Attempt = -1 }, "manifest.attempt"},
		{"prefix of another step", func(m *Manifest) { m.Step = 6 }, "manifest.prefix"},
		{"prefix elsewhere", func(m *Manifest) { m.Prefix = "../x" }, "manifest.prefix"},
		{"parent after", func(m *Manifest) { m.Parent = at(6) }, "manifest.parent"},
		{"parent below", func(m *Manifest) { m.Parent = at(-1) }, "manifest.parent"},
		{"no files", func(m *Manifest) { m.Files = nil }, "manifest.files"},
		{"unsorted", func(m *Manifest) { m.Files[0], m.Files[1] = m.Files[1], m.Files[0] }, "files[1].name"},
		{"twice", func(m *Manifest) { m.Files[1] = m.Files[0] }, "files[1].name"},
		{"traversal", func(m *Manifest) { m.Files[0].Name = "hf/../../x" }, "files[0].name"},
		{"absolute", func(m *Manifest) { m.Files[0].Name = "/etc/passwd" }, "files[0].name"},
		{"backslash", func(m *Manifest) { m.Files[0].Name = `hf\..\x` }, "files[0].name"},
		{"empty name", func(m *Manifest) { m.Files[0].Name = "" }, "files[0].name"},
		{"long name", func(m *Manifest) { m.Files[0].Name = strings.Repeat("a/", 256) + "a" }, "files[0].name"},
		{"the manifest itself", func(m *Manifest) { m.Files[2].Name = "manifest.json" }, "files[2].name"},
		{"inside the manifest", func(m *Manifest) { m.Files[2].Name = "manifest.json/x" }, "files[2].name"},
		{"the claim", func(m *Manifest) { m.Files[0].Name = "claim.json" }, "files[0].name"},
		{"file in file", func(m *Manifest) { m.Files[1].Name = "hf/config.json/x" }, "hf/config.json/x"},
		{"negative size", func(m *Manifest) { m.Files[1].Size = -1 }, "files[1].size"},
		{"sum overflows", func(m *Manifest) { m.Files[0].Size, m.Files[1].Size = math.MaxInt64, 1 }, "files[1].size"},
		{"digest upper case", func(m *Manifest) { m.Files[0].SHA256 = strings.ToUpper(digest) }, "files[0].sha256"},
		{"digest short", func(m *Manifest) { m.Files[0].SHA256 = digest[2:] }, "files[0].sha256"},
		{"digest no hex", func(m *Manifest) { m.Files[0].SHA256 = "zz" + digest[2:] }, "files[0].sha256"},
		{"snapshot without state", func(m *Manifest) { m.Files = m.Files[:2] }, "manifest.snapshot"},
		{"state without snapshot", func(m *Manifest) { m.Snapshot = false }, "manifest.snapshot"},
	} {
		m := sample()
		test.change(&m)
		_, err := EncodeManifest(m)
		if fault.KindOf(err) != fault.Invalid || !strings.Contains(err.Error(), test.names) {
			t.Errorf("%s: encode: %v, expected it to name %s", test.name, err, test.names)
		}
		raw, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := DecodeManifest(raw); fault.KindOf(err) != fault.Invalid || !strings.Contains(err.Error(), test.names) {
			t.Errorf("%s: decode: %v, expected it to name %s", test.name, err, test.names)
		}
	}
	good, err := EncodeManifest(sample())
	if err != nil {
		t.Fatal(err)
	}
	for name, raw := range map[string][]byte{
		"empty": nil, "truncated": good[:len(good)/2], "trailing": append(bytes.Clone(good), '{'), "two": append(bytes.Clone(good), good...),
		"unknown member": bytes.Replace(good, []byte(`"engine"`), []byte(`"motor"`), 1), "array": []byte("[]"), "fraction": bytes.Replace(good, []byte(`"step": 5`), []byte(`"step": 5.5`), 1),
	} {
		if _, err := DecodeManifest(raw); fault.KindOf(err) != fault.Malformed {
			t.Errorf("%s: %v, expected it to be malformed", name, err)
		}
	}
	if _, err := DecodeManifest(make([]byte, MaxManifest+1)); fault.KindOf(err) != fault.TooLarge {
		t.Errorf("oversize: %v", err)
	}
}

func FuzzDecodeManifest(f *testing.F) {
	good, err := EncodeManifest(sample())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`{"version":1,"job":"a","files":[{"name":"../x","size":-1}]}`))
	f.Add([]byte(`{"version":1,"job":"a","step":0,"attempt":0,"prefix":"jobs/a/checkpoints/00000000-0","files":[{"name":"x","size":1,"sha256":"` + digest + `"}],"extra":{"a":[1e300,null]}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := DecodeManifest(data)
		if err != nil {
			if k := fault.KindOf(err); k == fault.Internal {
				t.Errorf("error without a kind: %v", err)
			}
			return
		}
		for _, file := range m.Files {
			if !localName(file.Name) || file.Size < 0 {
				t.Errorf("accepted file %+v", file)
			}
		}
		again, err := EncodeManifest(m)
		if err != nil {
			t.Fatalf("what was decoded cannot be encoded: %v", err)
		}
		back, err := DecodeManifest(again)
		if err != nil || len(back.Files) != len(m.Files) || back.Prefix != m.Prefix || !back.Created.Equal(m.Created) {
			t.Errorf("second decoding differs: %v %s", err, cmp.Diff(m, back))
		}
	})
}

// localName is an independent statement of what no file name may do.
func localName(name string) bool {
	return name != "" && name[0] != '/' && !strings.Contains("/"+name+"/", "/../") && !strings.Contains("/"+name+"/", "/./") &&
		!strings.Contains("/"+name+"/", "//") && !strings.ContainsAny(name, "\x00\\")
}

func FuzzDecodeLatest(f *testing.F) {
	f.Add([]byte(`{"step":5,"attempt":0,"prefix":"jobs/j/checkpoints/00000005-0","manifest_sha256":"` + digest + `"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if l, err := decodeLatest(data, "j"); err == nil && l.Prefix != prefixOf("j", l.Step, l.Attempt) {
			t.Errorf("accepted %+v", l)
		}
	})
}

// TestFrozenV1 reads what the first version wrote; these files never change.
func TestFrozenV1(t *testing.T) {
	raw, err := os.ReadFile("testdata/v1/jobs/demo/checkpoints/00000007-1/manifest.json")
	if err != nil {
		t.Fatal(err)
	}
	m, err := DecodeManifest(raw)
	if err != nil {
		t.Fatal(err)
	}
	parent := int64(6)
	want := Manifest{Version: 1, Job: "demo", Step: 7, Attempt: 1, Prefix: "jobs/demo/checkpoints/00000007-1", Parent: &parent,
		Engine: "v0.1.0", Created: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC), Snapshot: true,
		Files: []File{{"hf/config.json", 2, "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"},
			{"state/step.json", 5, "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"}},
		Extra: map[string]any{"loss": 0.5}}
	if diff := cmp.Diff(want, m); diff != "" {
		t.Error(diff)
	}
	raw, err = os.ReadFile("testdata/v1/jobs/demo/latest.json")
	if err != nil {
		t.Fatal(err)
	}
	l, err := decodeLatest(raw, "demo")
	if err != nil || l.Step != 7 || l.Attempt != 1 {
		t.Errorf("latest is %+v, %v", l, err)
	}
}

func TestParsePrefix(t *testing.T) {
	for _, name := range []string{"00000005-0", "123456789012-3", "00000000-12"} {
		step, attempt, ok := parsePrefix(name)
		if !ok || prefixOf("j", step, attempt) != checkpointsOf("j")+name {
			t.Errorf("%s: got %d, %d, %v", name, step, attempt, ok)
		}
	}
	for _, name := range []string{"", "5-0", "00000005", "00000005-", "00000005-00", "00000005-x", "-0000005-1", "00000005--1", "+0000005-1", "00000005-+1", "000000005-1"} {
		if _, _, ok := parsePrefix(name); ok {
			t.Errorf("%s was accepted", name)
		}
	}
}

func TestParseURL(t *testing.T) {
	for url, want := range map[string]Location{
		"dir:/data/store":       {Scheme: "dir", Path: "/data/store"},
		"dir:rel/../x":          {Scheme: "dir", Path: "rel/../x"},
		"s3://bucket":           {Scheme: "s3", Bucket: "bucket"},
		"s3://bucket/":          {Scheme: "s3", Bucket: "bucket"},
		"s3://my.bucket-1/a/b/": {Scheme: "s3", Bucket: "my.bucket-1", Prefix: "a/b"},
	} {
		got, err := ParseURL(url)
		if err != nil || got != want {
			t.Errorf("%s: %+v, %v", url, got, err)
		}
		if again, err := ParseURL(got.String()); err != nil || again != got {
			t.Errorf("%s: %s reads as %+v, %v", url, got, again, err)
		}
	}
	for _, url := range []string{"", "dir:", "dir:a\x00b", "/data", "s3:bucket", "s3://", "s3:///p", "s3://UP", "s3://ab", "s3://-ab", "s3://bucket/a//b", "s3://bucket/../x", "http://h/b", "s3://user:hunter2@bucket/x"} {
		_, err := ParseURL(url)
		if fault.KindOf(err) != fault.Invalid || err == nil {
			t.Errorf("%q: %v", url, err)
		} else if strings.Contains(err.Error(), "hunter2") {
			t.Errorf("error %q holds a password", err)
		}
	}
}

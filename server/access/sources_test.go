package access

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"trainerd/internal/fault"
)

func must(t *testing.T, errs ...error) {
	t.Helper()
	for _, err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
}

func TestSourcesStayBelowTheirRoots(t *testing.T) {
	base := t.TempDir()
	at := func(parts ...string) string { return filepath.Join(append([]string{base}, parts...)...) }
	must(t,
		os.MkdirAll(at("root", "m"), 0o755), os.WriteFile(at("root", "m", "config.json"), nil, 0o644),
		os.MkdirAll(at("root", "hub", "blobs"), 0o755), os.MkdirAll(at("root", "hub", "snap"), 0o755),
		os.WriteFile(at("root", "hub", "blobs", "b"), nil, 0o644), os.Symlink("../blobs/b", at("root", "hub", "snap", "config.json")),
		os.MkdirAll(at("out", "m"), 0o755), os.WriteFile(at("out", "secret"), nil, 0o644),
		os.MkdirAll(at("root2"), 0o755), // a root's name is a prefix of it
		os.Symlink(at("out", "m"), at("root", "escape")), os.Symlink("../out", at("root", "escape2")), os.Symlink("m", at("root", "inside")),
		os.MkdirAll(at("root", "leaky"), 0o755), os.Symlink(at("out", "secret"), at("root", "leaky", "tokenizer.json")),
		os.MkdirAll(at("root", "dangling"), 0o755), os.Symlink("nowhere", at("root", "dangling", "x")),
		os.MkdirAll(at("root", "pipe"), 0o755), syscall.Mkfifo(at("root", "pipe", "model.safetensors"), 0o644),
		os.Symlink("loop", at("root", "loop")),
		os.Symlink(at("root"), at("alias")),
	)
	s, err := NewSources([]string{at("root")}, []string{"models"})
	if err != nil {
		t.Fatal(err)
	}
	aliased, err := NewSources([]string{at("alias")}, nil)
	if err != nil {
		t.Fatal(err)
	}
	real, err := filepath.EvalSymlinks(at("root"))
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name, source, want string // want "": refused
		of                 *Sources
	}{
		{"a model", "dir:" + at("root", "m"), "dir:" + real + "/m", s},
		{"the root itself", "dir:" + at("root", "m") + "/", "dir:" + real + "/m", s},
		{"links inside, as a hub's cache has", "dir:" + at("root", "hub", "snap"), "dir:" + real + "/hub/snap", s},
		{"a link to a model", "dir:" + at("root", "inside"), "dir:" + real + "/m", s},
		{"below a root that is a link", "dir:" + at("alias", "m"), "dir:" + real + "/m", aliased},
		{"below what the root's link means", "dir:" + at("root", "m"), "dir:" + real + "/m", aliased},
		{"a bucket", "s3://models/a/b", "s3://models/a/b", s},
		{"a checkpoint", "job:job-1@latest", "job:job-1@latest", s},

		{"outside", "dir:" + at("out", "m"), "", s},
		{"a name with the root's as prefix", "dir:" + at("root2"), "", s},
		{"up and out", "dir:" + base + "/root/../out/m", "", s},
		{"up through a model", "dir:" + base + "/root/m/../../out/m", "", s},
		{"nowhere outside", "dir:" + at("nowhere"), "", s},
		{"nowhere inside", "dir:" + at("root", "nowhere"), "", s},
		{"a link out", "dir:" + at("root", "escape"), "", s},
		{"through a link out", "dir:" + at("root", "escape2", "m"), "", s},
		{"a file that is a link out", "dir:" + at("root", "leaky"), "", s},
		{"a file that is a link to nowhere", "dir:" + at("root", "dangling"), "", s},
		{"a pipe", "dir:" + at("root", "pipe"), "", s},
		{"a loop", "dir:" + at("root", "loop"), "", s},
		{"NUL", "dir:" + at("root", "m") + "\x00", "", s},
		{"the working directory", "dir:.", "", s},
		{"no path", "dir:", "", s},
		{"a file", "dir:" + at("root", "m", "config.json"), "", s},
		{"the machine's root", "dir:/", "", s},
		{"percent signs are no slashes", "dir:" + at("root") + "/..%2fout", "", s},
		{"another bucket", "s3://other/a", "", s},
		{"a bucket with credentials", "s3://models@evil/a", "", s},
		{"a bucket that is a host", "s3://models:9000/a", "", s},
		{"up in a bucket", "s3://models/../other", "", s},
		{"no bucket allowed", "s3://models/a", "", aliased},
	} {
		got, err := tc.of.Resolve(tc.source)
		if tc.want != "" {
			if err != nil || got != tc.want {
				t.Errorf("%s: %q, %v, expected %q", tc.name, got, err, tc.want)
			}
			continue
		}
		f, ok := fault.As(err)
		if !ok || f.Kind != fault.Denied || len(f.Fields) != 1 || f.Fields[0].Name != "model.source" {
			t.Errorf("%s: %q, %v", tc.name, got, err)
		}
	}

	// What lies outside cannot be found out by asking.
	there, gone := at("out", "m"), at("out", "n")
	_, a := s.Resolve("dir:" + there)
	_, b := s.Resolve("dir:" + gone)
	if strings.ReplaceAll(a.Error(), there, "") != strings.ReplaceAll(b.Error(), gone, "") {
		t.Errorf("%v and %v differ", a, b)
	}
	if got, err := AnySource().Resolve("dir:" + gone); err != nil || got != "dir:"+gone {
		t.Errorf("any source: %q, %v", got, err)
	}
	for _, roots := range [][]string{{""}, {at("nowhere")}, {at("out", "secret")}} {
		if _, err := NewSources(roots, nil); err == nil {
			t.Errorf("root %q was taken", roots)
		}
	}
	for _, bucket := range []string{"", "a/b", "UPPER", "a"} {
		if _, err := NewSources(nil, []string{bucket}); err == nil {
			t.Errorf("bucket %q was taken", bucket)
		}
	}
}

package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/pflag"
)

// load runs LoadConfig over a file, an environment and flags.
func load(t *testing.T, file string, env map[string]string, flags ...string) (Config, error) {
	t.Helper()
	fs := pflag.NewFlagSet("test", pflag.ContinueOnError)
	d := DefaultConfig()
	bindFlags(fs, membersOf(&d))
	fs.String("config", "", "")
	if file != "" {
		path := filepath.Join(t.TempDir(), "trainerd.json")
		if err := os.WriteFile(path, []byte(file), 0o600); err != nil {
			t.Fatal(err)
		}
		flags = append(flags, "--config", path)
	}
	if err := fs.Parse(flags); err != nil {
		t.Fatal(err)
	}
	return LoadConfig(fs, func(name string) (string, bool) { v, ok := env[name]; return v, ok })
}

func TestConfigLayers(t *testing.T) {
	got, err := load(t, `{"data":"file","device":"cpu","workers":1,"shutdown":"5s","max_batch_rows":null,"s3_endpoint":"file:9000","peak_tflops":1.5}`,
		map[string]string{"TRAINERD_DEVICE": "auto", "TRAINERD_WORKERS": "2", "AWS_ENDPOINT_URL": "aws:9000", "AWS_REGION": "aws", "AWS_SECRET_ACCESS_KEY": "s"},
		"--workers", "3", "--s3-path-style=false")
	if err != nil {
		t.Fatal(err)
	}
	want := DefaultConfig()
	want.Data, want.Store = "file", "dir:file/store" // from the file
	want.Shutdown, want.PeakTFLOPS = Duration(5*time.Second), 1.5
	want.Device = "auto"                                                                                // the environment over the file
	want.Workers = 3                                                                                    // a flag over both
	want.S3Endpoint, want.S3Region, want.S3SecretKey, want.S3PathStyle = "file:9000", "aws", "s", false // AWS_* only where nothing else is set
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

// TestEveryMemberIsReached sets each member by each way and sees it arrive.
func TestEveryMemberIsReached(t *testing.T) {
	d := DefaultConfig()
	for _, m := range membersOf(&d) {
		text := map[string]string{"listen": "127.0.0.2:1", "insecure": "true", "s3_path_style": "false", "cuda_algorithms": "first", "cuda_attention": "wgmma",
			"trace_endpoint": "http://127.0.0.1:4318", "trace_sample": "0.5"}[m.name]
		_, duration := m.target.Interface().(Duration)
		switch {
		case duration:
			text = "7s"
		case text == "":
			text = "7"
		}
		raw := text
		if k := m.target.Kind().String(); k == "string" || duration {
			raw = `"` + text + `"`
		}
		for way, load := range map[string]func() (Config, error){
			"file": func() (Config, error) { return load(t, `{"`+m.name+`":`+raw+`}`, nil) },
			"environment": func() (Config, error) {
				return load(t, "", map[string]string{"TRAINERD_" + strings.ToUpper(m.name): text})
			},
			"flag": func() (Config, error) { return load(t, "", nil, "--"+m.flag()+"="+text) },
		} {
			got, err := load()
			if err != nil {
				t.Errorf("%s by %s: %v", m.name, way, err)
				continue
			}
			for _, g := range membersOf(&got) {
				if g.name != m.name {
					continue
				}
				b, err := json.Marshal(g.target.Interface())
				if err != nil || string(b) != raw {
					t.Errorf("%s by %s is %s, expected %s (%v)", m.name, way, b, raw, err)
				}
			}
		}
	}
}

func TestConfigRefuses(t *testing.T) {
	for _, tc := range []struct {
		name, file string
		env        map[string]string
		flags      []string
		want       []string // that the error names
	}{
		{"unknown member", `{"lisssten":"127.0.0.1:1"}`, nil, nil, []string{"trainerd.json", "lisssten", "no such setting"}},
		{"another case", `{"Listen":"127.0.0.1:1"}`, nil, nil, []string{"Listen", "no such setting"}},
		{"member twice", `{"workers":1,"workers":2}`, nil, nil, []string{"workers", "once"}},
		{"wrong type", `{"workers":"1"}`, nil, nil, []string{"workers", "a whole number"}},
		{"bad duration", `{"shutdown":"soon"}`, nil, nil, []string{"shutdown", "soon"}},
		{"not an object", `[]`, nil, nil, []string{"JSON object"}},
		{"cut", `{"workers":1`, nil, nil, []string{"trainerd.json"}},
		{"text after it", `{} {}`, nil, nil, []string{"after top-level value"}},
		{"no such file", "", nil, []string{"--config", "no-such.json"}, []string{"no-such.json"}},
		{"environment", "", map[string]string{"TRAINERD_WORKERS": "many"}, nil, []string{"environment", "workers", "many"}},
		{"empty environment", "", map[string]string{"TRAINERD_MAX_BODY_BYTES": ""}, nil, []string{"max_body_bytes", "whole number"}},
		{"flag", "", nil, []string{"--max-queue-rows", "1e3"}, []string{"flags", "max_queue_rows", "1e3"}},
		{"flag of a bool", "", map[string]string{"TRAINERD_INSECURE": "perhaps"}, nil, []string{"insecure", "true or false"}},
		{"every interface", "", nil, []string{"--listen", ":8080"}, []string{"listen", "insecure"}},
		{"beyond loopback", "", nil, []string{"--listen", "192.0.2.1:8080"}, []string{"listen", "192.0.2.1:8080", "insecure"}},
		{"a name that is not localhost", "", nil, []string{"--listen", "example.org:80"}, []string{"listen", "example.org:80"}},
		{"no port", "", nil, []string{"--listen", "127.0.0.1"}, []string{"listen", "HOST:PORT"}},
		{"no data", "", nil, []string{"--data", ""}, []string{"data", "directory"}},
		{"negative workers", "", nil, []string{"--workers", "-1"}, []string{"workers", "-1"}},
		{"algorithms by chance", "", nil, []string{"--cuda-algorithms", "luck"}, []string{"cuda_algorithms", "luck", "timed or first"}},
		{"attention by hand", "", nil, []string{"--cuda-attention", "hand"}, []string{"cuda_attention", "hand", "mma or wgmma"}},
		{"negative peak", "", nil, []string{"--peak-tflops", "-1"}, []string{"peak_tflops"}},
		{"peak that is no number", "", nil, []string{"--peak-tflops", "NaN"}, []string{"peak_tflops"}},
		{"no body", "", nil, []string{"--max-body-bytes", "0"}, []string{"max_body_bytes"}},
		{"no rows", "", nil, []string{"--max-batch-rows", "0"}, []string{"max_batch_rows"}},
		{"no tokens", "", nil, []string{"--max-batch-tokens", "0"}, []string{"max_batch_tokens"}},
		{"no queue", "", nil, []string{"--max-queue-rows", "0"}, []string{"max_queue_rows"}},
		{"negative device memory", "", nil, []string{"--device-memory", "-1"}, []string{"device_memory"}},
		{"negative swap memory", "", nil, []string{"--swap-memory", "-2"}, []string{"swap_memory"}},
		{"negative swap hold", "", nil, []string{"--swap-hold", "-1s"}, []string{"swap_hold"}},
		{"no queue of tokens", "", nil, []string{"--max-queue-tokens", "0"}, []string{"max_queue_tokens"}},
		{"traces to nowhere", "", nil, []string{"--trace-endpoint", "collector:4318"}, []string{"trace_endpoint", "http://HOST:PORT"}},
		{"a sample over one", "", nil, []string{"--trace-sample", "2"}, []string{"trace_sample", "0 to 1"}},
		{"drain before the signal", "", nil, []string{"--drain", "-1s"}, []string{"drain", "0 or more"}},
		{"no time to stop", "", nil, []string{"--shutdown", "0s"}, []string{"shutdown"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := load(t, tc.file, tc.env, tc.flags...)
			if err == nil {
				t.Fatal("accepted")
			}
			for _, w := range tc.want {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("%q does not name %q", err, w)
				}
			}
		})
	}
	for _, listen := range []string{"127.0.0.1:0", "localhost:0", "[::1]:0"} {
		if _, err := load(t, "", nil, "--listen", listen); err != nil {
			t.Errorf("%s: %v", listen, err)
		}
	}
	if c, err := load(t, "", nil, "--listen", ":8080", "--insecure"); err != nil || c.Listen != ":8080" {
		t.Errorf("with --insecure: %v", err)
	}
}

func TestRedacted(t *testing.T) {
	c := DefaultConfig()
	c.S3AccessKey, c.S3SecretKey, c.S3Region = "open-sesame", "hunter2", "eu"
	b, err := json.Marshal(c.Redacted())
	if err != nil {
		t.Fatal(err)
	}
	for _, secret := range []string{"open-sesame", "hunter2"} {
		if strings.Contains(string(b), secret) {
			t.Errorf("%s shows %s", b, secret)
		}
	}
	if !strings.Contains(string(b), `"s3_region":"eu"`) || c.S3SecretKey != "hunter2" {
		t.Errorf("%s hides too much, or the configuration itself was changed", b)
	}
}

// TestObjectStoreIsItsOwn holds commands with an s3:// destination to what they
// use: the server's settings in the environment are not theirs to judge.
func TestObjectStoreIsItsOwn(t *testing.T) {
	fs := newInit().Flags()
	env := map[string]string{"TRAINERD_LISTEN": "0.0.0.0:80", "TRAINERD_WORKERS": "many", "TRAINERD_S3_REGION": "eu"}
	o, err := LoadObjectStore(fs, func(name string) (string, bool) { v, ok := env[name]; return v, ok })
	if err != nil || o.S3Region != "eu" || !o.S3PathStyle {
		t.Errorf("%+v, %v", o, err)
	}
	env["TRAINERD_S3_PATH_STYLE"] = "x"
	if _, err := LoadObjectStore(fs, func(name string) (string, bool) { v, ok := env[name]; return v, ok }); err == nil || !strings.Contains(err.Error(), "s3_path_style") {
		t.Errorf("a bad value: %v", err)
	}
}

// TestCUDASettingsOfTheCPU: a setting that nobody would use is refused.
func TestCUDASettingsOfTheCPU(t *testing.T) {
	for name, o := range map[string]deviceOptions{"cuda_algorithms": {algorithms: algorithmsFirst}, "cuda_attention": {attention: attentionWgmma}} {
		if d, err := openDeviceWith("cpu", 0, o); err == nil || !strings.Contains(err.Error(), name) {
			if err == nil {
				d.Close()
			}
			t.Errorf("%+v on the CPU gives %v", o, err)
		}
	}
}

// TestFileTypesAreNamed: a value of the wrong type is refused in the words of the settings, whichever it is.
func TestFileTypesAreNamed(t *testing.T) {
	d := DefaultConfig()
	for _, m := range membersOf(&d) {
		_, err := load(t, `{"`+m.name+`":{}}`, nil)
		if err == nil || !strings.Contains(err.Error(), m.name+": got {}, expected "+m.expected()) {
			t.Errorf("%s: %v, expected one that asks for %s", m.name, err, m.expected())
		}
	}
}

// TestStrangersInTheEnvironment: a mistyped setting is seen, a setting and what is no setting's business is not.
func TestStrangersInTheEnvironment(t *testing.T) {
	got := strangers([]string{"TRAINERD_LISTNE=x", "TRAINERD_LISTEN=x", "TRAINERD_S3_SECRET_KEY=s", "TRAINERD_TOKEN=t", "HOME=/", "TRAINERD_DATE=1"})
	if d := cmp.Diff([]string{"TRAINERD_DATE", "TRAINERD_LISTNE"}, got); d != "" {
		t.Error(d)
	}
}

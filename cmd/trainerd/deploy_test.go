package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"trainerd/server/access"
)

const deploy = "../../deploy/"

// configuration parses a command line of `trainerd serve` with the real command.
func configuration(t *testing.T, args []string, env map[string]string) Config {
	t.Helper()
	root := newRoot()
	cmd, rest, err := root.Find(args)
	if err != nil || cmd.Name() != "serve" {
		t.Fatalf("%q is no command to serve: %v", args, err)
	}
	if err := cmd.ParseFlags(rest); err != nil {
		t.Fatalf("%q: %v", args, err)
	}
	if cmd.Flags().NArg() != 0 {
		t.Fatalf("%q has arguments %q", args, cmd.Flags().Args())
	}
	c, err := LoadConfig(cmd.Flags(), func(name string) (string, bool) { v, ok := env[name]; return v, ok })
	if err != nil {
		t.Fatalf("%q: %v", args, err)
	}
	return c
}

// stopsWithin holds what a supervisor waits to what a stop may take.
func stopsWithin(t *testing.T, what string, c Config, wait time.Duration) {
	t.Helper()
	if need := time.Duration(c.Drain) + time.Duration(c.Shutdown) + 10*time.Second; wait < need {
		t.Errorf("%s kills after %v, and a stop may take %v", what, wait, need)
	}
}

func TestSystemdUnit(t *testing.T) {
	unit := map[string][]string{} // "Section.Key" to its values
	section := ""
	for line := range strings.Lines(string(read(t, deploy+"systemd/trainerd.service"))) {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		if line[0] == '[' {
			section = strings.Trim(line, "[]")
			continue
		}
		key, value, ok := strings.Cut(line, "=")
		if !ok {
			t.Fatalf("line %q", line)
		}
		unit[section+"."+key] = append(unit[section+"."+key], value)
	}
	one := func(key string) string {
		t.Helper()
		if len(unit[key]) != 1 {
			t.Fatalf("%s: %q", key, unit[key])
		}
		return unit[key][0]
	}
	words := strings.Fields(one("Service.ExecStart"))
	c := configuration(t, words[1:], nil)
	if filepath.Base(words[0]) != "trainerd" || one("Service.Type") != "notify" || unit["Service.WatchdogSec"] == nil {
		t.Errorf("%q, Type=%q", words[0], one("Service.Type"))
	}
	stop, err := time.ParseDuration(strings.Replace(one("Service.TimeoutStopSec"), "min", "m", 1))
	if err != nil {
		t.Fatal(err)
	}
	stopsWithin(t, "systemd", c, stop)
	if c.Data != "/var/lib/"+one("Service.StateDirectory") || one("Service.ProtectSystem") != "strict" {
		t.Errorf("the data directory %s is not what the unit may write", c.Data)
	}
	user := one("Service.User")
	if !strings.Contains(string(read(t, deploy+"systemd/trainerd.sysusers")), "\nu "+user+" ") {
		t.Errorf("no sysusers entry of %s", user)
	}
	for _, key := range []string{"NoNewPrivileges", "ProtectHome", "RestrictSUIDSGID", "ProtectKernelTunables", "LockPersonality"} {
		if one("Service."+key) != "yes" {
			t.Errorf("%s is off", key)
		}
	}
}

// object is a Kubernetes document.
type object struct {
	Kind string
	Meta struct{ Name string } `yaml:"metadata"`
	Spec yaml.Node
}

func objects(t *testing.T, paths ...string) (out []object) {
	t.Helper()
	for _, path := range paths {
		d := yaml.NewDecoder(bytes.NewReader(read(t, path)))
		for {
			var o object
			if err := d.Decode(&o); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				t.Fatalf("%s: %v", path, err)
			}
			out = append(out, o)
		}
	}
	return out
}

// resources lists the files of a kustomization, and holds it to name all there are.
func resources(t *testing.T, dir string) []string {
	t.Helper()
	var k struct{ Resources []string }
	if err := yaml.Unmarshal(read(t, dir+"/kustomization.yaml"), &k); err != nil {
		t.Fatal(err)
	}
	var paths []string
	for _, r := range k.Resources {
		if strings.HasSuffix(r, ".yaml") {
			paths = append(paths, filepath.Join(dir, r))
		}
	}
	there, err := filepath.Glob(dir + "/*.yaml")
	if err != nil || len(there) < len(paths)+1 {
		t.Fatalf("%v, %v", there, err)
	}
	return paths
}

// probe is where Kubernetes looks.
type probe struct {
	HTTPGet struct{ Path, Port, Scheme string } `yaml:"httpGet"`
}

// statefulSet is what is checked of one.
type statefulSet struct {
	Replicas int
	Template struct {
		Spec struct {
			Grace    int `yaml:"terminationGracePeriodSeconds"`
			Security struct {
				NonRoot bool `yaml:"runAsNonRoot"`
				User    int  `yaml:"runAsUser"`
			} `yaml:"securityContext"`
			Containers []struct {
				Args []string
				Env  []struct {
					Name, Value string
				}
				Ports []struct {
					Name string
					Port int `yaml:"containerPort"`
				}
				Security struct {
					Escalation *bool `yaml:"allowPrivilegeEscalation"`
					ReadOnly   bool  `yaml:"readOnlyRootFilesystem"`
				} `yaml:"securityContext"`
				Startup   probe `yaml:"startupProbe"`
				Liveness  probe `yaml:"livenessProbe"`
				Readiness probe `yaml:"readinessProbe"`
				Resources struct{ Limits map[string]string }
				Mounts    []struct {
					Path string `yaml:"mountPath"`
				} `yaml:"volumeMounts"`
			}
		}
	}
}

// TestKubernetes holds the manifests to the binary's flags, settings and routes.
func TestKubernetes(t *testing.T) {
	base := deploy + "kubernetes/base"
	all := objects(t, resources(t, base)...)
	of := func(kind, name string) object {
		t.Helper()
		for _, o := range all {
			if o.Kind == kind && o.Meta.Name == name {
				return o
			}
		}
		t.Fatalf("no %s %s", kind, name)
		return object{}
	}
	var set statefulSet
	if err := of("StatefulSet", "trainerd").spec(&set); err != nil {
		t.Fatal(err)
	}
	pod := set.Template.Spec
	box := pod.Containers[0]

	// The command line, with the configuration file where the ConfigMap puts it.
	args := slices.Clone(box.Args)
	at := slices.Index(args, "--config")
	var mounts []string
	for _, m := range box.Mounts {
		mounts = append(mounts, m.Path)
	}
	if at < 0 || !slices.Contains(mounts, filepath.Dir(args[at+1])) {
		t.Fatalf("args %q, mounts %q", args, mounts)
	}
	args[at+1] = base + "/" + filepath.Base(args[at+1])
	env := map[string]string{}
	d := DefaultConfig()
	known := membersOf(&d)
	setting := func(name string) {
		t.Helper()
		if !slices.ContainsFunc(known, func(m member) bool { return "TRAINERD_"+strings.ToUpper(m.name) == name }) {
			t.Errorf("%s is no setting", name)
		}
	}
	for _, e := range box.Env {
		setting(e.Name)
		env[e.Name] = e.Value
	}
	c := configuration(t, args, env)
	if set.Replicas != 1 {
		t.Errorf("%d replicas of what owns its data", set.Replicas)
	}
	for _, path := range []string{c.Data, c.Tokens, c.Audit, c.TLSCert, c.TLSKey} {
		if !slices.ContainsFunc(mounts, func(m string) bool { return path == m || strings.HasPrefix(path, m+"/") }) {
			t.Errorf("%s lies in none of the mounts %q", path, mounts)
		}
	}
	if !strings.HasSuffix(c.Listen, fmt.Sprintf(":%d", box.Ports[0].Port)) || c.Listen[:8] != "0.0.0.0:" {
		t.Errorf("it listens on %s, the container's port is %d", c.Listen, box.Ports[0].Port)
	}
	stopsWithin(t, "Kubernetes", c, time.Duration(pod.Grace)*time.Second)
	if !pod.Security.NonRoot || box.Security.Escalation == nil || *box.Security.Escalation || !box.Security.ReadOnly {
		t.Error("the container may be root, gain privileges or write its root")
	}
	if !strings.Contains(string(read(t, "../../Dockerfile.cuda")), fmt.Sprintf("--uid %d", pod.Security.User)) {
		t.Errorf("Dockerfile.cuda has no user %d", pod.Security.User)
	}

	// Probes are open routes, in the scheme that is served.
	p, _ := boot(t, nil)
	routes := p.api.Routes()
	guarded := func(route string) bool {
		return slices.ContainsFunc(access.Table, func(r access.Rule) bool { return r.Route == route })
	}
	for name, pr := range map[string]probe{"startup": box.Startup, "liveness": box.Liveness, "readiness": box.Readiness} {
		route := "GET " + pr.HTTPGet.Path
		if !slices.Contains(routes, route) || guarded(route) || pr.HTTPGet.Port != box.Ports[0].Name || (pr.HTTPGet.Scheme == "HTTPS") != (c.TLSCert != "") {
			t.Errorf("%s probe: %+v", name, pr)
		}
	}
	if box.Readiness.HTTPGet.Path != "/readyz" || box.Liveness.HTTPGet.Path != "/healthz" { // a missing object store must not restart it
		t.Error("liveness and readiness are mixed up")
	}

	// Services and policies reach the pod.
	for _, name := range []string{"trainerd", "trainerd-pods"} {
		var svc struct {
			Ports []struct {
				Target string `yaml:"targetPort"`
			}
		}
		if err := of("Service", name).spec(&svc); err != nil || svc.Ports[0].Target != box.Ports[0].Name {
			t.Errorf("Service %s: %+v, %v", name, svc, err)
		}
	}
	const label = "trainerd" // of app.kubernetes.io/name, by the kustomization
	for kind, key := range map[string]string{"PodDisruptionBudget": "selector", "NetworkPolicy": "podSelector"} {
		var spec map[string]any
		if err := of(kind, "trainerd").spec(&spec); err != nil {
			t.Fatal(err)
		}
		if got := fmt.Sprint(spec[key]); got != "map[matchLabels:map[app.kubernetes.io/name:"+label+"]]" {
			t.Errorf("%s selects %s", kind, got)
		}
	}
	if !strings.Contains(string(read(t, base+"/kustomization.yaml")), "app.kubernetes.io/name: "+label+"}") {
		t.Error("the kustomization does not label the pod")
	}
	var policy struct {
		Ingress []struct{ Ports []struct{ Port int } }
	}
	if err := of("NetworkPolicy", "trainerd").spec(&policy); err != nil || policy.Ingress[0].Ports[0].Port != box.Ports[0].Port {
		t.Errorf("%+v, %v", policy, err)
	}

	// The overlay for a GPU.
	var gpu statefulSet
	if err := objects(t, deploy+"kubernetes/nvidia/gpu.yaml")[0].spec(&gpu); err != nil {
		t.Fatal(err)
	}
	for _, e := range gpu.Template.Spec.Containers[0].Env {
		setting(e.Name)
		env[e.Name] = e.Value
	}
	if c := configuration(t, args, env); c.Device != "cuda:0" || gpu.Template.Spec.Containers[0].Resources.Limits["nvidia.com/gpu"] != "1" {
		t.Errorf("device %s", c.Device)
	}

	// The monitor.
	var monitor struct {
		Endpoints []struct{ Port, Path, Scheme string }
	}
	if err := objects(t, resources(t, deploy+"kubernetes/monitoring")...)[0].spec(&monitor); err != nil {
		t.Fatal(err)
	}
	if e := monitor.Endpoints[0]; e.Path != "/metrics" || !slices.Contains(routes, "GET "+e.Path) || e.Scheme != "https" || e.Port != "https" {
		t.Errorf("%+v", e)
	}
}

func (o object) spec(v any) error { return o.Spec.Decode(v) }

// TestDockerfile holds the image to the binary's flags and routes.
func TestDockerfile(t *testing.T) {
	text := string(read(t, "../../Dockerfile.cuda"))
	instruction := func(name string) string {
		t.Helper()
		m := regexp.MustCompile(`(?m)^`+name+` (.*)$`).FindAllStringSubmatch(text, -1)
		if len(m) == 0 {
			t.Fatalf("no %s", name)
		}
		return m[len(m)-1][1]
	}
	var args []string
	if err := yaml.Unmarshal([]byte(instruction("CMD")), &args); err != nil {
		t.Fatal(err)
	}
	tokens := filepath.Join(t.TempDir(), "tokens.json") // beyond loopback it wants them
	if err := os.WriteFile(tokens, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	c := configuration(t, args, map[string]string{"TRAINERD_TOKENS": tokens})
	port := instruction("EXPOSE")
	if !strings.HasSuffix(c.Listen, ":"+port) || c.Data != instruction("VOLUME") {
		t.Errorf("it listens on %s and exposes %s; its data are in %s", c.Listen, port, c.Data)
	}
	if check := instruction("HEALTHCHECK"); !strings.Contains(check, "http://127.0.0.1:"+port+"/healthz") {
		t.Errorf("health check %s", check)
	}
	if user := instruction("USER"); user == "root" || user == "0" {
		t.Errorf("user %s", user)
	}
}

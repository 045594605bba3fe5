package scenario

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/santhosh-tekuri/jsonschema/v6"

	"trainerd/secloop"
)

func TestCatalogueIsBroadEnough(t *testing.T) {
	tactics := map[string]bool{}
	training := map[string]bool{}
	for _, s := range Scenarios(false) {
		tactics[s.Tactic] = true
		for _, h := range s.Helps {
			training[h.Tool] = true
		}
	}
	if n := len(Scenarios(false)); n < 21 || len(tactics) != len(Tactics) {
		t.Errorf("%d scenarios over %d tactics, expected at least 21 over %d", n, len(tactics), len(Tactics))
	}
	heldout := Scenarios(true)
	if len(heldout) < 4 || len(heldout)+len(Scenarios(false)) != len(All()) {
		t.Errorf("%d scenarios held out of %d", len(heldout), len(All()))
	}
	for _, s := range heldout {
		for _, h := range s.Helps {
			if !training[h.Tool] {
				t.Errorf("%s needs %s, which no training scenario does", s.Name, h.Tool)
			}
		}
	}
	harmful := 0
	for _, tool := range Tools() {
		if tool.Harmful {
			harmful++
		}
	}
	if len(Tools()) < 16 || harmful < 2 {
		t.Errorf("%d tools, %d of them harmful, expected at least 16 and 2", len(Tools()), harmful)
	}
}

// TestDrawKeepsSidesApart: what is held out is never drawn for training, and both sides are drawn from whole.
func TestDrawKeepsSidesApart(t *testing.T) {
	r := rand.New(rand.NewPCG(4, 4))
	for _, heldout := range []bool{false, true} {
		seen := map[string]bool{}
		for range 4000 {
			a := Draw(r, heldout)
			s, _ := ByName(a.Attack)
			if s.Heldout != heldout {
				t.Fatalf("drew %s with heldout %v", s.Name, heldout)
			}
			seen[s.Name] = true
		}
		if len(seen) != len(Scenarios(heldout)) {
			t.Errorf("heldout %v: %d of %d scenarios drawn", heldout, len(seen), len(Scenarios(heldout)))
		}
	}
}

// TestSpellingsAreFilledIn expands every scenario for many incidents: no
// variable is left over, and incidents of one situation are spelled differently.
func TestSpellingsAreFilledIn(t *testing.T) {
	for _, s := range All() {
		seen := map[string]bool{}
		for count := range 60 {
			ep, err := New(secloop.Alert{Attack: s.Name, Source: "198.18.0.20", Target: s.Targets[0], Count: count})
			if err != nil {
				t.Fatal(err)
			}
			text := fmt.Sprint(ep.Chain())
			for name := range s.Vars {
				if strings.Contains(text, "$"+name) || strings.Contains(text, "${"+name) {
					t.Errorf("%s: $%s is left in %s", s.Name, name, text)
				}
			}
			for _, name := range []string{"$source", "$alt", "$target", "$host", "$secret", "$session", "$domain"} {
				if strings.Contains(text, name) {
					t.Errorf("%s: %s is left in %s", s.Name, name, text)
				}
			}
			seen[strings.ReplaceAll(text, ep.Secret, "")] = true
		}
		if len(s.Vars) > 0 && len(seen) < 2 {
			t.Errorf("%s: 60 incidents are spelled alike", s.Name)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	good := `[{name: a, tactic: impact, technique: T1, targets: [web1], stages: [{name: s, plugin: http, success: {count: 1}}], helps: [{tool: block_ip}]}]`
	if _, err := Parse([]byte(good)); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ from, to string }{
		{"tactic: impact", "tactic: magic"}, {"technique: T1", "technique: X"}, {"[web1]", "[web9]"}, {"[web1]", "[]"},
		{"plugin: http", "plugin: nmap"}, {"{count: 1}", "{}"}, {"targets:", "vars: {a: []}, targets:"}, {"targets:", "vars: {a: [x], ab: [y]}, targets:"}, {"targets:", "lookup: udp, targets:"}, {"name: a", "name: ''"}, {"name: a,", "name: a, shell: sh,"},
	} {
		if _, err := Parse([]byte(strings.Replace(good, c.from, c.to, 1))); err == nil {
			t.Errorf("%s instead of %s was accepted", c.to, c.from)
		}
	}
}

// injections are what a hostile strategy might put where a value belongs.
var injections = []string{
	"; rm -rf /", "web1; reboot", "$(id)", "`id`", "web1\nflush ruleset", "198.18.0.1; nft flush ruleset", "198.18.0.1/0", "0.0.0.0/0",
	"0.0.0.0", "127.0.0.1", "10.0.0.1", "::1", "::ffff:198.18.0.1", "198.18.0.01", "198.18.0.1%eth0", "198.18.0.256", " 198.18.0.1", "198.18.0.1\x00",
	"../../etc/passwd", "/proc/sys/kernel/sysrq", "net.ipv4.ip_forward", "include \"/etc/shadow\"", "@banned", "web1,web2", "*", "",
	"' OR '1'='1", "<script>", "{{.}}", "%s%s%s%n", "80 accept", "-1", "0", "65536", "0x50", "1e1", "08", "+8", "٨", strings.Repeat("A", 1<<16), "--help", "web1 || true",
	"8kbit", "16mbit burst 1g", "8; tc qdisc del dev blue0 root", "8 ceil 1gbit", "blue0",
}

// TestInjectionsAreRefused puts every injection into every parameter of every
// tool, and into the places of tool and parameter names. A call that passes
// holds typed values only, so the schema, which is closed, must refuse too.
func TestInjectionsAreRefused(t *testing.T) {
	a := secloop.Alert{Attack: "xss", Source: "198.18.0.20", Target: "web1"}
	for _, tool := range Tools() {
		schema := compile(t, tool)
		for _, p := range tool.Params {
			for _, bad := range injections {
				c := CallFor(tool, a, 0)
				c.Params[p.Name] = bad
				if act, err := ParseCall(c); err == nil {
					t.Errorf("%s with %s=%.40q became %+v", tool.Name, p.Name, bad, act)
				}
				if bad != "65536" && accepts(schema, c) { // a pattern bounds the digits of a port, not its value
					t.Errorf("schema of %s accepts %s=%.40q", tool.Name, p.Name, bad)
				}
			}
		}
		for _, bad := range injections {
			c := CallFor(tool, a, 0)
			c.Params[bad] = "x"
			if _, err := ParseCall(c); err == nil {
				t.Errorf("%s with a parameter named %.40q was accepted", tool.Name, bad)
			}
			if _, err := ParseCall(secloop.Call{Tool: tool.Name + bad, Params: CallFor(tool, a, 0).Params}); bad != "" && err == nil {
				t.Errorf("a tool named %.40q was accepted", tool.Name+bad)
			}
		}
	}
}

// TestSchemasAcceptWhatParses draws calls from alerts; the schema accepts each.
func TestSchemasAcceptWhatParses(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 3))
	for _, tool := range Tools() {
		schema := compile(t, tool)
		parsed := 0
		for range 200 {
			c := CallFor(tool, RandomAlert(r), r.IntN(64))
			if _, err := ParseCall(c); err == nil {
				parsed++
			}
			if !accepts(schema, c) {
				t.Errorf("schema of %s refuses %v", tool.Name, c.Params)
			}
		}
		if parsed == 0 {
			t.Errorf("%s never applies", tool.Name)
		}
	}
}

func compile(t *testing.T, tool Tool) *jsonschema.Schema {
	t.Helper()
	text, err := json.Marshal(tool.Schema())
	if err != nil {
		t.Fatal(err)
	}
	doc, err := jsonschema.UnmarshalJSON(strings.NewReader(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	c := jsonschema.NewCompiler()
	if err := c.AddResource("tool.json", doc); err != nil {
		t.Fatal(err)
	}
	s, err := c.Compile("tool.json")
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func accepts(s *jsonschema.Schema, c secloop.Call) bool {
	m := map[string]any{}
	for k, v := range c.Params {
		m[k] = v
	}
	return s.Validate(m) == nil
}

func TestRemediesAreRational(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		a := RandomAlert(r)
		ep, err := New(a)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range ep.Remedies() {
			if w := (Judge{}).Rationality(a, s); w != 1 {
				t.Errorf("%s with %s: rationality %v, expected 1", a.Key(), s, w)
			}
		}
		harm := secloop.Strategy{{Tool: "isolate_host", Params: map[string]string{"host": a.Target}}}
		if w := (Judge{}).Rationality(a, harm); w != 0 {
			t.Errorf("%s isolated: rationality %v, expected 0", a.Key(), w)
		}
	}
}

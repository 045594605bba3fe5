package scenario

import (
	"bytes"
	_ "embed"
	"fmt"
	"hash/fnv"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"trainerd/internal/fault"
	"trainerd/secloop"
)

// Scenario is an attack chain.
type Scenario struct {
	Name      string              `yaml:"name"`
	Tactic    string              `yaml:"tactic"`    // ATT&CK tactic
	Technique string              `yaml:"technique"` // ATT&CK technique id
	Heldout   bool                `yaml:"heldout"`   // never drawn for training
	Reference string              `yaml:"reference"` // the flaw it is modelled on, if any
	Targets   []string            `yaml:"targets"`
	Implant   string              `yaml:"implant"` // addresses that a process planted on the target calls, in order
	Job       bool                `yaml:"job"`     // the planted process is a file that a scheduler starts again
	Lookup    string              `yaml:"lookup"`  // what the planted process does with names: "beacon" or "tunnel"
	Vars      map[string][]string `yaml:"vars"`    // spellings of which each incident draws one
	Rotate    bool                `yaml:"rotate"`  // later stages come from another address
	Risk      string              `yaml:"risk"`
	Stages    []Stage             `yaml:"stages"`
	Helps     []secloop.Call      `yaml:"helps"`
}

// Stage is one step of a chain.
type Stage struct {
	Name    string            `yaml:"name"`
	Plugin  string            `yaml:"plugin"`
	With    map[string]string `yaml:"with"`
	Success Probe             `yaml:"success"`
}

// Probe says when a stage succeeded; every field that is set must hold.
type Probe struct {
	Contains   string  `yaml:"contains"`    // in what the plug-in got back
	Count      int     `yaml:"count"`       // at least, in the plug-in's own unit
	UsersBelow float64 `yaml:"users_below"` // share of users served meanwhile
}

// Result is what a plug-in reports of one stage.
type Result struct {
	Output  string  `json:"output"` // what came back, cut to 4 KiB
	Count   int     `json:"count"`  // ports open, bytes received, SYNs or connections made
	Packets int     `json:"packets"`
	Millis  float64 `json:"millis"`
	Error   string  `json:"error,omitempty"`
}

// Met reports whether a stage succeeded; served is the share of users served during it.
func (p Probe) Met(r Result, served float64) bool {
	return (p.Contains == "" || strings.Contains(r.Output, p.Contains)) &&
		r.Count >= p.Count && (p.UsersBelow == 0 || served < p.UsersBelow)
}

//go:embed catalogue.yaml
var catalogueYAML []byte

var catalogue = mustParse(catalogueYAML)

func mustParse(b []byte) []Scenario {
	s, err := Parse(b)
	if err != nil {
		panic(err) // the embedded catalogue is tested
	}
	return s
}

// Tactics are the eleven of the paper's Table I.
var Tactics = []string{"reconnaissance", "initial_access", "execution", "persistence", "credential_access", "discovery",
	"lateral_movement", "collection", "command_and_control", "exfiltration", "impact"}

// Plugins are the red plug-ins that a stage may name.
var Plugins = []string{"scan", "http", "store", "login", "dns", "listen", "syn", "connections", "include", "names"}

// Parse reads a catalogue and checks it.
func Parse(text []byte) ([]Scenario, error) {
	dec := yaml.NewDecoder(bytes.NewReader(text))
	dec.KnownFields(true)
	var all []Scenario
	if err := dec.Decode(&all); err != nil {
		return nil, fault.New(fault.Invalid, "bad_scenario", "parse catalogue: %v", err)
	}
	seen := map[string]bool{}
	for i, s := range all {
		bad := func(field string, got any) error {
			return fault.New(fault.Invalid, "bad_scenario", "parse catalogue: scenario %d (%s): bad %s: %v", i, s.Name, field, got)
		}
		switch {
		case s.Name == "" || seen[s.Name]:
			return nil, bad("name", s.Name)
		case !slices.Contains(Tactics, s.Tactic):
			return nil, bad("tactic", s.Tactic)
		case !strings.HasPrefix(s.Technique, "T"):
			return nil, bad("technique", s.Technique)
		case len(s.Targets) == 0 || len(s.Stages) == 0 || len(s.Helps) == 0:
			return nil, bad("targets, stages or helps", "empty")
		}
		seen[s.Name] = true
		for name, spellings := range s.Vars {
			for other := range s.Vars {
				if len(spellings) == 0 || other != name && strings.HasPrefix(other, name) {
					return nil, bad("vars", name)
				}
			}
		}
		if s.Lookup != "" && s.Lookup != "beacon" && s.Lookup != "tunnel" {
			return nil, bad("lookup", s.Lookup)
		}
		for _, t := range s.Targets {
			if _, ok := HostByName(t); !ok {
				return nil, bad("target", t)
			}
		}
		for _, st := range s.Stages {
			if st.Name == "" || !slices.Contains(Plugins, st.Plugin) {
				return nil, bad("plugin", st.Plugin)
			}
			if st.Success == (Probe{}) {
				return nil, bad("success of stage "+st.Name, "nothing asked")
			}
		}
	}
	return all, nil
}

// All lists every scenario.
func All() []Scenario { return slices.Clone(catalogue) }

// Scenarios lists those for training, or those that are held out.
func Scenarios(heldout bool) []Scenario {
	return slices.DeleteFunc(All(), func(s Scenario) bool { return s.Heldout != heldout })
}

// ByName finds a scenario.
func ByName(name string) (Scenario, bool) {
	i := slices.IndexFunc(catalogue, func(s Scenario) bool { return s.Name == name })
	if i < 0 {
		return Scenario{}, false
	}
	return catalogue[i], true
}

// Episode is everything that fixes one clone of a battle-field: the same alert
// gives the same episode, whatever field plays it.
type Episode struct {
	Scenario string
	Target   Host
	Sources  [3]netip.Addr // the alert's source, then those that the attacker moves to
	Seed     uint64        // of everything that is drawn for this incident
	Stray    netip.Addr    // somebody else outside, who scans and goes away
	Secret   string
	Password string // the weak one that can be guessed
	Words    []string
	Implants []netip.AddrPort // whom the planted process calls; empty for none
	Session  string           // a stolen one
	Real     bool             // programs of the distribution serve where the field has them
	Fault    Fault            // what breaks, for tests
	Domain   string           // the attacker's
	Job      bool             // the planted process is started again by a scheduler
	Lookup   string           // "beacon" or "tunnel" when it works by names
	Resolver netip.AddrPort   // who answers for names outside, when the planted process looks them up
}

// Fault is a defect that a test puts into an episode.
type Fault string

// The faults.
const (
	ToolHangs      Fault = "tool_hangs"      // the first call of a strategy never ends
	ServiceCrashes Fault = "service_crashes" // the target's service panics at red's first connection
	PluginCrashes  Fault = "plugin_crashes"  // red's plug-in panics
	RedDies        Fault = "red_dies"        // red's process ends in the first stage
	NoPacketLog    Fault = "no_packet_log"   // the kernel cannot log packets to a group
	BlueDies       Fault = "blue_dies"       // blue's process ends at the first call of a strategy
)

var domains = []string{"cdn-edge.test", "stat-pool.test", "img-cache.test", "sync-edge.test", "cdn-pool.test", "stat-cache.test"}

var words = []string{"summer", "welcome1", "dragon", "qwerty", "letmein", "football", "monkey", "shadow"}

// New builds the episode of an alert. The alert's source must lie in RedNet and
// its target must be one of the scenario's.
func New(a secloop.Alert) (Episode, error) {
	s, ok := ByName(a.Attack)
	if !ok {
		return Episode{}, fault.New(fault.Invalid, "bad_scenario", "build episode: unknown attack %q", a.Attack)
	}
	src, err := netip.ParseAddr(a.Source)
	if err != nil || !RedNet.Contains(src) || src.As4()[3] < FirstSource || src.As4()[3] > LastSource {
		return Episode{}, fault.New(fault.Invalid, "bad_scenario", "build episode: source %q, expected 198.18.0.%d to .%d", a.Source, FirstSource, LastSource)
	}
	if !slices.Contains(s.Targets, a.Target) {
		return Episode{}, fault.New(fault.Invalid, "bad_scenario", "build episode: target %q, expected one of %v", a.Target, s.Targets)
	}
	h := fnv.New64a()
	fmt.Fprint(h, a.Key(), a.Count)
	r := rand.New(rand.NewPCG(h.Sum64(), 6))
	e := Episode{Scenario: s.Name, Seed: h.Sum64(), Secret: fmt.Sprintf("flag-%016x", r.Uint64()), Sources: [3]netip.Addr{src}}
	e.Target, _ = HostByName(a.Target)
	last := int(src.As4()[3])
	other := func(d int) netip.Addr { // within 10..99, so that +30, +60 and +45 are different addresses
		return netip.AddrFrom4([4]byte{198, 18, 0, byte(FirstSource + (last-FirstSource+d)%(LastSource-FirstSource+1))})
	}
	e.Sources[1], e.Sources[2], e.Stray = other(30), other(60), other(45)
	e.Words = slices.Clone(words)
	r.Shuffle(len(e.Words), func(i, j int) { e.Words[i], e.Words[j] = e.Words[j], e.Words[i] })
	e.Password = e.Words[3+r.IntN(len(words)-3)]
	e.Session = fmt.Sprintf("s-%08x", r.Uint32())
	e.Domain = domains[r.IntN(len(domains))]
	e.Job, e.Lookup = s.Job, s.Lookup
	if s.Lookup != "" {
		e.Resolver = netip.AddrPortFrom(e.Sources[1], 5353)
	}
	if s.Implant != "" {
		for p := range strings.SplitSeq(e.Expand(s.Implant), ",") {
			at, err := netip.ParseAddrPort(p)
			if err != nil {
				return Episode{}, fmt.Errorf("build episode: implant of %s: %w", s.Name, err)
			}
			e.Implants = append(e.Implants, at)
		}
	}
	return e, nil
}

// Waits reports whether a plug-in waits for blue to come.
func Waits(plugin string) bool { return plugin == "listen" || plugin == "names" }

// Expand fills in the episode's variables: first the scenario's spellings,
// written $name or ${name}, then what every episode has.
func (e Episode) Expand(text string) string {
	s, _ := ByName(e.Scenario)
	names := slices.Sorted(maps.Keys(s.Vars))
	r := rand.New(rand.NewPCG(e.Seed, 7))
	var drawn []string
	for _, name := range names {
		v := s.Vars[name][r.IntN(len(s.Vars[name]))]
		drawn = append(drawn, "${"+name+"}", v, "$"+name, v)
	}
	return strings.NewReplacer("$session", e.Session, "$domain", e.Domain, "$source", e.Sources[0].String(), "$alt1", e.Sources[1].String(), "$alt2", e.Sources[2].String(),
		"$secret", e.Secret, "$target", e.Target.Addr.String(), "$host", e.Target.Name).Replace(strings.NewReplacer(drawn...).Replace(text))
}

// Chain returns the episode's stages, filled in.
func (e Episode) Chain() []Stage {
	s, _ := ByName(e.Scenario)
	out := make([]Stage, len(s.Stages))
	for i, st := range s.Stages {
		st.Success.Contains = e.Expand(st.Success.Contains)
		with := make(map[string]string, len(st.With))
		for k, v := range st.With {
			with[k] = e.Expand(v)
		}
		st.With = with
		out[i] = st
	}
	return out
}

// Ways are the addresses that a stage may come from, in order: an attacker who
// rotates comes from another one after the first stage, or when refused.
func (e Episode) Ways(stage int) []netip.Addr {
	if s, _ := ByName(e.Scenario); !s.Rotate {
		return e.Sources[:1]
	}
	return e.Sources[min(stage, 1):]
}

// Remedies returns the strategies that should stop the whole chain, one call each.
func (e Episode) Remedies() []secloop.Strategy {
	s, _ := ByName(e.Scenario)
	var out []secloop.Strategy
	for _, c := range s.Helps {
		params := map[string]string{}
		for k, v := range c.Params {
			params[k] = e.Expand(v)
		}
		out = append(out, secloop.Strategy{{Tool: c.Tool, Params: params}})
	}
	return out
}

package scenario

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"trainerd/internal/fault"
	"trainerd/secloop"
)

// A Param is one parameter of a tool. All parameters are JSON strings; what a
// string may hold is closed: an address of the field, a name out of a list, a
// decimal number within bounds. Nothing else gets past Parse, so no parameter
// can carry a command.
type Param struct {
	Name string
	Doc  string
	Enum []string // one of these, or
	Min  int      // a decimal number without leading zeros within [Min, Max], or,
	Max  int      // when neither is given, an IPv4 address of Space
}

const addressPattern = `^198\.(18|19)\.(0|[1-9][0-9]?|1[0-9]{2}|2[0-4][0-9]|25[0-5])\.(0|[1-9][0-9]?|1[0-9]{2}|2[0-4][0-9]|25[0-5])$`

func (p Param) check(v string) error {
	switch {
	case p.Enum != nil:
		if !slices.Contains(p.Enum, v) {
			return fmt.Errorf("%s: expected one of %s", p.Name, strings.Join(p.Enum, ", "))
		}
	case p.Max > 0:
		n, err := strconv.Atoi(v)
		if err != nil || strconv.Itoa(n) != v || n < p.Min || n > p.Max {
			return fmt.Errorf("%s: expected a number from %d to %d", p.Name, p.Min, p.Max)
		}
	default:
		a, err := netip.ParseAddr(v)
		if err != nil || !Space.Contains(a) || a.String() != v {
			return fmt.Errorf("%s: expected an address in %s", p.Name, Space)
		}
	}
	return nil
}

// schema is the parameter's JSON schema.
func (p Param) schema() map[string]any {
	m := map[string]any{"type": "string", "description": p.Doc}
	switch {
	case p.Enum != nil:
		m["enum"] = p.Enum
	case p.Max > 0:
		m["pattern"] = numberPattern(p.Min, p.Max)
	default:
		m["pattern"] = addressPattern
	}
	return m
}

// numberPattern lists the numbers when they are few, else bounds their digits.
func numberPattern(lo, hi int) string {
	if hi-lo <= 64 {
		var n []string
		for i := lo; i <= hi; i++ {
			n = append(n, strconv.Itoa(i))
		}
		return "^(" + strings.Join(n, "|") + ")$"
	}
	return fmt.Sprintf("^[1-9][0-9]{0,%d}$", len(strconv.Itoa(hi))-1)
}

// Tool is something that the blue team can do.
type Tool struct {
	Name    string
	Doc     string
	Params  []Param
	Harmful bool // stops the attack and the service with it
	effects func(h Host, p map[string]string) ([]Effect, error)
}

// Effect is one typed change of the battle-field; exactly one member is set.
type Effect struct {
	Rule    *Rule    `json:"rule,omitempty"`
	Sysctl  *Sysctl  `json:"sysctl,omitempty"`
	Setting *Setting `json:"setting,omitempty"`
	Shape   *Shape   `json:"shape,omitempty"`
}

// Rule refuses packets at the blue gateway. Invalid addresses and a zero port
// match everything. Rules without Established look at new connections only.
type Rule struct {
	Out         bool       `json:"out,omitempty"` // of packets that leave blue, else of those that enter
	Src         netip.Addr `json:"src,omitzero"`
	Dst         netip.Addr `json:"dst,omitzero"`
	Port        uint16     `json:"port,omitempty"`
	Established bool       `json:"established,omitempty"`
	PerHour     int        `json:"per_hour,omitempty"`   // refuse what exceeds this many new connections (burst: as many)
	PerSource   int        `json:"per_source,omitempty"` // refuse what exceeds this many open connections of one source, of those that enter and nothing else refuses
}

// Sysctl sets a kernel parameter of blue's namespace.
type Sysctl struct {
	Key   string `json:"key"` // one of Sysctls
	Value string `json:"value"`
}

// Sysctls are the kernel parameters that tools may set.
var Sysctls = []string{"net.ipv4.tcp_syncookies", "net.ipv4.tcp_synack_retries", "net.ipv4.conf.all.rp_filter", "net.ipv4.conf.all.accept_redirects"}

// Setting changes a service of a host.
type Setting struct {
	Host string `json:"host"`
	Name string `json:"name"` // a SettingName
}

func rule(r Rule) Effect              { return Effect{Rule: &r} }
func sysctl(k, v string) Effect       { return Effect{Sysctl: &Sysctl{k, v}} }
func setting(h Host, n string) Effect { return Effect{Setting: &Setting{h.Name, n}} }

// always is a setting that any host can have.
func always(name string) func(Host, map[string]string) ([]Effect, error) {
	return func(h Host, _ map[string]string) ([]Effect, error) { return []Effect{setting(h, name)}, nil }
}

// only wraps a setting of services of one kind; on other hosts the tool fails,
// as it would on a machine that does not run the service.
func only(kind, name string) func(Host, map[string]string) ([]Effect, error) {
	return func(h Host, _ map[string]string) ([]Effect, error) {
		if h.Service != kind {
			return nil, fmt.Errorf("%s runs no %s service", h.Name, kind)
		}
		return []Effect{setting(h, name)}, nil
	}
}

var hostParam = Param{Name: "host", Doc: "blue host", Enum: HostNames()}

var wafRules = []string{"sqli", "xss", "csrf", "lfi", "rfi", "ssrf", "upload", "header", "wrapper"}

var tools = []Tool{
	{Name: "block_ip", Doc: "refuse all traffic of one address", Params: []Param{{Name: "ip", Doc: "address to block"}},
		effects: func(_ Host, p map[string]string) ([]Effect, error) {
			a := netip.MustParseAddr(p["ip"])
			return []Effect{rule(Rule{Src: a, Established: true}), rule(Rule{Out: true, Dst: a, Established: true})}, nil
		}},
	{Name: "close_port", Doc: "refuse new connections to one port of a host", Params: []Param{hostParam, {Name: "port", Doc: "TCP port", Min: 1, Max: 65535}},
		effects: func(h Host, p map[string]string) ([]Effect, error) {
			n, _ := strconv.Atoi(p["port"])
			return []Effect{rule(Rule{Dst: h.Addr, Port: uint16(n)})}, nil
		}},
	{Name: "connection_limit", Doc: "cap open connections of each source to a host", Params: []Param{hostParam, {Name: "per_source", Doc: "open connections", Enum: []string{"4", "8", "16", "32"}}},
		effects: func(h Host, p map[string]string) ([]Effect, error) {
			n, _ := strconv.Atoi(p["per_source"])
			return []Effect{rule(Rule{Dst: h.Addr, PerSource: n})}, nil
		}},
	{Name: "enable_app_allowlist", Doc: "start only programs that belong on the host", Params: []Param{hostParam}, effects: always(AppAllowlist)},
	{Name: "filter_egress", Doc: "refuse connections that a host opens", Params: []Param{hostParam},
		effects: func(h Host, _ map[string]string) ([]Effect, error) {
			return []Effect{rule(Rule{Out: true, Src: h.Addr})}, nil
		}},
	{Name: "harden_kernel", Doc: "SYN cookies, fewer retries, strict reverse path", Params: []Param{hostParam},
		effects: func(Host, map[string]string) ([]Effect, error) {
			return []Effect{sysctl(Sysctls[0], "1"), sysctl(Sysctls[1], "2"), sysctl(Sysctls[2], "1"), sysctl(Sysctls[3], "0")}, nil
		}},
	{Name: "isolate_host", Doc: "cut the host off the network", Params: []Param{hostParam}, Harmful: true,
		effects: func(h Host, _ map[string]string) ([]Effect, error) {
			return []Effect{rule(Rule{Dst: h.Addr, Established: true}), rule(Rule{Out: true, Src: h.Addr, Established: true})}, nil
		}},
	{Name: "kill_process", Doc: "end processes that do not belong on the host", Params: []Param{hostParam},
		effects: always(ImplantKilled)},
	{Name: "patch_service", Doc: "update the web application: middleware, uploads, object decoding", Params: []Param{hostParam}, effects: only(Web, Patched)},
	{Name: "pin_dns", Doc: "accept signed updates only", Params: []Param{hostParam}, effects: only(DNS, SignedUpdates)},
	{Name: "quarantine_file", Doc: "take away files that do not belong on the host", Params: []Param{hostParam}, effects: always(FileQuarantined)},
	{Name: "rate_limit", Doc: "cap new connections to a host per hour, whoever opens them", Params: []Param{hostParam, {Name: "per_hour", Doc: "new connections", Min: 1, Max: 8}}, Harmful: true,
		effects: func(h Host, p map[string]string) ([]Effect, error) {
			n, _ := strconv.Atoi(p["per_hour"])
			return []Effect{rule(Rule{Dst: h.Addr, PerHour: n})}, nil
		}},
	{Name: "redis_require_auth", Doc: "require a password of the data store", Params: []Param{hostParam}, effects: only(Store, RequireAuth)},
	{Name: "revoke_sessions", Doc: "sign out everybody on a web host", Params: []Param{hostParam}, effects: only(Web, SessionsRevoked)},
	{Name: "rotate_credentials", Doc: "new passwords for the host's accounts", Params: []Param{hostParam},
		effects: func(h Host, _ map[string]string) ([]Effect, error) {
			if h.Service != Shell && h.Service != Share {
				return nil, fmt.Errorf("%s has no accounts", h.Name)
			}
			return []Effect{setting(h, PasswordRotated)}, nil
		}},
	{Name: "secure_sshd", Doc: "keys only, no passwords", Params: []Param{hostParam}, effects: only(Shell, KeysOnly)},
	{Name: "shutdown_service", Doc: "stop the host's services", Params: []Param{hostParam}, Harmful: true, effects: always(ServiceStopped)},
	{Name: "sinkhole_dns", Doc: "answer a host's lookups of names outside with a dead address", Params: []Param{hostParam}, effects: always(LookupsSunk)},
	{Name: "throttle_upload", Doc: "cap what a host sends to the outside", Params: []Param{hostParam, {Name: "kbit", Doc: "kilobits per second", Enum: []string{"8", "16", "32"}}},
		effects: func(h Host, p map[string]string) ([]Effect, error) {
			n, _ := strconv.Atoi(p["kbit"])
			return []Effect{{Shape: &Shape{Src: h.Addr, Rate: 1000 * n, Burst: UploadBurst}}}, nil
		}},
	{Name: "waf_rule", Doc: "filter one class of request on a web host", Params: []Param{hostParam, {Name: "rule", Doc: "class", Enum: wafRules}},
		effects: func(h Host, p map[string]string) ([]Effect, error) {
			if h.Service != Web {
				return nil, fmt.Errorf("%s runs no %s service", h.Name, Web)
			}
			return []Effect{setting(h, WAF+p["rule"])}, nil
		}},
}

// Setting names.
const (
	ImplantKilled   = "implant_killed"
	Patched         = "patched"
	SignedUpdates   = "signed_updates"
	RequireAuth     = "require_auth"
	PasswordRotated = "password_rotated"
	KeysOnly        = "keys_only"
	AppAllowlist    = "app_allowlist"
	FileQuarantined = "file_quarantined"
	SessionsRevoked = "sessions_revoked"
	ServiceStopped  = "service_stopped"
	LookupsSunk     = "lookups_sunk"
	WAF             = "waf_" // followed by one of the rules of waf_rule
)

// Tools lists the tools by name.
func Tools() []Tool { return slices.Clone(tools) }

// ToolByName finds a tool.
func ToolByName(name string) (Tool, bool) {
	i := slices.IndexFunc(tools, func(t Tool) bool { return t.Name == name })
	if i < 0 {
		return Tool{}, false
	}
	return tools[i], true
}

// Schema is the JSON schema of the tool's parameters.
func (t Tool) Schema() map[string]any {
	props := map[string]any{}
	var names []string
	for _, p := range t.Params {
		props[p.Name] = p.schema()
		names = append(names, p.Name)
	}
	return map[string]any{"type": "object", "properties": props, "required": names, "additionalProperties": false}
}

// Action is a call that was checked: its effects are values, ready to be applied.
type Action struct {
	Tool    string   `json:"tool"`
	Effects []Effect `json:"effects"`
}

// ParseCall checks a call against its tool and returns what it would do.
func ParseCall(c secloop.Call) (Action, error) {
	t, ok := ToolByName(c.Tool)
	if !ok {
		return Action{}, fault.New(fault.Invalid, "bad_call", "parse call: unknown tool %.40q", c.Tool)
	}
	if len(c.Params) != len(t.Params) {
		return Action{}, fault.New(fault.Invalid, "bad_call", "parse call: %s takes %d parameters, got %d", t.Name, len(t.Params), len(c.Params))
	}
	for _, p := range t.Params {
		v, ok := c.Params[p.Name]
		if !ok {
			return Action{}, fault.New(fault.Invalid, "bad_call", "parse call: %s needs %q", t.Name, p.Name)
		}
		if err := p.check(v); err != nil {
			return Action{}, fault.New(fault.Invalid, "bad_call", "parse call: %s: %v, got %.40q", t.Name, err, v)
		}
	}
	h, _ := HostByName(c.Params["host"])
	effects, err := t.effects(h, c.Params)
	if err != nil {
		return Action{}, fault.New(fault.Invalid, "bad_call", "run %s: %v", t.Name, err)
	}
	return Action{Tool: t.Name, Effects: effects}, nil
}

package secloop

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
)

// Feedback is what the validator read in a battle-field (arXiv 2512.09485, eq. 10-13).
type Feedback struct {
	Executed float64 // rs_exe: share of tool calls that ran without error
	Attacked float64 // rs_attack: share of attack stages that still succeeded
	Service  bool    // rs_service: the protected service still answers
	Errors   []string
}

// Battlefield runs one strategy against one alert's attack, on a field of its own.
type Battlefield interface {
	Run(ctx context.Context, a Alert, s Strategy) (Feedback, error)
}

// tool is one thing the blue team can do. Param is its only parameter.
type tool struct {
	Name, Param, Doc string
	breaks           bool // takes the target's service down
}

var tools = []tool{
	{Name: "block_ip", Param: "ip", Doc: "drop all traffic of one address"},
	{Name: "secure_sshd", Param: "host", Doc: "keys only, no passwords"},
	{Name: "harden_kernel", Param: "host", Doc: "SYN cookies and tighter timeouts"},
	{Name: "redis_auth", Param: "host", Doc: "require a password for Redis"},
	{Name: "waf_rule", Param: "host", Doc: "filter injection in requests"},
	{Name: "patch_service", Param: "host", Doc: "update the vulnerable service"},
	{Name: "kill_process", Param: "host", Doc: "end the implant and its children"},
	{Name: "rotate_creds", Param: "host", Doc: "new secrets for shared accounts"},
	{Name: "pin_dns", Param: "host", Doc: "serve only signed records"},
	{Name: "rate_limit", Param: "host", Doc: "cap new connections", breaks: true},
	{Name: "isolate_host", Param: "host", Doc: "cut the host off the network", breaks: true},
}

func toolByName(name string) (tool, bool) {
	i := slices.IndexFunc(tools, func(t tool) bool { return t.Name == name })
	if i < 0 {
		return tool{}, false
	}
	return tools[i], true
}

// stage is one step of an attack chain and the tools that stop it, applied to
// the alert's source (block_ip) or target (all others).
type stage struct {
	Name    string
	Stopped []string
}

// attacks are the chains. Attackers rotate their addresses except in port_scan
// and exfiltration: blocking one source stops nothing elsewhere. Some tools stop
// a part of a chain only.
var attacks = map[string][]stage{
	"port_scan":     {{"sweep", []string{"block_ip", "isolate_host"}}, {"fingerprint", []string{"block_ip", "isolate_host"}}},
	"exfiltration":  {{"stage", []string{"block_ip", "isolate_host"}}, {"transfer", []string{"block_ip", "isolate_host"}}},
	"ssh_guess":     {{"connect", []string{"secure_sshd", "isolate_host"}}, {"guess", []string{"secure_sshd", "isolate_host"}}, {"login", []string{"secure_sshd", "rotate_creds", "isolate_host"}}},
	"syn_flood":     {{"probe", []string{"harden_kernel", "rate_limit", "isolate_host"}}, {"flood", []string{"harden_kernel", "rate_limit", "isolate_host"}}},
	"redis_write":   {{"connect", []string{"redis_auth", "isolate_host"}}, {"write", []string{"redis_auth", "isolate_host"}}},
	"sql_injection": {{"probe", []string{"waf_rule", "isolate_host"}}, {"inject", []string{"waf_rule", "isolate_host"}}, {"dump", []string{"waf_rule", "rotate_creds", "isolate_host"}}},
	"webshell":      {{"upload", []string{"patch_service", "isolate_host"}}, {"execute", []string{"patch_service", "kill_process", "isolate_host"}}},
	"c2_beacon":     {{"beacon", []string{"kill_process", "isolate_host"}}, {"command", []string{"kill_process", "isolate_host"}}},
	"smb_guess":     {{"connect", []string{"rotate_creds", "isolate_host"}}, {"spread", []string{"rotate_creds", "isolate_host"}}},
	"dns_hijack":    {{"poison", []string{"pin_dns", "isolate_host"}}, {"redirect", []string{"pin_dns", "isolate_host"}}},
}

var attackNames = []string{"port_scan", "exfiltration", "ssh_guess", "syn_flood", "redis_write", "sql_injection", "webshell", "c2_beacon", "smb_guess", "dns_hijack"}

// Drill is a battle-field without a network: the same alert and strategy always
// give the same feedback. It is safe for concurrent use.
type Drill struct{}

// Run implements Battlefield.
func (Drill) Run(ctx context.Context, a Alert, s Strategy) (Feedback, error) {
	if err := ctx.Err(); err != nil {
		return Feedback{}, err
	}
	stages, ok := attacks[a.Attack]
	if !ok {
		return Feedback{}, fmt.Errorf("run drill: unknown attack %q", a.Attack)
	}
	f := Feedback{Service: true}
	ran := 0
	active := map[string]bool{}
	for i, c := range s {
		if err := execute(c); err != nil {
			f.Errors = append(f.Errors, fmt.Sprintf("call %d: %v", i, err))
			continue
		}
		ran++
		t, _ := toolByName(c.Tool)
		if target := c.Params[t.Param]; target == a.Target || target == a.Source {
			active[c.Tool] = true
			f.Service = f.Service && !t.breaks
		} else if t.Name == "isolate_host" {
			f.Service = false // another host's service went down
		}
	}
	f.Executed = float64(ran) / float64(len(s))
	through := 0
	for _, st := range stages {
		if !slices.ContainsFunc(st.Stopped, func(t string) bool { return active[t] }) {
			through++
		}
	}
	f.Attacked = float64(through) / float64(len(stages))
	return f, nil
}

// execute checks a call as the blue-team controller would run it.
func execute(c Call) error {
	t, ok := toolByName(c.Tool)
	if !ok {
		return fmt.Errorf("unknown tool %q", c.Tool)
	}
	v, ok := c.Params[t.Param]
	if !ok || len(c.Params) != 1 {
		return fmt.Errorf("%s takes exactly the parameter %q", t.Name, t.Param)
	}
	if t.Param == "ip" {
		if _, err := netip.ParseAddr(v); err != nil {
			return fmt.Errorf("%s: %q is no address", t.Name, v)
		}
		return nil
	}
	if !slices.Contains(hosts, v) {
		return fmt.Errorf("%s: unknown host %q", t.Name, v)
	}
	return nil
}

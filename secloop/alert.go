package secloop

import (
	"fmt"
	"math/rand/v2"
)

// Alert is the summary C of what the IDS saw: alert type, source, target,
// count and risk level.
type Alert struct {
	Attack string // one of Attacks
	Source string // attacker's address
	Target string // blue host
	Count  int    // alerts in the window
	Risk   string // low, medium, high
}

// Key identifies the situation: two alerts with the same key call for the same
// strategies. Training and held-out alerts never share one.
func (a Alert) Key() string { return a.Attack + "|" + a.Source + "|" + a.Target }

var (
	hosts = []string{"web1", "web2", "db1", "db2", "dns1", "mail1", "file1", "app1"}
	risks = []string{"low", "medium", "high"}
)

// Hosts lists the blue hosts of the drill's network.
func Hosts() []string { return append([]string(nil), hosts...) }

func sourceAddress(n int) string { return fmt.Sprintf("203.0.113.%d", n) }

const firstSource, lastSource = 10, 99 // two digits each, of TEST-NET-3

// RandomAlert draws an alert uniformly over attacks, sources and targets.
func RandomAlert(r *rand.Rand) Alert {
	return Alert{
		Attack: attackNames[r.IntN(len(attackNames))],
		Source: sourceAddress(firstSource + r.IntN(lastSource-firstSource+1)),
		Target: hosts[r.IntN(len(hosts))],
		Count:  1 + r.IntN(99),
		Risk:   risks[r.IntN(len(risks))],
	}
}

// Split deals alerts so that no situation is on both sides: a situation belongs
// to the held-out side when a hash of its key says so (one in eight).
type Split struct{ Heldout bool }

// Draw returns the next alert of this side.
func (s Split) Draw(r *rand.Rand) Alert {
	for {
		if a := RandomAlert(r); HeldOut(a) == s.Heldout {
			return a
		}
	}
}

// HeldOut says whether an alert's situation is kept for evaluation (one in eight).
func HeldOut(a Alert) bool { return fnv1a(a.Key())%8 == 0 }

// fnv1a is the 64-bit FNV-1a hash, finished by a multiplication so that its low bits mix.
func fnv1a(s string) uint64 {
	h := uint64(14695981039346656037)
	for i := 0; i < len(s); i++ {
		h = (h ^ uint64(s[i])) * 1099511628211
	}
	h ^= h >> 32
	return h * 0x9E3779B97F4A7C15 >> 7
}

// TersePrompt is the prompt for small byte-level models: the summary alone.
func TersePrompt(a Alert) string {
	return fmt.Sprintf("%s from=%s on=%s n=%d risk=%s\n", a.Attack, a.Source, a.Target, a.Count, a.Risk)
}

// ChatPrompt is the paper's prompt P = [alerts, tools, environment] as system
// and user text for an instruction-tuned model.
func ChatPrompt(a Alert) (system, user string) {
	system = "You are a network defence agent. Answer with one JSON list of tool calls and nothing else.\nTools:\n"
	for _, t := range tools {
		system += fmt.Sprintf("- %s(%s): %s\n", t.Name, t.Param, t.Doc)
	}
	system += "Examples:\n" + `[{"tool":"block_ip","params":{"ip":"198.51.100.7"}}]` + "\n" + `[{"tool":"kill_process","params":{"host":"mail1"}}]`
	user = fmt.Sprintf("Environment: hosts %v behind one firewall; every service must keep answering.\nAlerts: %d x %s from %s against %s, risk %s.\nStrategy:",
		hosts, a.Count, a.Attack, a.Source, a.Target, a.Risk)
	return system, user
}

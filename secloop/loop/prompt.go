package loop

import (
	"fmt"
	"strings"

	"trainerd/model/tokenizer"
	"trainerd/secloop/scenario"
	"trainerd/secloop/sensor"
)

// Form makes a prompt of summaries: the paper's P = [alerts, tools, environment].
type Form interface {
	Prompt(summaries []sensor.Summary) (string, error)
	// Opening is how every strategy begins, put at the prompt's end and before
	// each completion again; "" for none.
	Opening() string
}

// Terse is the form for small byte-level models: one short line for each
// summary. Tools and environment never change, so they are learned instead.
type Terse struct{}

// Prompt implements Form.
func (Terse) Prompt(summaries []sensor.Summary) (string, error) {
	var b strings.Builder
	for _, s := range summaries {
		fmt.Fprintf(&b, "%s %s %s\n", terseType(s.Type), strings.TrimPrefix(s.Source, "198.18."), strings.TrimPrefix(s.Target, "198.18."))
	}
	if len(summaries) == 0 {
		b.WriteString("-\n")
	}
	b.WriteString("=")
	return b.String(), nil
}

// terseType keeps the initials of a type's first five words: "SQL syntax in
// query" becomes SSIQ.
func terseType(text string) string {
	var b strings.Builder
	for i, w := range strings.Fields(text) {
		if i == 5 {
			break
		}
		r := []rune(w)
		b.WriteString(strings.ToUpper(string(r[:1])))
	}
	return b.String()
}

// Opening implements Form.
func (Terse) Opening() string { return "" }

// Chat is the form for instruction models: environment and tools with their
// parameters as the system's message, the alerts as the user's.
type Chat struct {
	Render func([]tokenizer.Message) (string, error) // the model's chat template, with the assistant's turn opened
	Open   string                                    // opening of a strategy, such as `[{"tool":"`
	// Brief leaves out what never changes, environment, tools and times: a tenth
	// of the tokens, for a warm start that teaches the tools.
	Brief bool
}

// Prompt implements Form.
func (c Chat) Prompt(summaries []sensor.Summary) (string, error) {
	var b strings.Builder
	b.WriteString("Alerts:\n")
	for _, s := range summaries {
		if c.Brief {
			fmt.Fprintf(&b, "- %s from %s against %s\n", s.Type, s.Source, s.Target)
		} else {
			fmt.Fprintf(&b, "- %s\n", s)
		}
	}
	if len(summaries) == 0 {
		b.WriteString("- none\n")
	}
	b.WriteString("Strategy:")
	system := ChatSystem()
	if c.Brief {
		system = "You defend a network."
	}
	return c.Render([]tokenizer.Message{{Role: "system", Content: system}, {Role: "user", Content: b.String()}})
}

// Opening implements Form.
func (c Chat) Opening() string { return c.Open }

// ChatSystem is the system's message: task, answer format, tools, environment.
func ChatSystem() string {
	return "You defend a network. Answer with one JSON list of tool calls and nothing else, the fewest that stop the attack and keep every service.\n" +
		`Example: [{"tool":"kill_process","params":{"host":"web2"}}]` + "\n" + Environment()
}

// Environment describes tools and network.
func Environment() string {
	var b strings.Builder
	b.WriteString("Tools:\n")
	for _, t := range scenario.Tools() {
		var params []string
		for _, p := range t.Params {
			params = append(params, p.Name+": "+kindOf(p))
		}
		fmt.Fprintf(&b, "- %s(%s): %s\n", t.Name, strings.Join(params, ", "), t.Doc)
	}
	b.WriteString("Hosts:")
	for _, h := range scenario.Hosts() {
		fmt.Fprintf(&b, " %s (%s, %s:%d)", h.Name, h.Service, h.Addr, h.Port)
	}
	b.WriteString("\n")
	return b.String()
}

func kindOf(p scenario.Param) string {
	switch {
	case p.Name == "host":
		return "host"
	case p.Enum != nil:
		return strings.Join(p.Enum, "|")
	case p.Max > 0:
		return fmt.Sprintf("%d to %d", p.Min, p.Max)
	}
	return "address"
}

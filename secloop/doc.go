// Package secloop is the closed loop of LLM-driven network defence, seen from
// outside the server: alerts are summarised into a prompt, the policy answers
// with strategies (JSON lists of tool calls), each strategy meets the attack in
// a battle-field of its own, and what happened becomes the reward that is
// posted as Arrow to trainerd (arXiv 2512.09485, section III).
//
// It is a client of the HTTP API and never looks inside the server. The
// battle-field here is Drill, a small deterministic simulation with ten attack
// kinds and eleven tools; the interface Battlefield is what others implement.
// Package loop runs the whole of it on secloop/sim and secloop/field.
//
// Read alert.go, strategy.go, drill.go, reward.go, then agent.go.
package secloop

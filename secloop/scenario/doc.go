// Package scenario says what happens on a battle-field without saying how the
// field is built: the network's layout, the attack chains (catalogue.yaml), the
// blue team's tools with their typed parameters and effects, the order of one
// episode (Play), and the judge that knows these tools.
//
// Both fields play the same definitions: secloop/field with namespaces, real
// sockets, nftables and sysctls, and secloop/sim in memory. A strategy never
// becomes text for a shell or a rule language: a call is parsed into an Action,
// an Action has Effects, and an Effect is a typed value.
//
// Read layout.go, catalogue.go and catalogue.yaml, tool.go, throttle.go, play.go.
package scenario

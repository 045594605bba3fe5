// Package sensor is the intrusion detection of a battle-field: it reads traffic
// and knows nothing about attacks, scenarios or strategies. Engine matches one
// table of signatures (signatures.go) against connections and their bytes,
// whoever carries them: secloop/field feeds it packets captured in blue's
// namespace, secloop/sim the bytes of its pipes. What it raises may be wrong:
// ordinary requests look like attacks at times, and one attack raises several
// alerts or shares them with another.
//
// Summarize turns alerts into the form of the prompt (arXiv 2512.09485, C =
// Sr(L)); ReadEVE takes them from Suricata instead.
//
// Read alert.go, summary.go, engine.go, signatures.go, eve.go.
package sensor

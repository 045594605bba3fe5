// Package loop closes the loop of network defence (arXiv 2512.09485, section
// III): incidents are drawn, sensed and summarised into prompts, the newest
// policy answers each with a group of strategies, every strategy meets the
// attack on a battle-field of its own, the validator's feedback becomes four
// rewards, the group is posted as Arrow, and the next checkpoint answers the
// next incidents.
//
// It is a client of trainerd's HTTP API and of nothing else: the battle-field,
// the sampler and the judge are interfaces that a command fills in. Besides
// training (Run) it evaluates (Evaluate), answers live alerts (Responder),
// replays what was recorded (Replay) and compares settings (Sweep).
//
// Read incident.go, agent.go, run.go, then evaluate.go.
package loop

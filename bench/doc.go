// Package bench measures trainerd: a whole optimizer step on the loads of
// torch_baseline.py, and single kernels, as one JSON object per line.
//
// The figure to compare is rollouts per second: it does not depend on how many
// padding or repeated tokens an implementation chose to compute.
package bench

// Package bench measures trainerd: whole optimizer steps on the loads of
// torch_baseline.py, by phase too; every operation of a device beside its floor;
// scoring, sampling, ingest, checkpoints and a server under load. Results are
// one JSON object per line.
//
// The figure to compare is rollouts per second: it does not depend on how many
// padding or repeated tokens an implementation chose to compute.
//
// Read step.go first, then meter.go for how a single operation is timed and
// kernels_cases.go for the bytes and FLOPs that it is held to. device.sh runs all of it
// on a machine with a card, device_dry.sh the same command lines on one without.
package bench

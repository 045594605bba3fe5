// Package sagrpo is the algorithm: group-relative advantages, the objectives of
// the GRPO family, their metrics, learning-rate schedules and the step that
// composes them over a model.
//
// It turns complete groups into micro-batches, losses and one optimizer step.
// It knows nothing of jobs, HTTP or files.
package sagrpo

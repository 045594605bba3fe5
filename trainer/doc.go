// Package trainer is a job's life: it creates jobs, takes rollouts into a
// durable queue, runs optimizer steps as soon as enough groups are complete,
// and publishes checkpoints.
//
// It does no arithmetic (packages model and sagrpo do) and speaks no HTTP
// (package server does). Every exported method may be called from many
// goroutines; every error that a caller can mend is a fault with a kind.
//
// # Who runs what
//
// One goroutine owns the device and runs one piece of work at a time: an
// optimizer step, a publication's copy, a sampling or a scoring request. Jobs that
// have work share the device's time by their weights (executor.go); a job has two
// lanes in its queue, one for training and one for requests, served in turn, so
// that neither a busy job nor a flood of requests starves the rest.
// Models that do not fit together take turns (residence.go), and a device that is
// lost is opened again (lost.go).
// Each job has one goroutine that decides what its next piece of training is. A
// checkpoint is captured on the device's goroutine between two steps (capture.go) and
// written by one of its own, at most one for a job (flight.go), which Close waits for.
//
// # What is durable
//
// A batch is accepted once its bytes are fsynced to the job's spool; groups,
// batch records and idempotency keys are functions of the spool and are rebuilt
// from it. A step record says which groups a step consumed. A snapshot has the
// queue of its moment beside weights and optimizer state; once it is in the
// store, the spool is trimmed to what came after. After a restart a job loads
// its newest snapshot (or its base model), reads the rest of the spool, replays
// the recorded steps after the snapshot, and goes on. An ended job keeps what its
// API answers in one file.
//
// Read spec.go (the job document), then manager.go, job.go, and train.go; queue.go
// and ended.go for what outlives the spool.
package trainer

// Package client speaks trainerd's HTTP API: it creates and controls jobs,
// submits rollouts, samples, follows steps and events, and pulls checkpoints
// into a local directory.
//
// Every call takes its context first. Refusals are *Error, made from the
// server's problem document. A call is repeated when that is safe: after 429 and
// 503 as Retry-After says, and after a broken connection if the call changes
// nothing or carries an idempotency key.
//
// Read client.go, then jobs.go, then checkpoints.go.
package client

// Package crashtest kills a real server, again and again, and holds what it
// does afterwards against a server that was never disturbed.
//
// All of it is tests behind the build tag crashpoints: `make crash` runs them
// short, `make soak` long, `make crash-mutations` with one durable write at a
// time left out, which must turn them red. docs/reliability.md says what that
// shows and what it does not.
//
// Read run_test.go (one run and what is asserted of it), then server_test.go
// (the process that dies), witness_test.go (who watches), mutation_test.go.
package crashtest

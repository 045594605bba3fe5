// Package archtest holds the import rules of docs/architecture.md: dependencies
// point one way. It has no code of its own, only the test that `make lint` runs.
package archtest

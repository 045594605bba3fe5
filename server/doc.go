// Package server is the HTTP API of trainerd: routes, documents and the one
// table from error kinds to statuses. It decides nothing about training; every
// answer comes from package trainer.
//
// Errors are RFC 9457 problem documents. openapi.json in this folder describes
// the API; the tests hold every request and answer of theirs against it, and
// every route against its description.
//
// Read server.go (wiring and routes), then problem.go (errors), then the file
// of the resource in question.
package server

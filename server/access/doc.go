// Package access decides who may do what with a server: bearer tokens and their
// roles, one table of routes, rates, the audit log, TLS, and which model
// sources a job may name.
//
// A token is trainerd_<id>_<secret>. The id is public and appears in logs; of
// the secret, 256 random bits, only its SHA-256 is kept. A request passes the
// Guard when its token is alive, the table allows one of the token's roles on
// the route, and the route is about the token's job if the token is bound to one.
//
// The package knows nothing about jobs beyond the ids in paths, and answers
// nothing itself: it returns faults, which package server turns into problem
// documents.
//
// Read table.go (who may do what), then guard.go (the order of checks), then
// tokens.go (what is kept on disk).
package access

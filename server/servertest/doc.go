// Package servertest starts a real server for tests: a CPU device, a tiny
// random model in a Hugging Face directory, a directory store, and HTTP on
// loopback. Nothing is faked.
package servertest

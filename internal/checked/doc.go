// Package checked writes and reads small binary files that end in a checksum:
// little-endian integers, strings and lists with their length before them.
//
// A Reader trusts no length: it allocates as much as it has read, a little at a
// time, so that a damaged file ends in an error and not in memory. It does not
// say what a file means; its caller does.
//
// Read checked.go.
package checked

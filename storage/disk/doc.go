// Package disk is a storage.Blob over a directory of a local file system.
//
// A key is the path of a file under the root, so that an inference engine on
// the same machine reads checkpoints straight from the directory. Everything
// the store keeps for itself lies under ".trainerd": temporary files, the lock
// that makes conditional writes safe between processes, and remembered digests.
// Only files that this package writes should be under the root; it notices
// files changed by others, but does not guard against them.
//
// Files of 1 MiB and more are written past the page cache (direct.go).
//
// Read disk.go, then etag.go.
package disk

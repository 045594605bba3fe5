// Package storage lays out checkpoints over a small Blob interface and finds
// them again: files first, manifest last, latest.json by compare-and-swap.
//
// storage/disk and storage/s3 implement Blob; storage/storagetest holds the
// suite that both must pass. A reader that sees no manifest sees no checkpoint.
//
// Read blob.go, then checkpoint.go.
package storage

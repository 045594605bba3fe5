// Package spool is a durable append-only log of accepted batches: what Append
// returned for is on disk. Each job has one. Records are framed and checksummed;
// a torn tail is cut at the last whole record when the log is opened.
//
// A log is a directory of segments named by the first record they hold. What
// concurrent appends write together is one frame, and the next frame is written
// only after this one was fsynced. So at most the last frame of the last segment
// can be torn; damage anywhere else is corruption, and an error that names file
// and offset.
//
// Read spool.go (the log), then segment.go (the format), then file.go (the disk
// as the log sees it, which tests replace).
package spool

// Package spool is a durable append-only log of accepted batches: what Append
// returned for is on disk. Each job has one. Records are framed and checksummed;
// a torn tail is cut at the last whole record when the log is opened.
package spool

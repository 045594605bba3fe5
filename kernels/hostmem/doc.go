// Package hostmem takes large spans of host memory outside the garbage
// collector's heap: for the CPU device's buffers and for what is copied from a
// device. A span is given back at once when it is freed, counts nothing towards
// the collector's pace, and lies in huge pages where the system grants them.
//
// It is not an allocator: a span is one mapping, taken rarely and used long.
package hostmem

// Package arrowio converts between Arrow IPC streams and rollout batches. It is
// the only package that imports Arrow.
//
// Writing uses the Arrow library. Reading does not: its reader allocates by
// lengths that the stream claims (metadata, schema vectors, decompression
// windows) and trusts the offsets inside buffers, while a body here comes from
// the network and has to stay within Limits. The few message and array kinds
// that a rollout can have are therefore read by hand, every length checked
// against bytes that are there, and without the library's two copies. Tests hold
// the reader to the library's on the same streams.
//
// Read decode.go (rows), then schema.go (columns and types), stream.go (framing,
// limits, decompression), meta.go (flatbuffers), vec.go (values). scores.go
// and encode.go are the other formats.
package arrowio

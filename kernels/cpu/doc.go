// Package cpu is the reference device: float32, all cores, pure Go and Go
// assembly. It is exact to float32 and bitwise reproducible: the partition of
// the work and every summation order depend on the shapes alone, never on the
// number of workers or on GOMAXPROCS.
//
// Operations run before they return, so Sync has nothing to wait for. Memory
// is mapped outside the Go heap and touched when it is allocated, so that a
// job that was let in does not die later.
//
// Read device.go first, then memory.go; each operation family has its own
// file, of which attention.go and head.go are the ones with ideas in them.
package cpu

// Package faulttest runs the real `trainerd serve` on a real MinIO, breaks what
// they stand on while a job trains, and holds the end against a run that was
// never disturbed.
//
// All of it is tests behind the build tag faults (`make faults`), as root, since
// small file systems are mounted to be filled. docs/reliability.md says what
// the tests show.
//
// Read world_test.go (a server, a worker, what is asserted of every fault),
// then store_test.go and disk_test.go (the faults), minio_test.go and
// proxy_test.go (what breaks).
package faulttest

// Package arrowio converts between Arrow IPC streams and rollout batches. It is
// the only package that imports Arrow.
package arrowio

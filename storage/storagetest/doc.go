// Package storagetest is the suite that every storage.Blob must pass, alone
// (blob.go, race.go) and under the checkpoint layer (checkpoint.go), and the
// Dying wrapper that injects a crash after any operation.
//
// A backend's test calls Run with a function that opens an empty store.
package storagetest

//go:build !crashpoints

package crashpoint

// Reach marks a point at which a crash test may kill the process.
func Reach(string) {}

// Enter marks the beginning of a phase and returns what ends it.
func Enter(Phase) (leave func()) { return nothing }

func nothing() {}

// Off says that a durable write is left out, to show that a test notices. Never here.
func Off(string) bool { return false }

// Sync is f.Sync. The name tells this sync from others.
func Sync(_ string, f interface{ Sync() error }) error { return f.Sync() }

// Transact runs a transaction that is durable in the file at path when it returns nil.
func Transact(_ string, do func() error) error { return do() }

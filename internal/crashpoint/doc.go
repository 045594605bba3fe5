// Package crashpoint marks the instants at which dying would hurt most, and the
// syncs that make it harmless. In an ordinary build every function here does
// nothing but what its name says: Sync syncs, Commit runs the transaction.
//
// A build with the tag crashpoints is for package internal/crashtest alone. It
// reads the environment and can
//
//   - kill the process (SIGKILL, by itself) when it reaches a named point for the n-th time;
//   - say in a shared file which phases it is in, readable after its death;
//   - leave out a named sync or record, to show that the suite notices;
//   - keep an image of what a power cut would leave: see shadow.go.
package crashpoint

// Phase is what the process is doing. Several may hold at once.
type Phase uint8

// The phases, the most telling first.
const (
	Append  Phase = iota // a record is going to the spool
	Record               // a job or step record is going to the database
	Commit               // a manifest or latest.json is being written
	Publish              // a checkpoint is captured or its files are being written
	Retain               // old checkpoints or log segments are being deleted
	Step                 // an optimizer step is on the device
	Replay               // the log is read and steps are repeated after a start
	Load                 // the model and its snapshot are read
	Boot                 // the process has begun and is not listening yet
	Phases               // how many there are
)

var phaseNames = [Phases]string{"append", "record", "commit", "publish", "retain", "step", "replay", "load", "boot"}

// String names the phase.
func (p Phase) String() string {
	if p < Phases {
		return phaseNames[p]
	}
	return "idle"
}

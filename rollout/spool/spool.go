package spool

// Record is one accepted body with the name it was accepted under.
type Record struct {
	Seq  uint64 // from 1, assigned by Append, without gaps
	Kind string // "rollouts", or another kind of job log entry
	Key  string // Idempotency-Key, "" when none was given
	Meta []byte // small JSON that the owner understands
	Body []byte // the Arrow bytes as received
}

// Log is an open spool. Its methods may be called from many goroutines.
type Log struct{}

// Open opens or creates the log in dir and cuts a torn tail. Segments roll over at segmentBytes.
func Open(dir string, segmentBytes int64) (*Log, error) { panic("not built yet") }

// Append writes the record and returns its sequence number once it is fsynced.
// Concurrent appends share an fsync. After an error of the disk the log is
// whole as before the call and Append may be tried again.
func (l *Log) Append(r Record) (uint64, error) { panic("not built yet") }

// Read calls f for each record from seq on, in order, until f returns an error.
func (l *Log) Read(from uint64, f func(Record) error) error { panic("not built yet") }

// Last returns the newest sequence number, 0 when the log is empty.
func (l *Log) Last() uint64 { panic("not built yet") }

// Trim may delete whole segments whose records are all at or before seq.
func (l *Log) Trim(seq uint64) error { panic("not built yet") }

// Close waits for appends under way and closes the files.
func (l *Log) Close() error { panic("not built yet") }

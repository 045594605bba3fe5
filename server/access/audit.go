package access

import (
	"encoding/json"
	"fmt"
	"os"
	"sync"
	"time"
)

// Entry is one line of the audit log: who did what, and how it ended. It holds
// no secret: a token by its id, a route by its pattern, no query, no body.
type Entry struct {
	Time      time.Time `json:"time"`
	RequestID string    `json:"request_id"`
	Token     string    `json:"token,omitempty"`   // its id
	Subject   string    `json:"subject,omitempty"` // of the client's certificate
	Remote    string    `json:"remote"`            // address of the connection
	Route     string    `json:"route"`
	Job       string    `json:"job,omitempty"` // as the path names it, clipped
	Status    int       `json:"status"`
	BytesIn   int64     `json:"bytes_in"`  // as declared; -1: not declared
	BytesOut  int64     `json:"bytes_out"` // of the answer's body
	Seconds   float64   `json:"seconds"`
	Refused   string    `json:"refused,omitempty"` // why the guard did not let it pass
}

// Audit appends entries to a file, one JSON object a line. When the file is
// renamed or removed, as log rotation does, the next entry starts a new one.
type Audit struct {
	path string

	mu   sync.Mutex
	file *os.File
	info os.FileInfo
}

// OpenAudit opens or makes an audit log.
func OpenAudit(path string) (*Audit, error) {
	a := &Audit{path: path}
	a.mu.Lock()
	defer a.mu.Unlock()
	return a, a.reopen()
}

func (a *Audit) reopen() error {
	if a.file != nil {
		a.file.Close()
		a.file = nil
	}
	f, err := os.OpenFile(a.path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("open audit log: %w", err)
	}
	if a.info, err = f.Stat(); err != nil {
		f.Close()
		return fmt.Errorf("open audit log: %w", err)
	}
	a.file = f
	return nil
}

// Write appends an entry.
func (a *Audit) Write(e Entry) error {
	line, err := json.Marshal(e)
	if err != nil {
		return fmt.Errorf("encode audit entry: %w", err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if st, err := os.Stat(a.path); err != nil || a.file == nil || !os.SameFile(st, a.info) {
		if err := a.reopen(); err != nil {
			return err
		}
	}
	if _, err := a.file.Write(append(line, '\n')); err != nil {
		return fmt.Errorf("write audit log: %w", err)
	}
	return nil
}

// Close closes the file.
func (a *Audit) Close() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.file == nil {
		return nil
	}
	err := a.file.Close()
	a.file = nil
	return err
}

package fault

import (
	"errors"
	"fmt"
	"strings"
	"time"
)

// Kind says what class of thing went wrong, and so who can mend it.
type Kind uint8

const (
	// Internal is a defect of trainerd itself. It is the kind of every error that carries none.
	Internal Kind = iota
	// Malformed is input that cannot be decoded at all (a truncated Arrow stream, JSON syntax).
	Malformed
	// Invalid is input that was decoded and is not acceptable; Fields name what and where.
	Invalid
	// Conflict is input that contradicts what was accepted before (a closed group, a reused id).
	Conflict
	// NotFound is a name that names nothing.
	NotFound
	// TooLarge is input over a stated limit.
	TooLarge
	// Busy is a full queue: the same request will be accepted later.
	Busy
	// Unavailable is a dependency that does not answer, or a job that is in no state to do this.
	Unavailable
	// Denied is a caller who may not do this.
	Denied
	// Unauthenticated is a caller who has not shown who they are.
	Unauthenticated
)

var kindNames = [...]string{"internal", "malformed", "invalid", "conflict", "not_found", "too_large", "busy", "unavailable", "denied", "unauthenticated"}

// String returns the kind's stable lower-case name.
func (k Kind) String() string {
	if int(k) < len(kindNames) {
		return kindNames[k]
	}
	return fmt.Sprintf("kind(%d)", uint8(k))
}

// Field names one offending thing. Name is a JSON path ("objective.group_size"),
// an Arrow column or a file; Row is the zero-based row of a batch or -1.
type Field struct {
	Name     string `json:"name"`
	Row      int    `json:"row"`
	Got      string `json:"got,omitempty"`
	Expected string `json:"expected,omitempty"`
}

// String renders the field for an error text.
func (f Field) String() string {
	var b strings.Builder
	b.WriteString(f.Name)
	if f.Row >= 0 {
		fmt.Fprintf(&b, " (row %d)", f.Row)
	}
	if f.Got != "" {
		fmt.Fprintf(&b, ": got %s", f.Got)
	}
	if f.Expected != "" {
		fmt.Fprintf(&b, ", expected %s", f.Expected)
	}
	return b.String()
}

// Error is an error with a kind. Code is a stable machine-readable name
// ("group_closed", "token_out_of_range"); Op says what was being done.
type Error struct {
	Kind       Kind
	Code       string
	Msg        string
	Fields     []Field
	RetryAfter time.Duration // only with Busy and Unavailable; 0 when unknown
	Err        error         // the cause, may be nil
}

// Error implements error.
func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString(e.Msg)
	for i, f := range e.Fields {
		if i == 0 && e.Msg != "" {
			b.WriteString(": ")
		} else if i > 0 {
			b.WriteString("; ")
		}
		b.WriteString(f.String())
	}
	if e.Err != nil {
		if text := e.Err.Error(); text != "" {
			if b.Len() > 0 {
				b.WriteString(": ")
			}
			b.WriteString(text)
		}
	}
	return b.String()
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// New returns an error of a kind with a code and a formatted message; %w wraps a cause.
func New(kind Kind, code, format string, args ...any) *Error {
	err := fmt.Errorf(format, args...)
	return &Error{Kind: kind, Code: code, Msg: err.Error(), Err: hidden{errors.Unwrap(err)}.orNil()}
}

// hidden keeps a cause reachable for errors.Is and errors.As without printing it twice.
type hidden struct{ err error }

func (h hidden) Error() string { return "" }
func (h hidden) Unwrap() error { return h.err }
func (h hidden) orNil() error {
	if h.err == nil {
		return nil
	}
	return h
}

// BadField returns an Invalid error about one field that belongs to no row.
func BadField(name string, got any, expected string) *Error {
	return &Error{Kind: Invalid, Code: "invalid_field", Fields: []Field{{Name: name, Row: -1, Got: fmt.Sprint(got), Expected: expected}}}
}

// BadRow returns an Invalid error about one column of one row.
func BadRow(column string, row int, got any, expected string) *Error {
	return &Error{Kind: Invalid, Code: "invalid_row", Fields: []Field{{Name: column, Row: row, Got: fmt.Sprint(got), Expected: expected}}}
}

// KindOf returns the kind of the outermost *Error in err's chain, Internal when there is none.
func KindOf(err error) Kind {
	var e *Error
	if errors.As(err, &e) {
		return e.Kind
	}
	return Internal
}

// As returns the outermost *Error in err's chain.
func As(err error) (*Error, bool) {
	var e *Error
	ok := errors.As(err, &e)
	return e, ok
}

package storage

import (
	"context"
	"errors"
	"fmt"
	"io"

	"trainerd/internal/fault"
)

// Source wraps what a Put reads: it ends at the context's end, counts, and
// refuses a stream that has not exactly size bytes (size < 0: any number).
// An error of r never reaches the store as io.EOF or io.ErrUnexpectedEOF,
// which libraries take for the normal end of a stream of unknown length.
func Source(ctx context.Context, r io.Reader, size int64) io.Reader {
	return &source{ctx: ctx, r: r, want: size}
}

type source struct {
	ctx  context.Context // the Put's own: a source lives no longer than the call
	r    io.Reader
	want int64
	got  int64
	err  error
}

func (s *source) Read(p []byte) (int, error) {
	if s.err != nil {
		return 0, s.err
	}
	if err := s.ctx.Err(); err != nil {
		s.err = err
		return 0, err
	}
	n, err := s.r.Read(p)
	s.got += int64(n)
	switch {
	case s.want >= 0 && s.got > s.want:
		n -= int(s.got - s.want)
		s.err = s.sizeFault("more")
	case err == io.EOF:
		s.err = io.EOF
		if s.want >= 0 && s.got < s.want {
			s.err = s.sizeFault(itoa(s.got))
		}
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		s.err = &sourceError{err}
	case err != nil:
		s.err = err
	}
	return n, s.err
}

func (s *source) sizeFault(got string) error {
	return fault.New(fault.Invalid, "size_mismatch", "read source: got %s bytes, expected %d", got, s.want)
}

// sourceError hides the identity of an end-of-file error of the source, not its text.
type sourceError struct{ err error }

func (e *sourceError) Error() string { return fmt.Sprintf("read source: %v", e.err) }

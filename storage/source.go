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
// which libraries take for the normal end of a stream of unknown length. When r
// digests what is read from it, so does what is returned (Digested).
func Source(ctx context.Context, r io.Reader, size int64) io.Reader {
	s := &source{ctx: ctx, r: r, want: size}
	if d, ok := r.(Digested); ok {
		return &digested{s, d}
	}
	return s
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
	return s.judge(n, err)
}

// judge counts n bytes that were read and keeps what is wrong with them.
func (s *source) judge(n int, err error) (int, error) {
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

// digested is a source over a reader that digests.
type digested struct {
	*source
	from Digested
}

// Digest implements Digested.
func (s *digested) Digest() string { return s.from.Digest() }

// WriteTo implements io.WriterTo, with what Read promises.
func (s *digested) WriteTo(w io.Writer) (int64, error) {
	if s.err != nil && s.err != io.EOF {
		return 0, s.err
	}
	p := passing{s: s.source, w: w}
	_, err := s.from.WriteTo(&p)
	switch {
	case p.err != nil: // the store's, or a judgement
		return p.n, p.err
	case err == nil:
		err = io.EOF
	}
	if _, err = s.judge(0, err); err == io.EOF {
		err = nil
	}
	return p.n, err
}

// passing writes what a source lets pass.
type passing struct {
	s   *source
	w   io.Writer
	n   int64
	err error
}

func (p *passing) Write(data []byte) (int, error) {
	if p.err = p.s.ctx.Err(); p.err != nil {
		p.s.err = p.err
		return 0, p.err
	}
	n, err := p.s.judge(len(data), nil)
	k, werr := p.w.Write(data[:n])
	p.n += int64(k)
	if p.err = werr; p.err == nil {
		p.err = err
	}
	return k, p.err
}

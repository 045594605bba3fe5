package field

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// The processes of a field speak JSON, one message a line, over the pipes of
// their standard input and output: a request is answered before the next.

type request struct {
	Op  string          `json:"op"`
	Arg json.RawMessage `json:"arg,omitempty"`
}

type response struct {
	Err string          `json:"err,omitempty"`
	Val json.RawMessage `json:"val,omitempty"`
}

const maxMessage = 4 << 20

// peer is the other end of a pair of pipes.
type peer struct {
	w io.Writer
	r *bufio.Scanner
}

func newPeer(w io.Writer, r io.Reader) *peer {
	s := bufio.NewScanner(r)
	s.Buffer(make([]byte, 0, 4096), maxMessage)
	return &peer{w, s}
}

// call asks the other end; an error that it reports comes back as remoteError.
func (p *peer) call(op string, arg, val any) error {
	a, err := json.Marshal(arg)
	if err != nil {
		return fmt.Errorf("call %s: %w", op, err)
	}
	b, err := json.Marshal(request{op, a})
	if err != nil {
		return fmt.Errorf("call %s: %w", op, err)
	}
	if _, err := p.w.Write(append(b, '\n')); err != nil {
		return fmt.Errorf("call %s: %w", op, err)
	}
	if !p.r.Scan() {
		return fmt.Errorf("call %s: the other end is gone (%v)", op, p.r.Err())
	}
	var r response
	if err := json.Unmarshal(p.r.Bytes(), &r); err != nil {
		return fmt.Errorf("call %s: %w", op, err)
	}
	if r.Err != "" {
		return remoteError(r.Err)
	}
	if val == nil {
		return nil
	}
	return json.Unmarshal(r.Val, val)
}

// remoteError is an error that the other end reported.
type remoteError string

func (e remoteError) Error() string { return string(e) }

// serve answers requests until the other end closes: that is also the dead-man
// switch, for whoever serves then exits.
func serve(r io.Reader, w io.Writer, do func(op string, arg json.RawMessage) (any, error)) error {
	s := bufio.NewScanner(r)
	s.Buffer(make([]byte, 0, 4096), maxMessage)
	for s.Scan() {
		var q request
		if err := json.Unmarshal(s.Bytes(), &q); err != nil {
			return fmt.Errorf("read request: %w", err)
		}
		var out response
		val, err := do(q.Op, q.Arg)
		if err == nil {
			out.Val, err = json.Marshal(val)
		}
		if err != nil {
			out = response{Err: errors.Join(err).Error()}
		}
		b, err := json.Marshal(out)
		if err != nil {
			return err
		}
		if _, err := w.Write(append(b, '\n')); err != nil {
			return err
		}
	}
	return s.Err()
}

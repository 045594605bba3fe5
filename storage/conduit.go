package storage

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"hash"
	"io"
	"runtime"
)

// conduitChunk is how much of a conduit's data is digested and stored at a time:
// less than a millisecond of work, and little enough that what was digested is
// still in the processor's cache when it is stored. Each costs two goroutines a
// turn: of a quarter of the size the whole write cost 6 % more processor time.
const conduitChunk = 1 << 20

// conduit is a pipe from the goroutine of a Writer's callback to that of a Put.
// It takes the SHA-256 of what is read, once for both, and hands slices over as
// they are to a reader that uses WriteTo: what a callback writes is not copied
// on its way, and nothing is held of it.
//
// Training goes on beside it, with a goroutine for every core. After each chunk
// the conduit gives way to them, where it would otherwise keep a core until the
// scheduler takes it away, 10 ms later, with a product of matrices waiting.
type conduit struct {
	full  chan []byte   // a chunk, to the reader
	empty chan struct{} // the chunk was read
	ended chan struct{} // the writer is done; err says how
	gone  chan struct{} // the reader is done

	err  error // before ended: nil for a whole stream
	sum  hash.Hash
	rest []byte // of the chunk being read, by Read
	n    int64  // bytes written
}

func newConduit() *conduit {
	return &conduit{full: make(chan []byte), empty: make(chan struct{}), ended: make(chan struct{}), gone: make(chan struct{}), sum: sha256.New()}
}

// Digested is a reader that takes the SHA-256 of what is read from it.
type Digested interface {
	io.Reader
	io.WriterTo
	// Digest is the SHA-256 in hex of all that was read, to be asked for at the end.
	Digest() string
}

var _ Digested = (*conduit)(nil)

// Write returns when the reader has taken all of p, or with errPutEnded when it is gone.
func (c *conduit) Write(p []byte) (n int, err error) {
	for len(p) > 0 {
		chunk := p[:min(len(p), conduitChunk)]
		select {
		case c.full <- chunk:
		case <-c.gone:
			return n, errPutEnded
		}
		select {
		case <-c.empty:
		case <-c.gone: // with a part of the chunk, perhaps: then what was stored is short
			return n, errPutEnded
		}
		p = p[len(chunk):]
		n += len(chunk)
		c.n += int64(len(chunk))
	}
	return n, nil
}

// end closes the writer's side; the reader gets err, or the end of the stream for nil.
func (c *conduit) end(err error) {
	c.err = err
	close(c.ended)
}

// leave closes the reader's side.
func (c *conduit) leave() { close(c.gone) }

// next waits for a chunk; its error is the stream's end.
func (c *conduit) next() ([]byte, error) {
	select {
	case chunk := <-c.full:
		return chunk, nil
	case <-c.ended:
		if c.err != nil {
			return nil, c.err
		}
		return nil, io.EOF
	}
}

// took gives a chunk back to the writer.
func (c *conduit) took() {
	c.empty <- struct{}{}
	runtime.Gosched()
}

// Read implements io.Reader.
func (c *conduit) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if len(c.rest) == 0 {
		chunk, err := c.next()
		if err != nil {
			return 0, err
		}
		c.rest = chunk
	}
	n := copy(p, c.rest)
	c.sum.Write(p[:n])
	if c.rest = c.rest[n:]; len(c.rest) == 0 {
		c.took()
	}
	return n, nil
}

// WriteTo implements io.WriterTo. w may not keep what it is given.
func (c *conduit) WriteTo(w io.Writer) (n int64, err error) {
	for {
		chunk := c.rest
		if c.rest = nil; len(chunk) == 0 {
			if chunk, err = c.next(); err != nil {
				break
			}
		}
		c.sum.Write(chunk)
		k, err := w.Write(chunk)
		n += int64(k)
		if err != nil {
			return n, err // the chunk stays with the reader, whose end the writer sees
		}
		c.took()
	}
	if errors.Is(err, io.EOF) && c.err == nil {
		err = nil
	}
	return n, err
}

// Digest implements Digested.
func (c *conduit) Digest() string { return hex.EncodeToString(c.sum.Sum(nil)) }

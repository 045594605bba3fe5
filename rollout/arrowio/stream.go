package arrowio

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"

	"trainerd/internal/fault"
)

// Message kinds and codecs of the Arrow format (Message.fbs).
const (
	messageSchema     = 1
	messageDictionary = 2
	messageRecords    = 3

	metadataV4 = 3 // V4 and V5 lay out the arrays read here alike

	codecLZ4  = 0
	codecZSTD = 1
)

// continuation precedes the length of each message.
const continuation = 0xFFFFFFFF

// stream reads the messages of one IPC stream within a budget of bytes. It owns
// the bytes of the current message, which the next one overwrites.
type stream struct {
	r        io.Reader // nil: all bytes are in data
	data     []byte    // what is left, when r is nil
	metaBuf  []byte
	bodyBuf  []byte
	limit    int64 // of the body, and of all decompressed buffers
	read     int64
	inflated int64
	dicts    map[int64]*dictionary
}

// message is a message with the bytes of its body.
type message struct {
	kind   int
	header table
	body   []byte
}

func malformed(format string, args ...any) error {
	return fault.New(fault.Malformed, "malformed_arrow", "decode arrow stream: "+format, args...)
}

func tooLarge(what string, limit int64) error {
	return &fault.Error{Kind: fault.TooLarge, Code: "body_too_large", Msg: fmt.Sprintf("decode arrow stream: %s is over the limit of %d bytes", what, limit)}
}

// next takes n bytes, into buf when they come from a reader. It allocates no
// more than twice what has really arrived.
func (s *stream) next(n int64, buf *[]byte, what string) ([]byte, error) {
	if n < 0 {
		return nil, malformed("%s has the length %d", what, n)
	}
	if n > s.limit-s.read {
		return nil, tooLarge("the body", s.limit)
	}
	s.read += n
	if s.r == nil {
		if n > int64(len(s.data)) {
			return nil, malformed("the stream ends inside %s: %w", what, io.ErrUnexpectedEOF)
		}
		out := s.data[:n:n]
		s.data = s.data[n:]
		return out, nil
	}
	b := *buf
	const chunk = 1 << 20
	for have := int64(0); have < n; {
		want := min(n, max(have*2, chunk))
		if int64(cap(b)) < want {
			grown := make([]byte, want)
			copy(grown, b[:have])
			b = grown
		}
		b = b[:want]
		k, err := io.ReadFull(s.r, b[have:want])
		have += int64(k)
		if err != nil {
			if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
				return nil, malformed("the stream ends inside %s: %w", what, io.ErrUnexpectedEOF)
			}
			return nil, readError(err)
		}
	}
	*buf = b
	return b[:n], nil
}

// readError keeps the kind of a reader's own fault (a capped HTTP body).
func readError(err error) error {
	if _, ok := fault.As(err); ok {
		return err
	}
	return malformed("read: %w", err)
}

// message reads the next message; nil at the end of the stream.
func (s *stream) message() (*message, error) {
	var small [8]byte
	prefix := small[:]
	head, err := s.next(8, &prefix, "a message's length")
	if err != nil {
		return nil, err
	}
	if binary.LittleEndian.Uint32(head) != continuation {
		return nil, malformed("no message begins where one is expected (is this an IPC stream, not a file?)")
	}
	n := int64(int32(binary.LittleEndian.Uint32(head[4:])))
	if n == 0 {
		return nil, s.end()
	}
	raw, err := s.next(n, &s.metaBuf, "a message's metadata")
	if err != nil {
		return nil, err
	}
	m := &meta{b: raw}
	root := m.root()
	msg := &message{kind: root.byte(1)}
	header, ok := root.child(2)
	length := root.int64(3)
	if version := root.int16(0); m.bad || !ok || version < metadataV4 {
		return nil, malformed("a message's metadata is damaged or older than version 4")
	}
	msg.header = header
	msg.body, err = s.next(length, &s.bodyBuf, "a message's body")
	return msg, err
}

// end makes sure that nothing follows the end marker.
func (s *stream) end() error {
	if s.r == nil {
		if len(s.data) > 0 {
			return malformed("bytes follow the end of the stream")
		}
		return nil
	}
	var one [1]byte
	switch _, err := io.ReadFull(s.r, one[:]); {
	case err == nil:
		return malformed("bytes follow the end of the stream")
	case errors.Is(err, io.EOF):
		return nil
	default:
		return readError(err)
	}
}

// records is a record batch message whose nodes and buffers are taken in order.
type records struct {
	s             *stream
	m             *meta
	body          []byte
	length        int64
	nodes, nNodes int
	bufs, nBufs   int
	codec         int // -1: none
}

func (s *stream) records(t table, body []byte) (*records, error) {
	r := &records{s: s, m: t.m, body: body, length: t.int64(0), codec: -1}
	r.nodes, r.nNodes = t.vector(1, 16)
	r.bufs, r.nBufs = t.vector(2, 16)
	if c, ok := t.child(3); ok {
		r.codec = c.byte(0)
		if r.codec != codecLZ4 && r.codec != codecZSTD || c.byte(1) != 0 {
			return nil, malformed("unknown compression %d", r.codec)
		}
	}
	if t.m.bad || r.length < 0 {
		return nil, malformed("a record batch's metadata is damaged")
	}
	return r, nil
}

// node takes the next field node.
func (r *records) node() (length, nulls int64, err error) {
	if r.nNodes == 0 {
		return 0, 0, malformed("a record batch has fewer arrays than its schema")
	}
	length, nulls = r.m.i64(r.nodes), r.m.i64(r.nodes+8)
	r.nodes += 16
	r.nNodes--
	if length < 0 || nulls < 0 || nulls > length {
		return 0, 0, malformed("an array of %d values with %d nulls", length, nulls)
	}
	return length, nulls, nil
}

// skip passes over a buffer that nobody needs.
func (r *records) skip() error {
	if r.nBufs == 0 {
		return malformed("a record batch has fewer buffers than its schema")
	}
	r.bufs += 16
	r.nBufs--
	return nil
}

// buffer takes the next buffer, decompressed.
func (r *records) buffer() ([]byte, error) {
	at := r.bufs
	if err := r.skip(); err != nil {
		return nil, err
	}
	off, n := r.m.i64(at), r.m.i64(at+8)
	if off < 0 || n < 0 || off > int64(len(r.body)) || n > int64(len(r.body))-off {
		return nil, malformed("a buffer of %d bytes at %d in a body of %d", n, off, len(r.body))
	}
	raw := r.body[off : off+n]
	if r.codec < 0 || n == 0 {
		return raw, nil
	}
	if n < 8 {
		return nil, malformed("a compressed buffer of %d bytes", n)
	}
	size := int64(binary.LittleEndian.Uint64(raw))
	raw = raw[8:]
	if size == -1 {
		return raw, nil // the writer left it as it was
	}
	if size < 0 {
		return nil, malformed("a compressed buffer that inflates to %d bytes", size)
	}
	if size > r.s.limit-r.s.inflated {
		return nil, tooLarge("the decompressed data", r.s.limit)
	}
	r.s.inflated += size
	if size == 0 {
		return nil, nil
	}
	return inflate(r.codec, raw, int(size))
}

// zstdDecoder serves all decoders. It never writes past the capacity it is given
// and needs no window of its own: the output is the window.
var zstdDecoder = sync.OnceValues(func() (*zstd.Decoder, error) {
	return zstd.NewReader(nil, zstd.WithDecodeAllCapLimit(true))
})

// inflate decompresses raw, which must give exactly size bytes. Neither codec
// can exceed 256 to 1 by much more than a block, so a small body cannot claim a
// large buffer: zstd's bound is a 128 KiB block in 4 bytes, LZ4's a run of 255 a byte.
func inflate(codec int, raw []byte, size int) ([]byte, error) {
	const perByte = 1 << 15
	if int64(size) > perByte*int64(len(raw)) {
		return nil, malformed("%d compressed bytes claim to hold %d", len(raw), size)
	}
	out := make([]byte, 0, size)
	if codec == codecZSTD {
		d, err := zstdDecoder()
		if err != nil {
			return nil, fault.New(fault.Internal, "zstd", "start zstd decoder: %w", err)
		}
		out, err = d.DecodeAll(raw, out)
		if err != nil || len(out) != size {
			return nil, malformed("a zstd buffer does not hold the %d bytes it claims: %w", size, orShort(err))
		}
		return out, nil
	}
	r := lz4.NewReader(bytes.NewReader(raw))
	out = out[:size]
	var more [1]byte
	if _, err := io.ReadFull(r, out); err != nil {
		return nil, malformed("an lz4 buffer does not hold the %d bytes it claims: %w", size, err)
	}
	if n, err := r.Read(more[:]); n != 0 || !errors.Is(err, io.EOF) {
		return nil, malformed("an lz4 buffer holds more than the %d bytes it claims", size)
	}
	return out, nil
}

func orShort(err error) error {
	if err == nil {
		return io.ErrUnexpectedEOF
	}
	return err
}

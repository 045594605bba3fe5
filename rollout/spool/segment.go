package spool

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math"
	"strconv"
	"strings"

	"trainerd/internal/fault"
)

// A segment is a header and frames. All integers are little-endian, all sums
// CRC-32C.
//
//	header  magic[8]  version u32  first u64  salt u64  sum u32 (of what precedes)
//	frame   length u64  count u32  first u64  payload sum u32  sum u32 (of salt and what precedes)  payload[length]
//	payload count times: kind u32  key u32  meta u32  body u64 (lengths)  kind  key  meta  body
//
// Spaces at the end of a meta are no part of it: they may be there to let the body
// begin where a block of the file does.
//
// The salt is drawn per segment and keeps bytes that a client sent from passing
// for a frame when a damaged segment is searched.
const (
	magic       = "trdspool"
	version     = 1
	headerSize  = 32
	frameSize   = 28
	recordSize  = 20
	suffix      = ".seg"
	maxKey      = 1 << 16 // of Kind and Key
	maxRecord   = 1 << 40
	scanBuffer  = 1 << 20
	groupTarget = 64 << 20 // bytes of a frame past which no record joins it
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func segmentName(first uint64) string { return fmt.Sprintf("%020d%s", first, suffix) }

func parseName(name string) (first uint64, ok bool) {
	digits, ok := strings.CutSuffix(name, suffix)
	if !ok || len(digits) != 20 {
		return 0, false
	}
	first, err := strconv.ParseUint(digits, 10, 64)
	return first, err == nil && first > 0
}

func corrupt(name string, offset int64, format string, args ...any) error {
	return fault.New(fault.Internal, "spool_corrupt", "read spool segment %s at offset %d: %w", name, offset, fmt.Errorf(format, args...))
}

func encodeHeader(first, salt uint64) []byte {
	b := append(make([]byte, 0, headerSize), magic...)
	b = binary.LittleEndian.AppendUint32(b, version)
	b = binary.LittleEndian.AppendUint64(b, first)
	b = binary.LittleEndian.AppendUint64(b, salt)
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

// readHeader returns the salt of a segment.
func readHeader(f file, name string, first uint64) (salt uint64, err error) {
	b := make([]byte, headerSize)
	if _, err := f.ReadAt(b, 0); err != nil {
		return 0, corrupt(name, 0, "no whole header: %w", err)
	}
	body := b[:headerSize-4]
	if string(b[:8]) != magic || crc32.Checksum(body, castagnoli) != binary.LittleEndian.Uint32(b[headerSize-4:]) {
		return 0, corrupt(name, 0, "the header is damaged")
	}
	if v := binary.LittleEndian.Uint32(b[8:]); v != version {
		return 0, corrupt(name, 8, "version %d, expected %d", v, version)
	}
	if got := binary.LittleEndian.Uint64(b[12:]); got != first {
		return 0, corrupt(name, 12, "the segment begins at record %d, expected %d", got, first)
	}
	return binary.LittleEndian.Uint64(b[20:]), nil
}

// frame is what appends wrote together.
type frame struct {
	length  int64
	count   uint32
	first   uint64
	payload uint32 // sum
}

func (h frame) last() uint64 { return h.first + uint64(h.count) - 1 }

func (h frame) encode(salt uint64) []byte {
	b := make([]byte, 0, frameSize)
	b = binary.LittleEndian.AppendUint64(b, uint64(h.length))
	b = binary.LittleEndian.AppendUint32(b, h.count)
	b = binary.LittleEndian.AppendUint64(b, h.first)
	b = binary.LittleEndian.AppendUint32(b, h.payload)
	return binary.LittleEndian.AppendUint32(b, frameSum(b, salt))
}

func frameSum(b []byte, salt uint64) uint32 {
	var s [8]byte
	binary.LittleEndian.PutUint64(s[:], salt)
	return crc32.Update(crc32.Checksum(s[:], castagnoli), castagnoli, b)
}

// decodeFrame reads a frame's head; ok is false when it is damaged.
func decodeFrame(b []byte, salt uint64) (h frame, ok bool) {
	length := binary.LittleEndian.Uint64(b)
	h = frame{int64(length), binary.LittleEndian.Uint32(b[8:]), binary.LittleEndian.Uint64(b[12:]), binary.LittleEndian.Uint32(b[20:])}
	return h, length <= math.MaxInt64/2 && h.count > 0 && frameSum(b[:frameSize-4], salt) == binary.LittleEndian.Uint32(b[frameSize-4:])
}

// errTorn says that no whole frame lies where one was looked for.
var errTorn = errors.New("no whole frame")

// frameAt reads the head of the frame at an offset of a segment of size bytes.
// io.EOF is a segment that ends there.
func frameAt(f file, at, size int64, salt uint64) (h frame, err error) {
	if at == size {
		return h, io.EOF
	}
	if size-at < frameSize {
		return h, errTorn
	}
	var b [frameSize]byte
	if _, err := f.ReadAt(b[:], at); err != nil {
		return h, err
	}
	h, ok := decodeFrame(b[:], salt)
	if !ok || h.length > size-at-frameSize {
		return h, errTorn
	}
	return h, nil
}

// sumAt is the sum of the payload of a frame, read in pieces.
func sumAt(f file, at, length int64) (uint32, error) {
	sum := crc32.New(castagnoli)
	_, err := io.CopyBuffer(sum, io.NewSectionReader(f, at+frameSize, length), make([]byte, min(length, scanBuffer)+1))
	return sum.Sum32(), err
}

// recoverTail finds the end of the last segment: after its last whole frame. What
// follows is a torn tail and may be cut, unless a whole frame lies in it: then
// the damage is in what was once synced.
func recoverTail(f file, name string, first uint64, size int64, salt uint64) (end int64, last uint64, err error) {
	at, next := int64(headerSize), first
	for {
		h, err := frameAt(f, at, size, salt)
		if err == nil {
			var sum uint32
			if sum, err = sumAt(f, at, h.length); err == nil && sum != h.payload {
				err = errTorn
			}
		}
		switch {
		case errors.Is(err, errTorn):
			later, err := findFrame(f, at+1, size, salt)
			if err != nil {
				return 0, 0, err
			}
			if later >= 0 {
				return 0, 0, corrupt(name, at, "a damaged frame, although a whole one follows at %d", later)
			}
			return at, next - 1, nil
		case errors.Is(err, io.EOF) && at == size:
			return at, next - 1, nil
		case err != nil:
			return 0, 0, fault.New(fault.Internal, "spool_read", "read spool segment %s at offset %d: %w", name, at, err)
		case h.first != next:
			return 0, 0, corrupt(name, at, "the frame begins at record %d, expected %d", h.first, next)
		}
		at += frameSize + h.length
		next += uint64(h.count)
	}
}

// findFrame looks for a whole frame at any offset from at on; -1 when there is none.
func findFrame(f file, at, size int64, salt uint64) (int64, error) {
	buf := make([]byte, min(size-at, scanBuffer))
	for at+frameSize <= size {
		b := buf[:min(size-at, int64(len(buf)))]
		if _, err := f.ReadAt(b, at); err != nil {
			return 0, fmt.Errorf("search for frames: %w", err)
		}
		for i := 0; i+frameSize <= len(b); i++ {
			h, ok := decodeFrame(b[i:], salt)
			if !ok || h.length > size-at-int64(i)-frameSize {
				continue
			}
			sum, err := sumAt(f, at+int64(i), h.length)
			if err != nil {
				return 0, fmt.Errorf("search for frames: %w", err)
			}
			if sum == h.payload {
				return at + int64(i), nil
			}
		}
		at += int64(len(b) - frameSize + 1)
	}
	return -1, nil
}

// encodeHead is a record without its body, its meta followed by so many spaces.
func encodeHead(r *Record, spaces int) []byte {
	b := make([]byte, 0, recordSize+len(r.Kind)+len(r.Key)+len(r.Meta)+spaces)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(r.Kind)))
	b = binary.LittleEndian.AppendUint32(b, uint32(len(r.Key)))
	b = binary.LittleEndian.AppendUint32(b, uint32(len(r.Meta)+spaces))
	b = binary.LittleEndian.AppendUint64(b, uint64(len(r.Body)))
	b = append(b, r.Kind...)
	b = append(b, r.Key...)
	b = append(b, r.Meta...)
	return append(b, bytes.Repeat([]byte{' '}, spaces)...)
}

// decodeRecord takes the next record of a payload. Its slices lie in the payload.
func decodeRecord(p []byte) (r Record, rest []byte, err error) {
	if len(p) < recordSize {
		return r, nil, io.ErrUnexpectedEOF
	}
	lengths := [4]uint64{uint64(binary.LittleEndian.Uint32(p)), uint64(binary.LittleEndian.Uint32(p[4:])),
		uint64(binary.LittleEndian.Uint32(p[8:])), binary.LittleEndian.Uint64(p[12:])}
	p = p[recordSize:]
	var parts [4][]byte
	for i, n := range lengths {
		if n > uint64(len(p)) {
			return r, nil, io.ErrUnexpectedEOF
		}
		parts[i], p = p[:n:n], p[n:]
	}
	return Record{Kind: string(parts[0]), Key: string(parts[1]), Meta: bytes.TrimRight(parts[2], " "), Body: parts[3]}, p, nil
}

// readFrame calls f for the records of the frame at an offset, from seq on.
func readFrame(in file, name string, at int64, h frame, seq uint64, f func(Record) error) error {
	payload := make([]byte, h.length)
	if _, err := in.ReadAt(payload, at+frameSize); err != nil {
		return fault.New(fault.Internal, "spool_read", "read spool segment %s at offset %d: %w", name, at, err)
	}
	if crc32.Checksum(payload, castagnoli) != h.payload {
		return corrupt(name, at, "the payload's sum is wrong")
	}
	rest := payload
	for i := range uint64(h.count) {
		r, next, err := decodeRecord(rest)
		if err != nil {
			return corrupt(name, at, "record %d: %w", h.first+i, err)
		}
		rest = next
		if r.Seq = h.first + i; r.Seq < seq {
			continue
		}
		if err := f(r); err != nil {
			return err
		}
	}
	if len(rest) > 0 {
		return corrupt(name, at, "%d bytes after the last record", len(rest))
	}
	return nil
}

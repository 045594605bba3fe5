package arrowio

import (
	"encoding/binary"
	"math"
)

// meta reads the flatbuffer of one message. An offset that leads outside the
// bytes sets bad and reads as zero, so that a parse may run to its end and ask
// once. Offsets of flatbuffers only point forward; callers bound depth and count.
type meta struct {
	b   []byte
	bad bool
}

// table is a flatbuffer table at pos; the zero table has no fields.
type table struct {
	m                 *meta
	pos, vtable, size int
}

func (m *meta) bytes(pos, n int) []byte {
	if pos < 0 || n < 0 || pos > len(m.b) || n > len(m.b)-pos {
		m.bad = true
		return nil
	}
	return m.b[pos : pos+n]
}

func (m *meta) u16(pos int) int {
	if b := m.bytes(pos, 2); b != nil {
		return int(binary.LittleEndian.Uint16(b))
	}
	return 0
}

func (m *meta) u32(pos int) int {
	if b := m.bytes(pos, 4); b != nil {
		return int(binary.LittleEndian.Uint32(b))
	}
	return 0
}

func (m *meta) i64(pos int) int64 {
	if b := m.bytes(pos, 8); b != nil {
		return int64(binary.LittleEndian.Uint64(b))
	}
	return 0
}

// root is the table that the first word of the buffer points to.
func (m *meta) root() table { return m.table(0) }

// table follows the offset at pos.
func (m *meta) table(pos int) table {
	p := pos + m.u32(pos)
	b := m.bytes(p, 4)
	if b == nil {
		return table{m: m}
	}
	v := p - int(int32(binary.LittleEndian.Uint32(b)))
	size := m.u16(v)
	if size < 4 || m.bytes(v, size) == nil {
		m.bad = true
		return table{m: m}
	}
	return table{m: m, pos: p, vtable: v, size: size}
}

// at is where field i of the table lies; ok is false when it has its default.
func (t table) at(i int) (pos int, ok bool) {
	slot := 4 + 2*i
	if t.size < slot+2 {
		return 0, false
	}
	o := t.m.u16(t.vtable + slot)
	return t.pos + o, o != 0
}

func (t table) byte(i int) int {
	if pos, ok := t.at(i); ok {
		if b := t.m.bytes(pos, 1); b != nil {
			return int(b[0])
		}
	}
	return 0
}

func (t table) int16(i int) int {
	if pos, ok := t.at(i); ok {
		return int(int16(t.m.u16(pos)))
	}
	return 0
}

func (t table) int32(i int) int {
	if pos, ok := t.at(i); ok {
		return int(int32(t.m.u32(pos)))
	}
	return 0
}

func (t table) int64(i int) int64 {
	if pos, ok := t.at(i); ok {
		return t.m.i64(pos)
	}
	return 0
}

func (t table) child(i int) (table, bool) {
	if pos, ok := t.at(i); ok {
		return t.m.table(pos), true
	}
	return table{m: t.m}, false
}

// vector is where the n elements of size bytes of a vector field begin.
func (t table) vector(i, size int) (pos, n int) {
	at, ok := t.at(i)
	if !ok {
		return 0, 0
	}
	at += t.m.u32(at)
	n = t.m.u32(at)
	if n > math.MaxInt32 || t.m.bytes(at+4, n*size) == nil {
		t.m.bad = true
		return 0, 0
	}
	return at + 4, n
}

func (t table) text(i int) string {
	pos, n := t.vector(i, 1)
	return string(t.m.bytes(pos, n))
}

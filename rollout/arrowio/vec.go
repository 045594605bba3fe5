package arrowio

import (
	"encoding/binary"
	"math"
)

// vec is a column of one record batch, or the values of its lists. Its bytes
// belong to the stream and are gone with the next message. load has checked that
// every value and every list lies inside them.
type vec struct {
	typ     *dtype
	n       int
	valid   []byte // bitmap; nil: no nulls
	offsets []byte // n+1 of 4 or 8 bytes, of lists and text
	data    []byte
	child   *vec // of lists
	inBody  bool // data lies in the message's body as it was sent
	body    int  // bytes of that body
	dict    *dictionary
}

// dictionary is the text that indices point to. It owns its bytes.
type dictionary struct {
	values [][]byte
	null   []bool
}

// load reads the next array of a record batch.
func (r *records) load(t *dtype) (*vec, error) {
	length, nulls, err := r.node()
	if err != nil {
		return nil, err
	}
	a := &vec{typ: t}
	if nulls == 0 {
		err = r.skip()
	} else {
		a.valid, err = r.buffer()
		if err == nil && length > 8*int64(len(a.valid)) {
			err = malformed("a validity bitmap of %d bytes for %d values", len(a.valid), length)
		}
	}
	if err != nil {
		return nil, err
	}
	switch {
	case t.dict:
		if a.dict = r.s.dicts[t.dictID]; a.dict == nil && length > 0 {
			return nil, malformed("a column refers to dictionary %d, which did not come before it", t.dictID)
		}
		return a, r.fixed(a, length, t.index.bits)
	case t.class == intClass || t.class == floatClass:
		return a, r.fixed(a, length, t.bits)
	case t.class == boolClass:
		return a, r.fixed(a, length, 1)
	case t.class == textClass:
		if a.offsets, err = r.buffer(); err != nil {
			return nil, err
		}
		if a.data, err = r.buffer(); err != nil {
			return nil, err
		}
		return a, a.bound(length, int64(len(a.data)))
	case t.class == listClass:
		if t.fixed < 0 {
			if a.offsets, err = r.buffer(); err != nil {
				return nil, err
			}
		}
		if a.child, err = r.load(t.elem); err != nil {
			return nil, err
		}
		return a, a.bound(length, int64(a.child.n))
	}
	return nil, malformed("a column of type %s", t.name)
}

// fixed takes the data of n values of bits each.
func (r *records) fixed(a *vec, n int64, bits int) (err error) {
	if a.data, err = r.buffer(); err != nil {
		return err
	}
	a.inBody, a.body = r.codec < 0, len(r.body)
	if n > 8*int64(len(a.data))/int64(bits) {
		return malformed("%d bytes for %d values of %s", len(a.data), n, a.typ.name)
	}
	a.n = int(n)
	return nil
}

// bound checks that n spans lie in order inside [0, end).
func (a *vec) bound(n, end int64) error {
	if a.typ.fixed >= 0 {
		// n is not bounded by any bytes when lists are empty: rows are, by Limits.
		if size := int64(a.typ.fixed); size > 0 && n > end/size || n > math.MaxInt32 {
			return malformed("%d lists of %d values in %d values", n, size, end)
		}
		a.n = int(n)
		return nil
	}
	width := int64(4)
	if a.typ.large {
		width = 8
	}
	if n == 0 {
		return nil
	}
	if n >= int64(len(a.offsets))/width {
		return malformed("%d bytes of offsets for %d values", len(a.offsets), n)
	}
	a.n = int(n)
	before := int64(0)
	for i := range a.n + 1 {
		at := a.offset(i)
		if at < before || at > end {
			return malformed("offset %d of a %s column is %d, outside [%d, %d]", i, a.typ.name, at, before, end)
		}
		before = at
	}
	return nil
}

func (a *vec) offset(i int) int64 {
	if a.typ.large {
		return int64(binary.LittleEndian.Uint64(a.offsets[8*i:]))
	}
	return int64(int32(binary.LittleEndian.Uint32(a.offsets[4*i:])))
}

func (a *vec) null(i int) bool { return a.valid != nil && a.valid[i>>3]>>(i&7)&1 == 0 }

// span is where the values of list or text i lie.
func (a *vec) span(i int) (lo, hi int) {
	if a.typ.fixed >= 0 {
		return i * a.typ.fixed, (i + 1) * a.typ.fixed
	}
	return int(a.offset(i)), int(a.offset(i + 1))
}

// raw is the bytes of values [lo, hi).
func (a *vec) raw(lo, hi int) []byte {
	w := a.typ.bits / 8
	return a.data[lo*w : hi*w]
}

// text is value i of a text column; null has been asked before.
func (a *vec) text(i int) (b []byte, null bool, err error) {
	if a.dict == nil {
		lo, hi := a.span(i)
		return a.data[lo:hi], false, nil
	}
	k := integer(a.data, a.typ.index, i)
	if k < 0 || k >= int64(len(a.dict.values)) {
		return nil, false, malformed("index %d into a dictionary of %d values", k, len(a.dict.values))
	}
	return a.dict.values[k], a.dict.null[k], nil
}

func (a *vec) bool(i int) bool { return a.data[i>>3]>>(i&7)&1 != 0 }

func (a *vec) int(i int) int64 { return integer(a.data, a.typ, i) }

// integer is value i; a uint64 over the greatest int64 reads as negative.
func integer(data []byte, t *dtype, i int) int64 {
	switch t.bits {
	case 8:
		if t.signed {
			return int64(int8(data[i]))
		}
		return int64(data[i])
	case 16:
		v := binary.LittleEndian.Uint16(data[2*i:])
		if t.signed {
			return int64(int16(v))
		}
		return int64(v)
	case 32:
		v := binary.LittleEndian.Uint32(data[4*i:])
		if t.signed {
			return int64(int32(v))
		}
		return int64(v)
	default:
		return int64(binary.LittleEndian.Uint64(data[8*i:]))
	}
}

func (a *vec) float(i int) float64 {
	switch a.typ.bits {
	case 16:
		return half(binary.LittleEndian.Uint16(a.data[2*i:]))
	case 32:
		return float64(math.Float32frombits(binary.LittleEndian.Uint32(a.data[4*i:])))
	default:
		return math.Float64frombits(binary.LittleEndian.Uint64(a.data[8*i:]))
	}
}

// half is the value of an IEEE 754 binary16.
func half(v uint16) float64 {
	exponent, fraction := int(v>>10&31), float64(v&1023)
	var x float64
	switch exponent {
	case 0:
		x = math.Ldexp(fraction, -24)
	case 31:
		x = math.Inf(1)
		if fraction != 0 {
			x = math.NaN()
		}
	default:
		x = math.Ldexp(1024+fraction, exponent-25)
	}
	if v>>15 != 0 {
		return -x
	}
	return x
}

// tokens copies values [lo, lo+len(dst)) and returns the first place whose value
// is outside [0, vocab), or -1.
func (a *vec) tokens(dst []int32, lo int, vocab int) int {
	if a.typ.bits == 32 && littleEndian && vocab >= 1 && vocab <= math.MaxInt32 {
		if raw := a.raw(lo, lo+len(dst)); tokensFit(raw, vocab) {
			copyNumbers(dst, raw)
			return -1
		}
	}
	for i := range dst {
		v := a.int(lo + i)
		if v < 0 || v >= int64(vocab) || v > math.MaxInt32 {
			return i
		}
		dst[i] = int32(v)
	}
	return -1
}

// logProbs copies values [lo, lo+len(dst)) if all are there, finite and at most
// maxLogProb; false when one is not, or when the column is not of float32.
func (a *vec) logProbs(dst []float32, lo int) bool {
	if a.typ.bits != 32 || a.valid != nil || !littleEndian {
		return false
	}
	raw := a.raw(lo, lo+len(dst))
	if !logProbsFit(raw) {
		return false
	}
	copyNumbers(dst, raw)
	return true
}

// readDictionary reads a dictionary batch. typ is the type of the column that uses it.
func (s *stream) readDictionary(t table, body []byte, typ func(id int64) *dtype) error {
	id := t.int64(0)
	column := typ(id)
	data, ok := t.child(1)
	if column == nil || !ok {
		return malformed("a dictionary %d that no column uses", id)
	}
	r, err := s.records(data, body)
	if err != nil {
		return err
	}
	plain := *column
	plain.dict = false
	a, err := r.load(&plain)
	if err != nil {
		return err
	}
	old := s.dicts[id]
	d := &dictionary{}
	if t.byte(2) != 0 && old != nil { // a delta appends
		d = old
	}
	// Many values may share bytes: what is kept is bounded by the bytes there are.
	own := append([]byte(nil), a.data...)
	for i := range a.n {
		lo, hi := a.span(i)
		d.values = append(d.values, own[lo:hi:hi])
		d.null = append(d.null, a.null(i))
	}
	s.dicts[id] = d
	return nil
}

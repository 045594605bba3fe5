package gguf

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"unicode/utf8"

	"trainerd/internal/fault"
)

// Limits of a header. The largest known vocabularies (about 260k tokens and as
// many merges) stay well below them.
const (
	maxHeaderBytes = 64 << 20 // all of the header, strings included
	maxElements    = 4 << 20  // array elements of all keys together
	maxKeys        = 1 << 16
	maxTensors     = 1 << 16
	maxKeyBytes    = 1 << 16 // the format's own limit
	maxNameBytes   = 256     // of a tensor; ggml's own limit is 64
	maxStringBytes = 1 << 20 // a chat template, a token
	maxDims        = 4
	maxDim         = 1 << 40
	maxAlignment   = 1 << 20
)

// Value types of the metadata, as numbered by the format.
const (
	typeUint8 = iota
	typeInt8
	typeUint16
	typeInt16
	typeUint32
	typeInt32
	typeFloat32
	typeBool
	typeString
	typeArray
	typeUint64
	typeInt64
	typeFloat64
)

// minSize is the fewest bytes a value of each type takes in the file; array is 0: nesting is refused.
var minSize = [...]int64{1, 1, 2, 2, 4, 4, 4, 1, 8, 0, 8, 8, 8}

// header is a decoded GGUF header. Values of meta are int64, float64, bool,
// string, or a slice of one of them.
type header struct {
	version   uint32
	meta      map[string]any
	tensors   []tensorInfo // in file order
	dataStart int64        // bytes
}

// tensorInfo places one tensor. Dims are ggml's: fastest first.
type tensorInfo struct {
	name     string
	dims     []int64
	kind     uint32
	offset   int64 // bytes from dataStart
	elements int64
	bytes    int64
}

// shape returns the row-major shape, slowest dimension first.
func (t tensorInfo) shape() []int {
	s := make([]int, len(t.dims))
	for i, d := range t.dims {
		s[len(s)-1-i] = int(d)
	}
	return s
}

// malformed is a fault about bytes that are no GGUF; what names the key, tensor or part.
func malformed(what string, got any, expected string) *fault.Error {
	return &fault.Error{Kind: fault.Malformed, Code: "bad_gguf",
		Fields: []fault.Field{{Name: what, Row: -1, Got: fmt.Sprint(got), Expected: expected}}}
}

// tooLarge is a fault about a count or length over its limit.
func tooLarge(what string, got any, limit int64) *fault.Error {
	e := malformed(what, got, fmt.Sprintf("at most %d", limit))
	e.Kind, e.Code = fault.TooLarge, "gguf_limit"
	return e
}

// unsupported is a fault about a sound file that asks for something not built.
func unsupported(what string, got any, expected string) *fault.Error {
	e := malformed(what, got, expected)
	e.Kind, e.Code = fault.Invalid, "unsupported_gguf"
	return e
}

// decodeHeader reads a header from the start of a file of size bytes.
func decodeHeader(r io.Reader, size int64) (*header, error) {
	d := &decoder{r: bufio.NewReaderSize(r, 1<<16), size: size, at: "header"}
	h := &header{meta: map[string]any{}}
	if magic := d.bytes(4); d.err == nil && string(magic) != "GGUF" {
		return nil, malformed("magic", fmt.Sprintf("%q", magic), `"GGUF"`)
	}
	h.version = d.u32()
	if d.err == nil && h.version != 2 && h.version != 3 {
		if v := h.version; v == 2<<24 || v == 3<<24 {
			return nil, unsupported("version", "a big-endian file", "little-endian")
		}
		return nil, unsupported("version", h.version, "2 or 3")
	}
	tensors := d.count("tensor count", maxTensors, 24)
	keys := d.count("key count", maxKeys, 13)
	for i := int64(0); i < keys && d.err == nil; i++ {
		d.at = fmt.Sprintf("key %d", i)
		key := d.str(maxKeyBytes)
		if d.err != nil {
			break
		}
		d.at = "key " + quoted(key)
		if _, twice := h.meta[key]; twice {
			return nil, malformed(d.at, "twice", "each key once")
		}
		h.meta[key] = d.value(d.u32())
	}
	seen := map[string]bool{}
	for i := int64(0); i < tensors && d.err == nil; i++ {
		d.at = fmt.Sprintf("tensor %d", i)
		t := d.tensor()
		if d.err == nil && seen[t.name] {
			return nil, malformed(d.at, "twice", "each tensor once")
		}
		seen[t.name] = true
		h.tensors = append(h.tensors, t)
	}
	if d.err != nil {
		return nil, d.err
	}
	return h, h.place(d.n, size)
}

// place computes where the data starts and checks that every tensor lies in the file.
func (h *header) place(headerBytes, size int64) error {
	align := int64(32)
	if v, ok := h.meta["general.alignment"]; ok {
		a, isInt := v.(int64)
		if !isInt || a < 8 || a > maxAlignment || a&(a-1) != 0 {
			return malformed(`key "general.alignment"`, v, "a power of two from 8 to 1048576")
		}
		align = a
	}
	h.dataStart = (headerBytes + align - 1) / align * align
	for _, t := range h.tensors {
		at := "tensor " + quoted(t.name)
		if t.offset%align != 0 {
			return malformed(at, fmt.Sprintf("offset %d", t.offset), fmt.Sprintf("a multiple of %d", align))
		}
		// Offset and bytes are each below 2^62, so the sum does not overflow.
		if end := t.offset + t.bytes; t.offset > size || end > size-h.dataStart {
			return malformed(at, fmt.Sprintf("data up to byte %d of the data section", end),
				fmt.Sprintf("at most %d (is the file truncated?)", max(0, size-h.dataStart)))
		}
	}
	return nil
}

// decoder reads little-endian values, keeps the first error and counts what it
// consumed. After an error every method returns zero values.
type decoder struct {
	r        *bufio.Reader
	n        int64 // bytes consumed
	size     int64 // of the file
	elements int64 // array elements so far
	at       string
	err      error
	scratch  [8]byte
}

func (d *decoder) fail(err error) {
	if d.err == nil {
		d.err = err
	}
}

// left is how many more bytes the header may take.
func (d *decoder) left() int64 { return min(d.size, maxHeaderBytes) - d.n }

// take reserves n bytes of the header budget, before they are read.
func (d *decoder) take(n int64) bool {
	if d.err != nil {
		return false
	}
	if n > d.left() {
		if d.n+n > d.size {
			d.fail(malformed(d.at, "the end of the file", fmt.Sprintf("%d more bytes", n)))
		} else {
			d.fail(tooLarge(d.at, fmt.Sprintf("a header of over %d bytes", d.n+n), maxHeaderBytes))
		}
		return false
	}
	d.n += n
	return true
}

func (d *decoder) bytes(n int) []byte {
	b := d.scratch[:]
	if n > len(b) {
		b = make([]byte, n)
	}
	b = b[:n]
	clear(b)
	if !d.take(int64(n)) {
		return b
	}
	if _, err := io.ReadFull(d.r, b); err != nil {
		d.fail(fault.New(fault.Malformed, "bad_gguf", "%s: %w", d.at, err))
	}
	return b
}

func (d *decoder) u32() uint32 { return binary.LittleEndian.Uint32(d.bytes(4)) }
func (d *decoder) u64() uint64 { return binary.LittleEndian.Uint64(d.bytes(8)) }

// count reads a u64 count of things of at least each bytes and holds it to limit and file size.
func (d *decoder) count(what string, limit, each int64) int64 {
	n := d.u64()
	switch {
	case d.err != nil:
		return 0
	case n > uint64(limit):
		d.fail(tooLarge(what, n, limit))
		return 0
	case int64(n)*each > d.size-d.n:
		d.fail(malformed(what, n, fmt.Sprintf("at most %d in the %d bytes that follow", (d.size-d.n)/each, d.size-d.n)))
		return 0
	}
	return int64(n)
}

func (d *decoder) str(limit int64) string {
	n := d.count(d.at+" (string length)", limit, 1)
	if d.err != nil || n == 0 {
		return ""
	}
	b := make([]byte, n)
	if !d.take(n) {
		return ""
	}
	if _, err := io.ReadFull(d.r, b); err != nil {
		d.fail(fault.New(fault.Malformed, "bad_gguf", "%s: %w", d.at, err))
		return ""
	}
	return string(b)
}

func (d *decoder) value(kind uint32) any {
	switch {
	case d.err != nil:
		return nil
	case kind == typeArray:
		return d.array()
	case kind >= uint32(len(minSize)):
		d.fail(malformed(d.at, fmt.Sprintf("value type %d", kind), "0 to 12"))
		return nil
	case kind == typeString:
		return d.str(maxStringBytes)
	case kind == typeBool:
		return d.boolean()
	case kind == typeFloat32 || kind == typeFloat64:
		return d.float(kind)
	default:
		return d.integer(kind)
	}
}

func (d *decoder) boolean() bool {
	b := d.bytes(1)[0]
	if b > 1 {
		d.fail(malformed(d.at, fmt.Sprintf("bool %d", b), "0 or 1"))
	}
	return b == 1
}

func (d *decoder) float(kind uint32) float64 {
	if kind == typeFloat32 {
		return float64(math.Float32frombits(d.u32()))
	}
	return math.Float64frombits(d.u64())
}

func (d *decoder) integer(kind uint32) int64 {
	switch kind {
	case typeUint8:
		return int64(d.bytes(1)[0])
	case typeInt8:
		return int64(int8(d.bytes(1)[0]))
	case typeUint16:
		return int64(binary.LittleEndian.Uint16(d.bytes(2)))
	case typeInt16:
		return int64(int16(binary.LittleEndian.Uint16(d.bytes(2))))
	case typeUint32:
		return int64(d.u32())
	case typeInt32:
		return int64(int32(d.u32()))
	}
	v := d.u64()
	if kind == typeUint64 && v > math.MaxInt64 {
		d.fail(tooLarge(d.at, v, math.MaxInt64))
		return 0
	}
	return int64(v)
}

func (d *decoder) array() any {
	kind := d.u32()
	if d.err == nil && (kind == typeArray || kind >= uint32(len(minSize))) {
		d.fail(unsupported(d.at, fmt.Sprintf("an array of value type %d", kind), "an array of scalars or strings"))
	}
	if d.err != nil {
		return nil
	}
	n := d.count(d.at+" (array length)", maxElements, minSize[kind])
	if d.elements += n; d.elements > maxElements {
		d.fail(tooLarge(d.at, fmt.Sprintf("%d array elements", d.elements), maxElements))
	}
	switch kind {
	case typeString:
		return readArray(d, n, func() string { return d.str(maxStringBytes) })
	case typeBool:
		return readArray(d, n, d.boolean)
	case typeFloat32, typeFloat64:
		return readArray(d, n, func() float64 { return d.float(kind) })
	}
	return readArray(d, n, func() int64 { return d.integer(kind) })
}

func readArray[E any](d *decoder, n int64, one func() E) []E {
	if d.err != nil {
		return nil
	}
	out := make([]E, 0, n)
	for range n {
		out = append(out, one())
		if d.err != nil {
			return nil
		}
	}
	return out
}

func (d *decoder) tensor() tensorInfo {
	t := tensorInfo{name: d.str(maxNameBytes)}
	if d.err != nil {
		return t
	}
	d.at = "tensor " + quoted(t.name)
	n := d.u32()
	if d.err == nil && (n == 0 || n > maxDims) {
		d.fail(malformed(d.at, fmt.Sprintf("%d dimensions", n), "1 to 4"))
	}
	if d.err != nil {
		return t
	}
	t.elements = 1
	for range n {
		v := d.u64()
		if d.err == nil && (v == 0 || v > maxDim) {
			d.fail(malformed(d.at, fmt.Sprintf("dimension %d", v), "1 to 2^40"))
		}
		if d.err != nil {
			return t
		}
		// Divide instead of multiplying: the product must not overflow.
		if t.elements > math.MaxInt64/8/int64(v) {
			d.fail(tooLarge(d.at, "a product of dimensions over 2^60", d.size))
			return t
		}
		t.elements *= int64(v)
		t.dims = append(t.dims, int64(v))
	}
	t.kind = d.u32()
	offset := d.u64()
	if d.err != nil {
		return t
	}
	f, ok := formats[t.kind]
	if !ok {
		d.fail(unsupported(d.at, "type "+typeName(t.kind), "F32, F16, BF16, Q8_0, Q4_0 or Q4_1"))
		return t
	}
	if t.dims[0]%f.block != 0 {
		d.fail(malformed(d.at, fmt.Sprintf("rows of %d elements", t.dims[0]), fmt.Sprintf("a multiple of %d, the block of %s", f.block, f.name)))
		return t
	}
	t.bytes = t.elements / f.block * f.size
	if offset > uint64(d.size) {
		d.fail(malformed(d.at, fmt.Sprintf("offset %d", offset), fmt.Sprintf("at most %d, the size of the file", d.size)))
		return t
	}
	t.offset = int64(offset)
	return t
}

// quoted makes a name from a file safe to print.
func quoted(s string) string {
	if len(s) > 80 {
		s = s[:80] + "..."
	}
	return fmt.Sprintf("%q", s)
}

// strings returns the string array of a key, nil when it is absent.
func (h *header) strings(key string) ([]string, error) {
	v, ok := h.meta[key]
	if !ok {
		return nil, nil
	}
	list, ok := v.([]string)
	if !ok {
		return nil, malformed("key "+quoted(key), fmt.Sprintf("%T", v), "an array of strings")
	}
	if i := slices.IndexFunc(list, func(s string) bool { return !utf8.ValidString(s) }); i >= 0 {
		return nil, malformed(fmt.Sprintf("key %q element %d", key, i), quoted(list[i]), "UTF-8")
	}
	return list, nil
}

// integer returns a key's whole number, or def when it is absent.
func (h *header) integer(key string, def int64) (int64, error) {
	switch v := h.meta[key].(type) {
	case nil:
		return def, nil
	case int64:
		return v, nil
	default:
		return 0, malformed("key "+quoted(key), describe(v), "a whole number")
	}
}

// number returns a key's number, or def when it is absent.
func (h *header) number(key string, def float64) (float64, error) {
	switch v := h.meta[key].(type) {
	case nil:
		return def, nil
	case float64:
		if math.IsNaN(v) || math.IsInf(v, 0) {
			return 0, malformed("key "+quoted(key), v, "a finite number")
		}
		return v, nil
	case int64:
		return float64(v), nil
	default:
		return 0, malformed("key "+quoted(key), describe(v), "a number")
	}
}

// text returns a key's string, or def when it is absent.
func (h *header) text(key, def string) (string, error) {
	switch v := h.meta[key].(type) {
	case nil:
		return def, nil
	case string:
		return strings.ToValidUTF8(v, "\uFFFD"), nil
	default:
		return "", malformed("key "+quoted(key), describe(v), "a string")
	}
}

// flag returns a key's bool, or def when it is absent.
func (h *header) flag(key string, def bool) (bool, error) {
	switch v := h.meta[key].(type) {
	case nil:
		return def, nil
	case bool:
		return v, nil
	default:
		return false, malformed("key "+quoted(key), describe(v), "a bool")
	}
}

// describe prints a metadata value briefly.
func describe(v any) string {
	switch v := v.(type) {
	case string:
		return quoted(v)
	case []int64, []float64, []bool, []string:
		return fmt.Sprintf("an array (%T)", v)
	default:
		return fmt.Sprint(v)
	}
}

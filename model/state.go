package model

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math"
	"unsafe"

	"gorgonia.org/tensor"

	"trainerd/internal/fault"
	"trainerd/kernels"
)

// A state file is, little-endian: the magic, a u32 version, a u32 length and
// that many bytes of header (stateHeader), its CRC-32C; then for each section
// (m, with compact moments its scales, v, and the reference if the header says
// so) and each block of the layout, frames of at most stateFrame values, each
// followed by its CRC-32C; then the magic again. Values are float32; those of
// compact moments are int8 (m) and the bits of bfloat16 (v). Padding is not
// stored, so a state is independent of the device's alignment.
//
// Version 1 has no word on the moments in its header: they are float32. It is
// what is written for them still.
const (
	stateMagic   = "TRNDSTAT"
	stateFrame   = 1 << 18
	stateFloat32 = 1 // versions by what the moments are
	stateCompact = 2
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// stateHeader is what must agree before a state is read.
type stateHeader struct {
	Steps                                          int64
	Vocab, Hidden, FFN, Layers, Heads, KV, HeadDim uint32
	Tied, Bias, QKNorm, Reference                  bool
}

// stateCompactHeader is the header of version 2.
type stateCompactHeader struct {
	Common stateHeader
	Block  uint32 // elements that share a scale
}

func (m *Model) stateHeader() stateHeader {
	c := m.cfg
	return stateHeader{Steps: m.steps, Vocab: uint32(c.Vocab), Hidden: uint32(c.Hidden), FFN: uint32(c.FFN), Layers: uint32(c.Layers),
		Heads: uint32(c.Heads), KV: uint32(c.KVHeads), HeadDim: uint32(c.HeadDim),
		Tied: c.Tied, Bias: c.QKVBias, QKNorm: c.QKNorm, Reference: m.ref != nil}
}

// values are a run of a section: exactly the slice of its type is set. h is bits of bfloat16.
type values struct {
	f []float32
	h []int16
	b []int8
}

// bytes returns the values little-endian: as they lie, or where the machine has
// the other order in the memory of dst.
func (v values) bytes(dst []byte) []byte {
	if binary.NativeEndian.Uint16([]byte{1, 0}) == 1 {
		switch {
		case v.f != nil:
			return raw(v.f)
		case v.h != nil:
			return raw(v.h)
		}
		return raw(v.b)
	}
	dst = dst[:0]
	for _, x := range v.f {
		dst = binary.LittleEndian.AppendUint32(dst, math.Float32bits(x))
	}
	for _, x := range v.h {
		dst = binary.LittleEndian.AppendUint16(dst, uint16(x))
	}
	for _, x := range v.b {
		dst = append(dst, byte(x))
	}
	return dst
}

// raw views values as bytes in the machine's order.
func raw[T float32 | int16 | int8](x []T) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(x))), len(x)*int(unsafe.Sizeof(*new(T))))
}

// take undoes bytes.
func (v values) take(src []byte) {
	for i := range v.f {
		v.f[i] = math.Float32frombits(binary.LittleEndian.Uint32(src[4*i:]))
	}
	for i := range v.h {
		v.h[i] = int16(binary.LittleEndian.Uint16(src[2*i:]))
	}
	for i := range v.b {
		v.b[i] = int8(src[i])
	}
}

// size is how many bytes that makes.
func (v values) size() int { return 4*len(v.f) + 2*len(v.h) + len(v.b) }

func (v values) dense() *tensor.Dense {
	switch {
	case v.f != nil:
		return denseF32(v.f)
	case v.h != nil:
		return denseI16(v.h)
	}
	return denseI8(v.b)
}

// section reads and writes a run of one flat buffer. get fills x, or returns
// values of the same number and type that it has already.
type section struct {
	stateBuffer
	get func(off int, x values) (values, error)
	put func(off int, x values)
}

// stateBuffer is a flat buffer that a state holds.
type stateBuffer struct {
	name string
	buf  kernels.Buffer
	t    kernels.DType // as which it is stored
	per  int           // elements of the model for each of its values
}

func (m *Model) stateBuffers() []stateBuffer {
	var s []stateBuffer
	if m.scale != nil {
		s = append(s, stateBuffer{"first moments", m.m, kernels.I8, 1}, stateBuffer{"scales of first moments", m.scale, kernels.F32, kernels.MomentBlock},
			stateBuffer{"second moments", m.v, kernels.BF16, 1})
	} else {
		s = append(s, stateBuffer{"first moments", m.m, kernels.F32, 1}, stateBuffer{"second moments", m.v, kernels.F32, 1})
	}
	if m.ref != nil {
		s = append(s, stateBuffer{"reference", m.ref.flat, kernels.F32, 1})
	}
	return s
}

// count returns how many values n elements of the model have in the section.
func (b stateBuffer) count(n int) int { return (n + b.per - 1) / b.per }

// space views the start of memory as n values; words says how much they take.
func (b stateBuffer) space(memory []float32, n int) values {
	if n == 0 {
		return values{f: memory[:0]}
	}
	p := unsafe.Pointer(unsafe.SliceData(memory[:b.words(n)]))
	switch b.t {
	case kernels.BF16:
		return values{h: unsafe.Slice((*int16)(p), n)}
	case kernels.I8:
		return values{b: unsafe.Slice((*int8)(p), n)}
	}
	return values{f: memory[:n:n]}
}

// words is how many float32 have room for n values.
func (b stateBuffer) words(n int) int { return (n*b.t.Size() + 3) / 4 }

func (m *Model) sections() []section {
	var s []section
	for _, b := range m.stateBuffers() {
		s = append(s, section{b,
			func(off int, x values) (values, error) {
				d := x.dense()
				return x, m.dev.Download(d, b.buf.Slice(off, off+d.DataSize()))
			},
			func(off int, x values) {
				d := x.dense()
				m.dev.Upload(b.buf.Slice(off, off+d.DataSize()), d)
			}})
	}
	return s
}

// eachFrame calls fn for every frame of every section, in file order. off and
// the length of x count the section's own values.
func eachFrame(lay *layout, sections []section, fn func(s section, off int, x values) error) error {
	memory := make([]float32, stateFrame)
	for _, s := range sections {
		for _, b := range lay.blocks {
			count := s.count(b.size())
			for from := 0; from < count; from += stateFrame {
				n := min(stateFrame, count-from)
				if err := fn(s, b.off/s.per+from, s.space(memory, n)); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// SaveState writes optimizer moments, step count and, with a reference, its
// weights: all that Load does not restore. LoadState reads it back into a model
// loaded with the same config and options; the pair is bitwise. A run goes on
// bit for bit when Load read the weights of the same moment as F32 (Export
// gives the exact masters; files of BF16 or F16 hold rounded ones). Accumulated
// gradients are not part of a state.
func (m *Model) SaveState(w io.Writer) error {
	if err := m.hasState(); err != nil {
		return err
	}
	return saveState(w, m.stateHeader(), m.scale != nil, m.lay, m.sections())
}

func (m *Model) hasState() error {
	if m.broken != nil {
		return m.broken
	}
	if m.m == nil {
		return fault.New(fault.Invalid, "no_training", "the model was loaded without optimizer state")
	}
	return nil
}

// State is a model's state in host memory, as it was when CaptureState took it.
type State struct {
	header   stateHeader
	compact  bool
	lay      *layout
	sections []section
}

// StateElements is how many float32 have room for a captured state; 0 without training.
func (m *Model) StateElements() int {
	if m.m == nil {
		return 0
	}
	n := 0
	for _, b := range m.stateBuffers() {
		n += b.words(b.count(m.lay.size))
	}
	return n
}

// CaptureState copies what SaveState would write to buf, which has at least
// StateElements values and belongs to the state until the caller is done with it.
func (m *Model) CaptureState(buf []float32) (*State, error) {
	if err := m.hasState(); err != nil {
		return nil, err
	}
	s := &State{header: m.stateHeader(), compact: m.scale != nil, lay: m.lay}
	for _, b := range m.stateBuffers() {
		n := b.count(m.lay.size)
		host := b.space(buf, n)
		buf = buf[b.words(n):]
		if err := m.dev.Download(host.dense(), b.buf); err != nil {
			return nil, fmt.Errorf("read %s from the device: %w", b.name, err)
		}
		s.sections = append(s.sections, section{stateBuffer: b, get: func(off int, x values) (values, error) {
			switch {
			case x.h != nil:
				return values{h: host.h[off : off+len(x.h)]}, nil
			case x.b != nil:
				return values{b: host.b[off : off+len(x.b)]}, nil
			}
			return values{f: host.f[off : off+len(x.f)]}, nil
		}})
	}
	return s, nil
}

// Save writes the bytes that SaveState would have written at the capture. It may run again.
func (s *State) Save(w io.Writer) error {
	return saveState(w, s.header, s.compact, s.lay, s.sections)
}

func saveState(w io.Writer, header stateHeader, compact bool, lay *layout, sections []section) error {
	out := bufio.NewWriterSize(w, 64<<10) // for checksums; a frame goes past it
	version, fixed := uint32(stateFloat32), any(header)
	if compact {
		version, fixed = stateCompact, stateCompactHeader{header, kernels.MomentBlock}
	}
	body, err := binary.Append(nil, binary.LittleEndian, fixed)
	if err != nil {
		return fmt.Errorf("write state: %w", err)
	}
	head := binary.LittleEndian.AppendUint32([]byte(stateMagic), version)
	head = binary.LittleEndian.AppendUint32(head, uint32(len(body)))
	head = append(head, body...)
	head = binary.LittleEndian.AppendUint32(head, crc32.Checksum(head, castagnoli))
	if _, err := out.Write(head); err != nil {
		return fmt.Errorf("write state: %w", err)
	}
	var data []byte
	err = eachFrame(lay, sections, func(s section, off int, x values) error {
		x, err := s.get(off, x)
		if err != nil {
			return fmt.Errorf("read %s: %w", s.name, err)
		}
		data = x.bytes(data)
		if _, err := out.Write(data); err != nil {
			return err
		}
		_, err = out.Write(binary.LittleEndian.AppendUint32(nil, crc32.Checksum(data, castagnoli)))
		return err
	})
	if err == nil {
		_, err = out.WriteString(stateMagic)
	}
	if err == nil {
		err = out.Flush()
	}
	if err != nil {
		return fmt.Errorf("write state: %w", err)
	}
	return nil
}

// LoadState restores what SaveState wrote and drops accumulated gradients. A
// header that does not fit changes nothing; after damage further on the model
// is half restored, refuses all work and is to be closed.
func (m *Model) LoadState(r io.Reader) error {
	if err := m.hasState(); err != nil {
		return err
	}
	in := bufio.NewReaderSize(r, 1<<20)
	h, compact, err := readStateHeader(in)
	if err != nil {
		return err
	}
	if compact != (m.scale != nil) {
		return &fault.Error{Kind: fault.Invalid, Code: "state_mismatch", Msg: "the state's moments are of another format",
			Fields: []fault.Field{{Name: "optimizer.moments", Row: -1, Got: momentsName(m.scale != nil), Expected: momentsName(compact) + ", as in the state"}}}
	}
	want := m.stateHeader()
	want.Steps = h.Steps
	if h != want {
		return fault.New(fault.Invalid, "state_mismatch", "the state is of another model: got %+v, expected %+v", h, want)
	}
	if h.Steps < 0 {
		return fault.New(fault.Malformed, "state_corrupt", "the state counts %d steps", h.Steps)
	}
	bytes := make([]byte, 4*stateFrame+4)
	err = eachFrame(m.lay, m.sections(), func(s section, off int, x values) error {
		n := x.size()
		frame := bytes[:n+4]
		if err := readState(in, frame); err != nil {
			return err
		}
		data, sum := frame[:n], frame[n:]
		if got := crc32.Checksum(data, castagnoli); got != binary.LittleEndian.Uint32(sum) {
			return fault.New(fault.Malformed, "state_corrupt", "the %s at value %d do not match their checksum", s.name, off)
		}
		x.take(data)
		s.put(off, x)
		return nil
	})
	if err == nil {
		end := make([]byte, len(stateMagic))
		if err = readState(in, end); err == nil && string(end) != stateMagic {
			err = fault.New(fault.Malformed, "state_corrupt", "the state does not end where it should")
		}
	}
	if err == nil {
		if err = m.dev.Sync(); err != nil {
			err = fmt.Errorf("load state: %w", err)
		}
	}
	if err != nil {
		m.broken = fault.New(fault.Unavailable, "state_half_loaded", "the model's state is half loaded: %w", err)
		return err
	}
	m.steps, m.fresh = h.Steps, true
	return nil
}

// momentsIn is a place of moments as settings name it.
func momentsIn(host bool) string {
	if host {
		return "host"
	}
	return "device"
}

// momentsName is a format of moments as settings name it.
func momentsName(compact bool) string {
	if compact {
		return "compact"
	}
	return "float32"
}

func readStateHeader(in io.Reader) (h stateHeader, compact bool, err error) {
	head := make([]byte, len(stateMagic)+8)
	if err := readState(in, head); err != nil {
		return h, false, err
	}
	version, length := binary.LittleEndian.Uint32(head[len(stateMagic):]), binary.LittleEndian.Uint32(head[len(stateMagic)+4:])
	compact = version == stateCompact
	full := stateCompactHeader{Block: kernels.MomentBlock}
	size := binary.Size(full.Common)
	if compact {
		size = binary.Size(full)
	}
	switch {
	case string(head[:len(stateMagic)]) != stateMagic:
		return h, false, fault.New(fault.Malformed, "state_corrupt", "not a state file: it does not start with %q", stateMagic)
	case version != stateFloat32 && version != stateCompact:
		return h, false, fault.New(fault.Invalid, "state_version", "state version %d, expected %d or %d", version, stateFloat32, stateCompact)
	case int(length) != size:
		return h, false, fault.New(fault.Malformed, "state_corrupt", "state header of %d bytes, expected %d", length, size)
	}
	body := make([]byte, length+4)
	if err := readState(in, body); err != nil {
		return h, false, err
	}
	head = append(head, body[:length]...)
	if crc32.Checksum(head, castagnoli) != binary.LittleEndian.Uint32(body[length:]) {
		return h, false, fault.New(fault.Malformed, "state_corrupt", "the state's header does not match its checksum")
	}
	if compact {
		_, err = binary.Decode(body[:length], binary.LittleEndian, &full)
	} else {
		_, err = binary.Decode(body[:length], binary.LittleEndian, &full.Common)
	}
	if err != nil {
		return h, false, fault.New(fault.Malformed, "state_corrupt", "decode state header: %w", err)
	}
	if full.Block != kernels.MomentBlock {
		return h, false, fault.New(fault.Invalid, "state_version", "%d first moments share a scale in the state, expected %d", full.Block, kernels.MomentBlock)
	}
	return full.Common, compact, nil
}

// readState fills p; an end of file is a fault, another error is the reader's.
func readState(in io.Reader, p []byte) error {
	_, err := io.ReadFull(in, p)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fault.New(fault.Malformed, "state_corrupt", "the state is truncated")
	}
	if err != nil {
		return fmt.Errorf("read state: %w", err)
	}
	return nil
}

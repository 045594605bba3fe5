package model

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math"

	"trainerd/internal/fault"
	"trainerd/kernels"
)

// A state file is, little-endian: the magic, a u32 version, a u32 length and
// that many bytes of header (stateHeader), its CRC-32C; then for each section
// (m, v, and the reference if the header says so) and each block of
// the layout, frames of at most stateFrame float32 values, each followed by its
// CRC-32C; then the magic again. Padding is not stored, so a state is
// independent of the device's alignment.
const (
	stateMagic   = "TRNDSTAT"
	stateVersion = 1
	stateFrame   = 1 << 18
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// stateHeader is what must agree before a state is read.
type stateHeader struct {
	Steps                                          int64
	Vocab, Hidden, FFN, Layers, Heads, KV, HeadDim uint32
	Tied, Bias, QKNorm, Reference                  bool
}

func (m *Model) stateHeader() stateHeader {
	c := m.cfg
	return stateHeader{Steps: m.steps, Vocab: uint32(c.Vocab), Hidden: uint32(c.Hidden), FFN: uint32(c.FFN), Layers: uint32(c.Layers),
		Heads: uint32(c.Heads), KV: uint32(c.KVHeads), HeadDim: uint32(c.HeadDim),
		Tied: c.Tied, Bias: c.QKVBias, QKNorm: c.QKNorm, Reference: m.ref != nil}
}

// section reads and writes a run of one flat buffer as float32.
type section struct {
	name string
	get  func(off int, x []float32) error
	put  func(off int, x []float32)
}

func (m *Model) sections() []section {
	var s []section
	for _, b := range m.stateBuffers() {
		s = append(s, section{b.name,
			func(off int, x []float32) error { return m.dev.Download(denseF32(x), b.buf.Slice(off, off+len(x))) },
			func(off int, x []float32) { m.dev.Upload(b.buf.Slice(off, off+len(x)), denseF32(x)) }})
	}
	return s
}

// stateBuffer is a flat buffer that a state holds.
type stateBuffer struct {
	name string
	buf  kernels.Buffer
}

func (m *Model) stateBuffers() []stateBuffer {
	s := []stateBuffer{{"first moments", m.m}, {"second moments", m.v}}
	if m.ref != nil {
		s = append(s, stateBuffer{"reference", m.ref.flat})
	}
	return s
}

// eachFrame calls fn for every frame of every section, in file order.
func eachFrame(lay *layout, sections []section, fn func(s section, off int, x []float32) error) error {
	buf := make([]float32, stateFrame)
	for _, s := range sections {
		for _, b := range lay.blocks {
			for from := 0; from < b.size(); from += stateFrame {
				n := min(stateFrame, b.size()-from)
				if err := fn(s, b.off+from, buf[:n]); err != nil {
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
	return saveState(w, m.stateHeader(), m.lay, m.sections())
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
	lay      *layout
	sections []section
}

// StateElements is how many float32 values a captured state takes; 0 without training.
func (m *Model) StateElements() int {
	if m.m == nil {
		return 0
	}
	return m.lay.size * len(m.stateBuffers())
}

// CaptureState copies what SaveState would write to buf, which has at least
// StateElements values and belongs to the state until the caller is done with it.
func (m *Model) CaptureState(buf []float32) (*State, error) {
	if err := m.hasState(); err != nil {
		return nil, err
	}
	s := &State{header: m.stateHeader(), lay: m.lay}
	for _, b := range m.stateBuffers() {
		var host []float32
		host, buf = buf[:m.lay.size:m.lay.size], buf[m.lay.size:]
		if err := m.dev.Download(denseF32(host), b.buf); err != nil {
			return nil, fmt.Errorf("read %s from the device: %w", b.name, err)
		}
		s.sections = append(s.sections, section{name: b.name, get: func(off int, x []float32) error {
			copy(x, host[off:])
			return nil
		}})
	}
	return s, nil
}

// Save writes the bytes that SaveState would have written at the capture. It may run again.
func (s *State) Save(w io.Writer) error { return saveState(w, s.header, s.lay, s.sections) }

func saveState(w io.Writer, header stateHeader, lay *layout, sections []section) error {
	out := bufio.NewWriterSize(w, 1<<20)
	head, err := binary.Append([]byte(stateMagic), binary.LittleEndian, uint32(stateVersion))
	if err != nil {
		return fmt.Errorf("write state: %w", err)
	}
	body, err := binary.Append(nil, binary.LittleEndian, header)
	if err != nil {
		return fmt.Errorf("write state: %w", err)
	}
	head = binary.LittleEndian.AppendUint32(head, uint32(len(body)))
	head = append(head, body...)
	head = binary.LittleEndian.AppendUint32(head, crc32.Checksum(head, castagnoli))
	if _, err := out.Write(head); err != nil {
		return fmt.Errorf("write state: %w", err)
	}
	bytes := make([]byte, 0, 4*stateFrame+4)
	err = eachFrame(lay, sections, func(s section, off int, x []float32) error {
		if err := s.get(off, x); err != nil {
			return fmt.Errorf("read %s: %w", s.name, err)
		}
		bytes = bytes[:0]
		for _, v := range x {
			bytes = binary.LittleEndian.AppendUint32(bytes, math.Float32bits(v))
		}
		bytes = binary.LittleEndian.AppendUint32(bytes, crc32.Checksum(bytes, castagnoli))
		_, err := out.Write(bytes)
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
	h, err := readStateHeader(in)
	if err != nil {
		return err
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
	err = eachFrame(m.lay, m.sections(), func(s section, off int, x []float32) error {
		frame := bytes[:4*len(x)+4]
		if err := readState(in, frame); err != nil {
			return err
		}
		data, sum := frame[:4*len(x)], frame[4*len(x):]
		if got := crc32.Checksum(data, castagnoli); got != binary.LittleEndian.Uint32(sum) {
			return fault.New(fault.Malformed, "state_corrupt", "the %s at element %d do not match their checksum", s.name, off)
		}
		for i := range x {
			x[i] = math.Float32frombits(binary.LittleEndian.Uint32(data[4*i:]))
		}
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

func readStateHeader(in io.Reader) (h stateHeader, err error) {
	head := make([]byte, len(stateMagic)+8)
	if err := readState(in, head); err != nil {
		return h, err
	}
	version, length := binary.LittleEndian.Uint32(head[len(stateMagic):]), binary.LittleEndian.Uint32(head[len(stateMagic)+4:])
	switch {
	case string(head[:len(stateMagic)]) != stateMagic:
		return h, fault.New(fault.Malformed, "state_corrupt", "not a state file: it does not start with %q", stateMagic)
	case version != stateVersion:
		return h, fault.New(fault.Invalid, "state_version", "state version %d, expected %d", version, stateVersion)
	case int(length) != binary.Size(h):
		return h, fault.New(fault.Malformed, "state_corrupt", "state header of %d bytes, expected %d", length, binary.Size(h))
	}
	body := make([]byte, length+4)
	if err := readState(in, body); err != nil {
		return h, err
	}
	head = append(head, body[:length]...)
	if crc32.Checksum(head, castagnoli) != binary.LittleEndian.Uint32(body[length:]) {
		return h, fault.New(fault.Malformed, "state_corrupt", "the state's header does not match its checksum")
	}
	if _, err := binary.Decode(body[:length], binary.LittleEndian, &h); err != nil {
		return h, fault.New(fault.Malformed, "state_corrupt", "decode state header: %w", err)
	}
	return h, nil
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

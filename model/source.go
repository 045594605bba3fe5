package model

import (
	"fmt"
	"hash/fnv"
	"math"
	"strings"

	"gorgonia.org/tensor"

	"trainerd/internal/fault"
	"trainerd/kernels"
)

// Source gives weights by their Hugging Face names ("model.embed_tokens.weight",
// "model.layers.0.self_attn.q_proj.weight", ...), one tensor at a time, so that
// a model larger than memory can be converted or loaded.
type Source interface {
	Config() Config
	// Names lists the tensors, in the order in which they are stored.
	Names() []string
	// Shape returns a tensor's shape, and false when there is no such tensor.
	Shape(name string) ([]int, bool)
	// Read fills dst (float32, row-major, of the tensor's shape). A missing
	// tensor or another shape is an Invalid fault that names file and tensor.
	Read(name string, dst *tensor.Dense) error
	// DType is the stored type of most weights, "F32", "F16" or "BF16".
	DType() string
	Close() error
}

// tensors implements the descriptive half of a Source over a layout.
type tensors struct {
	cfg   Config
	lay   *layout
	dtype string
	where string // what faults call the source
}

func (s *tensors) Config() Config { return s.cfg }
func (s *tensors) DType() string  { return s.dtype }
func (s *tensors) Close() error   { return nil }

func (s *tensors) Names() []string {
	names := make([]string, len(s.lay.tensors))
	for i, t := range s.lay.tensors {
		names[i] = t.name
	}
	return names
}

func (s *tensors) Shape(name string) ([]int, bool) {
	i, ok := s.lay.index[name]
	if !ok {
		return nil, false
	}
	return s.lay.tensors[i].shape, true
}

// find returns a tensor's place and dst's elements, or says what does not fit.
func (s *tensors) find(name string, dst *tensor.Dense) (tensorRef, []float32, error) {
	i, ok := s.lay.index[name]
	if !ok {
		return tensorRef{}, nil, fault.New(fault.Invalid, "invalid_tensor", "%s: no tensor %q", s.where, name)
	}
	t := s.lay.tensors[i]
	if dst.Dtype() != tensor.Float32 || dst.Shape().TotalSize() != t.n {
		return tensorRef{}, nil, fault.New(fault.Invalid, "invalid_tensor", "%s: tensor %q has shape %v, wanted as %v %v", s.where, name, t.shape, dst.Dtype(), dst.Shape())
	}
	return t, dst.Float32s(), nil
}

// randomSource makes weights on demand.
type randomSource struct {
	tensors
	seed uint64
	std  float64
}

// NewRandom returns a Source of freshly initialised weights (normal with
// cfg.InitStd, norms 1, biases 0), a pure function of config and seed.
func NewRandom(cfg Config, seed uint64) (Source, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if cfg.InitStd == 0 {
		cfg.InitStd = 0.02
	}
	return &randomSource{tensors: tensors{cfg: cfg, lay: newLayout(cfg, 1), dtype: "F32", where: "random weights"}, seed: seed, std: cfg.InitStd}, nil
}

func (s *randomSource) Read(name string, dst *tensor.Dense) error {
	t, out, err := s.find(name, dst)
	if err != nil {
		return err
	}
	if len(t.shape) == 1 { // norms and biases are the only vectors
		fill := float32(1)
		if strings.HasSuffix(name, ".bias") {
			fill = 0
		}
		for i := range out {
			out[i] = fill
		}
		return nil
	}
	h := fnv.New64a()
	h.Write([]byte(name))
	key := mix(s.seed ^ mix(h.Sum64()))
	for i := 0; i < len(out); i += 2 {
		a, b := normals(key, uint64(i))
		out[i] = float32(a * s.std)
		if i+1 < len(out) {
			out[i+1] = float32(b * s.std)
		}
	}
	return nil
}

// mix is the finaliser of SplitMix64 (Steele, Lea & Flood 2014): a bijection
// whose outputs on consecutive inputs pass for independent uniform words.
func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// uniform53 returns the counter's uniform number in (0,1].
func uniform53(key, counter uint64) float64 {
	return float64(mix(key+counter*0x9e3779b97f4a7c15)>>11+1) / (1 << 53)
}

// normals returns two standard normal numbers (Box & Muller 1958).
func normals(key, counter uint64) (float64, float64) {
	r := math.Sqrt(-2 * math.Log(uniform53(key, counter)))
	sin, cos := math.Sincos(2 * math.Pi * uniform53(key, counter+1))
	return r * cos, r * sin
}

// deviceSource reads a flat buffer of a model.
type deviceSource struct {
	tensors
	read    func(off int, x []float32) error
	rounded func(off int, x []uint16) (ok bool, err error) // nil: not to be had
}

func (s *deviceSource) Read(name string, dst *tensor.Dense) error {
	t, out, err := s.find(name, dst)
	if err != nil {
		return err
	}
	if err := s.read(t.off, out); err != nil {
		return fmt.Errorf("read tensor %q from the device: %w", name, err)
	}
	return nil
}

// BF16Reader is a Source that can round a tensor before it reaches the host.
type BF16Reader interface {
	// ReadBF16 fills dst with a tensor's values as bits of bfloat16, rounded to
	// nearest, ties to even. ok is false, and dst of no use, where the device cannot
	// do that and where a value is infinite: Read then says what it was.
	ReadBF16(name string, dst []uint16) (ok bool, err error)
}

// ReadBF16 implements BF16Reader.
func (s *deviceSource) ReadBF16(name string, dst []uint16) (ok bool, err error) {
	i, found := s.lay.index[name]
	if !found || s.rounded == nil {
		return false, nil
	}
	t := s.lay.tensors[i]
	if t.n != len(dst) {
		return false, fault.New(fault.Invalid, "invalid_tensor", "%s: tensor %q has shape %v, wanted as %d values", s.where, name, t.shape, len(dst))
	}
	if ok, err = s.rounded(t.off, dst); err != nil {
		return false, fmt.Errorf("read tensor %q from the device: %w", name, err)
	}
	return ok, nil
}

// Export returns the policy's weights as a Source, reading from the device.
// It is valid until the next OptimStep.
func (m *Model) Export() Source {
	s := &deviceSource{tensors: tensors{cfg: m.cfg, lay: m.lay, dtype: m.dtype, where: "model"}}
	s.read = func(off int, x []float32) error {
		if m.broken != nil {
			return m.broken
		}
		return m.getMaster(off, x)
	}
	if r, ok := m.dev.(kernels.Rounder); ok {
		s.rounded = func(off int, x []uint16) (bool, error) {
			if m.broken != nil {
				return false, m.broken
			}
			return m.getRounded(r, off, x)
		}
	}
	return s
}

// Gradient returns the accumulated gradients as a Source (for tests and inspection).
func (m *Model) Gradient() Source {
	s := &deviceSource{tensors: tensors{cfg: m.cfg, lay: m.lay, dtype: "F32", where: "gradients"}}
	s.read = func(off int, x []float32) error {
		switch {
		case m.broken != nil:
			return m.broken
		case m.grad == nil:
			return fault.New(fault.Invalid, "no_training", "the model was loaded without gradients")
		case m.fresh:
			clear(x)
			return nil
		}
		return m.dev.Download(denseF32(x), m.grad.flat.Slice(off, off+len(x)))
	}
	return s
}

package cuda

import (
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"
)

const (
	// trials is how often an algorithm is timed after one run that is not; the least time counts.
	trials = 3
	// worth is the share of the favourite's time that another algorithm must stay
	// under: noise alone does not change a choice.
	worth = 0.97
	// asideMost bounds the host memory that a result is put aside in. Beyond it, and
	// only when a class is met first by a product that adds to C, the favourite is taken untimed.
	asideMost = 1 << 30
	// shapesKept bounds what is remembered of single shapes.
	shapesKept = 1 << 14
)

// choice is how products are computed.
type choice struct {
	algorithm algorithm
	own       bool // by gemm_simple
	took      time.Duration
}

// shape is what decides whether an algorithm can compute a product: sizes, and how
// far addresses and strides are aligned.
type shape struct {
	m, n, k, lda, ldb, ldc         int
	transA, transB, float32C, bias bool
	alignA, alignB, alignC         uint8 // powers of two, at most 16 bytes
}

func (p product) shape() shape {
	return shape{p.m, p.n, p.k, p.lda, p.ldb, p.ldc, p.transA, p.transB, p.float32C, p.bias != 0, min(4, power(p.a)), min(4, power(p.b)), min(4, power(p.c))}
}

// class is a set of shapes that share a choice: sizes are rounded up to 1, 2, 3, 4,
// 6, 8, 12, 16, 24 and so on, since the number of tokens is another one in almost every micro-batch.
type class struct {
	m, n, k                        int
	transA, transB, float32C, bias bool
	align                          [6]uint8 // of addresses a, b, c and strides lda, ldb, ldc: powers of two, at most 16 bytes
}

func (s shape) class() class {
	size := 2
	if s.float32C {
		size = 4
	}
	stride := func(ld, size int) uint8 { return min(4, power(address(ld*size))) }
	return class{rungOf(s.m), rungOf(s.n), rungOf(s.k), s.transA, s.transB, s.float32C, s.bias,
		[6]uint8{s.alignA, s.alignB, s.alignC, stride(s.lda, 2), stride(s.ldb, 2), stride(s.ldc, size)}}
}

// rungOf is the least 2^i or 3·2^i that is not below n.
func rungOf(n int) int {
	for r := 1; ; r *= 2 {
		if n <= r {
			return r
		}
		if r > 1 && n <= r+r/2 {
			return r + r/2
		}
	}
}

// power returns the greatest power of two, at most 256, that divides an address, as its exponent.
func power(a address) uint8 {
	p := uint8(0)
	for p < 8 && a>>p&1 == 0 {
		p++
	}
	return p
}

// choices remembers how products are computed. It belongs to the owner of the card.
type choices struct {
	timed   bool
	file    string
	log     *slog.Logger
	here    machine
	classes map[class]choice                  // timed, and kept in the file
	release string                            // of the kernel driver
	seen    atomic.Pointer[map[string]string] // classes as Fingerprint gives them, for any goroutine
	shapes  map[shape]choice                  // in use
	refused map[class]bool                    // what the log was told about
}

func newChoices(o Options, model string, v versions) *choices {
	s := &choices{timed: o.Timed, file: o.Choices, log: o.Log, here: machine{Card: model, Driver: v.driver, CublasLt: v.cublasLt}, classes: map[class]choice{}, shapes: map[shape]choice{}, refused: map[class]bool{}}
	if s.log == nil {
		s.log = slog.Default()
	}
	s.release = driverRelease(releaseFile)
	if s.timed {
		s.join()
	}
	s.publish()
	return s
}

// join takes what the file holds of this machine and is not known yet: another
// process may have written it a moment ago.
func (s *choices) join() {
	if s.file == "" {
		return
	}
	found, err := loadChoices(s.file, s.here)
	if err != nil {
		s.log.Warn("algorithms of matrix products are chosen anew", "file", s.file, "err", err)
		return
	}
	for k, c := range found {
		if _, known := s.classes[k]; !known {
			s.classes[k] = c
		}
	}
	s.publish()
}

// known returns the choice of a class, from the file where this process has made none.
func (s *choices) known(k class) (choice, bool) {
	if _, ok := s.classes[k]; !ok {
		s.join()
	}
	c, ok := s.classes[k]
	return c, ok
}

// settle records what was timed and returns what counts: the choice that another
// process has recorded meanwhile, or this one.
func (s *choices) settle(k class, timed choice) choice {
	if c, ok := s.known(k); ok {
		return c
	}
	s.classes[k] = timed
	s.save()
	s.publish()
	return timed
}

// refuse notes that the library does not compute a shape; the log hears of each kind once.
func (s *choices) refuse(x shape, p product) {
	s.shapes[x] = choice{own: true}
	if k := x.class(); !s.refused[k] {
		s.refused[k] = true
		s.log.Warn("cuBLASLt refuses a product: a slow kernel computes it", "product", p)
	}
}

// gemm runs a product on the owner.
func (d *Device) gemm(c driver, x matrices) error {
	p := x.columnMajor()
	p.workspace, p.workspaceBytes = d.gemmSpace, gemmBytes
	// cuBLASLt has no empty sums, and a bias that is less aligned ends in misaligned accesses in some of its versions.
	if p.k == 0 || power(p.bias) < 4 && p.bias != 0 {
		return simple(c, p)
	}
	s := p.shape()
	chosen, known := d.choices.shapes[s]
	if !known {
		var ran bool
		var err error
		if chosen, ran, err = d.choose(c, p, s); err != nil {
			return err
		}
		if len(d.choices.shapes) >= shapesKept {
			clear(d.choices.shapes)
		}
		d.choices.shapes[s] = chosen
		if chosen.own {
			d.choices.refuse(s, p)
		}
		if ran {
			return nil
		}
	}
	if chosen.own {
		return simple(c, p)
	}
	err := c.product(p, chosen.algorithm)
	if errors.Is(err, errUnsupported) {
		d.choices.refuse(s, p)
		return simple(c, p)
	}
	return err
}

// choose decides how a shape is computed that was not met before; ran says that it was computed on the way.
func (d *Device) choose(c driver, p product, s shape) (_ choice, ran bool, err error) {
	if d.choices.timed {
		chosen, known := d.choices.known(s.class())
		if !known {
			if chosen, err = d.fastest(c, p); err != nil {
				return choice{}, false, err
			}
			chosen = d.choices.settle(s.class(), chosen)
		}
		if chosen.own {
			return chosen, false, nil
		}
		if c.admits(p, chosen.algorithm) == nil {
			return chosen, false, nil
		}
	}
	return favourite(c, p)
}

// favourite computes a product by the first of the library's algorithms that can.
func favourite(c driver, p product) (_ choice, ran bool, err error) {
	found, err := c.algorithms(p)
	if err != nil && !errors.Is(err, errUnsupported) {
		return choice{}, false, err
	}
	for _, a := range found {
		err := c.product(p, a)
		if err == nil {
			return choice{algorithm: a}, true, nil
		}
		if !errors.Is(err, errUnsupported) {
			return choice{}, false, err
		}
	}
	return choice{own: true}, false, nil
}

// fastest times the library's algorithms on the product's own memory. What the
// trials leave there is overwritten by the product itself, unless that adds to it:
// then it is put aside on the host and put back.
func (d *Device) fastest(c driver, p product) (best choice, err error) {
	found, err := c.algorithms(p)
	if err != nil && !errors.Is(err, errUnsupported) {
		return choice{}, err
	}
	if len(found) == 1 || len(found) > 0 && p.accumulate && p.extent() > asideMost {
		return choice{algorithm: found[0]}, nil
	}
	if p.accumulate && len(found) > 0 {
		kept := make([]byte, p.extent())
		if err := d.keep(c, kept, p.c); err != nil {
			return choice{}, err
		}
		defer func() { err = errors.Join(err, d.restore(c, p.c, kept)) }()
	}
	best.own = true
	for _, a := range found {
		took, err := timeOf(c, p, a)
		if errors.Is(err, errUnsupported) {
			continue
		}
		if err != nil {
			return choice{}, err
		}
		if best.own || float64(took) < worth*float64(best.took) {
			best = choice{algorithm: a, took: took}
		}
	}
	return best, nil
}

// extent is the bytes from the first to the last element of C.
func (p product) extent() int64 {
	size := int64(2)
	if p.float32C {
		size = 4
	}
	return size * (int64(p.n-1)*int64(p.ldc) + int64(p.m))
}

// timeOf is the least time of a few runs.
func timeOf(c driver, p product, a algorithm) (least time.Duration, err error) {
	run := func() error { return c.product(p, a) }
	if err := run(); err != nil {
		return 0, err
	}
	for i := range trials {
		took, err := c.elapsed(run)
		if err != nil {
			return 0, err
		}
		if i == 0 || took < least {
			least = took
		}
	}
	return least, nil
}

// keep copies memory of the card to the host, on the owner.
func (d *Device) keep(c driver, to []byte, from address) error {
	for len(to) > 0 {
		n := min(len(to), stageBytes)
		if err := c.download(d.down[:n], from); err != nil {
			return fmt.Errorf("put aside what timing would change: %w", err)
		}
		if err := c.sync(); err != nil {
			return fmt.Errorf("put aside what timing would change: %w", err)
		}
		copy(to, d.down[:n])
		to, from = to[n:], from+address(n)
	}
	return nil
}

// restore copies it back.
func (d *Device) restore(c driver, to address, from []byte) error {
	for len(from) > 0 {
		n := copy(d.down, from)
		if err := c.upload(to, d.down[:n]); err != nil {
			return fmt.Errorf("put back what timing changed: %w", err)
		}
		if err := c.sync(); err != nil {
			return fmt.Errorf("put back what timing changed: %w", err)
		}
		from, to = from[n:], to+address(n)
	}
	return nil
}

// simple computes a product by a kernel of our own: slow, for any shape and alignment.
func simple(c driver, p product) error {
	grid := size2{ceil(p.m, simpleTile), ceil(p.n, simpleTile)}
	if grid.y > maxGridY {
		return fmt.Errorf("product of %d columns: expected at most %d", p.n, maxGridY*simpleTile)
	}
	return c.launch("gemm_simple", grid, size2{256, 1}, 0, p.c, p.a, p.b, p.bias, int32(p.m), int32(p.n), int32(p.k), int64(p.lda), int64(p.ldb), int64(p.ldc),
		flag32(p.transA), flag32(p.transB), flag32(p.float32C), flag32(p.accumulate))
}

const (
	// simpleTile is the side of the square of C that a block of gemm_simple computes.
	simpleTile = 64
	// maxGridY is what CUDA allows.
	maxGridY = 65535
)

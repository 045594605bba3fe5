package cuda

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"trainerd/internal/durable"
)

// machine is what a choice is good for.
type machine struct {
	Card     string `json:"card"`
	Driver   int    `json:"driver"`   // 1000*major + 10*minor
	CublasLt int    `json:"cublaslt"` // 10000*major + 100*minor + patch
}

// entries is one machine's part of the file.
type entries struct {
	machine
	Products []entry `json:"products"`
}

// entry is a class of products and its choice.
type entry struct {
	M            int      `json:"m"`
	N            int      `json:"n"`
	K            int      `json:"k"`
	TransA       bool     `json:"trans_a"`
	TransB       bool     `json:"trans_b"`
	Float32      bool     `json:"float32"`
	Bias         bool     `json:"bias"`
	Align        [6]uint8 `json:"align"`
	Algorithm    string   `json:"algorithm"` // 64 bytes in hexadecimal, or "own"
	Microseconds float64  `json:"us"`
}

// file is the whole: the sum is SHA-256 over the machines as compact JSON.
type file struct {
	Format   string          `json:"format"`
	Sum      string          `json:"sum"`
	Machines json.RawMessage `json:"machines"`
}

const (
	fileFormat = "trainerd gemm choices 1"
	// fileMost and machinesMost bound the file; what has not been written for longest goes first.
	fileMost     = 16 << 20
	machinesMost = 8
	ownName      = "own"
)

// loadChoices reads what was chosen on a machine. A file that is not there, or
// says nothing of the machine, holds nothing.
func loadChoices(name string, m machine) (map[class]choice, error) {
	all, err := readMachines(name)
	if err != nil {
		return nil, err
	}
	for _, e := range all {
		if e.machine == m {
			return e.choices()
		}
	}
	return map[class]choice{}, nil
}

func readMachines(name string) ([]entries, error) {
	f, err := os.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, fileMost+1))
	if err != nil {
		return nil, err
	}
	return parseMachines(b)
}

// parseMachines reads the file's bytes.
func parseMachines(b []byte) ([]entries, error) {
	if len(b) > fileMost {
		return nil, fmt.Errorf("more than %d bytes", fileMost)
	}
	var x file
	if err := json.Unmarshal(b, &x); err != nil {
		return nil, err
	}
	if x.Format != fileFormat {
		return nil, fmt.Errorf("format %q, expected %q", x.Format, fileFormat)
	}
	var compact bytes.Buffer
	if err := json.Compact(&compact, x.Machines); err != nil {
		return nil, fmt.Errorf("machines: %w", err)
	}
	if sum := sumOf(compact.Bytes()); sum != x.Sum {
		return nil, fmt.Errorf("sum %s, expected %s", sum, x.Sum)
	}
	var all []entries
	if err := json.Unmarshal(x.Machines, &all); err != nil {
		return nil, fmt.Errorf("machines: %w", err)
	}
	return all, nil
}

func sumOf(b []byte) string {
	s := sha256.Sum256(b)
	return hex.EncodeToString(s[:])
}

func (e entries) choices() (map[class]choice, error) {
	out := make(map[class]choice, len(e.Products))
	for i, p := range e.Products {
		c := choice{own: p.Algorithm == ownName, took: time.Duration(p.Microseconds * 1e3)}
		if !c.own {
			b, err := hex.DecodeString(p.Algorithm)
			if err != nil || len(b) != len(c.algorithm)*8 {
				return nil, fmt.Errorf("product %d: algorithm %q, expected %d hexadecimal digits or %q", i, p.Algorithm, len(c.algorithm)*16, ownName)
			}
			for j := range c.algorithm {
				for k, x := range b[8*j:][:8] {
					c.algorithm[j] |= uint64(x) << (8 * k)
				}
			}
		}
		out[class{p.M, p.N, p.K, p.TransA, p.TransB, p.Float32, p.Bias, p.Align}] = c
	}
	return out, nil
}

// hex writes an algorithm's 64 bytes.
func (a algorithm) hex() string {
	var b []byte
	for _, x := range a {
		b = binary.LittleEndian.AppendUint64(b, x)
	}
	return hex.EncodeToString(b)
}

// entries lists the choices in a fixed order.
func (s *choices) entries() entries {
	e := entries{machine: s.here}
	for k, c := range s.classes {
		p := entry{M: k.m, N: k.n, K: k.k, TransA: k.transA, TransB: k.transB, Float32: k.float32C, Bias: k.bias, Align: k.align, Algorithm: ownName, Microseconds: float64(c.took) / 1e3}
		if !c.own {
			p.Algorithm = c.algorithm.hex()
		}
		e.Products = append(e.Products, p)
	}
	slices.SortFunc(e.Products, func(a, b entry) int {
		return cmp.Or(cmp.Compare(a.M, b.M), cmp.Compare(a.N, b.N), cmp.Compare(a.K, b.K), cmp.Compare(flag32(a.TransA), flag32(b.TransA)), cmp.Compare(flag32(a.TransB), flag32(b.TransB)),
			cmp.Compare(flag32(a.Float32), flag32(b.Float32)), cmp.Compare(flag32(a.Bias), flag32(b.Bias)), slices.Compare(a.Align[:], b.Align[:]))
	})
	return e
}

// save writes the file anew with this machine's choices first. That it cannot be
// written is a warning: only the next process is the poorer for it.
func (s *choices) save() {
	if s.file == "" {
		return
	}
	if err := s.write(); err != nil {
		s.log.Warn("algorithms of matrix products are not kept for the next process", "file", s.file, "err", err)
	}
}

func (s *choices) write() error {
	old, _ := readMachines(s.file) // what cannot be read is replaced
	all := []entries{s.entries()}
	for _, e := range old {
		if e.machine != s.here && len(all) < machinesMost {
			all = append(all, e)
		}
	}
	machines, err := json.Marshal(all)
	if err != nil {
		return err
	}
	b, err := json.Marshal(file{Format: fileFormat, Sum: sumOf(machines), Machines: machines})
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(s.file), filepath.Base(s.file)+".*")
	if err != nil {
		return err
	}
	_, err = f.Write(append(b, '\n'))
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), s.file)
	}
	if err == nil {
		err = durable.SyncDir("cuda.choices", filepath.Dir(s.file))
	}
	if err != nil {
		_ = os.Remove(f.Name())
	}
	return err
}

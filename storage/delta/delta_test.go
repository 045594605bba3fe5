package delta

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"trainerd/internal/fault"
)

func describe(name string, word int, base, target []byte) File {
	return File{Name: name, Size: int64(len(target)), Word: word, Base: sha256.Sum256(base), Target: sha256.Sum256(target)}
}

func encode(t testing.TB, word int, pairs ...[]byte) ([]byte, []Stats) {
	t.Helper()
	var out bytes.Buffer
	w := NewWriter(&out)
	var stats []Stats
	for i := 0; i < len(pairs); i += 2 {
		s, err := w.File(describe(string(rune('a'+i/2)), word, pairs[i], pairs[i+1]), bytes.NewReader(pairs[i]), bytes.NewReader(pairs[i+1]))
		if err != nil {
			t.Fatal(err)
		}
		stats = append(stats, s)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes(), stats
}

// apply reads a delta of one file over a base.
func apply(raw, base []byte) ([]byte, error) {
	r, err := NewReader(bytes.NewReader(raw))
	if err != nil {
		return nil, err
	}
	if _, err := r.Next(); err != nil {
		return nil, err
	}
	var out bytes.Buffer
	if err := r.Apply(bytes.NewReader(base), &out); err != nil {
		return nil, err
	}
	if _, err := r.Next(); err != io.EOF {
		return nil, fmt.Errorf("in the place of the end: %w", err)
	}
	return out.Bytes(), nil
}

// TestRoundTrip: what a delta gives of its base is its target, and so is what it
// gives of its target.
func TestRoundTrip(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	for _, word := range []int{1, 2, 4, 8} {
		for _, size := range []int{0, 1, 7, 8, 9, 4096, block - 1, block, block + 3, 3*block + 5} {
			for _, share := range []float64{0, 0.0001, 0.02, 0.5, 1} {
				base := make([]byte, size)
				for i := range base {
					base[i] = byte(rng.Uint32())
				}
				target := bytes.Clone(base)
				changed := int64(0)
				for at := 0; at+word <= size; at += word {
					if rng.Float64() < share {
						target[at+rng.IntN(word)] ^= byte(1 + rng.IntN(255))
						changed++
					}
				}
				if tail := size % word; tail > 0 && share > 0 {
					target[size-1]++
				}
				raw, stats := encode(t, word, base, target)
				if stats[0].Changed != changed || stats[0].Words != int64(size/word) {
					t.Errorf("word %d, size %d, share %g: %+v, expected %d changed", word, size, share, stats[0], changed)
				}
				for name, from := range map[string][]byte{"base": base, "target": target} {
					got, err := apply(raw, from)
					if err != nil || !bytes.Equal(got, target) {
						t.Fatalf("word %d, size %d, share %g, of the %s: %v", word, size, share, name, err)
					}
				}
			}
		}
	}
}

// TestCost: one changed bfloat16 in a hundred costs four bytes at most, and a
// file that changed everywhere hardly more than itself.
func TestCost(t *testing.T) {
	base := make([]byte, 2<<20)
	target := bytes.Clone(base)
	for at := 0; at < len(target); at += 200 {
		target[at]++
	}
	_, stats := encode(t, 2, base, target)
	if s := stats[0]; s.Changed != int64(len(base)+199)/200 || s.Bytes > 4*s.Changed+100 {
		t.Errorf("one in a hundred: %+v", s)
	}
	for at := range target {
		target[at] = ^base[at]
	}
	if _, stats = encode(t, 2, base, target); stats[0].Bytes > int64(len(base))+1000 {
		t.Errorf("everything: %+v of %d bytes", stats[0], len(base))
	}
}

func TestOtherBase(t *testing.T) {
	base, target := []byte("0123456789abcdef"), []byte("0123456789abcXef")
	raw, _ := encode(t, 2, base, target)
	if _, err := apply(raw, []byte("0123-56789abcdef")); !errors.Is(err, ErrResult) {
		t.Errorf("another base: %v", err)
	}
	if _, err := apply(raw, base[:9]); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("a base that is too short: %v", err)
	}
}

// section makes the delta of a file by hand, with its checksum.
func section(f File, body ...byte) []byte {
	p := []byte{mark, byte(len(f.Name))}
	p = append(p, f.Name...)
	p = binary.AppendUvarint(p, uint64(f.Size))
	p = append(p, byte(f.Word))
	p = append(p, f.Base[:]...)
	p = append(p, f.Target[:]...)
	p = append(p, body...)
	return binary.LittleEndian.AppendUint32(p, crc32.Checksum(p, castagnoli))
}

// TestHostile: whatever a delta claims, it is refused as malformed before
// anything is written beyond the file or held in memory.
func TestHostile(t *testing.T) {
	base, target := make([]byte, 64), make([]byte, 64)
	target[7] = 1
	good, _ := encode(t, 2, base, target)
	f := describe("a", 2, base, target)
	head := append([]byte(magic), version)
	with := func(p ...[]byte) []byte { return bytes.Join(append([][]byte{head}, p...), nil) }
	uv := func(v uint64) []byte { return binary.AppendUvarint(nil, v) }
	huge := f
	huge.Size = 1 << 62
	cases := map[string][]byte{
		"empty": nil, "magic": append([]byte("x"), good[1:]...), "version 2": append(append([]byte(magic), 2), good[9:]...),
		"mark":                      with([]byte{7}),
		"gap beyond the end":        with(section(f, uv(2*33+1)...)),
		"gap of 2^63":               with(section(f, uv(1<<63+1)...)),
		"gap of 2^64":               with(section(f, uv(1<<64-1)...)),
		"run beyond the end":        with(section(f, append(uv(2*30+2), uv(1)...)...)),
		"run of 2^64":               with(section(f, append(uv(2), uv(1<<64-1)...)...)),
		"run of 2^63":               with(section(f, append(uv(2), uv(1<<63-2)...)...)),
		"run of a huge file, cut":   with(section(huge, append(uv(2), uv(1<<60)...)...)),
		"varint that never ends":    with(section(f, bytes.Repeat([]byte{0xff}, 20)...)),
		"checksum":                  append(bytes.Clone(good[:len(good)-6]), good[len(good)-6]^1, good[len(good)-5], 0, 1),
		"no name":                   with([]byte{mark, 0}),
		"long name":                 with([]byte{mark}, uv(513), bytes.Repeat([]byte{'a'}, 513)),
		"name of 2^60":              with([]byte{mark}, uv(1<<60)),
		"size of 2^63":              with([]byte{mark, 1, 'a'}, uv(1<<63), make([]byte, 65)),
		"word of 3":                 with(section(File{Name: "a", Size: 64, Word: 3})),
		"word of 0":                 with(section(File{Name: "a", Size: 64, Word: 0})),
		"count of files":            append(bytes.Clone(good[:len(good)-1]), 2),
		"nothing where the end was": good[:len(good)-2],
	}
	for name, raw := range cases {
		_, err := apply(raw, bytes.Repeat([]byte{0}, 64))
		if name == "run of a huge file, cut" { // the base ends first
			if !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		if fault.KindOf(err) != fault.Malformed || err == nil {
			t.Errorf("%s: %v is not a malformed delta", name, err)
		}
	}
	for i := range good {
		if _, err := apply(good[:i], base); fault.KindOf(err) != fault.Malformed {
			t.Errorf("cut after %d bytes: %v", i, err)
		}
		flipped := bytes.Clone(good)
		flipped[i] ^= 0x40
		if got, err := apply(flipped, base); err == nil && !bytes.Equal(got, target) {
			t.Errorf("byte %d flipped: accepted", i)
		}
	}
}

// TestFrozen reads the delta of version 1 that lies in testdata, for ever.
func TestFrozen(t *testing.T) {
	base := make([]byte, 1001)
	for i := range base {
		base[i] = byte(i * i)
	}
	target := bytes.Clone(base)
	for _, at := range []int{0, 2, 3, 500, 501, 502, 503, 998, 1000} {
		target[at] ^= 0x55
	}
	path := filepath.Join("testdata", "v1", "one.delta")
	if os.Getenv("TRAINERD_FREEZE") != "" {
		raw, _ := encode(t, 2, base, target)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, raw, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := apply(raw, base); err != nil || !bytes.Equal(got, target) {
		t.Errorf("frozen delta: %v", err)
	}
	if again, _ := encode(t, 2, base, target); !bytes.Equal(again, raw) {
		t.Error("the writer writes version 1 in another way")
	}
}

// FuzzApply feeds what is no delta to the reader: it errs, or gives a file with
// the digest that the delta says.
func FuzzApply(f *testing.F) {
	base, target := make([]byte, 300), make([]byte, 300)
	for _, at := range []int{0, 1, 2, 77, 150, 151, 152, 153, 299} {
		target[at] = 9
	}
	for _, word := range []int{1, 2, 4, 8} {
		raw, _ := encode(f, word, base, target)
		f.Add(raw)
		f.Add(raw[:len(raw)/2])
	}
	two, _ := encode(f, 2, base, target, target, base)
	f.Add(two)
	f.Fuzz(func(t *testing.T, raw []byte) {
		r, err := NewReader(bytes.NewReader(raw))
		for err == nil {
			var file File
			if file, err = r.Next(); err != nil {
				break
			}
			var out bytes.Buffer
			if err = r.Apply(bytes.NewReader(base), &out); err == nil {
				if int64(out.Len()) != file.Size || Digest(sha256.Sum256(out.Bytes())) != file.Target {
					t.Fatalf("accepted %d bytes of %d", out.Len(), file.Size)
				}
			} else if out.Len() > len(base) {
				t.Fatalf("wrote %d bytes of a base of %d", out.Len(), len(base))
			}
		}
		if err != nil && err != io.EOF && fault.KindOf(err) != fault.Malformed && !errors.Is(err, ErrResult) &&
			!errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatalf("%v is no error of a delta", err)
		}
	})
}

func BenchmarkWrite(b *testing.B) {
	base := make([]byte, 64<<20)
	rng := rand.New(rand.NewPCG(1, 1))
	for i := range base {
		base[i] = byte(rng.Uint32())
	}
	target := bytes.Clone(base)
	for at := 0; at < len(target); at += 2 {
		if rng.IntN(50) == 0 {
			target[at]++
		}
	}
	b.SetBytes(int64(len(target)))
	for b.Loop() {
		w := NewWriter(io.Discard)
		if _, err := w.File(File{Name: "a", Size: int64(len(target)), Word: 2}, bytes.NewReader(base), bytes.NewReader(target)); err != nil {
			b.Fatal(err)
		}
	}
}

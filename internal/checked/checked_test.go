package checked

import (
	"bytes"
	"errors"
	"io"
	"math"
	"runtime"
	"testing"
	"time"
)

func TestEverythingReadsAsWritten(t *testing.T) {
	var raw bytes.Buffer
	w := NewWriter(&raw, "abcdefgh", 3)
	when := time.Date(2026, 2, 3, 4, 5, 6, 7, time.UTC)
	long := make([]int32, 5000)
	for i := range long {
		long[i] = int32(-i)
	}
	w.Uint8(7)
	w.Bool(true)
	w.Int64(-9)
	w.Float64(math.Inf(-1))
	w.Time(when)
	w.Time(time.Time{})
	w.String(string(bytes.Repeat([]byte("é"), 5000)))
	w.Int32s(long)
	w.Float32s([]float32{0.5})
	w.Float64s(nil)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	d, version, err := NewReader(bytes.NewReader(raw.Bytes()), "abcdefgh", 4)
	if err != nil || version != 3 {
		t.Fatal(version, err)
	}
	if d.Uint8() != 7 || !d.Bool() || d.Int64() != -9 || !math.IsInf(d.Float64(), -1) || !d.Time().Equal(when) || !d.Time().IsZero() {
		t.Fatal("a number differs")
	}
	if s := d.String(); len(s) != 10000 {
		t.Fatal(len(s))
	}
	got := d.Int32s()
	if len(got) != len(long) || got[4999] != -4999 || d.Float32s()[0] != 0.5 || d.Float64s() != nil {
		t.Fatal("a list differs")
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		magic  string
		newest uint32
	}{{"abcdefgi", 4}, {"abcdefgh", 2}} {
		if _, _, err := NewReader(bytes.NewReader(raw.Bytes()), c.magic, c.newest); !errors.Is(err, ErrDamaged) {
			t.Fatal(err)
		}
	}
}

// A length that lies costs no memory.
func TestALyingLengthAllocatesLittle(t *testing.T) {
	var raw bytes.Buffer
	w := NewWriter(&raw, "abcdefgh", 1)
	w.Len(math.MaxInt32)
	w.Raw(make([]byte, 100))
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	for name, read := range map[string]func(*Reader){
		"int32s":   func(d *Reader) { d.Int32s() },
		"float64s": func(d *Reader) { d.Float64s() },
		"strings":  func(d *Reader) { List(d, d.Len(), d.String) },
	} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		d, _, err := NewReader(bytes.NewReader(raw.Bytes()), "abcdefgh", 1)
		if err != nil {
			t.Fatal(err)
		}
		read(d)
		runtime.ReadMemStats(&after)
		if !errors.Is(d.Err(), ErrDamaged) || after.TotalAlloc-before.TotalAlloc > 1<<20 {
			t.Errorf("%s: %v after %d bytes", name, d.Err(), after.TotalAlloc-before.TotalAlloc)
		}
	}
}

type full struct{}

func (full) Write([]byte) (int, error) { return 0, io.ErrShortWrite }

func TestAWriteThatFailsIsSaid(t *testing.T) {
	w := NewWriter(full{}, "abcdefgh", 1)
	w.Raw(make([]byte, 1<<17))
	if err := w.Close(); !errors.Is(err, io.ErrShortWrite) {
		t.Fatal(err)
	}
}

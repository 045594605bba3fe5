//go:build cuda || cudaemu

package cuda

import (
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"unsafe"

	"gorgonia.org/tensor"

	"trainerd/kernels"
	"trainerd/kernels/hostmem"
)

// pinnable is host memory as captures have it.
func pinnable(t *testing.T, n int64) []byte {
	t.Helper()
	span, err := hostmem.Take(n, hostmem.Small)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(span.Free)
	return span.Bytes
}

// testPins downloads whatever there is into memory that is pinned and memory that
// is not: the bytes are the same, and beside what was asked for nothing is written.
func testPins(t *testing.T, d *Device) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	const n = stageBytes/4 + streamChunk/2 + 77 // more than a chunk, and more than the stage
	values, low := make([]float32, n), make([]int16, n)
	for i := range values {
		values[i], low[i] = float32(rng.NormFloat64()), int16(rng.Uint32())
	}
	take := func(k kernels.DType) kernels.Buffer {
		b, err := d.Alloc("test", k, n)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { d.Free(b) })
		d.Upload(b, tensor.New(tensor.WithShape(n), tensor.WithBacking(values)))
		return b
	}
	wide, half := take(kernels.F32), take(kernels.BF16)
	rem, err := d.Alloc("test", kernels.I16, n)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Free(rem) })
	d.Upload(rem, tensor.New(tensor.WithShape(n), tensor.WithBacking(low)))
	into := func(x any) *tensor.Dense { return tensor.New(tensor.WithShape(n), tensor.WithBacking(x)) }
	floats := func(b []byte) []float32 { return words[float32](b)[:n] }
	shorts := func(b []byte) []int16 { return words[int16](b)[:n] }
	bits := func(b []byte) []uint16 { return unsafe.Slice((*uint16)(unsafe.Pointer(unsafe.SliceData(b))), n) }

	memory := pinnable(t, 4*n+1<<20)
	unpin, err := d.Pin(memory)
	if err != nil {
		t.Fatal(err)
	}
	const skip, end = 4096 + 12, 4096 + 12 + 4*n // in the middle of pages
	for _, c := range []struct {
		name string
		get  func(b []byte) error
	}{
		{"float32", func(b []byte) error { return d.Download(into(floats(b)), wide) }},
		{"bfloat16 as float32", func(b []byte) error { return d.Download(into(floats(b)), half) }},
		{"bfloat16 as bits", func(b []byte) error { return d.Download(into(shorts(b)), half) }},
		{"remainder", func(b []byte) error { return d.Download(into(shorts(b)), rem) }},
		{"masters", func(b []byte) error { return d.DownloadMasters(floats(b), half, rem) }},
		{"rounded masters", func(b []byte) error {
			finite, err := d.DownloadRounded(bits(b), half, rem)
			if !finite {
				t.Errorf("not finite")
			}
			return err
		}},
		{"rounded", func(b []byte) error { _, err := d.DownloadRounded(bits(b), wide, nil); return err }},
	} {
		want := make([]byte, len(memory))
		for i := range memory {
			memory[i], want[i] = 0x5a, 0x5a
		}
		if err := c.get(want[skip:end]); err != nil {
			t.Fatal(err)
		}
		if err := c.get(memory[skip:end]); err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(memory, want) {
			t.Errorf("%s: pinned memory holds other bytes", c.name)
		}
	}
	// A value that is not finite is found in pinned memory too.
	values[n-1] = float32(math.Inf(1))
	d.Upload(wide, into(values))
	if finite, err := d.DownloadRounded(bits(memory[skip:end]), wide, nil); err != nil || finite {
		t.Errorf("infinity at the end: finite %v, %v", finite, err)
	}

	// What cannot be pinned is refused, and nothing is wrong with the device.
	for name, b := range map[string][]byte{"again": memory, "a part of it": memory[4096:8192], "not at a page": memory[8:], "nothing": nil} {
		if again, err := d.Pin(b); err == nil {
			t.Errorf("%s: no error", name)
			again()
		}
	}
	unpin()
	unpin()
	got := memory[skip:end]
	clear(got)
	if err := d.Download(into(floats(got)), wide); err != nil || !slices.Equal(floats(got), values) {
		t.Errorf("after unpin: %v, or other values", err)
	}
	if err := d.Sync(); err != nil {
		t.Fatal(err)
	}
}

// testPinsEnd closes a device with pinned memory and takes the pin away after it.
func testPinsEnd(t *testing.T, d *Device) {
	memory := pinnable(t, hostmem.Large)
	unpin, err := d.Pin(memory)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	unpin()
	if _, err := d.Pin(memory); err == nil {
		t.Error("a closed device pins")
	}
}

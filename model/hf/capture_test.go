package hf

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"io"
	"maps"
	"math"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"gorgonia.org/tensor"

	"trainerd/internal/fault"
	"trainerd/kernels/cpu"
	"trainerd/kernels/hostmem"
	"trainerd/model"
)

// written collects the files of a directory.
func written(t *testing.T, src model.Source, o WriteOptions) map[string][]byte {
	t.Helper()
	files := map[string][]byte{}
	err := Write(t.Context(), func(_ context.Context, name string, write func(io.Writer) error) error {
		var out bytes.Buffer
		err := write(&out)
		files[name] = out.Bytes()
		return err
	}, "", src, o)
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// wild are weights with values that are hard to round.
type wild struct{ model.Source }

func (w wild) Read(name string, dst *tensor.Dense) error {
	err := w.Source.Read(name, dst)
	x := dst.Float32s()
	copy(x, []float32{float32(math.NaN()), float32(math.Inf(-1)), 0, float32(math.Copysign(0, -1)), 1e-8, -6e-8, 65504, 1 + 1.0/256, 1 + 3.0/256, math.SmallestNonzeroFloat32})
	return err
}

// hard is a small model with such values in every tensor.
func hard(t *testing.T) model.Source {
	t.Helper()
	random, err := model.NewRandom(model.Config{Type: "qwen3", Vocab: 300, Hidden: 256, FFN: 8, Layers: 1, Heads: 2, KVHeads: 1, HeadDim: 4, MaxPositions: 64,
		RopeTheta: 100, NormEps: 1e-5, QKNorm: true, InitStd: 0.3, BOS: -1}, 3)
	if err != nil {
		t.Fatal(err)
	}
	return wild{random}
}

// TestCaptureWritesTheSameBytes holds every dtype, and the rounded directory
// that is written of an exact capture.
func TestCaptureWritesTheSameBytes(t *testing.T) {
	src := hard(t)
	n := CaptureElements(src)
	for _, dtype := range []string{"F32", "BF16", "F16"} {
		for _, exact := range []bool{false, true} {
			held := dtype
			if exact {
				held = "F32"
			}
			// One value more than is needed, to see that it is left alone.
			mem := CaptureMemory{Halves: make([]uint16, n+1)}
			if held == "F32" {
				mem = CaptureMemory{Floats: make([]float32, n+1)}
			}
			c, err := TakeCapture(t.Context(), src, held, mem)
			if err != nil {
				t.Fatal(err)
			}
			if mem.Floats != nil && mem.Floats[n] != 0 || mem.Halves != nil && mem.Halves[n] != 0 {
				t.Errorf("%s: the capture is larger than CaptureElements says", held)
			}
			got, want := written(t, c, WriteOptions{DType: dtype}), written(t, src, WriteOptions{DType: dtype})
			if !slices.Equal(slices.Sorted(maps.Keys(got)), slices.Sorted(maps.Keys(want))) {
				t.Errorf("%s of %s: files %v", dtype, held, slices.Sorted(maps.Keys(got)))
			}
			for name := range want {
				if !bytes.Equal(got[name], want[name]) {
					t.Errorf("%s of %s: %s differs", dtype, held, name)
				}
			}
		}
	}
}

// large are weights of which one does not fit in a half float.
type large struct{ model.Source }

func (l large) Read(name string, dst *tensor.Dense) error {
	err := l.Source.Read(name, dst)
	if x := dst.Float32s(); name == "model.embed_tokens.weight" {
		x[len(x)-1] = -7e4
	}
	return err
}

func TestCaptureRefuses(t *testing.T) {
	src, err := model.NewRandom(model.Config{Type: "llama", Vocab: 70000, Hidden: 2, FFN: 2, Layers: 1, Heads: 1, KVHeads: 1, HeadDim: 2, MaxPositions: 8,
		RopeTheta: 100, NormEps: 1e-5, Tied: true, BOS: -1}, 3)
	if err != nil {
		t.Fatal(err)
	}
	mem := CaptureMemory{Halves: make([]uint16, CaptureElements(src))}
	if _, err := TakeCapture(t.Context(), large{src}, "F16", mem); !isCode(err, "dtype_overflow") {
		t.Errorf("a value beyond float16: %v", err)
	}
	if _, err := TakeCapture(t.Context(), large{src}, "BF16", mem); err != nil {
		t.Errorf("the same in bfloat16: %v", err)
	}
	if _, err := TakeCapture(t.Context(), src, "I8", mem); fault.KindOf(err) != fault.Invalid {
		t.Errorf("an unknown dtype: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := TakeCapture(ctx, src, "BF16", mem); err == nil {
		t.Error("a cancelled capture succeeds")
	}
}

func isCode(err error, code string) bool {
	f, ok := fault.As(err)
	return ok && f.Code == code
}

// TestCaptureMemoryIsUsedAgain takes captures of two models in every dtype into
// the same bytes, one after the other and larger after smaller: nothing of an
// earlier one comes out of a later one, and nothing is written past its end.
func TestCaptureMemoryIsUsedAgain(t *testing.T) {
	small, err := model.NewRandom(model.Config{Type: "llama", Vocab: 30, Hidden: 4, FFN: 6, Layers: 2, Heads: 2, KVHeads: 1, HeadDim: 2, MaxPositions: 8,
		RopeTheta: 100, NormEps: 1e-5, BOS: -1}, 5)
	if err != nil {
		t.Fatal(err)
	}
	big := hard(t)
	span, err := hostmem.Take(int64(4*CaptureElements(big)+8), hostmem.Small)
	if err != nil {
		t.Fatal(err)
	}
	defer span.Free()
	for i := range span.Bytes {
		span.Bytes[i] = 0xa5
	}
	for i, src := range []model.Source{big, small, big, small, small, big} {
		dtype := []string{"BF16", "F32", "F16"}[i%3]
		n := CaptureElements(src)
		var mem CaptureMemory
		rest := span.Bytes
		if dtype == "F32" {
			mem.Floats, rest = hostmem.Floats(rest, n)
		} else {
			mem.Halves, rest = hostmem.Halves(rest, n)
		}
		before := bytes.Clone(rest)
		c, err := TakeCapture(t.Context(), src, dtype, mem)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(rest, before) {
			t.Errorf("capture %d in %s: bytes past its end were written", i, dtype)
		}
		o := WriteOptions{DType: dtype}
		if d := cmp.Diff(written(t, src, o), written(t, c, o)); d != "" {
			t.Errorf("capture %d in %s (-source +capture):\n%s", i, dtype, d)
		}
	}
}

// plain hides what a source can do besides.
type plain struct{ model.Source }

// huge are weights of which one is given.
type huge struct {
	model.Source
	value float32
}

func (h huge) Read(name string, dst *tensor.Dense) error {
	err := h.Source.Read(name, dst)
	if name == "model.norm.weight" {
		dst.Float32s()[1] = h.value
	}
	return err
}

// TestCaptureOfADevice holds what a device rounded to what is rounded here.
func TestCaptureOfADevice(t *testing.T) {
	for name, value := range map[string]float32{"small": 1, "largest": math.Float32frombits(0x7f7f7fff), "too large": math.MaxFloat32} {
		dev, err := cpu.New(2)
		if err != nil {
			t.Fatal(err)
		}
		defer dev.Close()
		m, err := model.Load(t.Context(), dev, huge{hard(t).(wild).Source, value}, model.Options{MaxTokens: 8})
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		src := m.Export()
		if _, ok := src.(model.BF16Reader); !ok {
			t.Fatal("the device does not round: nothing is tested")
		}
		take := func(src model.Source) (*Capture, error) {
			return TakeCapture(t.Context(), src, "BF16", CaptureMemory{Halves: make([]uint16, CaptureElements(src))})
		}
		got, err := take(src)
		want, werr := take(plain{src})
		if isCode(err, "dtype_overflow") != isCode(werr, "dtype_overflow") || isCode(err, "dtype_overflow") != (name == "too large") {
			t.Errorf("%s: %v, without the device's rounding %v", name, err, werr)
		}
		if err != nil {
			continue
		}
		if d := cmp.Diff(written(t, want, WriteOptions{}), written(t, got, WriteOptions{})); d != "" {
			t.Errorf("%s (-rounded here +on the device):\n%s", name, d)
		}
	}
}

// TestPublishedBytesAreFrozen holds the files of one model to the digests that
// they had before captures were written without a conversion: whatever way the
// bytes take, readers that compare digests see no difference.
func TestPublishedBytesAreFrozen(t *testing.T) {
	src := hard(t)
	for dtype, want := range map[string]map[string]string{
		"F32": {
			"config.json": "a264e9668fbf42eb", "model.safetensors.index.json": "9197fcd283141870",
			"model-00001-of-00003.safetensors": "40253797b38a1cc3", "model-00002-of-00003.safetensors": "2cbfa73182471929", "model-00003-of-00003.safetensors": "44d6524001b0e83e",
		},
		"BF16": {
			"config.json": "9f07a49d9331fef2", "model.safetensors.index.json": "a2740a39822e5939",
			"model-00001-of-00003.safetensors": "62fe4a693c7aae04", "model-00002-of-00003.safetensors": "1ffe9968f136053c", "model-00003-of-00003.safetensors": "daf8371c2f2b73dc",
		},
		"F16": {
			"config.json": "5a0d19e6a0ec8e13", "model.safetensors.index.json": "a2740a39822e5939",
			"model-00001-of-00003.safetensors": "f20b9a4d32872116", "model-00002-of-00003.safetensors": "7086dff93af88b53", "model-00003-of-00003.safetensors": "bfebe670bf5c8906",
		},
	} {
		mem := CaptureMemory{Floats: make([]float32, CaptureElements(src)), Halves: make([]uint16, CaptureElements(src))}
		captured, err := TakeCapture(t.Context(), src, dtype, mem)
		if err != nil {
			t.Fatal(err)
		}
		for where, from := range map[string]model.Source{"source": src, "capture": captured} {
			got := map[string]string{}
			for name, data := range written(t, from, WriteOptions{DType: dtype, ShardBytes: 1 << 16}) {
				sum := sha256.Sum256(data)
				got[name] = hex.EncodeToString(sum[:8])
			}
			if d := cmp.Diff(want, got); d != "" {
				t.Errorf("%s of a %s (-want +got):\n%s", dtype, where, d)
			}
		}
	}
}

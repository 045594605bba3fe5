package model_test

import (
	"bytes"
	"errors"
	"flag"
	"math/rand/v2"
	"os"
	"testing"

	"trainerd/internal/fault"
	"trainerd/model"
)

// train runs steps on batches that depend on the step's number only.
func train(t testing.TB, m *model.Model, steps int) {
	t.Helper()
	for range steps {
		b := pack(randomSamples(rand.New(rand.NewPCG(uint64(m.Steps()), 9)), m.Config().Vocab), true)
		if _, err := m.ForwardBackward(b, crossEntropy(len(b.Rows))); err != nil {
			t.Fatal(err)
		}
		if _, err := m.OptimStep(model.AdamW{LR: 0.01, Beta1: 0.9, Beta2: 0.95, Eps: 1e-8, WeightDecay: 0.1, MaxGradNorm: 1}); err != nil {
			t.Fatal(err)
		}
	}
}

// TestStateRoundTrip: weights and state taken up by a fresh model go on exactly
// as the first one does.
func TestStateRoundTrip(t *testing.T) {
	for name, cfg := range configs() {
		for format, opt := range formats() {
			t.Run(name+"/"+format, func(t *testing.T) {
				dev := newDevice(t)
				opt.Reference = true
				a := load(t, dev, randomSource(t, cfg, 4), opt)
				train(t, a, 3)
				if err := a.SyncReference(0.3); err != nil {
					t.Fatal(err)
				}
				var state bytes.Buffer
				if err := a.SaveState(&state); err != nil {
					t.Fatal(err)
				}
				b := load(t, dev, a.Export(), opt)
				if err := b.LoadState(bytes.NewReader(state.Bytes())); err != nil {
					t.Fatal(err)
				}
				var again bytes.Buffer
				if err := b.SaveState(&again); err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(state.Bytes(), again.Bytes()) {
					t.Error("a loaded state is saved differently")
				}
				train(t, a, 2)
				train(t, b, 2)
				if a.Steps() != 5 || b.Steps() != 5 {
					t.Errorf("%d and %d steps, expected 5", a.Steps(), b.Steps())
				}
				sameBits(t, "weights two steps on", weightsOf(t, b), weightsOf(t, a))
			})
		}
	}
}

var update = flag.Bool("update", false, "write testdata anew")

// TestFrozenStates reads frozen state files, which every later version must be able
// to, and writes the same bytes. -update makes the files; once released they stay.
func TestFrozenStates(t *testing.T) {
	for name, opt := range map[string]model.Options{"state.bin": trainOptions(), "state_compact.bin": formats()["compact moments"]} {
		opt.Reference = true
		m := load(t, newDevice(t), randomSource(t, tinyStateModel, 1), opt)
		path := "testdata/v1/" + name
		if *update {
			train(t, m, 2)
			var buf bytes.Buffer
			if err := m.SaveState(&buf); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, buf.Bytes(), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		frozen, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := m.LoadState(bytes.NewReader(frozen)); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		var again bytes.Buffer
		if err := m.SaveState(&again); err != nil {
			t.Fatal(err)
		}
		if m.Steps() != 2 || !bytes.Equal(frozen, again.Bytes()) {
			t.Errorf("%s: %d steps, expected 2 and the bytes that were read", name, m.Steps())
		}
	}
}

// FuzzLoadState: whatever the bytes, LoadState returns a fault or has read a state that is saved the same.
func FuzzLoadState(f *testing.F) {
	for _, name := range []string{"state.bin", "state_compact.bin"} {
		frozen, err := os.ReadFile("testdata/v1/" + name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(frozen, name != "state.bin")
		f.Add(frozen[:40], name != "state.bin")
	}
	dev := newDevice(f)
	f.Fuzz(func(t *testing.T, data []byte, compact bool) {
		opt := trainOptions()
		opt.Reference, opt.CompactMoments = true, compact
		m := load(t, dev, randomSource(t, tinyStateModel, 1), opt)
		if err := m.LoadState(bytes.NewReader(data)); err != nil {
			if k := fault.KindOf(err); k != fault.Malformed && k != fault.Invalid {
				t.Fatalf("%v is neither malformed nor invalid", err)
			}
			return
		}
		var again bytes.Buffer
		if err := m.SaveState(&again); err != nil || !bytes.HasPrefix(data, again.Bytes()) {
			t.Fatalf("read %d bytes, wrote %d others (%v)", len(data), again.Len(), err)
		}
	})
}

func TestStateRefuses(t *testing.T) {
	cfg := configs()["llama-tied"]
	dev, src := newDevice(t), randomSource(t, cfg, 4)
	m := load(t, dev, src, trainOptions())
	train(t, m, 1)
	var buf bytes.Buffer
	if err := m.SaveState(&buf); err != nil {
		t.Fatal(err)
	}
	good := buf.Bytes()
	flip := func(at int) []byte {
		bad := bytes.Clone(good)
		bad[at] ^= 0x10
		return bad
	}
	for name, bad := range map[string][]byte{
		"empty": nil, "magic": flip(0), "version": flip(8), "length": flip(12), "header": flip(17),
		"body": flip(len(good) / 2), "end": flip(len(good) - 1), "truncated": good[:len(good)-9], "cut in the header": good[:20],
	} {
		target := load(t, dev, src, trainOptions())
		err := target.LoadState(bytes.NewReader(bad))
		if k := fault.KindOf(err); err == nil || (k != fault.Malformed && k != fault.Invalid) {
			t.Errorf("%s: %v, expected a malformed or invalid fault", name, err)
		}
		// Either nothing was changed, or the model refuses to work half restored.
		_, err = target.Score(pack([]sample{{[]int32{1}, [][]int32{{2}}}}, true), model.Policy, 1)
		if half := name == "body" || name == "end" || name == "truncated"; half != (fault.KindOf(err) == fault.Unavailable && err != nil) {
			t.Errorf("%s: scoring afterwards gives %v", name, err)
		}
	}
	other := cfg
	other.Layers++
	if err := load(t, dev, randomSource(t, other, 4), trainOptions()).LoadState(bytes.NewReader(good)); fault.KindOf(err) != fault.Invalid || err == nil {
		t.Errorf("state of another model: %v", err)
	}
	withRef := trainOptions()
	withRef.Reference = true
	if err := load(t, dev, src, withRef).LoadState(bytes.NewReader(good)); fault.KindOf(err) != fault.Invalid || err == nil {
		t.Errorf("state without a reference: %v", err)
	}
	if err := m.SaveState(failingWriter{}); !errors.Is(err, errDisk) {
		t.Errorf("full disk: %v", err)
	}
	if err := load(t, dev, src, model.Options{MaxTokens: 8}).SaveState(&buf); fault.KindOf(err) != fault.Invalid || err == nil {
		t.Errorf("no optimizer: %v", err)
	}
}

var errDisk = errors.New("disk full")

type failingWriter struct{}

func (failingWriter) Write([]byte) (int, error) { return 0, errDisk }

// TestCapturedStateIsOfItsMoment: a captured state saves what SaveState wrote
// then, twice and whatever the model does meanwhile.
func TestCapturedStateIsOfItsMoment(t *testing.T) {
	for i, reference := range []bool{false, true, false, true} {
		opt := trainOptions()
		opt.Reference, opt.CompactMoments = reference, i >= 2
		m := load(t, newDevice(t), randomSource(t, configs()["qwen2"], 4), opt)
		train(t, m, 2)
		var want bytes.Buffer
		if err := m.SaveState(&want); err != nil {
			t.Fatal(err)
		}
		s, err := m.CaptureState(make([]float32, m.StateElements()))
		if err != nil {
			t.Fatal(err)
		}
		train(t, m, 1)
		if reference {
			if err := m.SyncReference(1); err != nil {
				t.Fatal(err)
			}
		}
		for range 2 {
			var got bytes.Buffer
			if err := s.Save(&got); err != nil || !bytes.Equal(got.Bytes(), want.Bytes()) {
				t.Errorf("reference %v: a captured state differs from the saved one, %v", reference, err)
			}
		}
	}
}

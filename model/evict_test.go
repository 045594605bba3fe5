package model_test

import (
	"bytes"
	"math/rand/v2"
	"testing"

	"trainerd/internal/fault"
	"trainerd/kernels/cpu"
	"trainerd/model"
)

// TestEvictRestore: a model that leaves the device and comes back goes on bit
// for bit, also in the middle of an accumulation, on a device that has room for
// one of two.
func TestEvictRestore(t *testing.T) {
	for name, cfg := range configs() {
		for format, opt := range formats() {
			t.Run(name+"/"+format, func(t *testing.T) {
				opt.Reference = true
				plan, err := model.Plan(newDevice(t), cfg, opt)
				if err != nil {
					t.Fatal(err)
				}
				dev, err := cpu.New(1, cpu.Memory(plan.Total+plan.Total/2))
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { dev.Close() })
				half := func(m *model.Model) { // a gradient that is not applied yet
					b := pack(randomSamples(rand.New(rand.NewPCG(5, 5)), cfg.Vocab), true)
					if _, err := m.ForwardBackward(b, crossEntropy(len(b.Rows))); err != nil {
						t.Fatal(err)
					}
				}
				run := func(between func(*model.Model)) *model.Model {
					m := load(t, dev, randomSource(t, cfg, 4), opt)
					train(t, m, 2)
					if err := m.SyncReference(0.3); err != nil {
						t.Fatal(err)
					}
					half(m)
					between(m)
					train(t, m, 2) // adds to the gradient
					return m
				}
				alone := run(func(*model.Model) {})
				weights := weightsOf(t, alone)
				var state bytes.Buffer
				if err := alone.SaveState(&state); err != nil {
					t.Fatal(err)
				}
				if err := alone.Close(); err != nil {
					t.Fatal(err)
				}
				free := dev.Info().MemFree

				moved := run(func(m *model.Model) {
					if err := m.Restore(); fault.KindOf(err) != fault.Conflict {
						t.Errorf("restore of a model on the device: %v", err)
					}
					if err := m.Evict(); err != nil {
						t.Fatal(err)
					}
					if !m.Evicted() || dev.Info().MemFree != free {
						t.Errorf("an evicted model holds %d bytes", free-dev.Info().MemFree)
					}
					if _, err := m.OptimStep(model.AdamW{LR: 0.01, Eps: 1e-8}); fault.KindOf(err) != fault.Unavailable {
						t.Errorf("step of an evicted model: %v", err)
					}
					if err := m.SaveState(&bytes.Buffer{}); fault.KindOf(err) != fault.Unavailable {
						t.Errorf("state of an evicted model: %v", err)
					}
					other := load(t, dev, randomSource(t, cfg, 9), opt)
					train(t, other, 1)
					if err := m.Restore(); fault.KindOf(err) != fault.TooLarge || !m.Evicted() {
						t.Errorf("restore onto a full device: %v", err)
					}
					if err := other.Close(); err != nil {
						t.Fatal(err)
					}
					if err := m.Restore(); err != nil {
						t.Fatal(err)
					}
				})
				sameBits(t, "weights", weightsOf(t, moved), weights)
				var again bytes.Buffer
				if err := moved.SaveState(&again); err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(state.Bytes(), again.Bytes()) {
					t.Error("optimizer state or reference differ")
				}
			})
		}
	}
}

// TestCloseEvicted: an evicted model can be closed, and is gone then.
func TestCloseEvicted(t *testing.T) {
	for _, cfg := range configs() {
		m := load(t, newDevice(t), randomSource(t, cfg, 4), trainOptions())
		if err := m.Evict(); err != nil {
			t.Fatal(err)
		}
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
		if err := m.Restore(); fault.KindOf(err) != fault.Conflict {
			t.Errorf("restore of a closed model: %v", err)
		}
		return
	}
}

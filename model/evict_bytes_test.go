package model

import (
	"testing"

	"trainerd/kernels/cpu"
)

// TestHostBytes: what is planned for an evicted model is what it takes.
func TestHostBytes(t *testing.T) {
	dev, err := cpu.New(1)
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	cfg := Config{Type: "llama", Vocab: 61, Hidden: 16, FFN: 24, Layers: 2, Heads: 2, KVHeads: 1, HeadDim: 8, MaxPositions: 32, RopeTheta: 10000, NormEps: 1e-5, InitStd: 0.1, BOS: -1}
	for _, opt := range []Options{{MaxTokens: 8}, {MaxTokens: 8, Train: true}, {MaxTokens: 8, Train: true, Reference: true},
		{MaxTokens: 8, Train: true, CompactMoments: true, BF16Gradients: true}} {
		m, err := allocate(dev, cfg, opt)
		if err != nil {
			t.Fatal(err)
		}
		if m.arena, err = dev.NewArena(64); err != nil {
			t.Fatal(err)
		}
		want, err := HostBytes(dev, cfg, opt)
		if err != nil {
			t.Fatal(err)
		}
		if err := m.Evict(); err != nil {
			t.Fatal(err)
		}
		got := int64(0)
		for _, h := range []hostCopy{m.host.policy, m.host.ref, m.host.grad, m.host.m, m.host.scale, m.host.v, m.host.rem} {
			got += h.bytes()
		}
		if got != want {
			t.Errorf("%+v: %d bytes, planned %d", opt, got, want)
		}
	}
}

package model

import (
	"math"
	"testing"

	"trainerd/kernels"
	"trainerd/kernels/cpu"
)

// TestHalves: every bfloat16, NaNs of any kind included, survives the way to host memory and back.
func TestHalves(t *testing.T) {
	src, back, half := make([]float32, 1<<16), make([]float32, 1<<16), make([]uint16, 1<<16)
	for i := range src {
		src[i] = math.Float32frombits(uint32(i) << 16)
	}
	narrow(half, src)
	widen(back, half)
	for i := range src {
		if math.Float32bits(back[i]) != uint32(i)<<16 {
			t.Fatalf("%#x came back as %#x", uint32(i)<<16, math.Float32bits(back[i]))
		}
	}
}

// TestHostBytes: what is planned for an evicted model is what it takes.
func TestHostBytes(t *testing.T) {
	dev, err := cpu.New(1)
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	cfg := Config{Type: "llama", Vocab: 61, Hidden: 16, FFN: 24, Layers: 2, Heads: 2, KVHeads: 1, HeadDim: 8, MaxPositions: 32, RopeTheta: 10000, NormEps: 1e-5, InitStd: 0.1, BOS: -1}
	for _, opt := range []Options{{MaxTokens: 8}, {MaxTokens: 8, Train: true}, {MaxTokens: 8, Train: true, Reference: true}} {
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
		for _, h := range []halves{m.host.policy, m.host.ref, m.host.grad, m.host.m, m.host.v} {
			got += int64(len(h.f)*kernels.F32.Size() + len(h.h)*2)
		}
		if got += int64(2 * len(m.host.rem)); got != want {
			t.Errorf("%+v: %d bytes, planned %d", opt, got, want)
		}
	}
}

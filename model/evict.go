package model

import (
	"fmt"
	"math"

	"trainerd/internal/fault"
	"trainerd/kernels"
)

// errEvicted is what every use of an evicted model gives.
var errEvicted = fault.New(fault.Unavailable, "model_evicted", "the model is in host memory, not on the device")

// evicted is a model's state in host memory, element for element as the device
// held it, padding included.
type evicted struct {
	policy, ref, grad, m, v halves
	rem                     []int16
}

// halves are float32 values, or the upper halves of such that a BF16 buffer held:
// widening them is exact, and so is rounding them back.
type halves struct {
	f []float32
	h []uint16
}

// evictChunk is how many elements are moved at once.
const evictChunk = 1 << 20

// HostBytes is the host memory that the model takes while it is evicted: its
// weights with their remainders, its reference and its moments. Gradients are
// dropped by every step, caches and scratch by every call.
func HostBytes(dev kernels.Device, cfg Config, opt Options) (int64, error) {
	if err := cfg.Validate(); err != nil {
		return 0, err
	}
	info := dev.Info()
	size := int64(newLayout(cfg, max(1, info.Alignment/info.Compute.Size())).size)
	flat := size * int64(info.Compute.Size())
	n := flat
	if opt.Train {
		n += 2 * 4 * size
		if info.Compute != kernels.F32 {
			n += int64(kernels.I16.Size()) * size
		}
	}
	if opt.Reference {
		n += flat
	}
	return n, nil
}

// Evicted reports whether the model is in host memory.
func (m *Model) Evicted() bool { return m.host != nil }

// Evict copies the model's state to host memory and frees all its device memory.
// Every use but Restore and Close is refused from then on. On an error the model
// stays on the device as it is. Gradients that were accumulated and not yet
// applied are kept.
func (m *Model) Evict() error {
	if m.broken != nil {
		return m.broken
	}
	h := &evicted{}
	var err error
	save := func(dst *halves, src kernels.Buffer) {
		if err == nil && src != nil {
			err = m.download(dst, src)
		}
	}
	save(&h.policy, m.policy.flat)
	if m.ref != nil {
		save(&h.ref, m.ref.flat)
	}
	if m.grad != nil && !m.fresh {
		save(&h.grad, m.grad.flat)
	}
	save(&h.m, m.m)
	save(&h.v, m.v)
	if err == nil && m.rem != nil {
		h.rem = make([]int16, m.rem.Len())
		err = m.dev.Download(denseI16(h.rem), m.rem)
	}
	if err == nil {
		err = m.dev.Sync()
	}
	if err != nil {
		return fmt.Errorf("evict the model: %w", err)
	}
	m.peak = m.arena.Peak()
	m.free()
	m.host, m.broken = h, errEvicted
	return nil
}

// Restore brings an evicted model back, bit for bit. On an error it stays
// evicted and may be restored later.
func (m *Model) Restore() error {
	h := m.host
	if h == nil {
		return fault.New(fault.Conflict, "model_not_evicted", "restore the model: it is on the device")
	}
	n, err := allocate(m.dev, m.cfg, m.opt)
	if err != nil {
		return fmt.Errorf("restore the model: %w", err)
	}
	if n.arena, err = m.dev.NewArena(m.scratch); err != nil {
		n.free()
		return fmt.Errorf("restore the model: allocate scratch: %w", err)
	}
	n.upload(n.policy.flat, h.policy)
	if n.ref != nil {
		n.upload(n.ref.flat, h.ref)
	}
	if n.grad != nil {
		if m.fresh {
			n.dev.Zero(n.grad.flat) // padding is zero for ever
		} else {
			n.upload(n.grad.flat, h.grad)
		}
	}
	if n.m != nil {
		n.upload(n.m, h.m)
		n.upload(n.v, h.v)
	}
	if n.rem != nil {
		n.dev.Upload(n.rem, denseI16(h.rem))
	}
	if err := n.dev.Sync(); err != nil {
		n.free()
		return fmt.Errorf("restore the model: %w", err)
	}
	m.policy, m.ref, m.grad, m.rem, m.m, m.v = n.policy, n.ref, n.grad, n.rem, n.m, n.v
	m.cache, m.sumsq, m.coef, m.arena, m.owned = n.cache, n.sumsq, n.coef, n.arena, n.owned
	m.host, m.broken = nil, nil
	return nil
}

// Abandon forgets a model whose device was lost: there is nothing to free any
// more, and the host copy of an evicted one is dropped too.
func (m *Model) Abandon() {
	m.owned, m.arena, m.host = nil, nil, nil
	m.broken = fault.New(fault.Unavailable, "model_closed", "the model's device was lost")
}

func (m *Model) download(dst *halves, src kernels.Buffer) error {
	n := src.Len()
	if src.Type() == kernels.F32 {
		dst.f = make([]float32, n)
		return m.dev.Download(denseF32(dst.f), src)
	}
	dst.h = make([]uint16, n)
	chunk := make([]float32, min(n, evictChunk))
	for from := 0; from < n; from += len(chunk) {
		part := chunk[:min(len(chunk), n-from)]
		if err := m.dev.Download(denseF32(part), src.Slice(from, from+len(part))); err != nil {
			return err
		}
		narrow(dst.h[from:], part)
	}
	return nil
}

func (m *Model) upload(dst kernels.Buffer, src halves) {
	if src.f != nil {
		m.dev.Upload(dst, denseF32(src.f))
		return
	}
	chunk := make([]float32, min(len(src.h), evictChunk))
	for from := 0; from < len(src.h); from += len(chunk) {
		part := chunk[:min(len(chunk), len(src.h)-from)]
		widen(part, src.h[from:])
		m.dev.Upload(dst.Slice(from, from+len(part)), denseF32(part))
	}
}

// narrow keeps the upper halves of values whose lower halves are zero.
func narrow(dst []uint16, src []float32) {
	for i, x := range src {
		dst[i] = uint16(math.Float32bits(x) >> 16)
	}
}

// widen undoes narrow.
func widen(dst []float32, src []uint16) {
	for i := range dst {
		dst[i] = math.Float32frombits(uint32(src[i]) << 16)
	}
}

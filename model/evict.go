package model

import (
	"fmt"

	"trainerd/internal/fault"
	"trainerd/kernels"
)

// errEvicted is what every use of an evicted model gives.
var errEvicted = fault.New(fault.Unavailable, "model_evicted", "the model is in host memory, not on the device")

// evicted is a model's state in host memory, element for element as the device
// held it, padding included.
type evicted struct {
	policy, ref, grad, m, v, scale hostCopy
	rem                            hostCopy
}

// hostCopy is a buffer's elements; exactly the slice of its type is set. h holds
// int16, or the bits of bfloat16.
type hostCopy struct {
	f []float32
	h []int16
	b []int8
}

func (c hostCopy) bytes() int64 { return int64(4*len(c.f) + 2*len(c.h) + len(c.b)) }

// HostBytes is the host memory that the model takes while it is evicted: its
// weights with their remainders, its reference and its moments. Gradients are
// dropped by every step, caches and scratch by every call.
func HostBytes(dev kernels.Device, cfg Config, opt Options) (int64, error) {
	if err := cfg.Validate(); err != nil {
		return 0, err
	}
	info := dev.Info()
	size := int64(newLayout(cfg, opt.alignment(info)).size)
	flat := size * int64(info.Compute.Size())
	n := flat
	if opt.Train {
		if opt.CompactMoments {
			n += 3*size + 4*int64(kernels.MomentBlocks(int(size)))
		} else {
			n += 2 * 4 * size
		}
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
	save := func(dst *hostCopy, src kernels.Buffer) {
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
	save(&h.scale, m.scale)
	save(&h.v, m.v)
	save(&h.rem, m.rem)
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
	n.upload(n.m, h.m)
	n.upload(n.scale, h.scale)
	n.upload(n.v, h.v)
	n.upload(n.rem, h.rem)
	if err := n.dev.Sync(); err != nil {
		n.free()
		return fmt.Errorf("restore the model: %w", err)
	}
	m.policy, m.ref, m.grad, m.rem, m.m, m.scale, m.v = n.policy, n.ref, n.grad, n.rem, n.m, n.scale, n.v
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

func (m *Model) download(dst *hostCopy, src kernels.Buffer) error {
	n := src.Len()
	switch src.Type() {
	case kernels.F32:
		dst.f = make([]float32, n)
		return m.dev.Download(denseF32(dst.f), src)
	case kernels.I8:
		dst.b = make([]int8, n)
		return m.dev.Download(denseI8(dst.b), src)
	}
	dst.h = make([]int16, n)
	return m.dev.Download(denseI16(dst.h), src)
}

// upload undoes download; a buffer that is nil has nothing to take.
func (m *Model) upload(dst kernels.Buffer, src hostCopy) {
	if dst == nil {
		return
	}
	switch dst.Type() {
	case kernels.F32:
		m.dev.Upload(dst, denseF32(src.f))
	case kernels.I8:
		m.dev.Upload(dst, denseI8(src.b))
	default:
		m.dev.Upload(dst, denseI16(src.h))
	}
}

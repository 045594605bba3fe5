package trainer

import (
	"context"
	"fmt"
	"io"
	"sync"

	"trainerd/model"
	"trainerd/model/hf"
)

// captureBudget bounds the host memory that all captures of a server take.
type captureBudget struct {
	limit int64

	mu   sync.Mutex
	used int64
}

// take reserves n bytes of which free are there; why says what they are too many for.
func (b *captureBudget) take(n, free int64) (why string, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case n > b.limit-b.used:
		return fmt.Sprintf("a capture of %d bytes is over the limit of %d (max_capture_bytes) with %d in use", n, b.limit, b.used), false
	case n > free:
		return fmt.Sprintf("a capture of %d bytes does not fit: the host has %d free", n, free), false
	}
	b.used += n
	return "", true
}

func (b *captureBudget) give(n int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.used -= n
}

// content is what a checkpoint is written from: a capture in host memory, or the
// device itself, which then has to stand still.
type content struct {
	step    int64
	weights model.Source
	exact   bool                  // the weights are float32, and hf/ may be rounded
	state   func(io.Writer) error // optimizer state; nil without a snapshot
	queue   *queueState           // that belongs to it; nil without
	base    *baseModel            // what hf/ carries along
	bytes   int64                 // host memory held; 0 when read from the device
}

// onDevice is the content of a checkpoint that is read from the device while it
// is written. Called on the device's goroutine.
func (j *Job) onDevice(snapshot bool) *content {
	c := &content{step: j.weights, weights: j.model.Export(), exact: true, base: j.base}
	if snapshot {
		c.state, c.queue = j.model.SaveState, j.captureQueue()
	}
	return c
}

// captureBytes is the host memory of a capture. A snapshot holds the exact
// weights, from which hf/ is rounded when it is written. Called on the device's goroutine.
func (j *Job) captureBytes(snapshot bool) int64 {
	n := int64(hf.CaptureElements(j.model.Export()))
	switch {
	case snapshot:
		return 4*n + 4*int64(j.model.StateElements())
	case j.base.dtype == "F32":
		return 4 * n
	}
	return 2 * n
}

// capture copies what a checkpoint is made of to host memory. The buffers are
// plain memory here; a device that copies faster to pinned memory would be asked
// for them in this place, the only one that makes them. Called on the device's goroutine.
func (j *Job) capture(ctx context.Context, snapshot bool) (*content, error) {
	src, dtype := j.model.Export(), j.base.dtype
	if snapshot {
		dtype = "F32"
	}
	n := hf.CaptureElements(src)
	var mem hf.CaptureMemory
	if dtype == "F32" {
		mem.Floats = make([]float32, n)
	} else {
		mem.Halves = make([]uint16, n)
	}
	weights, err := hf.TakeCapture(ctx, src, dtype, mem)
	if err != nil {
		return nil, fmt.Errorf("capture weights: %w", err)
	}
	c := &content{step: j.weights, weights: weights, exact: dtype == "F32", base: j.base, bytes: j.captureBytes(snapshot)}
	if snapshot {
		state, err := j.model.CaptureState(make([]float32, j.model.StateElements()))
		if err != nil {
			return nil, fmt.Errorf("capture the optimizer state: %w", err)
		}
		c.state, c.queue = state.Save, j.captureQueue()
	}
	return c, nil
}

// hostFree is how much host memory a capture may take besides what jobs on a CPU
// device are promised. With another device only the limit bounds captures.
func (m *Manager) hostFree() int64 {
	dev, err := m.device()
	if err != nil {
		return 0
	}
	info := dev.Info()
	if info.Name != "cpu" || m.opts.DeviceMemory > 0 { // which leaves host memory for this
		return m.captures.limit
	}
	return m.home.spare(info.MemFree)
}

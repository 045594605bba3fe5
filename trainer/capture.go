package trainer

import (
	"context"
	"fmt"
	"io"

	"trainerd/kernels/hostmem"
	"trainerd/model"
	"trainerd/model/hf"
)

// content is what a checkpoint is written from: a capture in host memory, or the
// device itself, which then has to stand still.
type content struct {
	step    int64
	weights model.Source
	exact   bool                  // the weights are float32, and hf/ may be rounded
	state   func(io.Writer) error // optimizer state; nil without a snapshot
	queue   *queueState           // that belongs to it; nil without
	base    *baseModel            // what hf/ carries along
	print   *fingerprint          // of the device that the weights are from
}

// onDevice is the content of a checkpoint that is read from the device while it
// is written. Called on the device's goroutine.
func (j *Job) onDevice(snapshot bool) *content {
	c := &content{step: j.weights, weights: j.model.Export(), exact: true, base: j.base, print: j.print()}
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

// capture copies what a checkpoint is made of to raw, host memory of captureBytes.
// Called on the device's goroutine.
func (j *Job) capture(ctx context.Context, snapshot bool, raw []byte) (*content, error) {
	src, dtype := j.model.Export(), j.base.dtype
	if snapshot {
		dtype = "F32"
	}
	n := hf.CaptureElements(src)
	var mem hf.CaptureMemory
	if dtype == "F32" {
		mem.Floats, raw = hostmem.Floats(raw, n)
	} else {
		mem.Halves, raw = hostmem.Halves(raw, n)
	}
	weights, err := hf.TakeCapture(ctx, src, dtype, mem)
	if err != nil {
		return nil, fmt.Errorf("capture weights: %w", err)
	}
	c := &content{step: j.weights, weights: weights, exact: dtype == "F32", base: j.base, print: j.print()}
	if snapshot {
		values, _ := hostmem.Floats(raw, j.model.StateElements())
		state, err := j.model.CaptureState(values)
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

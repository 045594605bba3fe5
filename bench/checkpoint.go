package bench

import (
	"context"
	"fmt"
	"io"
	"sort"
	"text/tabwriter"
	"time"

	"trainerd/kernels"
	"trainerd/model"
	"trainerd/model/hf"
	"trainerd/sagrpo"
	"trainerd/storage"
)

// CheckpointResult is one line of output of Checkpoint. Times are medians.
type CheckpointResult struct {
	Name      string `json:"name"`
	Impl      string `json:"impl"`
	Device    string `json:"device"`
	Workers   int    `json:"workers"`
	Shape     string `json:"shape"`
	Load      string `json:"load"`
	DType     string `json:"dtype"`
	Snapshot  bool   `json:"snapshot"`   // with optimizer state
	Bytes     int64  `json:"bytes"`      // in the store
	HostBytes int64  `json:"host_bytes"` // of the capture

	CaptureSeconds float64 `json:"capture_s"` // the device stands still
	CaptureGBs     float64 `json:"capture_gb_s"`
	WriteSeconds   float64 `json:"write_s"` // of a captured checkpoint, while a step runs
	WriteGBs       float64 `json:"write_gb_s"`
	DirectSeconds  float64 `json:"direct_s"` // from the device to the store, nothing else running: what a step waited for without a capture

	StepSeconds   float64 `json:"step_s"`        // nothing else running
	BesideSeconds float64 `json:"step_beside_s"` // with a checkpoint being written
	Cost          float64 `json:"cost"`          // of a checkpoint, as a share of a step: (capture + beside - step) / step, paired
}

// CheckpointOptions say what Checkpoint measures.
type CheckpointOptions struct {
	Shape, Load string
	DType       string // of published weights
	Snapshot    bool
	Repeats     int // pairs of a step alone and a step beside a checkpoint
	MaxTokens   int
	Store       storage.Blob
}

// Checkpoint measures what a checkpoint costs training: a step alone, then a
// capture and a step while the capture is written, in pairs.
func Checkpoint(ctx context.Context, dev kernels.Device, o CheckpointOptions) (CheckpointResult, error) {
	info := dev.Info()
	r := CheckpointResult{Name: "checkpoint", Impl: "trainerd", Device: info.Name, Workers: info.Workers,
		Shape: o.Shape, Load: o.Load, DType: o.DType, Snapshot: o.Snapshot}
	cfg, err := Shape(o.Shape)
	if err != nil {
		return r, err
	}
	l, err := LoadByName(o.Load)
	if err != nil {
		return r, err
	}
	if o.Repeats < 1 {
		return r, fmt.Errorf("repeats is %d, expected 1 or more", o.Repeats)
	}
	src, err := model.NewRandom(cfg, 1)
	if err != nil {
		return r, err
	}
	m, err := model.Load(ctx, dev, src, model.Options{Train: true, MaxTokens: o.MaxTokens})
	if err != nil {
		return r, err
	}
	defer m.Close()
	obj, opt := sagrpo.DefaultObjective("sa_grpo"), sagrpo.DefaultOptimizer()
	obj.GroupSize = len(l.Groups[0])
	engine, err := sagrpo.NewEngine(m, sagrpo.Settings{Objective: obj, Optimizer: opt, MaxTokens: o.MaxTokens})
	if err != nil {
		return r, err
	}
	groups, done := l.groups(cfg.Vocab), int64(0)
	step := func() (float64, error) {
		began := time.Now()
		c, err := engine.Consume(ctx, groups, done)
		if err != nil {
			return 0, err
		}
		for last := false; !last; done++ {
			if _, last, err = c.Next(ctx); err != nil {
				return 0, err
			}
		}
		return time.Since(began).Seconds(), nil
	}
	if _, err := step(); err != nil { // warm-up
		return r, err
	}
	b := checkpointBench{c: storage.Checkpoints{Blob: o.Store}, o: o}
	var captures, writes, directs, alone, beside, costs []float64
	for range o.Repeats {
		s, err := step()
		if err != nil {
			return r, err
		}
		began := time.Now()
		w, host, err := b.capture(ctx, m)
		if err != nil {
			return r, err
		}
		captured := time.Since(began).Seconds()
		r.HostBytes = host
		written := make(chan error, 1)
		var took float64
		go func() {
			began := time.Now()
			err := b.write(ctx, w)
			took = time.Since(began).Seconds()
			written <- err
		}()
		with, serr := step()
		if err := <-written; err != nil {
			return r, err
		}
		if serr != nil {
			return r, serr
		}
		began = time.Now()
		if err := b.write(ctx, b.direct(m)); err != nil {
			return r, err
		}
		directs = append(directs, time.Since(began).Seconds())
		captures, writes = append(captures, captured), append(writes, took)
		alone, beside, costs = append(alone, s), append(beside, with), append(costs, (captured+with-s)/s)
	}
	r.Bytes = b.bytes
	r.CaptureSeconds, r.WriteSeconds, r.DirectSeconds = median(captures), median(writes), median(directs)
	r.StepSeconds, r.BesideSeconds, r.Cost = median(alone), median(beside), median(costs)
	r.CaptureGBs, r.WriteGBs = float64(r.HostBytes)/r.CaptureSeconds/1e9, float64(r.Bytes)/r.WriteSeconds/1e9
	return r, nil
}

func median(x []float64) float64 {
	sort.Float64s(x)
	return x[len(x)/2]
}

// checkpointBench writes checkpoints as a job does.
type checkpointBench struct {
	c     storage.Checkpoints
	o     CheckpointOptions
	step  int64
	last  *storage.Manifest // which may be deleted once there is a newer one
	bytes int64
}

// content is what a checkpoint is written from.
type content struct {
	weights model.Source
	state   func(io.Writer) error
}

func (b *checkpointBench) direct(m *model.Model) content {
	c := content{weights: m.Export()}
	if b.o.Snapshot {
		c.state = m.SaveState
	}
	return c
}

// capture copies a checkpoint to fresh host memory and returns its bytes there.
func (b *checkpointBench) capture(ctx context.Context, m *model.Model) (c content, host int64, err error) {
	src, dtype := m.Export(), b.o.DType
	if b.o.Snapshot {
		dtype = "F32"
	}
	n := hf.CaptureElements(src)
	mem := hf.CaptureMemory{Floats: make([]float32, n)}
	host = 4 * int64(n)
	if dtype != "F32" {
		mem = hf.CaptureMemory{Halves: make([]uint16, n)}
		host = 2 * int64(n)
	}
	if c.weights, err = hf.TakeCapture(ctx, src, dtype, mem); err != nil {
		return c, host, err
	}
	if b.o.Snapshot {
		s, err := m.CaptureState(make([]float32, m.StateElements()))
		if err != nil {
			return c, host, err
		}
		c.state = s.Save
		host += 4 * int64(m.StateElements())
	}
	return c, host, nil
}

// write stores a checkpoint and deletes the one before.
func (b *checkpointBench) write(ctx context.Context, c content) error {
	b.step++
	w, err := b.c.Create(ctx, "bench", b.step)
	if err != nil {
		return err
	}
	if err := hf.Write(ctx, w.File, "hf/", c.weights, hf.WriteOptions{DType: b.o.DType}); err != nil {
		return err
	}
	if c.state != nil {
		if err := w.File(ctx, "state/optimizer.bin", c.state); err != nil {
			return err
		}
		if b.o.DType != "F32" {
			if err := hf.Write(ctx, w.File, "state/weights/", c.weights, hf.WriteOptions{DType: "F32"}); err != nil {
				return err
			}
		}
	}
	man, err := w.Commit(ctx, storage.Manifest{Engine: "bench"})
	if err != nil {
		return err
	}
	b.bytes = man.Bytes("")
	last := b.last
	b.last = &man
	if last == nil {
		return nil
	}
	return b.c.Delete(ctx, *last)
}

// Table writes the result for people.
func (r CheckpointResult) Table(out io.Writer) error {
	t := tabwriter.NewWriter(out, 0, 4, 2, ' ', tabwriter.AlignRight)
	what := r.DType + " weights"
	if r.Snapshot {
		what += " and optimizer state"
	}
	fmt.Fprintf(t, "%s of %s on %s\t\t\t\n", what, r.Shape, r.Device)
	fmt.Fprintf(t, "capture\t%.3f s\t%.2f GB/s\t%.2f GB in host memory\t\n", r.CaptureSeconds, r.CaptureGBs, float64(r.HostBytes)/1e9)
	fmt.Fprintf(t, "write beside a step\t%.3f s\t%.2f GB/s\t%.2f GB in the store\t\n", r.WriteSeconds, r.WriteGBs, float64(r.Bytes)/1e9)
	fmt.Fprintf(t, "write, device held\t%.3f s\t%.2f GB/s\t\t\n", r.DirectSeconds, float64(r.Bytes)/r.DirectSeconds/1e9)
	fmt.Fprintf(t, "step alone\t%.3f s\t\t\t\n", r.StepSeconds)
	fmt.Fprintf(t, "step beside a write\t%.3f s\t\t\t\n", r.BesideSeconds)
	fmt.Fprintf(t, "cost of a checkpoint\t%.1f %%\t\tof a step\t\n", 100*r.Cost)
	return t.Flush()
}

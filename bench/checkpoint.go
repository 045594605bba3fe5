package bench

import (
	"context"
	"fmt"
	"io"
	"runtime"
	"slices"
	"sort"
	"text/tabwriter"
	"time"

	"trainerd/kernels"
	"trainerd/kernels/hostmem"
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

	FirstSeconds   float64 `json:"first_capture_s"` // with its memory, taken once for a job
	CaptureSeconds float64 `json:"capture_s"`       // the device stands still
	CaptureGBs     float64 `json:"capture_gb_s"`
	CaptureCPU     float64 `json:"capture_cpu_s"` // processor seconds, all cores
	WriteSeconds   float64 `json:"write_s"`       // of a captured checkpoint, while a step runs
	WriteGBs       float64 `json:"write_gb_s"`
	AloneSeconds   float64 `json:"write_alone_s"` // nothing else running
	WriteCPU       float64 `json:"write_cpu_s"`   // processor seconds of that
	DirectSeconds  float64 `json:"direct_s"`      // from the device to the store, nothing else running: what a step waited for without a capture
	RSSGrowth      int64   `json:"rss_growth"`    // bytes: the most while a captured checkpoint is written, over what it was before

	StepSeconds   float64 `json:"step_s"`        // nothing else running
	StepCPU       float64 `json:"step_cpu_s"`    // processor seconds of that
	BesideSeconds float64 `json:"step_beside_s"` // with a checkpoint being written
	Cost          float64 `json:"cost"`          // of a checkpoint, as a share of a step: (capture + beside - step) / step, paired
	CPUShare      float64 `json:"cpu_share"`     // the same in processor seconds of all cores, until the write is done: the cost where the device is the processor and wastes none, whoever else uses the machine
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
	defer b.close()
	began := time.Now()
	if _, err := b.capture(ctx, m); err != nil { // takes the memory
		return r, err
	}
	r.FirstSeconds, r.HostBytes = time.Since(began).Seconds(), int64(len(b.memory.Bytes))
	var captures, captureCPU, writes, writeCPU, writesAlone, directs, alone, aloneCPU, beside, costs, shares []float64
	for range o.Repeats {
		before := processTime()
		s, err := step()
		if err != nil {
			return r, err
		}
		stepCPU := processTime().since(before)
		began, before := time.Now(), processTime()
		w, err := b.capture(ctx, m)
		if err != nil {
			return r, err
		}
		captured := time.Since(began).Seconds()
		captureCPU = append(captureCPU, processTime().since(before)) // before stays that of the pair
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
		aloneCPU, shares = append(aloneCPU, stepCPU), append(shares, (processTime().since(before)-stepCPU)/stepCPU)
		runtime.GC() // of the step's garbage
		rss, err := watchRSS()
		if err != nil {
			return r, err
		}
		began, before = time.Now(), processTime()
		err = b.write(ctx, w)
		samples := rss()
		if err != nil {
			return r, err
		}
		r.RSSGrowth = max(r.RSSGrowth, int64(1e6*(slices.Max(samples)-samples[0])))
		writesAlone, writeCPU = append(writesAlone, time.Since(began).Seconds()), append(writeCPU, processTime().since(before))
		began = time.Now()
		if err := b.write(ctx, b.direct(m)); err != nil {
			return r, err
		}
		directs = append(directs, time.Since(began).Seconds())
		captures, writes = append(captures, captured), append(writes, took)
		alone, beside, costs = append(alone, s), append(beside, with), append(costs, (captured+with-s)/s)
	}
	r.Bytes = b.bytes
	r.CaptureCPU, r.WriteCPU, r.AloneSeconds = median(captureCPU), median(writeCPU), median(writesAlone)
	r.CaptureSeconds, r.WriteSeconds, r.DirectSeconds = median(captures), median(writes), median(directs)
	r.StepSeconds, r.BesideSeconds, r.Cost = median(alone), median(beside), median(costs)
	r.StepCPU, r.CPUShare = median(aloneCPU), median(shares)
	r.CaptureGBs, r.WriteGBs = float64(r.HostBytes)/r.CaptureSeconds/1e9, float64(r.Bytes)/r.WriteSeconds/1e9
	return r, nil
}

func median(x []float64) float64 {
	sort.Float64s(x)
	return x[len(x)/2]
}

// since is the processor time in seconds between two readings.
func (u used) since(before used) float64 {
	return (u.user + u.system - before.user - before.system).Seconds()
}

// checkpointBench writes checkpoints as a job does.
type checkpointBench struct {
	c      storage.Checkpoints
	o      CheckpointOptions
	memory *hostmem.Span // of captures, kept from one to the next
	step   int64
	last   *storage.Manifest // which may be deleted once there is a newer one
	bytes  int64
}

func (b *checkpointBench) close() {
	if b.memory != nil {
		b.memory.Free()
	}
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

// capture copies a checkpoint to host memory.
func (b *checkpointBench) capture(ctx context.Context, m *model.Model) (c content, err error) {
	src, dtype := m.Export(), b.o.DType
	n, state := hf.CaptureElements(src), 0
	bytes := 2 * n
	if b.o.Snapshot {
		dtype, state = "F32", m.StateElements()
	}
	if dtype == "F32" {
		bytes = 4 * n
	}
	if b.memory == nil {
		if b.memory, err = hostmem.Take(int64(bytes+4*state), hostmem.Small); err != nil {
			return c, err
		}
	}
	var mem hf.CaptureMemory
	rest := b.memory.Bytes
	if dtype == "F32" {
		mem.Floats, rest = hostmem.Floats(rest, n)
	} else {
		mem.Halves, rest = hostmem.Halves(rest, n)
	}
	if c.weights, err = hf.TakeCapture(ctx, src, dtype, mem); err != nil || !b.o.Snapshot {
		return c, err
	}
	values, _ := hostmem.Floats(rest, state)
	s, err := m.CaptureState(values)
	if err == nil {
		c.state = s.Save
	}
	return c, err
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
	fmt.Fprintf(t, "%s of %s on %s\t\t\t\t\t\n", what, r.Shape, r.Device)
	row := func(what string, seconds, gbs, cpu float64, note string) {
		line := fmt.Sprintf("%s\t%.3f s\t", what, seconds)
		if gbs > 0 {
			line += fmt.Sprintf("%.2f GB/s", gbs)
		}
		line += "\t"
		if cpu > 0 {
			line += fmt.Sprintf("%.3f processor s", cpu)
		}
		fmt.Fprintf(t, "%s\t%s\t\n", line, note)
	}
	row("capture, the first", r.FirstSeconds, 0, 0, fmt.Sprintf("takes %.2f GB of host memory", float64(r.HostBytes)/1e9))
	row("capture", r.CaptureSeconds, r.CaptureGBs, r.CaptureCPU, "")
	row("write, nothing else running", r.AloneSeconds, float64(r.Bytes)/r.AloneSeconds/1e9, r.WriteCPU, fmt.Sprintf("%.2f GB in the store, %.1f MB more in memory", float64(r.Bytes)/1e9, float64(r.RSSGrowth)/1e6))
	row("write beside a step", r.WriteSeconds, r.WriteGBs, 0, "")
	row("write, device held", r.DirectSeconds, float64(r.Bytes)/r.DirectSeconds/1e9, 0, "")
	row("step alone", r.StepSeconds, 0, r.StepCPU, "")
	row("step beside a write", r.BesideSeconds, 0, 0, "")
	for _, every := range []int{1, 2, 5, 10} {
		fmt.Fprintf(t, "cost, published every %d\t%.1f %%\t\t%.1f %% in processor s\tof training\t\n", every, 100*r.Cost/float64(every), 100*r.CPUShare/float64(every))
	}
	return t.Flush()
}

package trainer

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"time"

	"trainerd/internal/crashpoint"
	"trainerd/internal/fault"
	"trainerd/kernels"
	"trainerd/model"
	"trainerd/model/hf"
	"trainerd/rollout/spool"
	"trainerd/sagrpo"
	"trainerd/storage"
)

// sweepAge is how old an upload without a manifest must be before it counts as
// interrupted: far longer than the upload of one file takes.
const sweepAge = 6 * time.Hour

// load brings the job's model to the device. A new job starts from its base; a
// restored one from its newest snapshot, from which the recorded steps are
// replayed; its queue is then as the snapshot left it, nil before the first record.
func (j *Job) load(ctx context.Context, base *baseModel, restored bool) (snap *storage.Manifest, queue *queueState, err error) {
	defer crashpoint.Enter(crashpoint.Load)()
	if base == nil {
		if base, err = j.m.resolve(ctx, j.ID, j.rec.Source, &j.spec); err != nil {
			return nil, nil, err
		}
	}
	defer base.close()
	if base.pull != nil {
		j.m.log.Info("pulling the base model", "job", j.ID, "source", base.source)
		if err := j.m.untilClosed(ctx, func(ctx context.Context) error { return base.pull(ctx, base.path) }); err != nil {
			return nil, nil, fmt.Errorf("pull model.source: %w", err)
		}
		base.pull = nil
	}
	if base.dir == nil {
		if err := base.open(&j.spec); err != nil {
			return nil, nil, err
		}
		if err := j.m.fit(ctx, j.ID, &j.spec, base); err != nil {
			return nil, nil, err
		}
		if err := j.adopt(base); err != nil {
			return nil, nil, err
		}
	}
	if restored {
		if swept, err := j.m.ckpts.Sweep(ctx, string(j.ID), sweepAge); err != nil {
			j.m.log.Warn("sweep interrupted uploads", "job", j.ID, "err", err)
		} else if len(swept) > 0 {
			j.m.log.Info("interrupted uploads swept", "job", j.ID, "prefixes", swept)
		}
		if snap, err = j.findSnapshot(ctx); err != nil {
			return nil, nil, err
		}
		if queue, err = j.resume(ctx, snap); err != nil {
			return nil, nil, err
		}
	}
	return snap, queue, j.place(ctx, base, snap)
}

// partStore is a store in which a killed process leaves parts of uploads that no
// listing shows.
type partStore interface {
	Sweep(ctx context.Context, age time.Duration) (int, error)
}

// sweepParts removes such parts once, when the manager begins.
func (m *Manager) sweepParts(s partStore) {
	n := 0
	err := m.untilClosed(context.Background(), func(ctx context.Context) (err error) {
		n, err = s.Sweep(ctx, sweepAge)
		return err
	})
	switch {
	case errors.Is(err, errClosed):
	case err != nil:
		m.log.Warn("sweep parts of interrupted uploads", "err", err)
	case n > 0:
		m.log.Info("parts of interrupted uploads swept", "uploads", n)
	}
}

// begin opens the job for work once its model and its queue are as they were.
func (j *Job) begin() {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.fed = true
	if !j.state.Final() {
		j.setState(Waiting)
	}
}

// adopt records what was learnt when the source was opened. A base that is
// another model than the one the job began with is refused.
func (j *Job) adopt(base *baseModel) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	cfg := base.config()
	if was := j.rec.Model; was.Vocab > 0 && (was.Vocab != cfg.Vocab || was.Hidden != cfg.Hidden || was.Layers != cfg.Layers || was.Type != cfg.Type) {
		return fault.BadField("model.source", base.source, "the model that the job was created with: its config has changed")
	}
	j.rec.Model, j.rec.DType = cfg, base.dtype
	if err := j.m.db.putJob(j.rec, nil); err != nil {
		return j.m.disk.fault("records_unavailable", "record the model", err)
	}
	return nil
}

// settler is a store in which what a killed process left may not be durable yet.
type settler interface {
	Settle(prefix string) error
}

// findSnapshot returns the newest whole checkpoint with state that the step
// records know, nil when there is none, and makes the newest one the job's latest,
// in the store as well.
func (j *Job) findSnapshot(ctx context.Context) (*storage.Manifest, error) {
	if s, ok := j.m.ckpts.Blob.(settler); ok {
		if err := s.Settle("jobs/" + string(j.ID)); err != nil {
			return nil, storeFault("settle checkpoints", err)
		}
	}
	all, err := j.m.ckpts.List(ctx, string(j.ID))
	if err != nil {
		return nil, storeFault("list checkpoints", err)
	}
	j.mu.Lock()
	done := j.rec.Step
	j.mu.Unlock()
	var snap, latest *storage.Manifest
	for i := range all {
		if all[i].Step > done {
			continue
		}
		latest = &all[i]
		if all[i].Snapshot {
			snap = &all[i]
		}
	}
	if latest != nil { // a crash may have come between its manifest and latest.json
		if err := j.m.ckpts.Promote(ctx, *latest); err != nil {
			return nil, storeFault("name the latest checkpoint", err)
		}
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.latest = latest
	if snap != nil {
		j.snapshot = snap.Step
	}
	return snap, nil
}

// place loads weights and optimizer state on the device.
func (j *Job) place(ctx context.Context, base *baseModel, snap *storage.Manifest) error {
	src := model.Source(base.dir)
	if snap != nil {
		dir := filepath.Join(j.m.jobDir(j.ID), "snapshot")
		defer os.RemoveAll(dir)
		prefix := prefixHF
		if slices.ContainsFunc(snap.Files, func(f storage.File) bool { return f.Name == prefixWeights+"config.json" }) {
			prefix = prefixWeights
		}
		if err := j.m.ckpts.Pull(ctx, *snap, prefix, dir); err != nil {
			return storeFault("pull the snapshot", err)
		}
		opened, err := hf.Open(dir)
		if err != nil {
			return fmt.Errorf("open the snapshot of step %d: %w", snap.Step, err)
		}
		defer opened.Close()
		src = opened
	} else if j.spec.Model.State == stateTraining {
		exact, err := base.exactBase()
		if err != nil {
			return err
		}
		if exact != nil {
			defer exact.Close()
			src = exact
		}
	}
	return j.settleIn(ctx, func(dev kernels.Device) (err error) {
		j.model, err = model.Load(ctx, dev, src, base.options)
		if err != nil {
			j.model = nil
			return err
		}
		defer func() {
			if err != nil {
				j.model.Close()
				j.model, j.engine = nil, nil
				j.loaded.Store(false)
			}
		}()
		j.weights = 0
		if snap != nil {
			if err := j.restoreState(ctx, *snap); err != nil {
				return err
			}
			j.weights = snap.Step
		} else if j.spec.Model.State == stateTraining {
			if err := j.restoreBase(base); err != nil {
				return err
			}
		}
		set := j.spec.settings()
		if j.spec.Model.State == stateTraining {
			set.Done = j.model.Steps() - j.weights
		}
		set.PeakFLOPS = j.m.opts.PeakFLOPS
		if j.engine, err = sagrpo.NewEngine(j.model, set); err != nil {
			return err
		}
		if err := j.recognise(dev, j.weights); err != nil {
			return err
		}
		j.base = base
		plan := MemoryPlan{Plan: j.model.Plan(), Recompute: base.options.Recompute.String(), RecomputeMore: base.options.RecomputeMore}
		j.mu.Lock()
		j.plan = &plan
		j.mu.Unlock()
		j.loaded.Store(true)
		return nil
	})
}

func (j *Job) restoreState(ctx context.Context, snap storage.Manifest) error {
	r, err := j.m.ckpts.Open(ctx, snap, fileOptimizer, 0, -1)
	if err != nil {
		return storeFault("open the optimizer state", err)
	}
	defer r.Close()
	if err := j.model.LoadState(r); err != nil {
		return fmt.Errorf("read the optimizer state of step %d: %w", snap.Step, err)
	}
	return nil
}

// rebuild feeds the assembler what the spool has after the snapshot's queue (or
// all of it), and repeats the recorded steps in between where they were taken:
// those up to the snapshot by name only, those after it on the device. A final
// job's steps are all by name.
func (j *Job) rebuild(ctx context.Context, snap *storage.Manifest, queue *queueState) error {
	defer crashpoint.Enter(crashpoint.Replay)()
	steps := &stepReader{j: j}
	if snap != nil {
		steps.replayFrom = snap.Step
	}
	if j.State().Final() {
		steps.replayFrom = math.MaxInt64
	}
	from, read := uint64(1), 0
	if queue != nil {
		from, steps.done = queue.entered+1, queue.step
	}
	err := j.spool.Read(from, func(r spool.Record) error {
		read++
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := steps.upTo(ctx, r.Seq-1); err != nil {
			return err
		}
		j.mu.Lock()
		defer j.mu.Unlock()
		return j.apply(r)
	})
	if err == nil {
		err = steps.upTo(ctx, math.MaxUint64)
	}
	if err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return fmt.Errorf("replay the log: %w", err)
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.state.Final() {
		j.dropQueue("job_" + string(j.state))
	}
	j.m.log.Info("log read", "job", j.ID, "from", from, "records", read, "steps_replayed", steps.replayed, "step", j.rec.Step)
	return nil
}

// stepReader walks a job's step records in order.
type stepReader struct {
	j          *Job
	replayFrom int64 // steps after it run on the device
	done       int64 // newest step handled
	page       []StepRecord
	end        bool
	replayed   int
}

// upTo repeats the steps whose groups were taken when the spool's newest record was seq or older.
func (s *stepReader) upTo(ctx context.Context, seq uint64) error {
	for {
		if len(s.page) == 0 && !s.end {
			page, err := s.j.Steps(s.done, 256)
			if err != nil {
				return err
			}
			s.page, s.end = page, len(page) == 0
		}
		if len(s.page) == 0 || s.page[0].LogSeq > seq {
			return nil
		}
		rec := s.page[0]
		if err := s.repeat(ctx, rec); err != nil {
			return fmt.Errorf("step %d: %w", rec.Step, err)
		}
		s.page, s.done = s.page[1:], rec.Step
	}
}

// repeat takes the groups of a record and does its step again if need be.
func (s *stepReader) repeat(ctx context.Context, rec StepRecord) error {
	j := s.j
	j.mu.Lock()
	if rec.Step == rec.First {
		groups, _ := j.asm.Take(len(rec.Groups), rec.First-1)
		c := newConsumption(groups, rec.First-1, rec.LogSeq)
		if !slices.Equal(c.ids, rec.Groups) {
			j.mu.Unlock()
			return fault.New(fault.Internal, "replay_differs", "took groups %q, the record says %q", c.ids, rec.Groups)
		}
		j.training = c
		j.asm.Delayed(rec.Delayed)
	}
	c := j.training
	j.mu.Unlock()
	if c == nil {
		return fault.New(fault.Internal, "replay_differs", "its groups were never taken")
	}
	if rec.Step > s.replayFrom {
		crashpoint.Reach("replay.step")
		var again StepRecord
		err := j.withModel(ctx, laneTrain, func() (err error) {
			again, err = j.compute(ctx, c)
			return err
		})
		if err != nil {
			return err
		}
		s.replayed++
		if was, is := rec.Metrics["loss"], again.Metrics["loss"]; again.Step != rec.Step || was != is && !(math.IsNaN(was) && math.IsNaN(is)) {
			j.m.log.Warn("a replayed step differs from its record", "job", j.ID, "step", rec.Step, "loss", is, "recorded", was)
		}
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.settle(rec)
}

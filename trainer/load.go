package trainer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"trainerd/internal/fault"
	"trainerd/kernels"
	"trainerd/model"
	"trainerd/model/hf"
	"trainerd/sagrpo"
	"trainerd/storage"
)

// baseModel is a job's initial weights: where they are, and the directory once it is open.
type baseModel struct {
	source string                                      // as recorded: "latest" resolved to a step
	path   string                                      // the Hugging Face directory
	pull   func(ctx context.Context, dir string) error // brings it to path; nil when it is there already

	dir        *hf.Dir
	configJSON []byte
	carried    map[string][]byte
	dtype      string // of published weights

	options model.Options // as which fit found room for the model
}

// resolve finds out what a source means, without reading weights.
func (m *Manager) resolve(ctx context.Context, id JobID, source string, spec *Spec) (*baseModel, error) {
	if m.opts.Sources != nil {
		var err error
		if source, err = m.opts.Sources(source); err != nil {
			return nil, err
		}
	}
	b := &baseModel{source: source, path: filepath.Join(m.jobDir(id), "base")}
	switch {
	case strings.HasPrefix(source, schemeDir):
		abs, err := filepath.Abs(strings.TrimPrefix(source, schemeDir))
		if err != nil {
			return nil, fault.BadField("model.source", source, "a path")
		}
		b.path = abs
		b.source = schemeDir + abs
		return b, nil
	case strings.HasPrefix(source, schemeJob):
		ref, ok := parseJobSource(source)
		if !ok {
			return nil, fault.BadField("model.source", source, "job:ID@STEP")
		}
		if ref.Step >= 0 && b.pulled() { // a restart; the source's checkpoint may be gone by now
			return b, nil
		}
		find, training := m.checkpointOf, spec.Model.State == stateTraining
		if training {
			if err := m.forkable(ref, spec); err != nil {
				return nil, err
			}
			find = m.snapshotOf
		}
		man, err := find(ctx, ref)
		if err != nil {
			return nil, err
		}
		b.source = fmt.Sprintf("%s%s@%d", schemeJob, ref.Job, man.Step)
		b.pull = func(ctx context.Context, dir string) error {
			if training {
				if err := m.ckpts.Pull(ctx, man, prefixState, b.statePath()); err != nil {
					return err
				}
			}
			return m.ckpts.Pull(ctx, man, prefixHF, dir)
		}
	default:
		if m.opts.OpenStore == nil {
			return nil, fault.BadField("model.source", source, "dir:PATH or job:ID@STEP: this server was started without access to S3")
		}
		b.pull = func(ctx context.Context, dir string) error { return m.pullStore(ctx, source, dir) }
	}
	if b.pulled() {
		b.pull = nil // a restart: it was pulled whole before
	}
	return b, nil
}

// checkpointOf finds the checkpoint that a job: source names.
func (m *Manager) checkpointOf(ctx context.Context, ref jobSource) (storage.Manifest, error) {
	var man storage.Manifest
	var err error
	if ref.Step < 0 {
		man, err = m.ckpts.Latest(ctx, string(ref.Job))
	} else {
		man, err = m.ckpts.At(ctx, string(ref.Job), ref.Step)
	}
	if errors.Is(err, storage.ErrNotFound) {
		return man, fault.BadField("model.source", fmt.Sprintf("job %s without such a checkpoint", ref.Job), "a published checkpoint")
	}
	if e, ok := fault.As(err); ok && e.Kind == fault.Internal { // the checkpoint is damaged, and the request named it
		return man, badModel(fmt.Sprintf("%s%s", schemeJob, ref.Job), err)
	}
	return man, storeFault("look up the source checkpoint", err)
}

// storeFault gives an error of the checkpoint store its kind, unless it has one.
func storeFault(doing string, err error) error {
	if err == nil {
		return nil
	}
	if _, ok := fault.As(err); ok || errors.Is(err, context.Canceled) {
		return fmt.Errorf("%s: %w", doing, err)
	}
	if errors.Is(err, storage.ErrNotFound) {
		return fault.New(fault.NotFound, "checkpoint_not_found", "%s: %w", doing, err)
	}
	return &fault.Error{Kind: fault.Unavailable, Code: "store_unavailable", Msg: doing, RetryAfter: 5 * time.Second, Err: err}
}

// pullStore copies the files directly under an s3:// prefix into dir, which
// appears whole or not at all.
func (m *Manager) pullStore(ctx context.Context, source, dir string) error {
	blob, err := m.opts.OpenStore(ctx, source)
	if err != nil {
		return storeFault("open "+source, err)
	}
	tmp := dir + ".partial"
	if err := os.RemoveAll(tmp); err != nil {
		return err
	}
	if err := os.MkdirAll(tmp, 0o750); err != nil {
		return err
	}
	var names []string
	err = blob.List(ctx, "", func(i storage.Info) error {
		if !strings.Contains(i.Key, "/") {
			names = append(names, i.Key)
		}
		return nil
	})
	if err != nil {
		return storeFault("list "+source, err)
	}
	if len(names) == 0 {
		return fault.BadField("model.source", source, "a prefix with config.json and *.safetensors directly under it")
	}
	for _, name := range names {
		if err := copyObject(ctx, blob, name, filepath.Join(tmp, path.Base(name))); err != nil {
			return storeFault("copy "+name+" of "+source, err)
		}
	}
	return os.Rename(tmp, dir)
}

func copyObject(ctx context.Context, blob storage.Blob, key, to string) error {
	r, _, err := blob.Get(ctx, key, 0, -1)
	if err != nil {
		return err
	}
	defer r.Close()
	f, err := os.Create(to)
	if err != nil {
		return err
	}
	if _, err := io.Copy(f, r); err != nil {
		f.Close()
		return err
	}
	if err := f.Sync(); err != nil {
		f.Close()
		return err
	}
	return f.Close()
}

// open reads config and headers of the directory. Faults name the file.
func (b *baseModel) open(spec *Spec) error {
	dir, err := hf.Open(b.path)
	if err != nil {
		return badModel(b.source, err)
	}
	b.dir = dir
	b.configJSON = dir.ConfigJSON()
	if b.carried, err = dir.Carried(); err != nil {
		return badModel(b.source, err)
	}
	b.dtype = spec.Checkpoint.DType
	if b.dtype == "source" {
		b.dtype = dir.DType()
	}
	return nil
}

// badModel says that a job's source is no good: whatever is wrong with the
// files, the request that named them is what can be mended.
func badModel(source string, err error) error {
	e := &fault.Error{Kind: fault.Invalid, Code: "invalid_model", Msg: "open model.source", Err: err,
		Fields: []fault.Field{{Name: "model.source", Row: -1, Got: clip(source), Expected: "a readable Hugging Face directory"}}}
	if f, ok := fault.As(err); ok {
		if f.Code != "" {
			e.Code = f.Code
		}
		if len(f.Fields) > 0 { // they say it all: the text would say it twice
			e.Fields, e.Err = append(e.Fields, f.Fields...), nil
			if f.Msg != "" {
				e.Msg += ": " + f.Msg
			}
		}
	}
	return e
}

func (b *baseModel) config() model.Config { return b.dir.Config() }

func (b *baseModel) close() {
	if b != nil && b.dir != nil {
		b.dir.Close()
		b.dir = nil
	}
}

// modelOptions says what memory a job needs besides its weights. With recompute
// auto that is the most; fit may find less.
func (s *Spec) modelOptions() model.Options {
	return model.Options{
		Train: true, Reference: s.Objective.NeedsReference(), MaxTokens: int(s.Batch.MaxTokens),
		SampleSlots: int(s.Sampling.MaxSequences), SampleTokens: int(s.Sampling.MaxTokens),
		CompactMoments: s.Optimizer.Moments == sagrpo.MomentsCompact, HostMoments: s.Optimizer.MomentsIn == sagrpo.MomentsHost,
		BF16Gradients: s.Optimizer.Gradients == sagrpo.GradientsBFloat,
		RoundingSeed:  uint64(s.Seed), Recompute: recomputes[s.Batch.Recompute],
	}
}

// MemoryPlan is what a job's model takes on the device.
type MemoryPlan struct {
	kernels.Plan
	Recompute     string `json:"recompute"`      // cheap, mlp or layers
	RecomputeMore int    `json:"recompute_more"` // layers, the first ones, for which that goes one mode further
}

// recomputeAuto lets fit choose among recomputes: as little as makes the job fit.
const recomputeAuto = "auto"

var recomputes = map[string]model.Recompute{
	recomputeAuto: model.RecomputeCheap, "cheap": model.RecomputeCheap, "mlp": model.RecomputeMLP, "layers": model.RecomputeLayers,
}

// fit makes sure that there is a place for a job's model, on the device or in
// host memory while others are there, and promises it for as long as the job is
// loaded. Ended jobs give theirs up, oldest first, before a job is refused; with
// recompute auto the job computes more again before they do.
func (m *Manager) fit(ctx context.Context, id JobID, spec *Spec, base *baseModel) error {
	for {
		opt := spec.modelOptions()
		var plan kernels.Plan
		var state int64
		err := m.planning(ctx, id, func(dev kernels.Device) (err error) {
			if plan, err = model.Plan(dev, base.config(), opt); err != nil {
				return err
			}
			state, err = model.HostBytes(dev, base.config(), opt)
			return err
		})
		if err != nil {
			return err
		}
		room, alone, ok := m.home.admit(id, plan.Total, state, plan.Free)
		if !ok && spec.Batch.Recompute == recomputeAuto {
			fits := false
			err := m.planning(ctx, id, func(dev kernels.Device) (err error) {
				opt, plan, fits, err = model.Fit(dev, base.config(), opt, room)
				return err
			})
			if err != nil {
				return err
			}
			if fits {
				room, alone, ok = m.home.admit(id, plan.Total, state, plan.Free)
			}
		}
		if ok {
			base.options = opt
			if opt.Recompute > model.RecomputeCheap || opt.RecomputeMore > 0 {
				m.log.Info("activations are computed again", "job", id, "recompute", opt.Recompute.String(), "layers_further", opt.RecomputeMore, "bytes", plan.Total, "free", room)
			}
			return nil
		}
		plan.Free = room
		if alone || !m.evictEnded(ctx) {
			return m.refuse(ctx, id, spec, base, plan, alone)
		}
	}
}

// planning runs a calculation of memory, for which the device is asked what it has.
func (m *Manager) planning(ctx context.Context, id JobID, run func(dev kernels.Device) error) error {
	err := m.exec.Do(ctx, lane{id, laneTrain}, func() error {
		dev, err := m.device()
		if err != nil {
			return err
		}
		return run(dev)
	})
	if err != nil {
		return fmt.Errorf("plan memory: %w", err)
	}
	return nil
}

// evictEnded frees the model of the oldest ended job that holds one.
func (m *Manager) evictEnded(ctx context.Context) bool {
	for _, j := range m.Jobs() {
		if j.State().Final() && j.loaded.Load() { // a failed one is about to free its own
			m.log.Info("model of an ended job freed for a new one", "job", j.ID)
			j.unload(ctx)
			return true
		}
	}
	return false
}

// refuse explains with the plan why a job does not fit, and names what would.
func (m *Manager) refuse(ctx context.Context, id JobID, spec *Spec, base *baseModel, plan kernels.Plan, alone bool) error {
	expected := fmt.Sprintf("a smaller model: %d bytes are free", plan.Free)
	try := *spec
	if try.Batch.Recompute == recomputeAuto {
		try.Batch.Recompute = "layers" // the plan that was refused is already that
	}
	planned := func() (fits bool, err error) {
		var p kernels.Plan
		err = m.planning(ctx, id, func(dev kernels.Device) (err error) {
			p, err = model.Plan(dev, base.config(), try.modelOptions())
			return err
		})
		return err == nil && p.Total <= plan.Free, err
	}
	fits := func() bool { ok, _ := planned(); return ok }
	e := &fault.Error{Kind: fault.Invalid, Code: "does_not_fit", Msg: "the job does not fit on the device (" + plan.String() + ")"}
	if !alone {
		e.Msg = fmt.Sprintf("the job does not fit on the device beside the others (%s), and host memory for models that are off the device (swap_memory, %d bytes) does not hold them all",
			plan.String(), m.home.host)
	}
	// Formats that lose nothing of the work come first, then less at a time.
	for _, f := range []struct {
		name string
		set  *string
		to   string
	}{
		{"batch.recompute", &try.Batch.Recompute, recomputeAuto},
		{"optimizer.gradients", &try.Optimizer.Gradients, sagrpo.GradientsBFloat},
		{"optimizer.moments", &try.Optimizer.Moments, sagrpo.MomentsCompact},
		{"optimizer.moments_in", &try.Optimizer.MomentsIn, sagrpo.MomentsHost}, // not every device can
	} {
		was := *f.set
		if was == f.to || f.to == recomputeAuto && was == "layers" {
			continue
		}
		if *f.set = f.to; f.to == recomputeAuto {
			*f.set = "layers" // as far as auto goes
		}
		ok, err := planned()
		if err != nil { // the device refuses it
			*f.set = was
			continue
		}
		e.Fields = append(e.Fields, fault.Field{Name: f.name, Row: -1, Got: was, Expected: f.to})
		if ok {
			return e
		}
	}
	e.Fields = nil
	for try.Batch.MaxTokens > 64 {
		try.Batch.MaxTokens /= 2
		if fits() {
			e.Fields = append(e.Fields, fault.Field{Name: "batch.max_tokens_per_micro_batch", Row: -1,
				Got: fmt.Sprint(spec.Batch.MaxTokens), Expected: fmt.Sprintf("at most %d", try.Batch.MaxTokens)})
			return e
		}
	}
	try.Sampling.MaxSequences, try.Sampling.MaxTokens = 0, 0
	if fits() {
		e.Fields = append(e.Fields,
			fault.Field{Name: "batch.max_tokens_per_micro_batch", Row: -1, Got: fmt.Sprint(spec.Batch.MaxTokens), Expected: fmt.Sprintf("at most %d", try.Batch.MaxTokens)},
			fault.Field{Name: "sampling.max_sequences", Row: -1, Got: fmt.Sprint(spec.Sampling.MaxSequences), Expected: "0"})
		return e
	}
	e.Fields = append(e.Fields, fault.Field{Name: "model.source", Row: -1, Got: fmt.Sprintf("a plan of %d bytes", plan.Total), Expected: expected})
	return e
}

package trainer

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"trainerd/internal/fault"
	"trainerd/model/hf"
	"trainerd/storage"
)

// What a job takes of the checkpoint that it begins with (model.state).
const (
	// stateWeights takes the published weights and begins an optimizer of its own.
	stateWeights = "weights"
	// stateTraining takes the exact weights and the optimizer: moments, count of
	// steps (bias correction and schedules go on) and reference. The job counts its
	// own steps from 0.
	stateTraining = "training"
)

// snapshotOf finds the checkpoint with training state that a job: source names:
// of its step, or with latest the newest there is.
func (m *Manager) snapshotOf(ctx context.Context, ref jobSource) (storage.Manifest, error) {
	all, err := m.ckpts.List(ctx, string(ref.Job))
	if err != nil && len(all) == 0 {
		return storage.Manifest{}, storeFault("look up the source checkpoint", err)
	}
	var have []string
	var found *storage.Manifest
	for i := range all {
		if !all[i].Snapshot {
			continue
		}
		if step := strconv.FormatInt(all[i].Step, 10); len(have) == 0 || have[len(have)-1] != step {
			have = append(have, step)
		}
		if ref.Step < 0 || all[i].Step == ref.Step {
			found = &all[i]
		}
	}
	if found != nil {
		return *found, nil
	}
	if len(have) > 20 {
		have = append([]string{"..."}, have[len(have)-20:]...)
	}
	expected := "a checkpoint with optimizer state (checkpoint.snapshot_every_steps, or POST …/checkpoints with {\"snapshot\": true}); the job has none"
	if len(have) > 0 {
		expected = "a checkpoint with optimizer state; the job has those of steps " + strings.Join(have, ", ")
	}
	return storage.Manifest{}, fault.BadField("model.state", stateTraining, expected)
}

// forkable refuses a fork whose optimizer state cannot be the source's, where
// the server knows the source.
func (m *Manager) forkable(ref jobSource, spec *Spec) error {
	parent, err := m.Job(ref.Job)
	if err != nil {
		return nil // its store is all that there is of it
	}
	if had, wants := parent.spec.Objective.NeedsReference(), spec.Objective.NeedsReference(); had != wants {
		return fault.BadField("model.state", stateTraining, fmt.Sprintf("weights: the source's state has a reference: %v, this objective needs one: %v", had, wants))
	}
	if had, wants := parent.spec.Optimizer.Moments, spec.Optimizer.Moments; had != wants {
		return fault.BadField("optimizer.moments", wants, had+", as in the source's state, or model.state weights")
	}
	return nil
}

// statePath is where the training state of a fork's source lies.
func (b *baseModel) statePath() string { return b.path + ".state" }

// pulled says whether a base that had to be fetched is here whole. The weights
// come last.
func (b *baseModel) pulled() bool {
	_, err := os.Stat(filepath.Join(b.path, "config.json"))
	return err == nil
}

// exactBase opens the exact weights of a fork's source, nil when they are those of the base.
func (b *baseModel) exactBase() (*hf.Dir, error) {
	dir := filepath.Join(b.statePath(), strings.TrimPrefix(strings.TrimSuffix(prefixWeights, "/"), prefixState))
	if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	exact, err := hf.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("open the exact weights of %s: %w", b.source, err)
	}
	return exact, nil
}

// prefixState is what of a checkpoint a fork with training state takes besides hf/.
const prefixState = "state/"

// restoreBase loads the optimizer of a fork's source. It runs on the device's goroutine.
func (j *Job) restoreBase(base *baseModel) error {
	f, err := os.Open(filepath.Join(base.statePath(), strings.TrimPrefix(fileOptimizer, prefixState)))
	if err != nil {
		return fault.New(fault.Unavailable, "base_unavailable", "open the optimizer state of %s: %w", base.source, err)
	}
	defer f.Close()
	if err := j.model.LoadState(f); err != nil {
		return fmt.Errorf("read the optimizer state of %s: %w", base.source, err)
	}
	return nil
}

// UnmarshalJSON implements json.Unmarshaler: records from before model.state
// was there took the weights.
func (m *ModelSpec) UnmarshalJSON(raw []byte) error {
	type plain ModelSpec
	p := plain{State: stateWeights}
	if err := json.Unmarshal(raw, &p); err != nil {
		return err
	}
	*m = ModelSpec(p)
	return nil
}

package trainer

import (
	"strconv"
	"strings"
	"time"

	"trainerd/internal/fault"
	"trainerd/rollout"
	"trainerd/sagrpo"
	"trainerd/storage"
)

// Spec is a job document with every default filled in. It never changes after creation.
type Spec struct {
	Version    int              `json:"version"` // 1
	Name       string           `json:"name"`
	Model      ModelSpec        `json:"model"`
	Objective  sagrpo.Objective `json:"objective"`
	Optimizer  sagrpo.Optimizer `json:"optimizer"`
	Batch      BatchSpec        `json:"batch"`
	Checkpoint CheckpointSpec   `json:"checkpoint"`
	Sampling   SamplingSpec     `json:"sampling"`
	Limits     LimitsSpec       `json:"limits"`
	// Priority is the job's weight where jobs compete for the device: of two that
	// both have work, one of 20 gets twice the device time of one of 10.
	Priority int64 `json:"priority"`
	MaxSteps int64 `json:"max_steps"` // 0: endless
	// Seed gives sampling requests without a seed of their own one that is a
	// function of it and of the request's number in the job. Steps draw from it
	// and their number what rounds compact moments and bfloat16 gradients, and nothing else.
	Seed int64 `json:"seed"`
}

// ModelSpec says where the initial weights come from.
type ModelSpec struct {
	Source string `json:"source"` // dir:PATH, s3://BUCKET/PREFIX or job:ID@STEP|latest
	State  string `json:"state"`  // weights, or training: with the optimizer of a job's snapshot
}

// BatchSpec says when a step runs and what it takes.
type BatchSpec struct {
	GroupsPerStep  int64  `json:"groups_per_step"`
	MaxTokens      int64  `json:"max_tokens_per_micro_batch"`
	MaxPolicyLag   int64  `json:"max_policy_lag"`      // steps; -1: no limit
	Stale          string `json:"stale"`               // reject, delay steps for, or admit groups that lag by more
	MissingStep    string `json:"missing_policy_step"` // accept or refuse rows that do not say which step sampled them
	GroupTimeout   string `json:"group_timeout"`       // Go duration ("90s"), "0s": open groups wait for ever
	IncompleteWhat string `json:"incomplete"`          // drop or train what a timed-out group has
	Recompute      string `json:"recompute"`           // what the backward pass computes again: auto (as little as makes the job fit), cheap, mlp or layers
}

// Timeout returns GroupTimeout as a duration, 0 for none.
func (b BatchSpec) Timeout() time.Duration {
	d, _ := time.ParseDuration(b.GroupTimeout)
	return d
}

// CheckpointSpec says what is published when, and for how long it is kept.
type CheckpointSpec struct {
	PublishEverySteps  int64  `json:"publish_every_steps"`
	SnapshotEverySteps int64  `json:"snapshot_every_steps"` // with optimizer state, at the next publication; 0: only when the server stops
	KeepLast           int64  `json:"keep_last"`            // newest checkpoints kept; 0: all
	KeepEvery          int64  `json:"keep_every"`           // steps divisible by it are kept besides; 0: none
	DType              string `json:"dtype"`                // source, F32, BF16 or F16
}

// SamplingSpec bounds the built-in inference node; its memory is part of the plan.
type SamplingSpec struct {
	MaxSequences int64 `json:"max_sequences"` // decoded at once; 0: no sampling
	MaxTokens    int64 `json:"max_tokens"`    // cache rows of one decoding: prompts and new tokens
}

// LimitsSpec bounds what may wait in the job's queue before it answers 429. 0
// means the server's limit, which none of them may exceed.
type LimitsSpec struct {
	MaxQueuedRollouts int64 `json:"max_queued_rollouts"`
	MaxQueuedTokens   int64 `json:"max_queued_tokens"` // each prompt once
	MaxQueuedBytes    int64 `json:"max_queued_bytes"`  // of the rows' payload in memory
}

// defaultPriority is the weight of a job that does not name one, and of jobs
// that were recorded before there were priorities.
const defaultPriority = 10

// weight returns the job's share of contended device time, relative to others'.
func (s *Spec) weight() int64 {
	if s.Priority == 0 {
		return defaultPriority
	}
	return s.Priority
}

// Source schemes of ModelSpec.Source.
const (
	schemeDir = "dir:"
	schemeS3  = "s3://"
	schemeJob = "job:"
)

// jobSource is a parsed job:ID@STEP. Step is -1 for latest.
type jobSource struct {
	Job  JobID
	Step int64
}

func parseJobSource(s string) (jobSource, bool) {
	rest, isJob := strings.CutPrefix(s, schemeJob)
	id, at, ok := strings.Cut(rest, "@")
	if !isJob || !ok || !validJobID(id) {
		return jobSource{}, false
	}
	if at == "latest" {
		return jobSource{Job: JobID(id), Step: -1}, true
	}
	step, err := strconv.ParseInt(at, 10, 64)
	return jobSource{Job: JobID(id), Step: step}, err == nil && step >= 0
}

func validSource(s string) bool {
	switch {
	case strings.HasPrefix(s, schemeDir), strings.HasPrefix(s, schemeS3):
		at, err := storage.ParseURL(s) // which has no place for credentials or a host
		return err == nil && (at.Scheme == "dir" || at.Prefix != "")
	case strings.HasPrefix(s, schemeJob):
		_, ok := parseJobSource(s)
		return ok
	}
	return false
}

// maxSteps bounds every count of steps: a step takes eight digits in a checkpoint's prefix.
const maxSteps = 99_999_999

// ParseSpec reads a job document strictly: unknown fields, wrong types and
// combinations that make no sense are one Invalid fault with a field for each.
func ParseSpec(raw []byte) (Spec, error) {
	var f faults
	o, err := parseObject(raw, "", &f)
	if err != nil {
		return Spec{}, err
	}
	s := Spec{
		Version:    1,
		Batch:      BatchSpec{GroupsPerStep: 4, MaxTokens: 16384, MaxPolicyLag: 4, Stale: rollout.StaleReject, MissingStep: "accept", GroupTimeout: "0s", IncompleteWhat: "drop", Recompute: recomputeAuto},
		Checkpoint: CheckpointSpec{PublishEverySteps: 1, SnapshotEverySteps: 10, KeepLast: 3, KeepEvery: 100, DType: "source"},
		Sampling:   SamplingSpec{MaxSequences: 32, MaxTokens: 8192},
		Priority:   defaultPriority,
	}
	version := int64(1)
	o.integer("version", &version, 1, 1)
	o.text("name", &s.Name)
	if len(s.Name) > 200 {
		f.add("name", s.Name, "at most 200 bytes")
	}
	o.integer("max_steps", &s.MaxSteps, 0, maxSteps)
	o.integer("seed", &s.Seed, 0, 1<<53-1)
	o.integer("priority", &s.Priority, 1, 100)

	m := o.object("model")
	m.text("source", &s.Model.Source)
	if !validSource(s.Model.Source) {
		shown := strconv.Quote(s.Model.Source)
		if strings.HasPrefix(s.Model.Source, schemeS3) && strings.Contains(s.Model.Source, "@") {
			shown = "an address with @" // it may hold a password
		}
		f.add("model.source", shown, "dir:PATH, s3://BUCKET/PREFIX or job:ID@STEP (STEP may be latest)")
	}
	s.Model.State = stateWeights
	m.oneOf("state", &s.Model.State, stateWeights, stateTraining)
	if s.Model.State == stateTraining && !strings.HasPrefix(s.Model.Source, schemeJob) {
		f.add("model.state", strconv.Quote(stateTraining), "weights, or a model.source job:ID@STEP: only a job's checkpoints have optimizer state")
	}
	m.finish()

	s.Batch.parse(o.object("batch"))
	s.parseAlgorithm(o, &f)
	s.Checkpoint.parse(o.object("checkpoint"))
	s.Limits.parse(o.object("limits"))

	p := o.object("sampling")
	p.integer("max_sequences", &s.Sampling.MaxSequences, 0, 1<<16)
	p.integer("max_tokens", &s.Sampling.MaxTokens, 0, 1<<24)
	if s.Sampling.MaxSequences == 0 && !p.given("max_tokens") {
		s.Sampling.MaxTokens = 0
	}
	p.finish()
	o.finish()
	if len(f) == 0 {
		s.combinations(&f)
	}
	if len(f) > 0 {
		return Spec{}, &fault.Error{Kind: fault.Invalid, Code: "invalid_job", Msg: "job document", Fields: f}
	}
	return s, nil
}

func (b *BatchSpec) parse(o *object) {
	o.integer("groups_per_step", &b.GroupsPerStep, 1, 1<<20)
	o.integer("max_tokens_per_micro_batch", &b.MaxTokens, 2, 1<<20)
	if o.isNull("max_policy_lag") {
		b.MaxPolicyLag = -1
	}
	o.integer("max_policy_lag", &b.MaxPolicyLag, -1, maxSteps)
	o.oneOf("stale", &b.Stale, rollout.StaleReject, rollout.StaleDelay, rollout.StaleAdmit)
	o.oneOf("missing_policy_step", &b.MissingStep, "accept", "refuse")
	o.text("group_timeout", &b.GroupTimeout)
	if d, err := time.ParseDuration(b.GroupTimeout); err != nil || d < 0 {
		o.faults.add(o.name("group_timeout"), strconv.Quote(b.GroupTimeout), `a duration such as "90s" or "10m"; "0s" for none`)
	}
	o.oneOf("incomplete", &b.IncompleteWhat, "drop", "train")
	o.oneOf("recompute", &b.Recompute, recomputeAuto, "cheap", "mlp", "layers")
	o.finish()
}

func (c *CheckpointSpec) parse(o *object) {
	o.integer("publish_every_steps", &c.PublishEverySteps, 1, maxSteps)
	o.integer("snapshot_every_steps", &c.SnapshotEverySteps, 0, maxSteps)
	o.integer("keep_last", &c.KeepLast, 0, maxSteps)
	o.integer("keep_every", &c.KeepEvery, 0, maxSteps)
	if c.KeepLast == 0 && !o.given("keep_every") {
		c.KeepEvery = 0
	}
	o.oneOf("dtype", &c.DType, "source", "F32", "BF16", "F16")
	o.finish()
}

func (l *LimitsSpec) parse(o *object) {
	o.integer("max_queued_rollouts", &l.MaxQueuedRollouts, 0, 1<<40)
	o.integer("max_queued_tokens", &l.MaxQueuedTokens, 0, 1<<50)
	o.integer("max_queued_bytes", &l.MaxQueuedBytes, 0, 1<<50)
	o.finish()
}

// within refuses a limit that the server's own does not allow, so that none is
// accepted and then cut down.
func (l *LimitsSpec) within(server Limits) error {
	var f faults
	for _, x := range []struct {
		name      string
		got, most int64
	}{
		{"limits.max_queued_rollouts", l.MaxQueuedRollouts, int64(server.MaxQueuedRollouts)},
		{"limits.max_queued_tokens", l.MaxQueuedTokens, server.MaxQueuedTokens},
		{"limits.max_queued_bytes", l.MaxQueuedBytes, server.MaxQueuedBytes},
	} {
		if x.got > x.most {
			f.add(x.name, x.got, "at most "+strconv.FormatInt(x.most, 10)+", the server's limit")
		}
	}
	if len(f) == 0 {
		return nil
	}
	return &fault.Error{Kind: fault.Invalid, Code: "invalid_job", Msg: "job document", Fields: f}
}

// queueLimits are what bounds a job's queue: its own limits where it has them,
// and never more than the server's, which may have come down since.
func (l *LimitsSpec) queueLimits(server Limits) Limits {
	least := func(own, most int64) int64 {
		if own == 0 {
			return most
		}
		return min(own, most)
	}
	server.MaxQueuedRollouts = int(least(l.MaxQueuedRollouts, int64(server.MaxQueuedRollouts)))
	server.MaxQueuedTokens = least(l.MaxQueuedTokens, server.MaxQueuedTokens)
	server.MaxQueuedBytes = least(l.MaxQueuedBytes, server.MaxQueuedBytes)
	return server
}

// combinations refuses settings that are each in range and make no sense together.
func (s *Spec) combinations(f *faults) {
	b, c := s.Batch, s.Checkpoint
	if b.MaxPolicyLag >= 0 && b.Stale != rollout.StaleAdmit && c.PublishEverySteps > b.MaxPolicyLag {
		f.add("checkpoint.publish_every_steps", c.PublishEverySteps,
			"at most batch.max_policy_lag ("+strconv.FormatInt(b.MaxPolicyLag, 10)+"): rollouts of the newest published policy would be refused as stale")
	}
	if b.IncompleteWhat == "train" && b.Timeout() == 0 {
		f.add("batch.incomplete", "train", "a batch.group_timeout above 0s: without one no group is ever settled incomplete")
	}
	if b.Stale != rollout.StaleReject && b.MaxPolicyLag < 0 {
		f.add("batch.stale", b.Stale, rollout.StaleReject+" without batch.max_policy_lag: nothing is ever too stale")
	}
	if b.Stale == rollout.StaleDelay && b.Timeout() == 0 {
		f.add("batch.stale", b.Stale, "a batch.group_timeout above 0s with delay: without one a step might wait for ever")
	}
	if s.Objective.Name == "cross_entropy" && b.Timeout() > 0 {
		f.add("batch.group_timeout", b.GroupTimeout, "none with cross_entropy: its groups are one row and never wait")
	}
	if s.Sampling.MaxSequences > 0 && s.Sampling.MaxTokens < 2 {
		f.add("sampling.max_tokens", s.Sampling.MaxTokens, "at least 2 when sampling.max_sequences is above 0")
	}
	if s.Sampling.MaxSequences == 0 && s.Sampling.MaxTokens > 0 {
		f.add("sampling.max_tokens", s.Sampling.MaxTokens, "0 when sampling.max_sequences is 0: nothing is sampled")
	}
	if c.KeepEvery > 0 && c.KeepLast == 0 {
		f.add("checkpoint.keep_every", c.KeepEvery, "0 when checkpoint.keep_last is 0: everything is kept")
	}
	if s.MaxSteps > 0 && c.PublishEverySteps > s.MaxSteps {
		f.add("checkpoint.publish_every_steps", c.PublishEverySteps, "at most max_steps ("+strconv.FormatInt(s.MaxSteps, 10)+")")
	}
}

// parseAlgorithm reads the members that belong to package sagrpo and lets it judge them.
func (s *Spec) parseAlgorithm(o *object, f *faults) {
	var err error
	raw, _ := o.raw("objective")
	s.Objective, err = sagrpo.ParseObjective(raw)
	broken := f.take(err)
	raw, _ = o.raw("optimizer")
	s.Optimizer, err = sagrpo.ParseOptimizer(raw)
	broken = f.take(err) || broken
	if !broken {
		f.take(s.settings().Validate())
	}
}

// settings are what package sagrpo runs a step with.
func (s *Spec) settings() sagrpo.Settings {
	return sagrpo.Settings{Objective: s.Objective, Optimizer: s.Optimizer, MaxSteps: s.MaxSteps, MaxTokens: int(s.Batch.MaxTokens)}
}

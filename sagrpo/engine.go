package sagrpo

import (
	"context"
	"fmt"
	"maps"
	"math"
	"time"
	"unsafe"

	"trainerd/internal/fault"
	"trainerd/kernels"
	"trainerd/model"
	"trainerd/rollout"
	"trainerd/rollout/words"
)

// policy is what a step asks of a model.
type policy interface {
	Score(b *model.Batch, w model.Weights, temperature float32) (model.Scores, error)
	// Accumulate's scores hold once Settle has returned nil.
	Accumulate(b *model.Batch, l model.Loss) (model.Scores, error)
	Settle() error
	ZeroGrad()
	OptimStep(o model.AdamW) (model.StepResult, error)
	SyncReference(alpha float32) error
}

// Engine runs steps of one objective on one model. Like its model, it is used by
// one goroutine at a time.
type Engine struct {
	policy     policy
	advantages func(kernels.Advantages)
	set        Settings
	loss       loss
	cost       cost
	memory     func() int64     // bytes the model holds on its device
	now        func() time.Time // for timings only
	counted    []int32          // 0, 1, 2, ...; see ordinals
	spare      memory           // of a consumption that was released
}

// memory is what a consumption's micro-batches lie in: some 14 bytes a token,
// which would otherwise be fresh for each step.
type memory struct {
	tokens  []int32
	weights []float32
}

// NewEngine checks the settings against the model. The model must have been
// loaded with Train, and with Reference when Beta is not 0.
func NewEngine(m *model.Model, s Settings) (*Engine, error) {
	if err := s.Validate(); err != nil {
		return nil, err
	}
	held := m.Plan().Bytes
	if held["optimizer"] == 0 {
		return nil, fault.New(fault.Invalid, "no_training", "new engine: the model was loaded without gradients and optimizer state")
	}
	if s.Objective.NeedsReference() && held["reference"] == 0 {
		return nil, fault.New(fault.Invalid, "no_reference", "new engine: objective.beta is %v and the model was loaded without a reference", s.Objective.Beta)
	}
	opt := m.Options()
	for _, f := range []struct {
		name, set string
		is        bool
		not, yes  string
	}{
		{"moments", s.Optimizer.Moments, opt.CompactMoments, Float32, MomentsCompact},
		{"moments_in", s.Optimizer.MomentsIn, opt.HostMoments, MomentsDevice, MomentsHost},
		{"gradients", s.Optimizer.Gradients, opt.BF16Gradients, Float32, GradientsBFloat},
	} {
		loaded := f.not
		if f.is {
			loaded = f.yes
		}
		if f.set != loaded {
			return nil, fault.BadField("optimizer."+f.name, f.set, loaded+", as which the model was loaded")
		}
	}
	e := newEngine(m, m.Device().Advantages, s)
	e.cost = costOf(m.Config())
	e.memory = func() int64 { return m.Plan().Total }
	return e, nil
}

func newEngine(p policy, advantages func(kernels.Advantages), s Settings) *Engine {
	s.Objective.Name = canonical(s.Objective.Name)
	return &Engine{
		policy: p, advantages: advantages, set: s, loss: newLoss(s.Objective),
		memory: func() int64 { return 0 }, now: time.Now,
	}
}

// Consumption is one use of a set of groups: Iterations optimizer steps on the
// same groups with the old policy fixed.
type Consumption struct {
	engine *Engine
	step   int64 // optimizer steps done before the next one
	left   int   // optimizer steps still to do
	micros []micro
	fixed  Metrics // what the groups alone determine
	spent  time.Duration
	mem    memory
}

// Release gives the consumption's memory to the next one. It is for whoever is
// done with it for good: Next does nothing any more.
func (c *Consumption) Release() {
	if c.engine != nil {
		c.engine.spare = c.mem
		*c = Consumption{}
	}
}

// Consume starts on groups; step is the number of optimizer steps done before.
// Everything that follows is a pure function of weights, state, groups and step.
// The groups must not change until the last step is done.
func (e *Engine) Consume(ctx context.Context, groups []rollout.Group, step int64) (*Consumption, error) {
	begin := e.now()
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if len(groups) == 0 {
		return nil, fault.New(fault.Invalid, "no_groups", "consume groups: there are none")
	}
	o := e.set.Objective
	count, longest := 0, 0
	for g := range groups {
		count += len(groups[g].Rollouts)
		for i := range groups[g].Rollouts {
			longest = max(longest, len(groups[g].Rollouts[i].Completion))
		}
	}
	ordinals := e.ordinals(longest)
	rows := make([]*row, 0, count) // of the whole step, in the order of groups
	for g := range groups {
		group := &groups[g]
		if len(group.Rollouts) == 0 {
			return nil, fault.New(fault.Invalid, "empty_group", "consume group %q: it has no rollouts", group.ID)
		}
		for i := range group.Rollouts {
			if err := e.admit(group, i); err != nil {
				return nil, err
			}
			r := &row{group: group, index: i}
			r.activate(o, ordinals)
			r.oldSampler = e.loss.rule.rewards && o.OldLogProbs != OldTrainer && r.sampler != nil
			rows = append(rows, r)
		}
	}

	trained, flat := rows, 0
	if e.loss.rule.rewards {
		adv, noSignal := advantages(e.advantages, e.loss.rule.scale, groups)
		free := o.Beta == 0 && o.EntropyCoef == 0 // a group without signal has no gradient at all
		trained = nil
		g := 0
		for i, r := range rows {
			if i > 0 && r.group != rows[i-1].group {
				g++
			}
			r.adv = adv[i]
			if !(free && noSignal[g]) {
				trained = append(trained, r)
			}
		}
		for _, f := range noSignal {
			if f {
				flat++
			}
		}
	}
	mem := e.spare
	e.spare = memory{}
	mem.weights = e.loss.weigh(rows, len(groups), mem.weights)
	micros, tokens, err := cut(trained, e.set.MaxTokens, e.cost, mem.tokens)
	if err != nil {
		return nil, fmt.Errorf("pack groups: %w", err)
	}
	mem.tokens = tokens
	c := &Consumption{engine: e, step: step, left: o.Iterations, micros: micros, mem: mem}
	c.fixed = e.describe(groups, rows, flat, step)
	c.spent = e.now().Sub(begin)
	return c, nil
}

// admit refuses a rollout that the objective cannot train on. Intake refuses
// the same earlier, with its row; here nothing may slip through as a NaN.
func (e *Engine) admit(group *rollout.Group, i int) error {
	o, r := e.set.Objective, &group.Rollouts[i]
	bad := func(column string, got any, expected string) error {
		return &fault.Error{
			Kind: fault.Invalid, Code: "invalid_rollout", Msg: fmt.Sprintf("consume group %q, rollout %d", group.ID, i),
			Fields: []fault.Field{{Name: column, Row: -1, Got: fmt.Sprint(got), Expected: expected}},
		}
	}
	n := len(r.Completion)
	active := func(t int) bool {
		return (r.LossMask == nil || r.LossMask[t]) && !(o.MaskTruncated && r.Truncated)
	}
	switch {
	case n == 0:
		return bad("completion_tokens", "none", "at least one")
	case e.loss.rule.rewards && !finite(r.Reward):
		return bad("reward", r.Reward, "a finite number")
	case r.LossMask != nil && len(r.LossMask) != n:
		return bad("loss_mask", len(r.LossMask), fmt.Sprintf("%d values, one per token", n))
	case r.SamplerLogProbs == nil && o.NeedsSamplerLogProbs():
		return bad("sampler_logprobs", "no column", "log-probs, which the objective's settings need")
	case r.SamplerLogProbs != nil && len(r.SamplerLogProbs) != n:
		return bad("sampler_logprobs", len(r.SamplerLogProbs), fmt.Sprintf("%d values, one per token", n))
	case r.LossWeights != nil && e.loss.rule.share != shareWeighted:
		return bad("loss_weights", len(r.LossWeights), "no column unless the objective is cross_entropy")
	case r.LossWeights != nil && len(r.LossWeights) != n:
		return bad("loss_weights", len(r.LossWeights), fmt.Sprintf("%d values, one per token", n))
	}
	if allFinite(r.SamplerLogProbs) && r.LossWeights == nil {
		return nil
	}
	for t, p := range r.SamplerLogProbs {
		if !finite(float64(p)) && active(t) {
			return bad(fmt.Sprintf("sampler_logprobs[%d]", t), p, "a finite number where the loss is not masked")
		}
	}
	for t, w := range r.LossWeights {
		if (!finite(float64(w)) || w < 0) && active(t) {
			return bad(fmt.Sprintf("loss_weights[%d]", t), w, "a finite number, 0 or more")
		}
	}
	return nil
}

// allFinite says in one pass that no number is infinite or NaN.
func allFinite(x []float32) bool {
	return words.Finite(unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(x))), 4*len(x)), math.MaxFloat32)
}

// Next runs the next optimizer step and returns its metrics; done is true
// together with the metrics of the last one, and after it. On an error the
// weights are as they were and the step may be tried again, unless the device
// itself failed in the update.
func (c *Consumption) Next(ctx context.Context) (m Metrics, done bool, err error) {
	if c.left == 0 {
		return nil, true, nil
	}
	e := c.engine
	begin := e.now()
	defer func() {
		if err != nil {
			e.policy.ZeroGrad() // drop what was accumulated
			err = fmt.Errorf("run step %d: %w", c.step+1, err)
		}
	}()
	e.policy.ZeroGrad()
	var seen observed
	scores := make([]model.Scores, len(c.micros))
	for i := range c.micros {
		if err := ctx.Err(); err != nil {
			return nil, false, err
		}
		if scores[i], err = c.accumulate(&c.micros[i], &seen); err != nil {
			return nil, false, err
		}
	}
	if err := e.policy.Settle(); err != nil {
		return nil, false, err
	}
	for i := range c.micros {
		if err := c.observe(&c.micros[i], scores[i], &seen); err != nil {
			return nil, false, err
		}
	}
	if err := ctx.Err(); err != nil {
		return nil, false, err
	}
	o := e.set.Optimizer
	lr := e.set.LR(e.set.Done + c.step)
	result, err := e.policy.OptimStep(model.AdamW{
		LR: lr, Beta1: o.Betas[0], Beta2: o.Betas[1], Eps: o.Eps,
		WeightDecay: o.WeightDecay, MaxGradNorm: o.MaxGradNorm,
	})
	if err != nil {
		return nil, false, err
	}
	for i := range c.micros {
		for _, s := range c.micros[i].spans {
			if s.row.first == nil {
				s.row.first = s.of(scores[i].LogProb)
			}
		}
	}
	c.step++
	c.left--
	if err := c.syncReference(); err != nil {
		return nil, false, err
	}

	m = make(Metrics, len(c.fixed)+24)
	for name, v := range c.fixed {
		m[name] = v
	}
	seen.report(m, e.loss.rule)
	m["grad_norm"] = result.GradNorm
	m["lr"] = lr
	took := e.now().Sub(begin) + c.spent
	c.spent = 0
	e.timings(m, &seen, took)
	maps.DeleteFunc(m, func(_ string, v float64) bool { return !finite(v) })
	return m, c.left == 0, nil
}

// accumulate adds a micro-batch to the gradient. The device need not be done when
// it returns, so that the host prepares the next one beside it: the scores hold
// nothing before the policy was settled.
func (c *Consumption) accumulate(mb *micro, seen *observed) (model.Scores, error) {
	e := c.engine
	temperature := float32(e.set.Objective.Temperature)
	if e.loss.token.Beta != 0 && mb.spans[0].row.ref == nil {
		s, err := e.policy.Score(&mb.batch, model.Reference, temperature)
		if err != nil {
			return model.Scores{}, fmt.Errorf("score under the reference: %w", err)
		}
		ref := append([]float32(nil), s.LogProb...)
		for _, sp := range mb.spans {
			sp.row.ref = sp.of(ref)
		}
		seen.flops += mb.flops
	}
	seen.flops += trainingPasses * mb.flops
	seen.tokens += len(mb.batch.Tokens)
	return e.policy.Accumulate(&mb.batch, e.modelLoss(mb))
}

// observe adds the scores of a settled micro-batch to what was observed.
func (c *Consumption) observe(mb *micro, scores model.Scores, seen *observed) error {
	e := c.engine
	for _, s := range mb.spans {
		if err := e.loss.finite(s.row, s.of(scores.LogProb), s.of(scores.Entropy)); err != nil {
			return err
		}
		e.loss.row(s.row, s.of(scores.LogProb), s.of(scores.Entropy), nil, nil, &seen.tally)
		seen.row(s.row, s.of(scores.LogProb), s.of(scores.Entropy))
	}
	return nil
}

// finite refuses log-probs that a step must not be built on, and ratios that
// overflow: a gradient computed from them would be no number.
func (l *loss) finite(r *row, fresh, entropy []float32) error {
	var old []float32
	if l.rule.rewards && !l.rule.sequence {
		old = r.old()
	}
	for i := range fresh {
		code, got := "", 0.0
		switch x := float64(fresh[i]); {
		case !finite(x):
			code, got = "logprob_not_finite", x
		case !finite(float64(entropy[i])):
			code, got = "entropy_not_finite", float64(entropy[i])
		case r.ref != nil && !expFinite(float64(r.ref[i])-x):
			code, got = "reference_ratio_not_finite", float64(r.ref[i])-x
		case old != nil && !expFinite(x-float64(old[i])):
			code, got = "ratio_not_finite", x-float64(old[i])
		default:
			continue
		}
		return &fault.Error{
			Kind: fault.Invalid, Code: code, Msg: "compute log-probs",
			Fields: []fault.Field{{
				Name: fmt.Sprintf("group %q, rollout %d, completion token %d", r.group.ID, r.index, r.active[i]), Row: -1,
				Got: fmt.Sprint(got), Expected: "a finite number, and a log-prob at most 88 nats off the old policy's and the reference's",
			}},
		}
	}
	return nil
}

// expFinite reports whether a log-ratio has a ratio in the device's float32.
func expFinite(x float64) bool { return finite(float64(float32(math.Exp(x)))) }

// modelLoss writes a micro-batch's rows as the model's loss. Where every token's
// coefficient is a function of inputs that are known beforehand and of its own
// fresh log-prob, the device computes it in the same pass over the logits. The
// rest is computed here from all fresh log-probs: a sequence-level ratio, factors
// of truncated importance sampling whose old log-probs are the fresh ones, and
// rows with and without old log-probs side by side.
func (e *Engine) modelLoss(mb *micro) model.Loss {
	l := model.Loss{Surrogate: e.loss.token, Temperature: float32(e.set.Objective.Temperature)}
	known := 0
	for _, s := range mb.spans {
		if s.row.old() != nil {
			known++
		}
	}
	mixed := known != 0 && known != len(mb.spans)
	if e.loss.rule.sequence || mixed || e.loss.tisCap != 0 && known == 0 {
		l.Surrogate = kernels.Surrogate{}
		l.Coefficients = func(s model.Scores) (dLogProb, dEntropy []float32) {
			dLogProb = make([]float32, len(s.LogProb))
			if e.loss.token.EntropyCoef != 0 {
				dEntropy = make([]float32, len(s.LogProb))
			}
			for _, sp := range mb.spans {
				e.loss.row(sp.row, sp.of(s.LogProb), sp.of(s.Entropy), sp.of(dLogProb), sp.of(dEntropy), new(tally))
			}
			return dLogProb, dEntropy
		}
		return l
	}
	for _, s := range mb.spans {
		l.Weight = append(l.Weight, s.row.weight...)
		if e.loss.rule.rewards {
			for range s.row.active {
				l.Adv = append(l.Adv, float32(s.row.adv))
			}
			l.Old = append(l.Old, s.row.old()...)
		}
		l.Ref = append(l.Ref, s.row.ref...)
		l.TIS = append(l.TIS, e.loss.tis(s.row, nil)...)
	}
	return l
}

// syncReference moves the reference towards the policy after every
// sync_every_steps-th step of the job.
func (c *Consumption) syncReference() error {
	ref := c.engine.set.Objective.Reference
	if ref.SyncEverySteps == 0 || (c.engine.set.Done+c.step)%int64(ref.SyncEverySteps) != 0 {
		return nil
	}
	if err := c.engine.policy.SyncReference(float32(ref.SyncAlpha)); err != nil {
		return fmt.Errorf("sync the reference: %w", err)
	}
	for i := range c.micros {
		for _, s := range c.micros[i].spans {
			s.row.ref = nil
		}
	}
	return nil
}

package bench

import (
	"context"
	"math/rand/v2"
	"sync"

	"gorgonia.org/tensor"

	"trainerd/kernels"
	"trainerd/model"
	"trainerd/rollout"
	"trainerd/sagrpo"
)

// trainee is a randomly initialised model with the engine and the groups of a load.
type trainee struct {
	cfg    model.Config
	m      *model.Model
	engine *sagrpo.Engine
	groups []rollout.Group
	done   int64
}

// newTrainee loads a model onto the device. Its weights are normal numbers that
// repeat after a million: making a billion of them would take longer than the measurement.
func newTrainee(ctx context.Context, dev kernels.Device, cfg model.Config, l Load, opt model.Options, set sagrpo.Optimizer) (*trainee, error) {
	src, err := model.NewRandom(cfg, 1)
	if err != nil {
		return nil, err
	}
	m, err := model.Load(ctx, dev, repeating{src}, opt)
	if err != nil {
		return nil, err
	}
	t := &trainee{cfg: cfg, m: m, groups: l.groups(cfg.Vocab)}
	if opt.Train {
		obj := sagrpo.DefaultObjective("sa_grpo")
		obj.GroupSize = len(l.Groups[0])
		if t.engine, err = sagrpo.NewEngine(m, sagrpo.Settings{Objective: obj, Optimizer: set, MaxTokens: opt.MaxTokens}); err != nil {
			_ = m.Close()
			return nil, err
		}
	}
	return t, nil
}

// step is one optimizer step on the load.
func (t *trainee) step(ctx context.Context) error {
	c, err := t.engine.Consume(ctx, t.groups, t.done)
	if err != nil {
		return err
	}
	for last := false; !last; t.done++ {
		if _, last, err = c.Next(ctx); err != nil {
			return err
		}
	}
	return nil
}

// peak is the device memory in use at the most: all but scratch as planned, scratch as used.
func (t *trainee) peak() int64 {
	p := t.m.Plan()
	return p.Total - p.Bytes["scratch"] + t.m.ScratchPeak()
}

// repeating is a Source whose matrices repeat a tile of normal numbers.
type repeating struct{ model.Source }

// tile is made when the first matrix is read.
var tile = sync.OnceValue(func() []float32 {
	r := rand.New(rand.NewPCG(3, 3))
	x := make([]float32, 1<<20+7) // no multiple of a row's width
	for i := range x {
		x[i] = float32(0.02 * r.NormFloat64())
	}
	return x
})

func (s repeating) Read(name string, dst *tensor.Dense) error {
	if len(dst.Shape()) == 1 { // norms and biases
		return s.Source.Read(name, dst)
	}
	for x := dst.Float32s(); len(x) > 0; {
		x = x[copy(x, tile()):]
	}
	return nil
}

package bench

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"fmt"
	"math"
	"os"
	"time"

	"trainerd/kernels/cpu"
	"trainerd/model"
	"trainerd/rollout"
	"trainerd/rollout/arrowio"
	"trainerd/rollout/spool"
	"trainerd/sagrpo"
)

// IngestStage is one part of the path alone, on one goroutine.
type IngestStage struct {
	Stage   string  `json:"stage"`
	NsByte  float64 `json:"ns_byte"` // processor time of this process by bytes of the body, garbage collection included
	MBsCore float64 `json:"mb_s_core"`
	BestNs  float64 `json:"best_ns_byte"` // of its fastest round, which other work on the machine disturbed least
	InPath  bool    `json:"in_path"`      // false: a part of another stage, or something else than the path does
}

// stageRounds is how often a stage is repeated at least.
const stageRounds = 8

// memoryDir is a file system without a disk: what is left of an append there is its processor time.
const memoryDir = "/dev/shm"

// ingestStages measures decoding and checking, the mark of a body, the assembler, the
// spool's append without a disk, and the preparation of a step on one body.
func ingestStages(ctx context.Context, o IngestOptions, body bodyTemplate) ([]IngestStage, error) {
	var out []IngestStage
	// run measures do alone; prepare is not counted.
	run := func(name string, inPath bool, prepare, do func(i int) error) error {
		var spent time.Duration
		best := time.Duration(math.MaxInt64)
		i := -1 // a warm-up
		for ; i < stageRounds || spent < o.StageTime; i++ {
			if prepare != nil {
				if err := prepare(i + 1); err != nil {
					return fmt.Errorf("%s: %w", name, err)
				}
			}
			before := processTime()
			if err := do(i + 1); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			after := processTime()
			if i >= 0 {
				took := after.user - before.user + after.system - before.system
				spent += took
				best = min(best, took)
			}
		}
		size := float64(len(body.bytes))
		ns := float64(spent) / float64(i) / size
		out = append(out, IngestStage{Stage: name, NsByte: ns, MBsCore: 1e3 / ns, BestNs: float64(best) / size, InPath: inPath})
		return nil
	}
	schema := rollout.Schema{Objective: "sa_grpo", SamplerLogProbs: true}
	limits := rollout.Limits{MaxBytes: 1 << 40, MaxRows: 1 << 30, MaxTokens: 1 << 40, MaxPromptTokens: ingestMaxTokens,
		MaxCompletionTokens: ingestMaxTokens, MaxSequence: ingestMaxTokens, Vocab: ingestVocab}

	if err := run("mark", true, nil, func(int) error { return mark(body.bytes) }); err != nil {
		return nil, err
	}
	var batch *rollout.Batch
	decode := func(int) (err error) {
		batch, _, err = arrowio.DecodeInPlace(body.bytes, schema, limits)
		return err
	}
	if err := run("decode and validate", true, nil, decode); err != nil {
		return nil, err
	}

	asm := rollout.NewAssembler(rollout.AssemblerOptions{GroupSize: o.GroupSize, Objective: "sa_grpo", MaxPolicyLag: -1})
	number := func(i int) error {
		body.number(i)
		return decode(i)
	}
	var groups []rollout.Group
	assemble := func(i int) error {
		if err := asm.Check(batch); err != nil {
			return err
		}
		if _, err := asm.Add(uint64(i+1), batch); err != nil {
			return err
		}
		groups, _ = asm.Take(asm.Ready(), 0)
		ids := make([]string, len(groups))
		for k := range groups {
			ids[k] = groups[k].ID
		}
		return asm.Mark(ids, rollout.State{Status: rollout.Trained, Step: int64(i)})
	}
	if err := run("assemble", true, number, assemble); err != nil {
		return nil, err
	}

	if err := appendStage(run, body.bytes); err != nil {
		return nil, err
	}

	dev, err := cpu.New(1)
	if err != nil {
		return nil, err
	}
	defer dev.Close()
	src, err := model.NewRandom(ingestModel(), 1)
	if err != nil {
		return nil, err
	}
	defer src.Close()
	m, err := model.Load(ctx, dev, src, model.Options{Train: true, MaxTokens: ingestMaxTokens})
	if err != nil {
		return nil, err
	}
	defer m.Close()
	obj := sagrpo.DefaultObjective("sa_grpo")
	obj.GroupSize = o.GroupSize
	engine, err := sagrpo.NewEngine(m, sagrpo.Settings{Objective: obj, Optimizer: sagrpo.DefaultOptimizer(), MaxTokens: ingestMaxTokens})
	if err != nil {
		return nil, err
	}
	if err := run("prepare a step", true, nil, func(i int) error {
		c, err := engine.Consume(ctx, groups, int64(i))
		if err == nil {
			c.Release()
		}
		return err
	}); err != nil {
		return nil, err
	}
	var mem []int32
	pack := func(int) (err error) {
		_, mem, err = rollout.PackIn(mem, groups, ingestMaxTokens)
		return err
	}
	if err := run("of which pack", false, nil, pack); err != nil {
		return nil, err
	}
	return out, nil
}

// mark does what a body's mark takes, which the trainer remembers beside its idempotency key.
func mark(body []byte) error {
	block, err := aes.NewCipher(make([]byte, 16))
	if err != nil {
		return err
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		return err
	}
	aead.Seal(nil, make([]byte, aead.NonceSize()), nil, body)
	return nil
}

// appendStage measures the spool where there is no disk below it. Its log is
// trimmed as it grows. Without such a place the stage is left out.
func appendStage(run func(name string, inPath bool, prepare, do func(i int) error) error, body []byte) error {
	dir, err := os.MkdirTemp(memoryDir, "trainerd-bench-")
	if err != nil {
		return nil // no such file system here: its time stays in the rest
	}
	defer os.RemoveAll(dir)
	log, err := spool.Open(dir, 64<<20)
	if err != nil {
		return err
	}
	defer log.Close()
	return run("append in memory", true, func(int) error { return log.Trim(log.Last()) }, func(int) error {
		_, err := log.Append(spool.Record{Kind: "rollouts", Body: body})
		return err
	})
}

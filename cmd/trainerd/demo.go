package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"github.com/spf13/cobra"

	"trainerd/client"
	"trainerd/internal/fault"
	"trainerd/kernels/cpu"
	"trainerd/model"
	"trainerd/model/hf"
	"trainerd/model/tokenizer"
	"trainerd/rollout"
	"trainerd/secloop"
)

// demo is one run of the loop over HTTP: a warm start by cross_entropy on
// demonstrations, then SA-GRPO on what the drill says.
type demo struct {
	con     console
	dir     string
	seed    uint64
	control bool // rewards shuffled within each group
	summary bool

	warmSteps, warmRows int
	steps, groups       int
	size                int // G
	evalPrompts         int
	evalEvery           int
	lr                  float64
	moments, gradients  string
	device              string
	smollm2             string

	client *client.Client
	node   *node
	agent  secloop.Agent
	points []point
}

// point is one measurement of the curve.
type point struct {
	Step int64
	Mean secloop.Tally
}

const (
	minGain    = 20 // points of held-out accuracy that the demo must show
	maxControl = 5  // points that the control may gain
)

func newDemo() *cobra.Command {
	d := &demo{}
	var keep string
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Train a small policy on the security drill, over HTTP, and show what it learned",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if err := d.settle(cmd); err != nil {
				return err
			}
			d.con = newQuietConsole(cmd, slog.LevelWarn)
			d.dir = keep
			if d.dir == "" {
				if d.dir, err = os.MkdirTemp("", "trainerd-demo-"); err != nil {
					return err
				}
				defer os.RemoveAll(d.dir)
			}
			if d.smollm2 != "" {
				return d.runSmolLM2(cmd.Context())
			}
			return d.run(cmd.Context())
		},
	}
	f := cmd.Flags()
	f.Uint64Var(&d.seed, "seed", 1, "seed of weights, alerts and sampling; the same seed gives the same numbers")
	f.BoolVar(&d.control, "control", false, "shuffle the rewards within each group: nothing must be learned")
	f.BoolVar(&d.summary, "summary", false, "print only the result")
	f.IntVar(&d.warmSteps, "warm-steps", 220, "cross_entropy steps of the warm start")
	f.IntVar(&d.warmRows, "warm-rows", 64, "demonstrations per warm-start step")
	f.Float64Var(&d.lr, "lr", 1.5e-4, "learning rate of SA-GRPO")
	f.StringVar(&d.moments, "moments", "float32", "optimizer.moments of the jobs: float32 or compact")
	f.StringVar(&d.gradients, "gradients", "float32", "optimizer.gradients of the jobs: float32 or bfloat16")
	f.IntVar(&d.steps, "steps", 60, "SA-GRPO steps; with --smollm2 4 unless given")
	f.IntVar(&d.groups, "groups", 24, "alerts per step")
	f.IntVar(&d.size, "group-size", 7, "strategies per alert (G)")
	f.IntVar(&d.evalPrompts, "eval-prompts", 240, "held-out alerts")
	f.IntVar(&d.evalEvery, "eval-every", 10, "steps between held-out measurements")
	f.StringVar(&keep, "keep", "", "directory to keep server data, store and models in")
	f.StringVar(&d.device, "device", "cpu", "cpu, cuda:N or auto; numbers repeat from run to run on one kind of device")
	f.StringVar(&d.smollm2, "smollm2", "", "GGUF of SmolLM2-135M-Instruct: run a few steps on it instead")
	return cmd
}

// settle checks the flags, and refuses those that a run on SmolLM2 would not use.
func (d *demo) settle(cmd *cobra.Command) error {
	for name, v := range map[string]int{"warm-steps": d.warmSteps, "warm-rows": d.warmRows, "steps": d.steps, "groups": d.groups,
		"group-size": d.size, "eval-prompts": d.evalPrompts, "eval-every": d.evalEvery} {
		if v < 1 {
			return fault.BadField(name, v, "1 or more")
		}
	}
	if d.smollm2 == "" {
		return nil
	}
	for _, name := range []string{"control", "summary", "warm-steps", "warm-rows", "lr", "groups", "eval-prompts", "eval-every"} {
		if cmd.Flags().Changed(name) {
			return fault.BadField(name, cmd.Flags().Lookup(name).Value, "not with --smollm2, which does not use it")
		}
	}
	if !cmd.Flags().Changed("steps") {
		d.steps = 4
	}
	return nil
}

// start boots a server on loopback with the chosen device and a directory store.
func (d *demo) start(ctx context.Context) (p *Program, err error) {
	cfg := DefaultConfig()
	cfg.Listen, cfg.Device = "127.0.0.1:0", d.device
	cfg.Data, cfg.Store = filepath.Join(d.dir, "data"), "dir:"+filepath.Join(d.dir, "store")
	p = &Program{Config: cfg, Log: d.con.log}
	if err = p.Start(ctx); err != nil {
		return nil, err
	}
	if d.client, err = client.New(p.URL(), client.Options{}); err != nil {
		return nil, err
	}
	return p, nil
}

func (d *demo) printf(format string, args ...any) {
	if !d.summary {
		fmt.Fprintf(d.con.out, format, args...)
	}
}

func (d *demo) run(ctx context.Context) error {
	began := time.Now()
	p, err := d.start(ctx)
	if err != nil {
		return err
	}
	defer func() {
		stop, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		p.Close(stop)
	}()
	d.printf("trainerd demo: server %s, seed %d, %d cores\n", p.URL(), d.seed, runtime.NumCPU())

	base := filepath.Join(d.dir, "model")
	src, err := model.NewRandom(byteModel(), d.seed)
	if err != nil {
		return err
	}
	if err := hf.Write(ctx, hf.DirSink(base), "", src, hf.WriteOptions{Carried: byteTokenizer()}); err != nil {
		return err
	}
	codec, err := tokenizer.Load(base)
	if err != nil {
		return err
	}
	device, err := cpu.New(0)
	if err != nil {
		return err
	}
	defer device.Close()
	d.node = &node{client: d.client, dir: filepath.Join(d.dir, "node"), device: device, slots: d.groups * d.size, maxPrompt: 80, maxTokens: 64, temperature: 1}
	defer d.node.close()
	d.agent = secloop.Agent{Codec: codec, Prompt: secloop.TersePrompt, Sampler: d.node, Field: secloop.Drill{}, Judge: secloop.RuleJudge{}}

	warm, err := warmStart{steps: d.warmSteps, rows: d.warmRows, ahead: 20, microBatch: 16384, lr: 3e-3, skill: 0.25, eos: byteEOS}.run(ctx, d, "dir:"+base)
	if err != nil {
		return fmt.Errorf("warm start: %w", err)
	}
	job, err := d.createLoop(ctx, warm)
	if err != nil {
		return err
	}
	if err := d.loop(ctx, job); err != nil {
		return fmt.Errorf("loop: %w", err)
	}
	return d.report(time.Since(began))
}

// warmStart says how a model is taught the format before it is rewarded.
type warmStart struct {
	steps, rows int // rows demonstrations per step
	ahead       int // steps' worth of rows in one batch
	microBatch  int // tokens
	lr          float64
	skill       float64 // of the operator that demonstrates
	eos         int32
}

// run trains the model on demonstrations through a cross_entropy job, and returns
// its last checkpoint as a model source.
func (w warmStart) run(ctx context.Context, d *demo, source string) (string, error) {
	job, err := d.client.CreateJob(ctx, map[string]any{
		"version": 1, "name": "warm-start", "model": map[string]any{"source": source},
		"objective": map[string]any{"name": "cross_entropy", "group_size": 1},
		"optimizer": map[string]any{"lr": w.lr, "betas": []float64{0.9, 0.98}, "schedule": map[string]any{"name": "cosine", "warmup_steps": w.steps / 20, "min_ratio": 0.1},
			"moments": d.moments, "gradients": d.gradients},
		"batch":      map[string]any{"groups_per_step": w.rows, "max_tokens_per_micro_batch": w.microBatch, "max_policy_lag": w.steps},
		"checkpoint": map[string]any{"publish_every_steps": w.steps},
		"max_steps":  w.steps, "seed": d.seed,
	}, client.NewKey())
	if err != nil {
		return "", err
	}
	r := rand.New(rand.NewPCG(d.seed, 1))
	operator := secloop.Operator{Skill: w.skill}
	bar := d.con.bar(int64(w.steps), "warm start")
	for done := 0; done < w.steps; done += w.ahead {
		n := min(w.ahead, w.steps-done)
		b := &rollout.Batch{}
		for i := range n * w.rows {
			a := secloop.Split{}.Draw(r)
			prompt, answer, err := d.agent.Example(a, operator.Demonstrate(r, a))
			if err != nil {
				return "", err
			}
			b.Rollouts = append(b.Rollouts, rollout.Rollout{GroupID: fmt.Sprintf("w%d", done*w.rows+i), Prompt: prompt,
				Completion: append(answer, w.eos), PolicyStep: rollout.NoPolicyStep})
		}
		if _, err := d.client.Submit(ctx, job.ID, b, fmt.Sprintf("warm-%d", done)); err != nil {
			return "", err
		}
		st, err := d.waitStep(ctx, job.ID, int64(done+n))
		if err != nil {
			return "", err
		}
		_ = bar.Set(done + n)
		d.printf("warm start %4d/%d  loss %.4f\n", done+n, w.steps, st.Metrics["loss"])
	}
	if _, err := waitCheckpoint(ctx, d.client, job.ID, int64(w.steps), 2*time.Minute); err != nil {
		return "", err
	}
	return fmt.Sprintf("job:%s@%d", job.ID, w.steps), nil
}

// createLoop makes the SA-GRPO job.
func (d *demo) createLoop(ctx context.Context, source string) (string, error) {
	job, err := d.client.CreateJob(ctx, map[string]any{
		"version": 1, "name": "secloop", "model": map[string]any{"source": source},
		"objective": map[string]any{"name": "sa_grpo", "group_size": d.size,
			"reward_weights": map[string]float64{"format": 1, "execution": 1, "evaluation": 1, "penalty": -1}},
		"optimizer":  map[string]any{"lr": d.lr, "betas": []float64{0.9, 0.95}, "max_grad_norm": 1.0, "moments": d.moments, "gradients": d.gradients},
		"batch":      map[string]any{"groups_per_step": d.groups, "max_tokens_per_micro_batch": 16384, "max_policy_lag": 1},
		"checkpoint": map[string]any{"publish_every_steps": 1},
		"max_steps":  d.steps, "seed": d.seed,
	}, client.NewKey())
	if err != nil {
		return "", fmt.Errorf("create job: %w", err)
	}
	d.node.job = job.ID // the server publishes what the job starts from as step 0
	return job.ID, nil
}

// pollEvery is the pause between looks at a job's status.
const pollEvery = 20 * time.Millisecond

// waitStep waits until a job has done a step and returns its record.
func (d *demo) waitStep(ctx context.Context, job string, step int64) (client.Step, error) {
	j, err := d.client.Wait(ctx, job, pollEvery, func(j client.Job) bool { return j.Step >= step || j.Final() })
	if err != nil {
		return client.Step{}, err
	}
	if j.Step < step {
		return client.Step{}, fmt.Errorf("job %s is %s at step %d: %+v", job, j.State, j.Step, j.LastError)
	}
	steps, err := d.client.Steps(ctx, job, step-1)
	if err != nil {
		return client.Step{}, err
	}
	if len(steps) == 0 {
		return client.Step{}, fmt.Errorf("job %s has no record of step %d", job, step)
	}
	return steps[0], nil
}

// loop alternates: pull the newest checkpoint, sample, score, post, until the job is done.
func (d *demo) loop(ctx context.Context, job string) error {
	alerts := rand.New(rand.NewPCG(d.seed, 2))
	var shuffle *rand.Rand
	if d.control {
		shuffle = rand.New(rand.NewPCG(d.seed, 3))
	}
	heldout := make([]secloop.Alert, d.evalPrompts)
	hr := rand.New(rand.NewPCG(d.seed, 4))
	for i := range heldout {
		heldout[i] = secloop.Split{Heldout: true}.Draw(hr)
	}
	if err := d.node.follow(ctx, 0); err != nil {
		return err
	}
	if err := d.measure(ctx, heldout); err != nil {
		return err
	}
	for step := range int64(d.steps) {
		batch := make([]secloop.Alert, d.groups)
		for i := range batch {
			batch[i] = secloop.Split{}.Draw(alerts)
		}
		episodes, at, err := d.agent.Play(ctx, batch, d.size, d.seed<<32|uint64(step))
		if err != nil {
			return err
		}
		b, err := d.agent.Rollouts(episodes, at, func(i int) string { return fmt.Sprintf("s%d-%d", step, i) }, shuffle)
		if err != nil {
			return err
		}
		if _, err := d.client.Submit(ctx, job, b, fmt.Sprintf("step-%d", step)); err != nil {
			return err
		}
		st, err := d.waitStep(ctx, job, step+1)
		if err != nil {
			return err
		}
		if err := d.node.follow(ctx, step+1); err != nil {
			return err
		}
		t := secloop.Count(episodes)
		d.printf("step %3d  reward %.3f  accuracy %.3f  grad_norm %.3f  entropy %.3f  sampler diff %.1e\n", step+1, t.Reward, t.Accuracy,
			st.Metrics["grad_norm"], st.Metrics["entropy"], st.Metrics["sampling/logp_difference_max"])
		if (int(step)+1)%d.evalEvery == 0 || int(step)+1 == d.steps {
			if err := d.measure(ctx, heldout); err != nil {
				return err
			}
		}
	}
	return nil
}

// measure samples one strategy for every held-out alert from the node's checkpoint.
func (d *demo) measure(ctx context.Context, heldout []secloop.Alert) error {
	episodes, at, err := d.agent.Play(ctx, heldout, 1, d.seed<<32|0xFFFFFFFF)
	if err != nil {
		return fmt.Errorf("measure: %w", err)
	}
	d.points = append(d.points, point{Step: at, Mean: secloop.Count(episodes)})
	d.printf("held-out at step %d: accuracy %.3f, reward %.3f\n", at, d.points[len(d.points)-1].Mean.Accuracy, d.points[len(d.points)-1].Mean.Reward)
	return nil
}

// report prints table and curve and decides whether the run showed what it must.
func (d *demo) report(took time.Duration) error {
	before, after := d.points[0].Mean, d.points[len(d.points)-1].Mean
	gain := 100 * (after.Accuracy - before.Accuracy)
	w := d.con.out
	if d.summary {
		return errors.Join(json.NewEncoder(w).Encode(map[string]any{"seed": d.seed, "control": d.control, "before": before.Accuracy, "after": after.Accuracy,
			"gain_points": gain, "reward_before": before.Reward, "reward_after": after.Reward, "seconds": took.Seconds()}), d.verdict(gain))
	}
	fmt.Fprintf(w, "\n%d held-out alerts      accuracy   reward   format\n", before.Episodes)
	fmt.Fprintf(w, "warm start               %6.1f %%   %6.3f   %5.1f %%\n", 100*before.Accuracy, before.Reward, 100*before.Format)
	fmt.Fprintf(w, "after %3d SA-GRPO steps  %6.1f %%   %6.3f   %5.1f %%\n", d.steps, 100*after.Accuracy, after.Reward, 100*after.Format)
	fmt.Fprintf(w, "gain                     %+6.1f points\n\n", gain)
	curve(w, d.points)
	fmt.Fprintf(w, "\n%.0f s in all\n", took.Seconds())
	return d.verdict(gain)
}

func (d *demo) verdict(gain float64) error {
	switch {
	case d.control && gain > maxControl:
		fmt.Fprintf(d.con.err, "FAILED: the control gained %.1f points, at most %d are chance\n", gain, maxControl)
		return exitError{1}
	case !d.control && gain < minGain:
		fmt.Fprintf(d.con.err, "FAILED: a gain of %.1f points, at least %d are expected\n", gain, minGain)
		return exitError{1}
	}
	return nil
}

package loop

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	mathrand "math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"time"

	"trainerd/client"
	"trainerd/internal/fault"
	"trainerd/rollout"
	"trainerd/secloop"
)

// Run is one training run: a warm start by cross_entropy on an operator's
// demonstrations, then turns of the loop until the job has done its steps. What
// it does is kept in a directory, from which a run that was ended goes on.
type Run struct {
	Client   *client.Client
	Agent    *Agent // its Sampler is set by the run unless there is one
	Source   Source
	Settings Settings
	Model    string // source of the initial weights, as the server names it
	Dir      string
	Printf   func(format string, args ...any)
	Story    bool // print the first turns stage by stage

	name string // of this run, for idempotency keys
	job  string
	exam Exam
	// Last are the measurements after the newest one, by set.
	points []Point
}

// Result is what a run came to.
type Result struct {
	Name     string   `json:"name"`
	Job      string   `json:"job"`
	Settings Settings `json:"settings"`
	Points   []Point  `json:"points"`
	Seconds  float64  `json:"seconds"` // of this process; a run that went on was longer
}

// Before and After return the first and last measurement on a set.
func (r Result) Before(set Set) (Point, bool) { return pick(r.Points, set, false) }

// After returns the last measurement on a set.
func (r Result) After(set Set) (Point, bool) { return pick(r.Points, set, true) }

func pick(points []Point, set Set, last bool) (p Point, ok bool) {
	for _, q := range points {
		if q.Set == set && (!ok || last) {
			p, ok = q, true
		}
	}
	return p, ok
}

// state is what run.json holds.
type state struct {
	Name     string   `json:"name"`
	Model    string   `json:"model"`
	Settings Settings `json:"settings"`
}

// open reads run.json or makes it. Other settings than those that the directory
// was begun with are refused.
func (r *Run) open() error {
	if err := r.Settings.Validate(); err != nil {
		return err
	}
	if err := os.MkdirAll(r.Dir, 0o755); err != nil {
		return err
	}
	path := filepath.Join(r.Dir, fileRun)
	raw, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		var b [6]byte
		if _, err := rand.Read(b[:]); err != nil {
			return err
		}
		r.name = hex.EncodeToString(b[:])
		return writeJSON(path, state{r.name, r.Model, r.Settings})
	}
	if err != nil {
		return err
	}
	var s state
	if err := json.Unmarshal(raw, &s); err != nil {
		return fault.New(fault.Malformed, "bad_record", "read %s: %v", path, err)
	}
	if s.Model != r.Model || !reflect.DeepEqual(s.Settings, r.Settings) {
		return fault.New(fault.Conflict, "other_run", "%s was begun with other settings: %+v, expected %+v; use another directory", r.Dir, r.Settings, s.Settings)
	}
	r.name = s.Name
	return readLines(filepath.Join(r.Dir, filePoints), func(p Point) error { r.points = append(r.points, p); return nil })
}

// Do runs or goes on until the job is done.
func (r *Run) Do(ctx context.Context) (Result, error) {
	began := time.Now()
	if err := r.open(); err != nil {
		return Result{}, err
	}
	source := r.Model
	if r.Settings.Warm.Steps > 0 {
		var err error
		if source, err = r.warmStart(ctx); err != nil {
			return Result{}, fmt.Errorf("warm start: %w", err)
		}
	}
	var err error
	if r.exam, err = NewExam(ctx, r.Source, r.Settings.Seed, map[Set]int{Incidents: r.Settings.EvalIncidents, Scenarios: r.Settings.EvalScenarios}); err != nil {
		return Result{}, err
	}
	if r.Settings.Steps == 0 {
		if err := r.measureOnly(ctx, source); err != nil {
			return Result{}, err
		}
	} else if err := r.learn(ctx, source); err != nil {
		return Result{}, err
	}
	out := Result{r.name, r.job, r.Settings, r.points, time.Since(began).Seconds()}
	return out, writeJSON(filepath.Join(r.Dir, fileResult), out)
}

// warmStart trains the model on demonstrations, and returns its last checkpoint as a source.
func (r *Run) warmStart(ctx context.Context) (string, error) {
	w, s := r.Settings.Warm, r.Settings
	j, err := r.Client.CreateJob(ctx, s.warmJob(r.Model), "secloop-warm-"+r.name)
	if err != nil {
		return "", err
	}
	source := fmt.Sprintf("job:%s@%d", j.ID, w.Steps)
	if j.Step >= int64(w.Steps) {
		return source, nil
	}
	pool, err := r.Source.Draw(ctx, seeded(s.Seed, "pool", 0), Train, w.Pool)
	if err != nil {
		return "", err
	}
	r.printf("warm start: %d incidents sensed, %d x %d demonstrations by an operator who is right %.0f %% of the time or by luck\n",
		len(pool), w.Steps, w.Rows, 100*w.Skill)
	operator := Operator{w.Skill}
	for batch := int64(0); int(batch)*w.Ahead < w.Steps; batch++ {
		n := min(w.Ahead, w.Steps-int(batch)*w.Ahead)
		if batch >= j.Counts.Batches { // else it was accepted before
			rows, err := r.demonstrate(seeded(s.Seed, "warm", batch), operator, pool, n*w.Rows, batch)
			if err != nil {
				return "", err
			}
			if _, err := r.Client.Submit(ctx, j.ID, &rollout.Batch{Rollouts: rows}, fmt.Sprintf("warm-%d", batch)); err != nil {
				return "", err
			}
		}
		done := batch*int64(w.Ahead) + int64(n)
		st, err := stepDone(ctx, r.Client, j.ID, done)
		if err != nil {
			return "", err
		}
		r.printf("warm start %4d/%d  loss %.4f\n", done, w.Steps, st.Metrics["loss"])
	}
	_, err = published(ctx, r.Client, j.ID, int64(w.Steps))
	return source, err
}

func (r *Run) demonstrate(rng *mathrand.Rand, o Operator, pool []Incident, n int, batch int64) ([]rollout.Rollout, error) {
	var rows []rollout.Rollout
	for i := range n {
		in := pool[rng.IntN(len(pool))]
		s, err := o.Demonstrate(rng, in)
		if err != nil {
			return nil, err
		}
		prompt, answer, err := r.Agent.Demonstration(in, s)
		if err != nil {
			return nil, err
		}
		rows = append(rows, rollout.Rollout{GroupID: fmt.Sprintf("w%d-%d", batch, i), Prompt: prompt,
			Completion: append(answer, r.Settings.Warm.EOS), PolicyStep: rollout.NoPolicyStep})
	}
	return rows, nil
}

// measureOnly measures a source that nothing is learned from, and keeps it as the policy.
func (r *Run) measureOnly(ctx context.Context, source string) error {
	s := r.Settings
	sampler, err := SampleOnly(ctx, r.Client, source, s.sequences(), s)
	if err != nil {
		return err
	}
	r.job = sampler.Job
	if r.Agent.Sampler == nil {
		r.Agent.Sampler = sampler
	}
	if err := r.measure(ctx, 0); err != nil {
		return err
	}
	return r.keepPolicy(ctx, 0)
}

// keepPolicy pulls the policy of a step once it is published.
func (r *Run) keepPolicy(ctx context.Context, step int64) error {
	if _, err := published(ctx, r.Client, r.job, step); err != nil {
		return err
	}
	_, err := r.Client.Pull(ctx, r.job, client.Latest, filepath.Join(r.Dir, dirPolicy))
	return err
}

// learn is the loop proper.
func (r *Run) learn(ctx context.Context, source string) error {
	s := r.Settings
	j, err := r.Client.CreateJob(ctx, s.loopJob(source), "secloop-loop-"+r.name)
	if err != nil {
		return fmt.Errorf("create job: %w", err)
	}
	r.job = j.ID
	if j, err = loaded(ctx, r.Client, j.ID); err != nil {
		return err
	}
	for j.Counts.Batches > j.Step && !j.Final() { // a batch that was accepted before this process began
		if _, err := stepDone(ctx, r.Client, j.ID, j.Counts.Batches); err != nil {
			return err
		}
		if j, err = r.Client.Job(ctx, j.ID); err != nil {
			return err
		}
	}
	if r.Agent.Sampler == nil {
		r.Agent.Sampler = ServerSampler{r.Client, r.job, s.MaxTokens, s.Temperature}
	}
	if j.Final() && j.Step >= int64(s.Steps) && !r.measured(int64(s.Steps)) {
		// The finished job of an earlier process is not in memory any more.
		sampler, err := SampleOnly(ctx, r.Client, fmt.Sprintf("job:%s@latest", r.job), s.sequences(), s)
		if err != nil {
			return err
		}
		r.Agent.Sampler = sampler
	}
	for step := j.Step; ; step++ {
		if err := r.measure(ctx, step); err != nil {
			return err
		}
		if step >= int64(s.Steps) {
			break
		}
		if err := r.turn(ctx, step); err != nil {
			return fmt.Errorf("turn %d: %w", step+1, err)
		}
	}
	return r.keepPolicy(ctx, int64(s.Steps))
}

// turn is one turn of the loop: incidents, prompts, strategies, battle-fields, rewards, step, checkpoint.
func (r *Run) turn(ctx context.Context, step int64) error {
	s := r.Settings
	began := time.Now()
	rng := seeded(s.Seed, "incidents", step)
	draw := func(n int) ([]Incident, error) { return r.Source.Draw(ctx, rng, Train, n) }
	incidents, err := draw(s.Groups)
	if err != nil {
		return err
	}
	observed := time.Since(began)
	seed := s.Seed<<32 | uint64(step)
	round, err := r.Agent.Play(ctx, incidents, s.Size, seed)
	if err != nil {
		return err
	}
	if err := r.Agent.Replace(ctx, &round, s.Size, seed, draw); err != nil {
		return err
	}
	if err := r.record(round, step); err != nil {
		return err
	}
	began = time.Now()
	var shuffle *mathrand.Rand
	if s.Shuffle {
		shuffle = seeded(s.Seed, "shuffle", step)
	}
	batch := secloop.Batch(round.Groups(func(i int) string { return r.group(step, i) }), round.PolicyStep, shuffle)
	if _, err := r.Client.Submit(ctx, r.job, batch, fmt.Sprintf("turn-%d", step)); err != nil {
		return fmt.Errorf("post rollouts: %w", err)
	}
	st, err := stepDone(ctx, r.Client, r.job, step+1)
	if err != nil {
		return err
	}
	checkpoint, err := published(ctx, r.Client, r.job, step+1)
	if err != nil {
		return err
	}
	t := Count(round.Episodes)
	rec := StepRecord{Step: step + 1, Policy: round.PolicyStep, Observe: observed.Seconds(), Sample: round.Sampling.Seconds(), Play: round.Playing.Seconds(),
		Train: time.Since(began).Seconds(), Tally: t, Replaced: round.Voided, Metrics: st.Metrics}
	if r.Story && step < 2 {
		r.tell(round, rec, checkpoint)
	}
	r.printf("step %3d  reward %.3f  accuracy %5.1f %%  format %5.1f %%  entropy %.3f  sampler diff %.1e  (observe %.1f, sample %.1f, play %.1f, train %.1f s)\n", step+1, t.Reward,
		100*t.Accuracy, 100*t.Format, st.Metrics["entropy"], st.Metrics["sampling/logp_difference_max"], rec.Observe, rec.Sample, rec.Play, rec.Train)
	return appendLines(filepath.Join(r.Dir, fileSteps), rec)
}

// group names the group of a run's step and incident.
func (r *Run) group(step int64, i int) string { return fmt.Sprintf("%s-%d-%d", r.name, step, i) }

// record keeps a round's episodes.
func (r *Run) record(round Round, step int64) error {
	var lines []Record
	for i, g := range round.Episodes {
		for k, e := range g {
			rec := Record{Step: step + 1, Policy: round.PolicyStep, Group: r.group(step, i), Index: k, Episode: e, Tokens: len(e.Sampled.Tokens), Truncated: !e.Sampled.Stopped}
			if k == 0 {
				text, _, err := r.Agent.Prompt(e.Incident)
				if err != nil {
					return err
				}
				rec.Prompt = text
			}
			lines = append(lines, rec)
		}
	}
	return appendLines(filepath.Join(r.Dir, fileEpisodes), lines...)
}

// tell prints one incident's way through a turn.
func (r *Run) tell(round Round, rec StepRecord, checkpoint string) {
	best := 0
	g := round.Episodes[0]
	for i, e := range g {
		if e.Reward.Total() > g[best].Reward.Total() {
			best = i
		}
	}
	in := g[0].Incident
	r.printf("\nobserve     %s from %s against %s (the policy does not see this line)\n", in.Truth.Attack, in.Truth.Source, in.Truth.Target)
	for _, s := range in.Summaries {
		r.printf("summary     %s\n", s)
	}
	for i, e := range g {
		mark := " "
		if i == best {
			mark = "*"
		}
		if e.Reward.Format == 0 {
			r.printf("strategy %s%d %.110s\n            no strategy -> reward %.2f\n", mark, i, printable(e.Completion), e.Reward.Total())
			continue
		}
		r.printf("strategy %s%d %.110s\n            stages stopped %.0f %%, executed %.0f %%, services up %v -> reward %.2f%s\n", mark, i, printable(e.Completion),
			100*(1-e.Feedback.Attacked), 100*e.Feedback.Executed, e.Feedback.Service, e.Reward.Total(), map[bool]string{true: ", correct"}[e.Reward.Correct])
	}
	r.printf("step        %d groups of %d posted as Arrow, loss %.4f, policy step %d -> %s\n\n", len(round.Episodes), len(g), rec.Metrics["loss"], rec.Policy, checkpoint)
}

func (r *Run) measured(step int64) bool {
	for _, p := range r.points {
		if p.Step == step {
			return true
		}
	}
	return false
}

// measure measures the policy of a step on the held-out sets, when it is due and was not yet.
func (r *Run) measure(ctx context.Context, step int64) error {
	s := r.Settings
	if r.measured(step) || step%int64(s.EvalEvery) != 0 && step != int64(s.Steps) {
		return nil
	}
	points, _, err := r.exam.Sit(ctx, r.Agent, s.Seed<<32|0xFFFFFF00)
	if err != nil {
		return err
	}
	for i, p := range points {
		points[i].Step = step
		r.printf("held-out %-9s at step %3d: accuracy %5.1f %% of %d, reward %.3f\n", p.Set, step, 100*p.Accuracy, p.N, p.Reward)
	}
	r.points = append(r.points, points...)
	return appendLines(filepath.Join(r.Dir, filePoints), points...)
}

func (r *Run) printf(format string, args ...any) {
	if r.Printf != nil {
		r.Printf(format, args...)
	}
}

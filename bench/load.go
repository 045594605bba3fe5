package bench

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"trainerd/client"
	"trainerd/rollout"
	"trainerd/rollout/arrowio"
)

// LoadOptions say what Serving does to a server. All but Progress and RSS are required.
type LoadOptions struct {
	URL       string
	Token     string
	Source    string // model.source of the job
	Vocab     int    // of that model
	Duration  time.Duration
	Producers int
	Readers   int
	Varied    int // groups of a batch whose rewards differ; the others cost no forward pass

	RSS      func() (int64, error) // of the server's process; nil: asked of /metrics
	Progress func(text string)     // every ten seconds; nil: none
}

// Shape of a batch: about 1 MB of Arrow, most of it prompts, which every row repeats.
const (
	LoadGroups     = 32 // of a batch
	loadGroupSize  = 8
	loadRows       = LoadGroups * loadGroupSize
	loadPrompt     = 1000 // tokens
	loadCompletion = 16
	// loadGroupsPerStep makes each step a batch.
	loadGroupsPerStep = LoadGroups
	loadPublishEvery  = 20
	loadKeepLast      = 20 // a reader has as many publications' time for its download
)

// LoadResult is the line of output of Serving. Latencies are in seconds, at the
// client, from sending a request to having read its answer.
type LoadResult struct {
	Name       string  `json:"name"`
	Seconds    float64 `json:"seconds"`
	Producers  int     `json:"producers"`
	Readers    int     `json:"readers"`
	BatchBytes int     `json:"batch_bytes"`
	BatchRows  int     `json:"batch_rows"`
	Varied     int     `json:"varied_groups"` // of a batch, of LoadGroups

	Accepted     int                `json:"accepted_batches"`
	AcceptedRows int64              `json:"accepted_rows"`
	AcceptedMBs  float64            `json:"accepted_mb_s"`
	RowsS        float64            `json:"rows_s"`
	Accept       map[string]float64 `json:"accept_s"` // p50, p90, p99, max of requests that were answered 202
	Refused      int                `json:"refused_429"`
	RefusedShare float64            `json:"refused_429_share"` // of all posts
	Refuse       map[string]float64 `json:"refuse_s"`

	Steps       int64            `json:"steps"`
	TrainedRows int64            `json:"trained_rows"`
	RefusedRows map[string]int64 `json:"refused_rows"` // by reason
	DrainS      float64          `json:"drain_s"`      // to train what was queued at the end

	ReadsVerified int                `json:"reads_verified"` // checkpoints, every file of hf/ downloaded and hashed
	ReadsGone     int                `json:"reads_gone"`     // retention took it while it was read
	ReadMB        float64            `json:"read_mb"`
	Read          map[string]float64 `json:"read_s"`

	RSS      []float64 `json:"rss_mb"` // a sample each second
	RSSFit   Fit       `json:"rss_fit"`
	Errors   []string  `json:"errors"` // the first ten
	ErrorsIn int       `json:"errors_total"`
}

// Fit is a least-squares line through the samples after the warm-up.
type Fit struct {
	WarmUp  float64 `json:"warm_up_s"`
	MeanMB  float64 `json:"mean_mb"`
	SlopeMB float64 `json:"slope_mb_min"`
	GrownMB float64 `json:"grown_mb"` // slope times the time fitted
}

// loadRun is a Serving under way.
type loadRun struct {
	o        LoadOptions
	client   *client.Client
	job      string
	template []byte
	marks    []int // offsets of the batch's number in the template

	mu     sync.Mutex
	res    LoadResult
	accept []float64
	refuse []float64
	reads  []float64
	next   int
}

// Serving makes a job on a server, posts to it from many producers that honour 429,
// reads and verifies its checkpoints from many readers, and holds what was
// accepted against what was trained. The job is cancelled at the end.
func Serving(ctx context.Context, o LoadOptions) (LoadResult, error) {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.MaxIdleConnsPerHost = o.Producers + o.Readers + 4
	defer transport.CloseIdleConnections()
	// No repetitions: each refusal is counted here.
	c, err := client.New(o.URL, client.Options{Token: o.Token, Retries: -1, HTTP: &http.Client{Transport: transport}})
	if err != nil {
		return LoadResult{}, err
	}
	r := &loadRun{o: o, client: c}
	r.res = LoadResult{Name: "load", Producers: o.Producers, Readers: o.Readers, Varied: o.Varied, BatchRows: loadRows, Errors: []string{}}
	if r.template, r.marks, err = loadTemplate(o.Vocab, o.Varied); err != nil {
		return r.res, err
	}
	r.res.BatchBytes = len(r.template)
	j, err := c.CreateJob(ctx, loadDocument(o.Source), "")
	if err != nil {
		return r.res, err
	}
	r.job = j.ID
	defer c.Cancel(context.WithoutCancel(ctx), r.job)
	if _, err := c.Wait(ctx, r.job, 0, func(j client.Job) bool { return j.PolicyStep >= 0 || j.Final() }); err != nil {
		return r.res, err
	}
	err = r.run(ctx)
	return r.res, err
}

// loadDocument is the job: snapshots are rare so that the log is trimmed now and then.
func loadDocument(source string) map[string]any {
	return map[string]any{
		"name": "load", "model": map[string]any{"source": source},
		"objective":  map[string]any{"name": "sa_grpo", "group_size": loadGroupSize},
		"optimizer":  map[string]any{"lr": 1e-5},
		"batch":      map[string]any{"groups_per_step": loadGroupsPerStep, "max_tokens_per_micro_batch": 8192, "max_policy_lag": nil},
		"checkpoint": map[string]any{"publish_every_steps": loadPublishEvery, "snapshot_every_steps": 5 * loadPublishEvery, "keep_last": loadKeepLast, "keep_every": 0},
		"sampling":   map[string]any{"max_sequences": 0},
		"limits":     map[string]any{"max_queued_rollouts": 64 * loadRows},
	}
}

// loadMark stands for a batch's number in the template's group ids.
const loadMark = "########"

// loadTemplate encodes one batch. A batch differs from the others by its group
// ids only, which are written over the marks: producing costs little beside accepting.
func loadTemplate(vocab, varied int) (body []byte, marks []int, err error) {
	rng := rand.New(rand.NewPCG(1, 2))
	random := func(n int) []int32 {
		out := make([]int32, n)
		for i := range out {
			out[i] = int32(rng.IntN(vocab))
		}
		return out
	}
	b := &rollout.Batch{HasReward: true}
	for g := range LoadGroups {
		prompt := random(loadPrompt)
		for k := range loadGroupSize {
			row := rollout.Rollout{GroupID: fmt.Sprintf("%s-%02d", loadMark, g), Prompt: prompt, Completion: random(loadCompletion), PolicyStep: rollout.NoPolicyStep, Reward: 1}
			if g < varied {
				row.Reward = float64(k % 2)
			}
			b.Rollouts = append(b.Rollouts, row)
		}
	}
	var buf bytes.Buffer
	if err := arrowio.Encode(&buf, b, ""); err != nil {
		return nil, nil, err
	}
	body = buf.Bytes()
	for at := 0; ; {
		i := bytes.Index(body[at:], []byte(loadMark))
		if i < 0 {
			break
		}
		marks = append(marks, at+i)
		at += i + len(loadMark)
	}
	if len(marks) != loadRows {
		return nil, nil, fmt.Errorf("encode a batch: found %d group ids, expected %d", len(marks), loadRows)
	}
	return body, marks, nil
}

func (r *loadRun) run(ctx context.Context) error {
	began := time.Now()
	posting, stop := context.WithTimeout(ctx, r.o.Duration)
	defer stop()
	var producers, others sync.WaitGroup
	for range r.o.Producers {
		producers.Go(func() { r.produce(posting, ctx) })
	}
	for range r.o.Readers {
		others.Go(func() { r.read(posting) })
	}
	others.Go(func() { r.watch(posting, began) })
	producers.Wait()
	took := time.Since(began)
	stop()
	others.Wait()
	return r.settle(ctx, took)
}

// fail counts an error, and keeps the first ten.
func (r *loadRun) fail(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.res.ErrorsIn++; len(r.res.Errors) < 10 {
		r.res.Errors = append(r.res.Errors, err.Error())
	}
}

// produce posts batches until posting ends; a post that has begun is finished.
func (r *loadRun) produce(posting, ctx context.Context) {
	body := bytes.Clone(r.template)
	for posting.Err() == nil {
		r.mu.Lock()
		r.next++
		number := fmt.Sprintf("%08d", r.next)
		r.mu.Unlock()
		for _, at := range r.marks {
			copy(body[at:], number)
		}
		if !r.post(posting, ctx, body, "load-"+number) {
			return
		}
	}
}

// post sends a batch until it is accepted, waiting as it is told to; false at the end.
func (r *loadRun) post(posting, ctx context.Context, body []byte, key string) bool {
	for {
		began := time.Now()
		got, err := r.client.SubmitArrow(ctx, r.job, body, key)
		took := time.Since(began).Seconds()
		var refusal *client.Error
		switch {
		case err == nil:
			r.mu.Lock()
			r.accept = append(r.accept, took)
			r.res.Accepted++
			r.res.AcceptedRows += int64(got.Rows)
			r.mu.Unlock()
			if got.Rows != loadRows || got.Duplicates != 0 {
				r.fail(fmt.Errorf("batch %d: %d rows accepted, %d duplicates, expected %d and 0", got.Batch, got.Rows, got.Duplicates, loadRows))
			}
			return true
		case errors.As(err, &refusal) && refusal.Status == http.StatusTooManyRequests:
			r.mu.Lock()
			r.refuse = append(r.refuse, took)
			r.mu.Unlock()
		default:
			r.fail(fmt.Errorf("post a batch: %w", err))
			return ctx.Err() == nil
		}
		// A little later than told, so that those who were refused together come apart.
		wait := refusal.RetryAfter + time.Duration(rand.Int64N(int64(500*time.Millisecond)))
		select {
		case <-time.After(wait):
		case <-posting.Done():
			return false
		}
	}
}

// read waits for the next checkpoint, downloads every file and hashes it.
func (r *loadRun) read(ctx context.Context) {
	last := int64(-1)
	for ctx.Err() == nil {
		m, ok, err := r.client.Newer(ctx, r.job, last, 20*time.Second)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			r.fail(fmt.Errorf("wait for a checkpoint: %w", err))
			continue
		}
		if !ok {
			continue
		}
		if m.Step <= last {
			r.fail(fmt.Errorf("the newest checkpoint went back from step %d to %d", last, m.Step))
		}
		last = m.Step
		began := time.Now()
		var read int64
		for _, f := range m.Files {
			if !strings.HasPrefix(f.Name, "hf/") {
				continue // what a restart needs, which no inference node reads
			}
			var n int64
			if n, err = r.verify(ctx, m.Step, f.Name, f.SHA256); err != nil {
				err = fmt.Errorf("read %s of step %d: %w", f.Name, m.Step, err)
				break
			}
			read += n
		}
		r.mu.Lock()
		switch {
		case ctx.Err() != nil:
		case client.Code(err) == "checkpoint_not_found":
			r.res.ReadsGone++
			err = nil
		case err == nil:
			r.res.ReadsVerified++
			r.res.ReadMB += float64(read) / 1e6
			r.reads = append(r.reads, time.Since(began).Seconds())
		}
		r.mu.Unlock()
		if err != nil && ctx.Err() == nil {
			r.fail(err)
		}
	}
}

func (r *loadRun) verify(ctx context.Context, step int64, name, want string) (int64, error) {
	in, err := r.client.File(ctx, r.job, step, name, 0, -1)
	if err != nil {
		return 0, err
	}
	defer in.Close()
	sum := sha256.New()
	n, err := io.Copy(sum, in)
	if err != nil {
		return n, err
	}
	if got := hex.EncodeToString(sum.Sum(nil)); got != want {
		return n, fmt.Errorf("sha256 is %s, the manifest says %s", got, want)
	}
	return n, nil
}

// watch samples the server's memory each second.
func (r *loadRun) watch(ctx context.Context, began time.Time) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for n := 1; ; n++ {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		rss, err := r.rss(ctx)
		if err != nil {
			if ctx.Err() == nil {
				r.fail(fmt.Errorf("read the server's memory: %w", err))
			}
			continue
		}
		r.mu.Lock()
		r.res.RSS = append(r.res.RSS, float64(rss)/1e6)
		text := fmt.Sprintf("%4.0f s  %6d accepted  %6d refused  %5d reads  RSS %.0f MB", time.Since(began).Seconds(), r.res.Accepted, len(r.refuse), r.res.ReadsVerified, float64(rss)/1e6)
		r.mu.Unlock()
		if r.o.Progress != nil && n%10 == 0 {
			r.o.Progress(text)
		}
	}
}

// settle waits until the queue is empty and balances the books.
func (r *loadRun) settle(ctx context.Context, took time.Duration) error {
	began := time.Now()
	j, err := r.client.Wait(ctx, r.job, 100*time.Millisecond, func(j client.Job) bool {
		return j.Final() || j.State == "waiting" && j.Queue.GroupsComplete == 0
	})
	if err != nil {
		return fmt.Errorf("wait for the queue to empty: %w", err)
	}
	res := &r.res
	res.DrainS = time.Since(began).Seconds()
	res.Seconds = took.Seconds()
	res.Steps = j.Step
	res.TrainedRows = j.Counts.GroupsTrained * loadGroupSize
	res.RefusedRows = map[string]int64{}
	counted := res.TrainedRows
	for reason, n := range j.Counts.GroupsRefused {
		res.RefusedRows[reason] = n * loadGroupSize
		counted += n * loadGroupSize
	}
	if counted != res.AcceptedRows || j.Counts.Rollouts != res.AcceptedRows {
		r.fail(fmt.Errorf("rows accepted %d, counted by the server %d, trained or refused under a reason %d", res.AcceptedRows, j.Counts.Rollouts, counted))
	}
	if j.Final() {
		r.fail(fmt.Errorf("the job is %s: %+v", j.State, j.LastError))
	}
	res.AcceptedMBs = float64(res.Accepted) * float64(res.BatchBytes) / 1e6 / res.Seconds
	res.RowsS = float64(res.AcceptedRows) / res.Seconds
	res.Refused = len(r.refuse)
	if posts := res.Accepted + res.Refused; posts > 0 {
		res.RefusedShare = float64(res.Refused) / float64(posts)
	}
	res.Accept, res.Refuse, res.Read = percentiles(r.accept), percentiles(r.refuse), percentiles(r.reads)
	res.RSSFit = fit(res.RSS)
	return nil
}

// percentiles of what was measured, by name.
func percentiles(of []float64) map[string]float64 {
	out := map[string]float64{}
	if len(of) == 0 {
		return out
	}
	slices.Sort(of)
	for name, q := range map[string]float64{"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999, "max": 1} {
		out[name] = of[min(int(q*float64(len(of))), len(of)-1)]
	}
	return out
}

// fit draws a line through what was sampled each second, less the first third,
// in which queue and caches fill.
func fit(samples []float64) Fit {
	f := Fit{WarmUp: float64(len(samples) / 3)}
	y := samples[len(samples)/3:]
	n := float64(len(y))
	if n < 2 {
		return f
	}
	var sx, sy, sxx, sxy float64
	for i, v := range y {
		x := float64(i)
		sx, sy, sxx, sxy = sx+x, sy+v, sxx+x*x, sxy+x*v
	}
	slope := (n*sxy - sx*sy) / (n*sxx - sx*sx)
	f.MeanMB, f.SlopeMB, f.GrownMB = sy/n, slope*60, slope*n
	return f
}

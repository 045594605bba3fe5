package client

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"trainerd/rollout"
	"trainerd/rollout/arrowio"
)

// Job is what a client usually wants of a job. Document is the whole answer.
type Job struct {
	ID           string        `json:"id"`
	Name         string        `json:"name"`
	State        string        `json:"state"`
	Step         int64         `json:"step"`
	PolicyStep   int64         `json:"policy_step"` // -1 before the first checkpoint
	Queue        Queue         `json:"queue"`
	Counts       Counts        `json:"counts"`
	Architecture *Architecture `json:"architecture"` // nil until the server has read the model
	Publication  Publication   `json:"publication"`
	Resident     bool          `json:"resident"` // the model is on the device now, not in host memory
	LastError    *JobError     `json:"last_error"`
	Fingerprint  *Fingerprint  `json:"fingerprint"` // nil until the model is loaded
	// FingerprintChanges say from when on bits may differ from those of an uninterrupted run.
	FingerprintChanges []FingerprintChange `json:"fingerprint_changes"`
	Document           json.RawMessage
}

// Fingerprint is what the bits of a job's steps depend on besides its state, its
// groups and its seed; what a kind of device does not have is empty.
type Fingerprint struct {
	Engine        string `json:"engine"`
	Device        string `json:"device"`
	Card          string `json:"card"`
	Instructions  string `json:"instructions"`
	Driver        string `json:"driver"`
	DriverRelease string `json:"driver_release"`
	CublasLt      string `json:"cublaslt"`
	Algorithms    string `json:"algorithms"`
	Attention     string `json:"attention"`
	Choices       int    `json:"choices"`
	ChoicesSHA256 string `json:"choices_sha256"`
}

// FingerprintChange is that a job went on, after a step, by something else.
type FingerprintChange struct {
	Time      time.Time `json:"time"`
	AfterStep int64     `json:"after_step"`
	Changes   []struct {
		Name string `json:"name"`
		Was  string `json:"was"`
		Is   string `json:"is"`
	} `json:"changes"`
	More int `json:"more"` // that are not listed
}

// Queue is what waits in a job.
type Queue struct {
	Rollouts       int   `json:"rollouts"`
	Tokens         int64 `json:"tokens"`
	Bytes          int64 `json:"bytes"`
	GroupsComplete int   `json:"groups_complete"`
	GroupsOpen     int   `json:"groups_open"`
}

// Counts are a job's totals.
type Counts struct {
	Batches           int64            `json:"batches"`
	Rollouts          int64            `json:"rollouts"`
	Duplicates        int64            `json:"duplicates"`
	MissingPolicyStep int64            `json:"missing_policy_step"`
	GroupsTrained     int64            `json:"groups_trained"`
	GroupsIncomplete  int64            `json:"groups_incomplete"`
	GroupsRefused     map[string]int64 `json:"groups_refused"`
	Stale             StaleCounts      `json:"stale"`
}

// StaleCounts are the groups that lagged too far, or would have, by what was done.
type StaleCounts struct {
	Admitted int64 `json:"admitted"`
	Delayed  int64 `json:"delayed"`
	Rejected int64 `json:"rejected"`
}

// Publication is how checkpoints get to the store.
type Publication struct {
	Step           *int64  `json:"step"` // under way, nil when none is
	HostBytes      int64   `json:"host_bytes"`
	Holds          string  `json:"holds"` // why training waited while the newest was written
	Synchronous    int64   `json:"synchronous"`
	Waits          int64   `json:"waits"`
	WaitSeconds    float64 `json:"wait_seconds"`
	CaptureSeconds float64 `json:"capture_seconds"`
	Retries        int64   `json:"retries"`
}

// Architecture is what a worker must know of a job's model.
type Architecture struct {
	Type         string  `json:"type"`
	Vocab        int     `json:"vocab"`
	MaxPositions int     `json:"max_positions"`
	MaxSequence  int     `json:"max_sequence"`
	BOS          int32   `json:"bos"`
	EOS          []int32 `json:"eos"`
	DType        string  `json:"dtype"`
}

// JobError is the newest thing that went wrong with a job.
type JobError struct {
	Code    string    `json:"code"`
	Message string    `json:"message"`
	Time    time.Time `json:"time"`
}

// Final reports whether the job never trains again.
func (j Job) Final() bool {
	return j.State == "finished" || j.State == "failed" || j.State == "cancelled"
}

// UnmarshalJSON implements json.Unmarshaler and keeps the whole document.
func (j *Job) UnmarshalJSON(raw []byte) error {
	type plain Job
	if err := json.Unmarshal(raw, (*plain)(j)); err != nil {
		return err
	}
	j.Document = bytes.Clone(raw)
	return nil
}

// CreateJob makes a job of a document: anything that marshals to it. With an
// empty key a fresh one is used, so that a repetition makes no second job.
func (c *Client) CreateJob(ctx context.Context, document any, key string) (Job, error) {
	k, err := post("/v1/jobs", document)
	if err != nil {
		return Job{}, err
	}
	if k.key = key; key == "" {
		k.key = NewKey()
	}
	var j Job
	err = c.json(ctx, k, &j)
	return j, err
}

// Jobs lists all jobs, oldest first.
func (c *Client) Jobs(ctx context.Context) ([]Job, error) {
	var list struct {
		Jobs []Job `json:"jobs"`
	}
	err := c.json(ctx, get("/v1/jobs", nil), &list)
	return list.Jobs, err
}

// Job returns a job's status.
func (c *Client) Job(ctx context.Context, job string) (Job, error) {
	var j Job
	err := c.json(ctx, get(jobPath(job), nil), &j)
	return j, err
}

// Cancel ends a job, or frees the memory of one that has ended.
func (c *Client) Cancel(ctx context.Context, job string) (Job, error) {
	var j Job
	err := c.json(ctx, call{method: http.MethodDelete, path: jobPath(job)}, &j)
	return j, err
}

// Pause stops a job from starting another step.
func (c *Client) Pause(ctx context.Context, job string) (Job, error) {
	return c.control(ctx, job, "pause")
}

// Resume lets a paused job go on.
func (c *Client) Resume(ctx context.Context, job string) (Job, error) {
	return c.control(ctx, job, "resume")
}

func (c *Client) control(ctx context.Context, job, what string) (Job, error) {
	k, err := post(jobPath(job, what), nil)
	if err != nil {
		return Job{}, err
	}
	var j Job
	err = c.json(ctx, k, &j)
	return j, err
}

// Flush asks for a step on the complete groups although they are fewer than the
// job's groups_per_step, and returns how many there are.
func (c *Client) Flush(ctx context.Context, job string) (groups int, err error) {
	k, err := post(jobPath(job, "flush"), nil)
	if err != nil {
		return 0, err
	}
	var out struct {
		Groups int `json:"groups"`
	}
	err = c.json(ctx, k, &out)
	return out.Groups, err
}

// Wait asks for a job's status until cond holds, every interval (0: 50 ms).
func (c *Client) Wait(ctx context.Context, job string, interval time.Duration, cond func(Job) bool) (Job, error) {
	if interval <= 0 {
		interval = 50 * time.Millisecond
	}
	for {
		j, err := c.Job(ctx, job)
		if err != nil || cond(j) {
			return j, err
		}
		select {
		case <-time.After(interval):
		case <-ctx.Done():
			return j, fmt.Errorf("wait for job %s, which is %s at step %d: %w", job, j.State, j.Step, ctx.Err())
		}
	}
}

// Receipt is the answer to an accepted batch.
type Receipt struct {
	Job             string `json:"job"`
	Batch           uint64 `json:"id"`
	Rows            int    `json:"rows"`
	Duplicates      int    `json:"duplicates"`
	GroupsCompleted int    `json:"groups_completed"`
	GroupsOpen      int    `json:"groups_open"`
	PolicyStep      int64  `json:"policy_step"`
	Step            int64  `json:"step"`
}

// Submit sends a batch of rollouts. With an empty key a fresh one is used, so
// that a repetition after a broken connection is counted once.
func (c *Client) Submit(ctx context.Context, job string, b *rollout.Batch, key string) (Receipt, error) {
	var body bytes.Buffer
	if err := arrowio.Encode(&body, b, ""); err != nil {
		return Receipt{}, fmt.Errorf("encode batch: %w", err)
	}
	said := http.Header{}
	said.Set("Trainerd-Rows", strconv.Itoa(len(b.Rollouts)))
	said.Set("Trainerd-Tokens", strconv.FormatInt(b.Tokens(), 10))
	return c.submit(ctx, job, body.Bytes(), key, said)
}

// SubmitArrow sends a batch that is an Arrow IPC stream already.
func (c *Client) SubmitArrow(ctx context.Context, job string, body []byte, key string) (Receipt, error) {
	return c.submit(ctx, job, body, key, http.Header{})
}

// awaitContinue is from how many bytes on the server is asked before they are sent:
// a full queue then costs no transfer.
const awaitContinue = 64 << 10

// submit sends a batch; said is what the headers tell of it.
func (c *Client) submit(ctx context.Context, job string, body []byte, key string, said http.Header) (Receipt, error) {
	if len(body) >= awaitContinue {
		said.Set("Expect", "100-continue")
	}
	k := call{method: http.MethodPost, path: jobPath(job, "rollouts"), body: body, contentType: arrowio.ContentType, key: key, header: said}
	if key == "" {
		k.key = NewKey()
	}
	var r Receipt
	err := c.json(ctx, k, &r)
	return r, err
}

// BatchStatus says where the groups of a batch are.
type BatchStatus struct {
	Job    string        `json:"job"`
	Batch  uint64        `json:"id"`
	Groups []GroupStatus `json:"groups"`
}

// GroupStatus says where a group is: open, queued, training, trained or refused.
type GroupStatus struct {
	ID     string `json:"id"`
	Rows   int    `json:"rows"`
	Status string `json:"status"`
	Step   *int64 `json:"step"`   // of trained
	Reason string `json:"reason"` // of refused
}

// Batch says where the groups of an accepted batch are.
func (c *Client) Batch(ctx context.Context, job string, batch uint64) (BatchStatus, error) {
	var b BatchStatus
	err := c.json(ctx, get(jobPath(job, "batches", strconv.FormatUint(batch, 10)), nil), &b)
	return b, err
}

// SampleRequest asks for N completions of each prompt. Zero values mean the server's defaults.
type SampleRequest struct {
	Prompts     [][]int32 `json:"prompts"`
	N           int       `json:"n,omitempty"`
	MaxTokens   int       `json:"max_tokens,omitempty"`
	Temperature *float64  `json:"temperature,omitempty"` // nil: the objective's
	TopP        float64   `json:"top_p,omitempty"`
	Seed        *uint64   `json:"seed,omitempty"`
	Stop        []int32   `json:"stop,omitempty"`
}

// SampleResult is what was sampled.
type SampleResult struct {
	PolicyStep  int64        `json:"policy_step"`
	Seed        uint64       `json:"seed"`
	Completions []Completion `json:"completions"` // by prompt, then index
}

// Completion is one sampled continuation.
type Completion struct {
	Prompt       int       `json:"prompt"`
	Index        int       `json:"index"`
	Tokens       []int32   `json:"tokens"`
	LogProbs     []float32 `json:"logprobs"`
	FinishReason string    `json:"finish_reason"` // stop or length
	PolicyStep   int64     `json:"policy_step"`
}

// Sample asks the server's built-in inference node for completions.
func (c *Client) Sample(ctx context.Context, job string, r SampleRequest) (SampleResult, error) {
	k, err := post(jobPath(job, "sample"), r)
	if err != nil {
		return SampleResult{}, err
	}
	var out SampleResult
	err = c.json(ctx, k, &out)
	return out, err
}

// LogProbs scores prompts and completions under the current policy, and says which step that is.
func (c *Client) LogProbs(ctx context.Context, job string, rows []arrowio.ScoreRow) ([]arrowio.ScoreRow, int64, error) {
	var body bytes.Buffer
	if err := arrowio.EncodeScores(&body, rows); err != nil {
		return nil, 0, fmt.Errorf("encode rows: %w", err)
	}
	res, err := c.do(ctx, call{method: http.MethodPost, path: jobPath(job, "logprobs"), body: body.Bytes(), contentType: arrowio.ContentType})
	if err != nil {
		return nil, 0, err
	}
	defer res.Body.Close()
	step, err := strconv.ParseInt(res.Header.Get("Trainerd-Policy-Step"), 10, 64)
	if err != nil {
		return nil, 0, fmt.Errorf("read Trainerd-Policy-Step: %w", err)
	}
	const trusted = 1 << 31 // the answer is about as large as what we sent
	out, err := arrowio.DecodeScores(res.Body, rollout.Limits{MaxBytes: trusted, MaxRows: trusted - 1, MaxTokens: trusted,
		MaxPromptTokens: trusted - 1, MaxCompletionTokens: trusted - 1, Vocab: trusted - 1})
	if err == nil && len(out) != len(rows) {
		err = io.ErrUnexpectedEOF
	}
	return out, step, err
}

// Step is the record of one optimizer step. A metric that was not finite is absent.
type Step struct {
	Step     int64              `json:"step"`
	Time     time.Time          `json:"time"`
	Groups   []string           `json:"groups"`
	Batches  []uint64           `json:"batches"`
	WallTime float64            `json:"wall_time"` // seconds
	Metrics  map[string]float64 `json:"-"`
}

// UnmarshalJSON implements json.Unmarshaler.
func (s *Step) UnmarshalJSON(raw []byte) error {
	type plain Step
	in := struct {
		*plain
		Metrics map[string]*float64 `json:"metrics"`
	}{plain: (*plain)(s)}
	if err := json.Unmarshal(raw, &in); err != nil {
		return err
	}
	s.Metrics = make(map[string]float64, len(in.Metrics))
	for name, v := range in.Metrics {
		if v != nil {
			s.Metrics[name] = *v
		}
	}
	return nil
}

// Steps returns all step records after a step, oldest first.
func (c *Client) Steps(ctx context.Context, job string, after int64) ([]Step, error) {
	var all []Step
	for {
		var page struct {
			Steps []Step `json:"steps"`
			Next  *int64 `json:"next"`
		}
		q := url.Values{"after": {strconv.FormatInt(after, 10)}, "limit": {"1000"}}
		if err := c.json(ctx, get(jobPath(job, "steps"), q), &page); err != nil {
			return all, err
		}
		all = append(all, page.Steps...)
		if page.Next == nil {
			return all, nil
		}
		after = *page.Next
	}
}

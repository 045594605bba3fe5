//go:build faults

package faulttest

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"trainerd/client"
	"trainerd/model"
	"trainerd/rollout/arrowio"
	"trainerd/server/servertest"
	"trainerd/storage"
)

// Every batch is two groups, which is a step: the weights after step k follow
// from the first k batches, whatever happened meanwhile.
const (
	groupSize     = 4
	groupsPerStep = 2

	every = 8 // steps are published; without a store training goes on for as many
)

// binary is the trainerd under test.
var binary string

func TestMain(m *testing.M) {
	code, err := func() (int, error) {
		dir, err := os.MkdirTemp("", "faulttest-")
		if err != nil {
			return 0, err
		}
		defer os.RemoveAll(dir)
		binary = filepath.Join(dir, "trainerd")
		build := exec.Command("go", "build", "-o", binary, "trainerd/cmd/trainerd")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			return 0, fmt.Errorf("build trainerd: %w\n%s", err, out)
		}
		return m.Run(), nil
	}()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// options say what a world is made of.
type options struct {
	listen   string       // "": a free port
	data     string       // the server's data directory; "": a new one
	store    []string     // flags that name the store; nil: a directory
	flags    []string     // more of them
	keys     keys         // of the object store
	model    model.Config // zero: servertest.TinyConfig
	document func(doc map[string]any)
	pace     time.Duration // between two batches; default 100 ms
}

// world is a server, a job on it and a worker that posts to it.
type world struct {
	t        *testing.T
	o        options
	modelDir string
	server   *serverProcess
	client   *client.Client
	job      string

	mu       sync.Mutex
	accepted int // batches
	refusals map[string]int
	broken   error // of the worker: a batch that was refused for good, or came out otherwise

	stop context.CancelFunc
	busy sync.WaitGroup
}

// serverProcess is a `trainerd serve`.
type serverProcess struct {
	cmd  *exec.Cmd
	url  string
	log  *lockedBuffer
	done chan struct{}
	err  error // of Wait, once done is closed
}

// lockedBuffer is a log that is read while it is written.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// serve starts a server; an error holds what it said.
func serve(o options) (*serverProcess, error) {
	if o.listen == "" {
		o.listen = "127.0.0.1:0"
	}
	args := append([]string{"serve", "--listen", o.listen, "--data", o.data, "--device", "cpu", "--workers", "1"}, o.store...)
	p := &serverProcess{cmd: exec.Command(binary, append(args, o.flags...)...), log: &lockedBuffer{}, done: make(chan struct{})}
	p.cmd.Env = append(os.Environ(), "TRAINERD_S3_ACCESS_KEY="+o.keys.access, "TRAINERD_S3_SECRET_KEY="+o.keys.secret, "GOMAXPROCS=2")
	p.cmd.Stderr = p.log
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	said := make(chan string, 1)
	go func() {
		line, _ := bufio.NewReader(out).ReadString('\n')
		said <- line
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	var hello struct{ Addr string }
	select {
	case line := <-said:
		if json.Unmarshal([]byte(line), &hello) != nil || hello.Addr == "" {
			<-p.done
			return nil, fmt.Errorf("the server ended: %w\n%s", p.err, p.log)
		}
	case <-time.After(time.Minute):
		p.kill()
		return nil, fmt.Errorf("the server does not listen after a minute\n%s", p.log)
	}
	p.url = "http://" + hello.Addr
	return p, nil
}

// restart kills the server and starts it again on the same address; the worker
// sees connections that are refused meanwhile.
func (w *world) restart() {
	w.t.Helper()
	w.server.kill()
	o := w.o
	o.listen = strings.TrimPrefix(w.server.url, "http://")
	p, err := serve(o)
	if err != nil {
		w.t.Fatal(err)
	}
	w.server = p
}

func (p *serverProcess) kill() {
	p.cmd.Process.Signal(syscall.SIGKILL)
	<-p.done
}

// newWorld starts a server, makes a job and a worker that posts until rest.
func newWorld(t *testing.T, o options) *world {
	t.Helper()
	if o.data == "" {
		o.data = t.TempDir()
	}
	if o.model.Vocab == 0 {
		o.model = servertest.TinyConfig()
	}
	if o.pace == 0 {
		o.pace = 100 * time.Millisecond
	}
	w := &world{t: t, o: o, modelDir: servertest.WriteModel(t, o.model, 1, "F32"), refusals: map[string]int{}}
	var err error
	if w.server, err = serve(o); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		w.mu.Lock()
		w.broken = errors.Join(w.broken, errors.New("the test is over"))
		w.mu.Unlock()
		w.server.kill()
		w.rest()
		if t.Failed() {
			t.Logf("the server's log:\n%s", tail(w.server.log.String(), 60))
		}
	})
	// Without repetitions: the worker does them itself, to count what it is told.
	if w.client, err = client.New(w.server.url, client.Options{Retries: -1}); err != nil {
		t.Fatal(err)
	}
	j, err := w.client.CreateJob(t.Context(), w.document(), "the-job")
	if err != nil {
		t.Fatal(err)
	}
	w.job = j.ID
	ctx, stop := context.WithCancel(context.Background())
	w.stop = stop
	w.busy.Go(func() { w.post(ctx) })
	return w
}

func tail(text string, lines int) string {
	all := strings.Split(text, "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

func (w *world) document() map[string]any {
	doc := map[string]any{
		"name": "faults", "model": map[string]any{"source": "dir:" + w.modelDir},
		"objective":  map[string]any{"name": "sa_grpo", "group_size": groupSize, "beta": 0.05},
		"optimizer":  map[string]any{"lr": 1e-2},
		"batch":      map[string]any{"groups_per_step": groupsPerStep, "max_tokens_per_micro_batch": 64, "max_policy_lag": nil},
		"checkpoint": map[string]any{"dtype": "F32", "publish_every_steps": every, "snapshot_every_steps": 2 * every, "keep_last": 3, "keep_every": 0},
		"sampling":   map[string]any{"max_sequences": 0},
	}
	if w.o.document != nil {
		w.o.document(doc)
	}
	return doc
}

// body is the i-th batch.
func (w *world) body(i int) []byte {
	var b bytes.Buffer
	if err := arrowio.Encode(&b, servertest.Batch(fmt.Sprintf("b%04d", i), groupsPerStep, groupSize, -1, uint64(i)), ""); err != nil {
		panic(err) // our own rows
	}
	return b.Bytes()
}

// post is the worker: each batch once the one before was accepted, the same key
// again whenever it was refused or not answered. It ends between two batches, so
// that no batch is in doubt.
func (w *world) post(ctx context.Context) {
	for i := 0; ; i++ {
		body := w.body(i)
		for {
			got, err := w.submit(body, fmt.Sprintf("batch-%d", i))
			w.mu.Lock()
			var refusal *client.Error
			switch {
			case err == nil && (got.Batch != uint64(i+1) || got.Duplicates != 0):
				w.broken = fmt.Errorf("batch %d was accepted as %d with %d duplicates", i+1, got.Batch, got.Duplicates)
			case err == nil:
				w.accepted = i + 1
			case errors.As(err, &refusal):
				w.refusals[refusal.Code]++
				if refusal.Status != http.StatusServiceUnavailable && refusal.Status != http.StatusTooManyRequests {
					w.broken = fmt.Errorf("batch %d was refused for good: %w", i+1, err)
				}
			default:
				w.refusals["not answered"]++
			}
			broken := w.broken
			w.mu.Unlock()
			if broken != nil {
				return
			}
			time.Sleep(w.o.pace)
			if err == nil {
				break
			}
		}
		if ctx.Err() != nil {
			return
		}
	}
}

// submit posts a batch once. A server that is gone answers nothing.
func (w *world) submit(body []byte, key string) (client.Receipt, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	return w.client.SubmitArrow(ctx, w.job, body, key)
}

// rest ends the worker and returns how many batches were accepted.
func (w *world) rest() int {
	w.stop()
	w.busy.Wait()
	return w.batches()
}

func (w *world) batches() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.accepted
}

// refused is how often the worker was told a code.
func (w *world) refused(code string) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.refusals[code]
}

// status is the job as the API shows it.
func (w *world) status() client.Job {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	j, err := w.client.Job(ctx, w.job)
	if err != nil {
		w.t.Fatalf("ask for the job: %v", err)
	}
	return j
}

// await waits until ok, or fails the test naming what did not come. It fails at
// once when the worker or the job is broken.
func (w *world) await(what string, within time.Duration, ok func() bool) time.Duration {
	w.t.Helper()
	began := time.Now()
	for {
		if ok() {
			took := time.Since(began)
			w.t.Logf("%-44s after %6.2f s", what, took.Seconds())
			return took
		}
		w.mu.Lock()
		broken := w.broken
		w.mu.Unlock()
		if broken != nil {
			w.t.Fatal(broken)
		}
		if j := w.status(); j.Final() || time.Since(began) > within {
			w.t.Fatalf("%s: not within %v; the job is %s at step %d, published %d, %d batches accepted, last error %+v", what, within, j.State, j.Step, j.PolicyStep, w.batches(), j.LastError)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// ready asks /readyz: its status and the problem's code.
func (w *world) ready() (status int, code, detail string) {
	w.t.Helper()
	res, err := http.Get(w.server.url + "/readyz")
	if err != nil {
		w.t.Fatal(err)
	}
	defer res.Body.Close()
	var p struct{ Code, Detail string }
	raw, err := io.ReadAll(res.Body)
	if err == nil {
		err = json.Unmarshal(raw, &p)
	}
	if err != nil {
		w.t.Fatalf("read /readyz: %v: %s", err, raw)
	}
	return res.StatusCode, p.Code, p.Detail
}

// metric is the value of a line of /metrics, 0 when it is not there.
func (w *world) metric(line string) (value float64) {
	w.t.Helper()
	res, err := http.Get(w.server.url + "/metrics")
	if err != nil {
		w.t.Fatal(err)
	}
	defer res.Body.Close()
	for s := bufio.NewScanner(res.Body); s.Scan(); {
		if rest, ok := strings.CutPrefix(s.Text(), line+" "); ok {
			if _, err := fmt.Sscan(rest, &value); err != nil {
				w.t.Fatalf("read %q: %v", s.Text(), err)
			}
		}
	}
	return value
}

// failing is the metric that is 1 as long as a job's work fails under a code.
func (w *world) failing(code string) bool {
	return w.metric(fmt.Sprintf("trainerd_job_failing{code=%q,job=%q}", code, w.job)) == 1
}

// healthy waits until the job has trained and published a few steps.
func (w *world) healthy() {
	w.t.Helper()
	w.await("healthy", time.Minute, func() bool {
		status, _, _ := w.ready()
		return status == http.StatusOK && w.status().PolicyStep >= every
	})
}

// says waits until the server says by /readyz, the job's status and a metric that
// work fails under a code, since a time.
func (w *world) says(code, text string, since time.Time, within time.Duration) {
	w.t.Helper()
	w.await("/readyz says so", within, func() bool {
		status, _, _ := w.ready()
		return status == http.StatusServiceUnavailable
	})
	w.await("the job says so", within, func() bool {
		e := w.status().LastError
		return e != nil && e.Time.After(since) && e.Code == code && strings.Contains(e.Message, text)
	})
	w.await("the metric says so", within, func() bool { return w.failing(code) })
}

// recovers waits until everything is as before the fault, without help.
func (w *world) recovers(within time.Duration, codes ...string) {
	w.t.Helper()
	at := w.status().Step
	w.await("recovered", within, func() bool {
		status, _, _ := w.ready()
		return status == http.StatusOK && w.status().PolicyStep > at
	})
	for _, code := range codes {
		w.await("the metric is 0 again", within, func() bool { return !w.failing(code) })
	}
}

// mark is where a job was when a fault began.
type mark struct {
	at      time.Time
	batches int
	step    int64
}

func (w *world) mark() mark {
	w.t.Helper()
	return mark{time.Now(), w.batches(), w.status().Step}
}

// goesOn asserts that batches are accepted, and steps done, during a fault.
func (w *world) goesOn(from mark, within time.Duration) {
	w.t.Helper()
	w.await("training goes on", within, func() bool { return w.batches() >= from.batches+3 && w.status().Step >= from.step+3 })
}

// finish lets the job train all that was accepted and compares it with a run that
// was never disturbed: counts, and the digests of weights and optimizer state.
func (w *world) finish() (client.Job, map[string]string) {
	w.t.Helper()
	n := w.rest()
	w.await("all is trained", 3*time.Minute, func() bool {
		j := w.status()
		return j.Step == int64(n) && j.LastError == nil
	})
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	m, err := w.client.Publish(ctx, w.job, true)
	if err != nil {
		w.t.Fatalf("publish the end: %v", err)
	}
	j := w.status()
	want := client.Counts{Batches: int64(n), Rollouts: int64(n * groupsPerStep * groupSize), GroupsTrained: int64(n * groupsPerStep)}
	have := j.Counts
	have.MissingPolicyStep = 0 // the batches name none
	if len(have.GroupsRefused) == 0 {
		have.GroupsRefused = nil
	}
	if d := cmp.Diff(want, have); d != "" {
		w.t.Errorf("rows accepted are not rows trained (-want +got):\n%s", d)
	}
	got := digests(m)
	if d := cmp.Diff(w.undisturbed(n), got); d != "" {
		w.t.Errorf("the weights are not those of the undisturbed run (-undisturbed +got):\n%s", d)
	}
	w.mu.Lock()
	w.t.Logf("%d batches, %d rows accepted and trained; refusals met by the worker: %v", n, have.Rollouts, w.refusals)
	w.mu.Unlock()
	return j, got
}

// finishStore is finish, and every checkpoint in the store is whole, the last one
// what the API said.
func (w *world) finishStore(m *minioServer) {
	w.t.Helper()
	j, digests := w.finish()
	found, latest, err := m.whole(w.job)
	if err != nil {
		w.t.Fatal(err)
	}
	if latest != j.Step {
		w.t.Errorf("latest.json names step %d, expected %d", latest, j.Step)
	}
	if d := cmp.Diff(digests, found[j.Step].digests()); d != "" {
		w.t.Errorf("the last checkpoint in the store (-told +found):\n%s", d)
	}
	w.t.Logf("%d checkpoints in the store, all whole", len(found))
}

// undisturbed is what n batches come to on a directory store with nothing wrong.
func (w *world) undisturbed(n int) map[string]string {
	w.t.Helper()
	o := options{data: w.t.TempDir()}
	p, err := serve(o)
	if err != nil {
		w.t.Fatal(err)
	}
	defer p.kill()
	c, err := client.New(p.url, client.Options{})
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	doc := w.document()
	cp := doc["checkpoint"].(map[string]any)
	cp["publish_every_steps"], cp["snapshot_every_steps"] = 1000000, 0
	j, err := c.CreateJob(ctx, doc, "")
	if err != nil {
		w.t.Fatal(err)
	}
	for i := range n {
		if _, err := c.SubmitArrow(ctx, j.ID, w.body(i), ""); err != nil {
			w.t.Fatal(err)
		}
	}
	if _, err := c.Wait(ctx, j.ID, 20*time.Millisecond, func(j client.Job) bool { return j.Step == int64(n) }); err != nil {
		w.t.Fatal(err)
	}
	m, err := c.Publish(ctx, j.ID, true)
	if err != nil {
		w.t.Fatal(err)
	}
	return digests(m)
}

// digests are a checkpoint's files by name, less the queue, which names the job and times.
func digests(m storage.Manifest) map[string]string {
	out := map[string]string{}
	for _, f := range m.Files {
		if f.Name != "state/queue.bin" {
			out[f.Name] = f.SHA256
		}
	}
	return out
}
